"""What a core does only while it leads: how far the others are, what is committed, reads, and handing over."""

from collections.abc import Callable, Sequence

from nbdvde.raft import quorum
from nbdvde.raft.log import Log
from nbdvde.raft.messages import (
    Append,
    AppendReply,
    Beat,
    BeatReply,
    Body,
    Elect,
    Entry,
    Install,
    NodeId,
    ReadReply,
    Snapshot,
)
from nbdvde.raft.progress import Progress, of_members
from nbdvde.raft.reads import Asked, Reads
from nbdvde.raft.settings import Settings


class Leader:
    """One time in office: a term."""

    def __init__(
        self, node: NodeId, term: int, log: Log, settings: Settings, commit: int,
        send: Callable[[NodeId, Body], None], settle: Callable[[int, int], None],
    ) -> None:  # fmt: skip
        """`settle(key, index)` answers a read of this node."""
        self._node, self._term, self._log, self._settings = node, term, log, settings
        self._send, self._settle_own = send, settle
        self.commit = commit
        self.applied = 0
        """Up to here this node has applied: what a state that is sent contains."""
        self.followers: dict[NodeId, Progress] = {}
        self.transferee: NodeId = 0
        """Who is to take over."""
        self.quiet = False
        """Whether all were told that no sign of life follows until something happens."""
        self.uncommitted_bytes = 0
        """Of entries of this term."""
        self._reads = Reads()
        self._early: list[Asked] = []
        """Reads that came before anything of this term was committed."""
        self._counted = self._beaten = self._idle = 0
        """Ticks since followers were counted, since a sign of life, and since anything happened."""
        self._clock = self._lease_until = 0
        self._begun: dict[int, int] = {}
        """When rounds began that a majority has not answered."""
        self._invited = False
        """Whether somebody was told to take over, who is given votes though this leader is heard: no lease any more."""

    # Time

    def tick(self) -> bool:
        """A unit of time has passed; whether it still leads: a majority was heard of."""
        self._clock += 1
        self._counted += 1
        self._beaten += 1
        self._idle += 1
        if self._counted >= self._settings.election:
            self._counted = self.transferee = 0
            if not self._hears_a_quorum():
                return False
        if self._beaten >= self._settings.heartbeat:
            self.beat()
        return True

    def _hears_a_quorum(self) -> bool:
        heard = {node for node, progress in self.followers.items() if progress.active} | {self._node}
        for node, progress in self.followers.items():
            if progress.installing and progress.active:
                self._send(node, Install(self._term, progress.installing))  # or an answer that was lost would be missed
            progress.active = False
        return quorum.agree(self._log.members.quorums, heard)

    def stir(self) -> None:
        """Something happens: signs of life go on. The clock stood still while there were none, so no lease counts."""
        if self.quiet:
            self._lease_until, self._begun = 0, {}
        self._idle, self.quiet = 0, False

    @property
    def _is_idle(self) -> bool:
        """Whether nothing has happened for long, and everybody has everything."""
        last = self._log.last_index
        return (
            0 < self._settings.quiet <= self._idle
            and self.commit == last
            and all(progress.kept == last and progress.active for progress in self.followers.values())
        )

    def beat(self) -> None:
        """Give a sign of life, and ask whether there is another leader."""
        self._beaten = 0
        round_, self.quiet = self._reads.begin(), self._is_idle
        if self._settings.lease and not self._decides_alone:
            self._begun[round_] = self._clock
        for node, progress in self.followers.items():
            self._send(node, Beat(self._term, min(progress.match, self.commit), round_, self.quiet))

    # Entries

    def appended(self, entries: Sequence[Entry]) -> None:
        """Entries were put into the log: send them, also to those who have just become members."""
        self.uncommitted_bytes += sum(entry.size for entry in entries)
        others = [node for node in self._log.members if node != self._node]
        self.followers = of_members(others, self.followers, entries[0].index)
        for node, progress in self.followers.items():
            self._send_entries(node, progress)

    def resume(self) -> None:
        """Send on what was not in memory."""
        for node, progress in self.followers.items():
            self._send_entries(node, progress)

    def _send_entries(self, node: NodeId, progress: Progress, *, anyway: bool = False) -> None:
        """Send what a follower lacks, as much as may be on its way; with `anyway` a message in any case."""
        log, settings = self._log, self._settings
        while anyway or progress.may_send(settings.window_bytes):
            previous = progress.next - 1
            term = log.term(previous)
            if term is None:
                self._send_snapshot(node, progress)
                return
            entries: Sequence[Entry] = ()
            if progress.may_send(settings.window_bytes):
                entries = log.slice(progress.next, log.last_index + 1, settings.message_bytes)
            if not (entries or anyway or not progress.streaming):
                return
            self._send(node, Append(self._term, previous, term, tuple(entries), self.commit))
            progress.sent(previous + len(entries), sum(entry.size for entry in entries))
            anyway = False

    def _send_snapshot(self, node: NodeId, progress: Progress) -> None:
        if progress.active and not progress.installing:
            index = self.applied
            snapshot = Snapshot(index, self._log.term(index) or 0, self._log.members_at(index))
            progress.install(snapshot)
            self._send(node, Install(self._term, snapshot))

    # Answers

    def on_append_reply(self, node: NodeId, body: AppendReply) -> None:
        """A follower has entries, or lacks what they would follow."""
        progress = self.followers.get(node)
        if progress is None:
            return
        progress.active = True
        again = progress.promises(body.counts, body.index if body.ok else 0)
        if not body.ok:
            following, _ = self._log.agreement(body.hint, body.hint_term)
            if progress.refused(body.index, following + 1):
                self._send_entries(node, progress)
        else:
            if progress.acknowledged(body.index) or again:
                self.advance()
                self.hand_over()
            self._send_entries(node, progress)

    def on_beat_reply(self, node: NodeId, body: BeatReply) -> None:
        """A follower knows of no other leader."""
        progress = self.followers.get(node)
        if progress is None:
            return
        progress.active = True
        progress.round = max(progress.round, body.round)
        progress.waiting = False
        if not body.round:  # it is mute, and will say what it has when it is asked
            progress.promises(False, progress.match)
        if progress.kept < self._log.last_index:
            self._send_entries(node, progress, anyway=True)
        answered = self._majority(self._reads.round, lambda progress: progress.round)
        if begun := [at for round_, at in self._begun.items() if round_ <= answered]:
            # Less than half: another clock may run twice as fast, and its node asks for votes that soon.
            self._lease_until = max(begun) + (self._settings.election - 1) // 2
            self._begun = {round_: at for round_, at in self._begun.items() if round_ > answered}
        for index, asked in self._reads.answered(answered):
            self._settle(asked, index)

    def advance(self) -> None:
        """Commit what a majority has, if it is of this term (3.6.2)."""
        index = self._majority(self._log.persisted, lambda progress: progress.kept)
        if index > self.commit and self._log.term(index) == self._term:
            self.commit = index
            early, self._early = self._early, []
            for asked in early:
                self.ask_read(asked)

    def belongs(self) -> bool:
        """Whether this node may go on: until the entry that removes it is committed."""
        return self._log.members.votes(self._node) or self._log.members_index > self.commit

    def committed(self, size: int) -> None:
        """So many bytes of entries are committed."""
        self.uncommitted_bytes = max(0, self.uncommitted_bytes - size)

    def _majority(self, own: int, of: Callable[[Progress], int]) -> int:
        """The highest number that a majority of voters reach."""
        followers = self.followers
        quorums = self._log.members.quorums
        return quorum.reached(quorums, lambda node: own if node == self._node else of(followers[node]))

    # Reads, and handing over

    def ask_read(self, asked: Asked) -> None:
        """Settle a read, now or when a majority has said that there is no other leader."""
        if self._log.term(self.commit) != self._term:
            self._early.append(asked)
        elif self._decides_alone or self._has_lease:
            self._settle(asked, self.commit)
        else:
            self._reads.add(self.commit, asked)

    @property
    def _decides_alone(self) -> bool:
        return quorum.agree(self._log.members.quorums, {self._node})

    @property
    def _has_lease(self) -> bool:
        return self._clock < self._lease_until and not self._invited and not self.quiet

    def ask_round(self) -> None:
        """Begin a round of questions if reads wait for one."""
        if self._reads.is_due:
            self.beat()

    def _settle(self, asked: Asked, index: int) -> None:
        if asked.reader == self._node:
            self._settle_own(asked.key, index)
        else:
            self._send(asked.reader, ReadReply(self._term, asked.key, index))

    def resign(self) -> None:
        """It leads no more: reads of this node have to be asked again."""
        for asked in self._reads.unsettled() + self._early:
            if asked.reader == self._node:
                self._settle_own(asked.key, -1)

    def transfer(self, node: NodeId) -> None:
        """Have another one lead as soon as it has everything."""
        self.transferee, self._counted = node, 0
        self.hand_over()

    def retire(self) -> None:
        """It belongs to the group no more: the voter that has most need not wait for silence to take over."""
        voters = self._log.members.voters
        self._invite(max(voters, key=lambda node: self.followers[node].kept))

    def hand_over(self) -> None:
        """Tell it when it has, and everything is committed: so those who proposed it learn of that."""
        progress = self.followers.get(self.transferee)
        if progress and progress.kept == self._log.last_index == self.commit:
            self._invite(self.transferee)

    def _invite(self, node: NodeId) -> None:
        self._invited = True
        self._send(node, Elect(self._term))
