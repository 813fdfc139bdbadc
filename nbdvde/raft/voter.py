"""Terms and votes: what a member does in elections (3.4), with the question before whether one would be won (9.6)."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import Enum

from nbdvde.raft import quorum
from nbdvde.raft.log import Log
from nbdvde.raft.messages import Body, HardState, Members, Message, NodeId, Vote, VoteReply
from nbdvde.raft.quorum import Outcome
from nbdvde.raft.settings import Settings

_LOST = 3
"""Ticks until a leader is missed whose connection broke: it may be made again at once."""
_APART = 2
"""Ticks between those who miss a leader at once: clocks may be one apart, and an election takes less than the other."""


class Role(Enum):
    """What a member is at the moment."""

    FOLLOWER = "follower"
    PRE_CANDIDATE = "pre-candidate"
    CANDIDATE = "candidate"
    LEADER = "leader"


class Voter(ABC):
    """A member as far as elections go. What it leads, or follows, is the business of who inherits from it."""

    def __init__(
        self, node: NodeId, log: Log, hard: HardState, settings: Settings, random: Callable[[int, int], int]
    ) -> None:
        self.node, self.log, self.settings = node, log, settings
        self.term, self.vote = hard.term, hard.vote
        self.commit = 0
        """Up to here the log never changes."""
        self.role = Role.FOLLOWER
        self.leader: NodeId = 0
        """Of this term, as far as it is known."""
        self.mute = False
        """While the log has holes: no votes, no acknowledgements, no candidacy."""
        self.elections = 0
        """How often this node asked for votes."""
        self._random = random
        self._ballots: dict[NodeId, bool] = {}
        self._ticks = 0
        """Since the last sign of life of a leader."""
        self._timeout = self._draw()
        self._bound = settings.lease
        """Whether a leader may count on what this node knew before it was started (`Settings.lease`)."""
        self._now: list[Message] = []
        self._after: list[Message] = []

    @property
    def members(self) -> Members:
        """Who belongs to the group."""
        return self.log.members

    @abstractmethod
    def _lead(self) -> None:
        """Won."""

    def _follow(self, term: int, leader: NodeId) -> None:
        """Be a follower, of a leader if one is known."""
        if term > self.term:
            self.term, self.vote = term, 0
        self.role, self.leader = Role.FOLLOWER, leader
        self._ticks, self._timeout = 0, self._draw()

    def _draw(self) -> int:
        return self._random(self.settings.election, 2 * self.settings.election - 1)

    def _send(self, node: NodeId, body: Body, *, after: bool = False) -> None:
        (self._after if after else self._now).append(Message(self.node, node, body))

    def _wait(self) -> None:
        """A tick without a sign of life."""
        self._ticks += 1
        if self._ticks >= self.settings.election:
            self._bound = False
        if self._ticks >= self._timeout and self._may_lead():
            self._ask_for_votes(pre=True)

    def suspect(self, node: NodeId) -> None:
        """The connection to a member broke: if it led, it is missed soon, unless it gives a sign of life.

        Who has not lost it, the leader itself among them, still refuses votes. A lease relies on full silence.
        """
        if node == self.leader and not self.settings.lease:
            before = sum(self.members.votes(other) for other in self.members if other < self.node and other != node)
            self._ticks = self.settings.election
            self._timeout = self._ticks + _LOST + _APART * before

    def _may_lead(self) -> bool:
        return not self.mute and self.log.may_decide(self.node, self.commit)

    def _ask_for_votes(self, *, pre: bool, forced: bool = False) -> None:
        """Become a candidate, or first find out whether that would succeed."""
        self._follow(self.term, 0)
        self.role = Role.PRE_CANDIDATE if pre else Role.CANDIDATE
        self._ballots = {self.node: True}
        term = self.term + 1
        if not pre:
            self.term, self.vote = term, self.node
            self.elections += 1
        question = Vote(term, self.log.last_index, self.log.last_term, pre, forced)
        for node in self.members:
            if node != self.node and self.members.votes(node):
                self._send(node, question, after=not pre)
        if pre:
            self._count_ballots()  # a vote counts, also its own, when it is durable

    def _hears_a_leader(self) -> bool:
        known = self.leader or self._bound
        return self.role is Role.LEADER or (bool(known) and self._ticks < self.settings.election)

    def _on_vote(self, sender: NodeId, body: Vote) -> None:
        if body.term > self.term and self._hears_a_leader() and not body.forced:
            return
        if body.term < self.term:
            self._send(sender, VoteReply(self.term, False, body.pre))
            return
        if body.term > self.term and not body.pre:
            self._follow(body.term, 0)
        log = self.log
        current = (body.last_term, body.last_index) >= (log.last_term, log.last_index)
        free = self.vote == sender or (not self.vote and not self.leader) or (body.pre and body.term > self.term)
        granted = current and free and not self.mute
        if body.pre:
            self._send(sender, VoteReply(body.term if granted else self.term, granted, pre=True))
            return
        if granted:
            self.vote, self._ticks = sender, 0
        self._send(sender, VoteReply(self.term, granted), after=True)

    def _on_vote_reply(self, sender: NodeId, body: VoteReply) -> None:
        asked = self.term + 1 if body.pre and body.granted else self.term
        expected = Role.PRE_CANDIDATE if body.pre else Role.CANDIDATE
        if self.role is expected and body.term == asked:
            self._ballots.setdefault(sender, body.granted)
            self._count_ballots()

    def _count_ballots(self) -> None:
        match quorum.outcome(self.members.quorums, self._ballots):
            case Outcome.WON if self.role is Role.PRE_CANDIDATE:
                self._ask_for_votes(pre=False)
            case Outcome.WON:
                self._lead()
            case Outcome.LOST:
                self._follow(self.term, 0)
