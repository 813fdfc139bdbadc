"""What a group has done, as one sees it who sees everything; what never may happen raises `Violation`.

Looked at after every step: election safety, log matching, leader completeness, state-machine safety, what is committed
stays so and is durable on a majority, terms and votes and commit indexes never go back, promises are kept across
crashes, and the reads and writes of each block are linearizable.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nbdvde.raft.core import Core
from nbdvde.raft.log import Log
from nbdvde.raft.messages import AppendReply, Entry, EntryKind, Message, NodeId, VoteReply
from tests.sim.disk import Disk, HoledStore

BLOCKS = 8


class Violation(AssertionError):
    """Something happened that never may."""


@dataclass(frozen=True, slots=True)
class Write:
    """One that a client waits for: blocks, and the newest write of each that was known when it came."""

    blocks: bytes
    known: tuple[int, ...]


@dataclass(slots=True)
class Seen:
    """What was seen of a member last."""

    term: int = 0
    vote: NodeId = 0
    commit: int = 0
    leads: bool = False


@dataclass
class History:
    """Of one group."""

    leaders: dict[int, NodeId] = field(default_factory=dict)
    """By term."""
    committed: list[Entry] = field(default_factory=list)
    """By index, from 1 on."""
    acknowledged: int = 0
    """Writes, each of a block."""
    reads: int = 0
    _writes: list[list[int]] = field(default_factory=lambda: [[0] for _ in range(BLOCKS)])
    """By block: index of each entry that wrote to it."""
    _known: list[int] = field(default_factory=lambda: [0] * BLOCKS)
    """By block: index of the newest write that was acknowledged or read."""
    _logged: dict[tuple[int, int], tuple[Entry, int]] = field(default_factory=dict)
    """By index and term: the entry, and the term of the one before."""
    _promised: dict[tuple[NodeId, int], NodeId] = field(default_factory=dict)
    """By node and term: who has its vote."""

    # What members do

    def logged(self, entries: Sequence[Entry], before: int) -> None:
        """Entries are written behind one of a term; term and index say everything up to an entry (3.5)."""
        for entry in entries:
            known, term = self._logged.setdefault((entry.index, entry.term), (entry, before))
            if term != before or (known is not entry and known != entry):
                raise Violation(f"there are two entries {entry.index} of term {entry.term}")
            before = entry.term

    def sent(self, message: Message, durable: HoledStore) -> None:
        """A message leaves: what it promises has to be durable, or that a newer term has ended the promise."""
        body = message.body
        if type(body) is AppendReply:
            if body.ok and body.counts and body.index > durable.last_index and body.term >= durable.hard.term:
                raise Violation(f"node {message.sender} acknowledges entry {body.index}, which is not durable")
        elif type(body) is VoteReply and body.granted and not body.pre:
            hard = durable.hard
            if hard.term < body.term or (hard.term == body.term and hard.vote != message.receiver):
                raise Violation(f"node {message.sender} gives a vote of term {body.term}, which is not durable")
            if self._promised.setdefault((message.sender, body.term), message.receiver) != message.receiver:
                raise Violation(f"node {message.sender} votes for two of term {body.term}")

    def look(self, node: NodeId, core: Core, seen: Seen, disks: Mapping[NodeId, Disk]) -> bool:
        """A member has changed; whether it leads from now on."""
        if core.term < seen.term or core.commit < seen.commit:
            raise Violation(f"node {node} goes back from term {seen.term}, commit {seen.commit}")
        if core.term == seen.term and seen.vote not in (0, core.vote):
            raise Violation(f"node {node} takes its vote of term {core.term} back")
        seen.term, seen.vote = core.term, core.vote
        seen.leads = core.is_leader
        news = seen.leads and self.leaders.get(core.term) != node
        if news:
            self._elected(node, core)
        if core.commit > seen.commit:
            self._committed(node, core, seen.commit, disks)
            seen.commit = core.commit
        return news

    def _elected(self, node: NodeId, core: Core) -> None:
        other = self.leaders.setdefault(core.term, node)
        if other != node:
            raise Violation(f"nodes {other} and {node} both lead in term {core.term}")
        log = core.log
        for entry in reversed(self.committed):
            if entry.term < core.term:
                there = entry.index < log.first_index or log.term(entry.index) == entry.term
                if not there:
                    raise Violation(f"leader {node} of term {core.term} lacks entry {entry.index}, which is committed")
                if entry.index < log.first_index:
                    break

    def _committed(self, node: NodeId, core: Core, before: int, disks: Mapping[NodeId, Disk]) -> None:
        """Everything up to `core.commit` is committed, says a node."""
        log, committed = core.log, self.committed
        if core.commit > len(committed):
            self._decided(core, disks)
        for index in range(max(before, log.first_index - 1) + 1, core.commit + 1):
            if committed[index - 1].term != log.term(index):
                raise Violation(f"node {node} has committed another entry {index}")

    def _decided(self, core: Core, disks: Mapping[NodeId, Disk]) -> None:
        """Somebody is the first to know that entries are committed: a majority must have them durably."""
        log, index = core.log, core.commit
        term = log.term(index)
        if term is None:
            raise Violation(f"entry {index} is committed, and its first witness lacks it")
        for voters in log.members.quorums:
            holders = sum(disks[voter].durable.holds(index, term) for voter in voters)
            if voters and 2 * holders <= len(voters):
                raise Violation(f"entry {index} of term {term} is committed, and {holders} of {len(voters)} have it")
        self._note(log, len(self.committed) + 1, index + 1)

    def _note(self, log: Log, start: int, stop: int) -> None:
        for index in range(start, stop):
            entry, _ = self._logged[index, log.term(index) or 0]
            self.committed.append(entry)
            if entry.kind == EntryKind.NORMAL:
                for block in entry.data[4:]:
                    self._writes[block].append(index)

    def applied(self, node: NodeId, entry: Entry, before: int) -> None:
        """A node applies an entry to a state that has everything up to `before`."""
        if entry.index != before + 1:
            raise Violation(f"node {node} applies entry {entry.index} after entry {before}")
        if entry.index > len(self.committed):
            raise Violation(f"node {node} applies entry {entry.index}, which is not committed")
        known = self.committed[entry.index - 1]
        if entry is not known and entry != known:
            raise Violation(f"node {node} applies another entry {entry.index} than others")

    # What clients see

    def write(self, blocks: bytes) -> Write:
        """A client writes."""
        return Write(blocks, tuple([self._known[block] for block in blocks]))

    def written(self, write: Write, index: int) -> None:
        """It is acknowledged; it comes after everything that was known when it began."""
        for block, known in zip(write.blocks, write.known, strict=True):
            if index <= known:
                raise Violation(f"a write of block {block} comes before an older one")
            self._known[block] = max(self._known[block], index)
        self.acknowledged += len(write.blocks)

    def read(self, block: int) -> tuple[int, int]:
        """A client reads: (block, index of the newest write that is known)."""
        return block, self._known[block]

    def answered(self, read: tuple[int, int], state: int) -> None:
        """It sees the state as of an index."""
        block, known = read
        index = next(at for at in reversed(self._writes[block]) if at <= state)
        if index < known:
            raise Violation(f"a read of block {block} sees entry {index}, and entry {known} was known before")
        self._known[block] = max(self._known[block], index)
        self.reads += 1
