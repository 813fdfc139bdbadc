"""A member of a group, as a pure state machine: messages, ticks and proposals in, `Ready` out.

After Ongaro, "Consensus: Bridging Theory and Practice" (2014), with pre-vote (9.6), check-quorum, ReadIndex (6.4),
changes of members (4.1, 4.3) with learners, and leadership transfer (3.10). Nothing here waits, sends, stores or
knows what time it is: who drives it does what `Ready` says, in its order.
"""

from collections.abc import Callable, Sequence
from functools import partial

from nbdvde.errors import RefusedError
from nbdvde.raft import membership
from nbdvde.raft.leader import Leader
from nbdvde.raft.log import Log
from nbdvde.raft.messages import (
    Append,
    AppendReply,
    AskRead,
    Beat,
    BeatReply,
    Body,
    Elect,
    Entry,
    EntryKind,
    HardState,
    Install,
    Members,
    Message,
    NodeId,
    ReadReply,
    Snapshot,
    Vote,
    VoteReply,
)
from nbdvde.raft.reads import Asked
from nbdvde.raft.ready import NotLeaderError, Ready
from nbdvde.raft.settings import Settings
from nbdvde.raft.store import LogStore
from nbdvde.raft.voter import Role, Voter

__all__ = ["Core", "NotLeaderError", "Ready", "Role"]
_SIGNS_OF_LIFE = (Beat, BeatReply)


class Core(Voter):
    """One member."""

    def __init__(
        self, node: NodeId, store: LogStore, hard: HardState, settings: Settings, random: Callable[[int, int], int],
        applied: int = 0,
    ) -> None:  # fmt: skip
        """`random(low, high)` draws a whole number, both ends included.

        `applied` is what the state has for sure: no more than the log, if that is more than what the log has forgotten.
        """
        settings.validate()
        super().__init__(node, Log(store), hard, settings, random)
        self.applied = self._handed = max(applied, store.snapshot.index)
        """Entries up to `applied` are applied; up to `_handed` they are out to be."""
        self.commit = max(self.applied, min(hard.commit, store.last_index))
        assert self.commit <= store.last_index, "what is applied is in the log"
        self.office: Leader | None = None
        """What there is to do while this node leads."""
        self.quiet = False
        """Whether nobody expects signs of life."""
        self._round = 0
        """Latest round of signs of life of this leader."""
        self._saved = hard
        self._results: list[tuple[int, int]] = []
        self._install: tuple[NodeId, Snapshot] | None = None
        self._pending: Ready | None = None

    # What the owner asks

    @property
    def is_leader(self) -> bool:
        """Whether this node leads, as far as it knows."""
        return self.office is not None

    def propose(self, datas: Sequence[bytes]) -> int:
        """Have entries appended; answers the index of the last one. Raises NotLeaderError, RefusedError."""
        office = self._leading()
        if office.transferee:
            raise RefusedError("raft group", "hands its leadership over", "try again")
        size = sum(map(len, datas))
        if office.uncommitted_bytes and office.uncommitted_bytes + size > self.settings.uncommitted_bytes:
            raise RefusedError("raft group", "has too much that is not committed", "try again later")
        return self._append(office, [(EntryKind.NORMAL, data) for data in datas])

    def change_members(self, target: Members) -> int:
        """Have other voters and learners, all at once; answers the index. Raises NotLeaderError, RefusedError.

        More than one voter changes by way of joint consensus, which ends by itself with another entry.
        """
        return self.change(partial(membership.towards, target=target))

    def change(self, step: Callable[[Members], Members]) -> int:
        """Have the members that a step of `membership` makes of those there are; answers and raises as that above.

        The change before has to be committed, and something of this term (4.1 and its correction of 2015).
        """
        office = self._leading()
        if not self.may_change():
            raise RefusedError("raft group", "is in the middle of a change", "try again")
        return self._append(office, [(EntryKind.MEMBERS, step(self.members).pack())])

    def may_change(self) -> bool:
        """Whether the members can be changed, if this node leads."""
        return self.log.members_index <= self.commit and self.log.term(self.commit) == self.term

    def read(self, key: int) -> None:
        """Have `Ready.reads` tell up to where to apply before a read that comes now. Raises NotLeaderError."""
        self.wake()  # also who follows: the leader may have gone silently
        if self.office:
            self.office.ask_read(Asked(self.node, key))
        elif self.leader:
            self._send(self.leader, AskRead(self.term, key))
        else:
            raise self._not_leader()

    def transfer(self, node: NodeId) -> None:
        """Hand leadership to another voter; until it has, or did not in an election timeout, nothing is proposed.

        Raises NotLeaderError, RefusedError.
        """
        office = self._leading()
        if node not in self.members.voters:
            raise RefusedError(f"node {node}", "is no voter of the group", "see nbdvde cluster status")
        if node != self.node:
            office.transfer(node)

    def campaign(self) -> None:
        """Ask for votes now."""
        if not self.office and self._may_lead():
            self._ask_for_votes(pre=True)

    def wake(self) -> None:
        """Expect signs of life again: something may have happened to a member."""
        if self.office:
            self.office.stir()
        if self.quiet:
            self.quiet, self._ticks = False, 0

    def loaded(self) -> None:
        """The store has in memory what it missed (`LogStore.missed`)."""
        if self.office:
            self.office.resume()

    def compacted(self) -> None:
        """The store has forgotten entries."""
        self.log.compacted()

    def forget(self, index: int) -> bool:
        """An entry that nobody has was never committed: it goes, and all behind it. Whether that can be done now.

        Not while there is a leader, who decides that in its own way, nor while anything is being made durable.
        """
        if self.leader or self._pending or index <= self.commit:
            return False
        self.log.forget(index)
        return True

    def wants(self, snapshot: Snapshot) -> bool:
        """Whether a state is to be taken over, as things are now."""
        return snapshot.index > self.commit and self.log.term(snapshot.index) != snapshot.term

    def installed(self, snapshot: Snapshot) -> None:
        """A state that it `wants` is taken over: the store has nothing but that."""
        self.log.restored(snapshot)
        self.commit = self.applied = self._handed = snapshot.index
        self._acknowledge(self.leader, snapshot.index)

    def overtaken(self, snapshot: Snapshot) -> None:
        """A state is taken over that it does not want any more: the log came as far meanwhile, and stays."""
        self._commit_to(snapshot.index)
        self._handed = max(self._handed, snapshot.index)
        self.applied_to(snapshot.index)

    def install_failed(self, node: NodeId) -> None:
        """A follower could not take over the state: it is asked again what it has."""
        if self.office and (progress := self.office.followers.get(node)):
            progress.installing = None

    def unreachable(self, node: NodeId) -> None:
        """Messages to a member were lost."""
        self.wake()
        if self.office and (progress := self.office.followers.get(node)) and progress.streaming:
            progress.probe()

    def _leading(self) -> Leader:
        self.wake()
        if self.office is None:
            raise self._not_leader()
        return self.office

    def _not_leader(self) -> NotLeaderError:
        hint = f"ask node {self.leader}" if self.leader else "wait for an election"
        return NotLeaderError(f"node {self.node}", "is not the leader", hint)

    def _append(self, office: Leader, items: Sequence[tuple[int, bytes]]) -> int:
        first = self.log.last_index + 1
        entries = [Entry(self.term, first + at, kind, data) for at, (kind, data) in enumerate(items)]
        self.log.append(entries)
        office.appended(entries)
        return self.log.last_index

    # Time

    def tick(self) -> None:
        """A unit of time has passed."""
        if self.quiet:
            return
        if self.office:
            if not self.office.tick():
                self._follow(self.term, 0)
            else:
                self.quiet = self.office.quiet
            return
        self._wait()

    # What comes in

    def step(self, message: Message) -> None:
        """A message came. It may be old, doubled, or of one who belongs to the group no more."""
        body, sender = message.body, message.sender
        if not isinstance(body, _SIGNS_OF_LIFE) and sender in self.members:
            self.wake()
        if isinstance(body, Vote):
            self._on_vote(sender, body)
        elif isinstance(body, VoteReply) and body.pre and body.granted:
            self._on_vote_reply(sender, body)
        elif body.term < self.term:
            if isinstance(body, Append | Beat | Install):
                self._send(sender, BeatReply(self.term, 0))  # so that an old leader hears of it
        else:
            if body.term > self.term:
                self._follow(body.term, 0)
            self._on_current(sender, body)

    def _on_current(self, sender: NodeId, body: Body) -> None:
        """A message of this term."""
        office = self.office
        match body:
            case Append() | Beat() | Install():
                self._on_leader(sender, body)
            case VoteReply():
                self._on_vote_reply(sender, body)
            case AppendReply() if office:
                office.on_append_reply(sender, body)
                self._follow_office(office)
            case BeatReply() if office:
                office.on_beat_reply(sender, body)
            case AskRead() if office:
                office.ask_read(Asked(sender, body.key))
            case Elect() if not office and self._may_lead():
                self._ask_for_votes(pre=False, forced=True)
            case ReadReply():
                self._results.append((body.key, body.index))

    def _on_leader(self, leader: NodeId, body: Append | Beat | Install) -> None:
        """The leader of this term gives a sign of life."""
        if self.role is not Role.FOLLOWER or self.leader != leader:
            self._follow(self.term, leader)
        self._ticks = 0
        match body:
            case Append():
                self._on_append(leader, body)
            case Beat():
                if not self.mute:  # or it may not have what the leader remembers
                    self._commit_to(body.commit)
                self._send(leader, BeatReply(self.term, 0 if self.mute else body.round))
                self.quiet = body.quiet and body.round >= self._round
                self._round = max(self._round, body.round)
            case Install(snapshot=snapshot):
                if self.wants(snapshot):
                    self._install = leader, snapshot
                else:
                    self._commit_to(snapshot.index)
                    self._acknowledge(leader, self.commit)

    def _on_append(self, leader: NodeId, body: Append) -> None:
        log, previous = self.log, body.previous
        if previous >= self.commit and log.term(previous) != body.previous_term:
            hint, hint_term = log.agreement(previous, body.previous_term)
            self._send(leader, AppendReply(self.term, False, previous, hint, hint_term, not self.mute))
            return
        log.merge([entry for entry in body.entries if entry.index > self.commit], self.commit)
        last = max(previous + len(body.entries), self.commit)  # what is committed is the same everywhere
        self._commit_to(min(body.commit, last))
        self._acknowledge(leader, last)

    def _acknowledge(self, leader: NodeId, index: int) -> None:
        """Once everything is durable; of who has holes in the log it does not count."""
        if leader:
            self._send(leader, AppendReply(self.term, True, index, counts=not self.mute), after=True)

    def _commit_to(self, index: int) -> None:
        assert index <= self.log.last_index, "only what is there is committed"
        self.commit = max(self.commit, index)

    def _follow_office(self, office: Leader) -> None:
        """Take over what the leader has committed: a change of members may go on, or have removed it (4.2.2)."""
        self._commit_to(office.commit)
        if not office.belongs():
            office.retire()
            self._follow(self.term, 0)
        elif self.members.auto_leave and self.may_change():
            self.change(membership.leave_joint)

    def _follow(self, term: int, leader: NodeId) -> None:
        if self.office:
            self.office.resign()
        self.office, self.quiet, self._round = None, False, 0
        super()._follow(term, leader)

    def _lead(self) -> None:
        self.role, self.leader = Role.LEADER, self.node
        self.office = Leader(
            self.node, self.term, self.log, self.settings, self.commit, self._send,
            lambda key, index: self._results.append((key, index)),
        )  # fmt: skip
        self.office.applied = self.applied
        self._append(self.office, [(EntryKind.EMPTY, b"")])

    # What goes out

    def ready(self) -> Ready | None:
        """What has to be done, if anything. The next one comes when `done` was told of this one."""
        assert self._pending is None, "one at a time"
        if self.office:
            self.office.ask_round()
        entries = self.log.unwritten()
        hard, committed = self._unsaved(entries), self._to_apply()
        if not (self._now or self._after or entries or hard or committed or self._results or self._install):
            return None
        ready = self._pending = Ready(
            self._now, self._install, hard, entries, self._after, committed, self._results
        )  # fmt: skip
        self._now, self._after, self._results, self._install = [], [], [], None
        self._saved = hard or self._saved
        return ready

    def _unsaved(self, entries: Sequence[Entry]) -> HardState | None:
        """Term and vote are promises; the commit index only goes along with entries.

        It tells of what is durable already: a crash may leave it, and in place of the entries those that they replace.
        """
        saved = self._saved
        promised = self.term != saved.term or self.vote != saved.vote
        if not (promised or entries):
            return None
        commit = min(self.commit, self.log.persisted)
        return HardState(self.term, self.vote, commit) if promised or commit != saved.commit else None

    def _to_apply(self) -> Sequence[Entry]:
        durable = min(self.commit, self.log.persisted)
        if durable <= self._handed or self._handed > self.applied:
            return ()  # one lot at a time
        entries = self.log.slice(self._handed + 1, durable + 1, self.settings.apply_bytes)
        self._handed += len(entries)
        if self.office:
            self.office.committed(sum(entry.size for entry in entries))
        return entries

    def done(self, ready: Ready) -> None:
        """Everything up to step 4 was done."""
        assert ready is self._pending, "it is the last one"
        self._pending = None
        if ready.entries:
            self.log.stored(ready.entries[-1])
        if self.office and ready.entries:
            self.office.advance()
            self.office.hand_over()
            self._follow_office(self.office)
        elif self.role is Role.CANDIDATE and ready.hard and ready.hard.term == self.term:
            self._count_ballots()

    def applied_to(self, index: int) -> None:
        """Everything up to an index is applied."""
        self.applied = max(self.applied, index)
        if self.office:
            self.office.applied = self.applied
