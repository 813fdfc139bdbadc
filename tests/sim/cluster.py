"""A group in one thread: members on simulated disks and a simulated network, everything decided by a seed.

The same seed gives the same run in any process. What must never happen is looked at after every step.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random

from nbdvde.errors import RefusedError
from nbdvde.raft.core import Core, NotLeaderError, Ready
from nbdvde.raft.messages import Entry, EntryKind, Members, Message, NodeId, Snapshot
from nbdvde.raft.settings import Settings
from nbdvde.raft.store import MemoryStore, write

_BLOCKS = 4


@dataclass(frozen=True)
class Faults:
    """How bad the world is. Probabilities are for each message, or for each step of a disk."""

    loss: float = 0.0
    doubled: float = 0.0
    delay: tuple[int, int] = (1, 2)
    """Ticks."""
    sync: tuple[int, int] = (0, 1)
    """Ticks that a sync takes."""
    crashes: float = 0.0
    """Chance that a tick of the world ends a node."""
    downtime: int = 40
    """Ticks that it is down at most."""
    partitions: float = 0.0
    """Chance that a tick of the world cuts it in two, or mends it."""
    compaction: float = 0.0
    """Chance that a node forgets what it has applied."""
    transfers: float = 0.0
    """Chance that a tick of the world has a leader hand over."""
    changes: float = 0.0
    """Chance that a tick of the world changes who belongs to the group."""
    rates: tuple[float, ...] = (1.0,)
    """How fast the clocks of nodes run."""


class Disk:
    """What a crash leaves: everything synced, and any first part of what was written after it."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.store = MemoryStore(snapshot)
        self.durable = MemoryStore(snapshot)
        self._changes: list[Callable[[MemoryStore], None]] = []

    def change(self, work: Callable[[MemoryStore], None]) -> None:
        work(self.store)
        self._changes.append(work)

    def sync(self) -> None:
        self._flush(len(self._changes))

    def _flush(self, count: int) -> None:
        for work in self._changes[:count]:
            work(self.durable)
        del self._changes[:count]

    def crash(self, random: Random) -> None:
        self._flush(random.randint(0, len(self._changes)))
        self._changes = []
        self.store = _copy(self.durable)


def _copy(store: MemoryStore) -> MemoryStore:
    other = MemoryStore(store.snapshot)
    other.hard = store.hard
    other.append(store.get_range(store.first_index, store.last_index + 1, 1 << 62))
    return other


class State:
    """The replicated state: blocks, each with the number of its last write."""

    def __init__(self) -> None:
        self.blocks: dict[int, int] = {}
        self.index = 0

    def apply(self, entry: Entry) -> None:
        assert entry.index == self.index + 1, "in order, each once"
        self.index = entry.index
        if entry.kind == EntryKind.NORMAL:
            block, value = divmod(int.from_bytes(entry.data, "little"), 1 << 32)
            self.blocks[block] = value

    def copy(self) -> "State":
        other = State()
        other.blocks, other.index = dict(self.blocks), self.index
        return other


@dataclass
class Node:
    """A member, up or down."""

    number: NodeId
    disk: Disk
    rate: float
    state: State = field(default_factory=State)
    durable_state: State = field(default_factory=State)
    """As of the last compaction: what is there after a crash."""
    core: Core | None = None
    syncing: Ready | None = None
    due: float = 0.0
    """When the next tick of its clock is."""
    life: int = 0
    """How often it was started."""
    waiting: list[tuple[int, int]] = field(default_factory=list)
    """(index, key) of reads that wait until so much is applied."""


class Violation(AssertionError):
    """Something happened that never may."""


class Cluster:
    """The world."""

    def __init__(self, seed: int, faults: Faults, settings: Settings, voters: int = 3) -> None:
        self.random = Random(seed)
        self.faults, self.settings = faults, settings
        members = Members(frozenset(range(1, voters + 1)))
        start = Snapshot(0, 0, members)
        self.nodes = {n: Node(n, Disk(start), self.random.choice(faults.rates)) for n in members}
        self.now = 0
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._order = 0
        self._cut: frozenset[NodeId] = frozenset()
        self.leaders: dict[int, NodeId] = {}
        """Of each term there was."""
        self.committed: list[tuple[int, bytes]] = []
        """(term, data) of every entry that anybody applied, by index from 1 on."""
        self.acknowledged = 0
        self.written: dict[int, int] = {}
        """By block: the number of the last acknowledged write."""
        self._writes = 0
        self._waiting: dict[tuple[int, int], tuple[int, int]] = {}
        """By index and term of a proposal: (block, value)."""
        self._ages: dict[tuple[int, int], int] = {}
        """Index of the entry that wrote a value to a block."""
        self._reads: dict[int, tuple[int, int]] = {}
        """Key of a read: (block, lowest value that it may see)."""
        self._keys = 0
        self.reads = 0
        self.counts: dict[str, int] = {}
        for node in self.nodes.values():
            self._start(node)

    # The world goes on

    def run(self, ticks: int) -> None:
        """Let time pass, with faults and load."""
        for _ in range(ticks):
            self._misfortune()
            self._load()
            self._tick()

    def heal(self) -> None:
        """From now on nothing fails, and everybody is up."""
        self.faults = Faults()
        self._cut = frozenset()
        for node in self.nodes.values():
            if node.core is None:
                self._start(node)

    def _tick(self) -> None:
        self.now += 1
        while self._queue and self._queue[0][0] <= self.now:
            heapq.heappop(self._queue)[2]()
        for node in self.nodes.values():
            node.due += node.rate
            while node.due >= 1:
                node.due -= 1
                if node.core:
                    node.core.tick()
            self._drive(node)

    def _later(self, ticks: int, what: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._queue, (self.now + ticks, self._order, what))

    def _note(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def _misfortune(self) -> None:
        random, faults = self.random, self.faults
        if len(self.nodes) > 1 and random.random() < faults.partitions:
            self._cut = frozenset() if self._cut else self._part()
            self._note("partitions")
        if random.random() < faults.crashes:
            self._crash(random.choice(list(self.nodes.values())))
        for node in list(self.nodes.values()) if random.random() < faults.transfers + faults.changes else ():
            if node.core and node.core.is_leader:
                transfer = random.random() * (faults.transfers + faults.changes) < faults.transfers
                self._ask_leader(node.core, transfer=transfer)
                self._drive(node)

    def _part(self) -> frozenset[NodeId]:
        """Some of the nodes; often who leads, alone."""
        leaders = [node.number for node in self.nodes.values() if node.core and node.core.is_leader]
        if leaders and self.random.random() < 0.5:
            return frozenset(leaders[:1])
        nodes = list(self.nodes)
        return frozenset(self.random.sample(nodes, self.random.randint(1, len(nodes) - 1)))

    def _ask_leader(self, core: Core, *, transfer: bool) -> None:
        """Have a leader hand over, or change the members."""
        members = core.members
        try:
            if transfer:
                core.transfer(self.random.choice(sorted(members.voters)))
                self._note("transfers")
            else:
                core.change_members(self._changed(members))
                self._note("changes")
        except RefusedError:
            self._note("refused")

    def _changed(self, members: Members) -> Members:
        """A voter fewer, a learner more, or a learner that becomes a voter."""
        random = self.random
        if len(members.voters) > random.choice((2, 3, 4)):
            return Members(members.voters - {random.choice(sorted(members.voters))}, members.learners)
        if members.learners:
            node = random.choice(sorted(members.learners))
            return Members(members.voters | {node}, members.learners - {node})
        number = max(self.nodes) + 1
        node_new = Node(number, Disk(Snapshot()), random.choice(self.faults.rates))
        self.nodes[number] = node_new
        self._start(node_new)
        return Members(members.voters, frozenset({number}))

    def _crash(self, node: Node) -> None:
        if node.core is None:
            return
        self._note("crashes")
        node.core = node.syncing = None
        node.waiting = []
        node.disk.crash(self.random)
        node.state = node.durable_state.copy()
        self._later(self.random.randint(1, self.faults.downtime), lambda: self._start(node))

    def _start(self, node: Node) -> None:
        if node.core is None:
            node.life += 1
            store = node.disk.store
            random = Random(self.random.getrandbits(64))
            node.core = Core(node.number, store, store.hard, self.settings, random.randint)

    # Nodes

    def _drive(self, node: Node) -> None:
        """Do what a node asks for, as far as its disk is not busy."""
        core = node.core
        while core and node.syncing is None and (ready := core.ready()):
            for message in ready.now:
                self._send(message)
            if ready.install:
                self._install(node, core, *ready.install)
            for key, index in ready.reads:
                self._read_at(node, key, index)
            node.disk.change(partial(write, hard=ready.hard, entries=ready.entries))
            took = self.random.randint(*self.faults.sync) if ready.hard or ready.entries else 0
            if took:
                node.syncing = ready
                self._later(took, partial(self._synced, node, ready))
            else:
                self._finish(node, core, ready)
        self._observe(node)

    def _synced(self, node: Node, ready: Ready) -> None:
        if node.syncing is ready and node.core:
            node.syncing = None
            self._finish(node, node.core, ready)
            self._drive(node)

    def _finish(self, node: Node, core: Core, ready: Ready) -> None:
        node.disk.sync()
        core.done(ready)
        for message in ready.after:
            self._send(message)
        for entry in ready.committed:
            self._apply(node, entry)
        if ready.committed:
            core.applied_to(node.state.index)
            ready_reads = [key for index, key in node.waiting if index <= node.state.index]
            node.waiting = [(index, key) for index, key in node.waiting if index > node.state.index]
            for key in ready_reads:
                self._answer(node, key)
            if self.random.random() < self.faults.compaction:
                self._compact(node, core)

    def _compact(self, node: Node, core: Core) -> None:
        index, store = node.state.index, node.disk.store
        if index > store.snapshot.index:
            snapshot = Snapshot(index, store.term(index), core.log.members_at(index))
            node.disk.change(lambda store: store.compact_to(snapshot))
            node.disk.sync()
            node.durable_state = node.state.copy()
            core.compacted()
            self._note("compactions")

    def _install(self, node: Node, core: Core, sender: NodeId, snapshot: Snapshot) -> None:
        """Take over the state of a node, if that has it still."""
        source = self.nodes[sender]
        if source.core is None or source.state.index < snapshot.index or not core.wants(snapshot):
            return
        taken = source.state.copy()
        term = source.core.log.term(taken.index)
        assert term is not None, "what was applied last is known"
        snapshot = Snapshot(taken.index, term, source.core.log.members_at(taken.index))
        node.disk.change(lambda store: store.reset(snapshot))
        node.disk.sync()
        node.state, node.durable_state = taken, taken.copy()
        core.installed(snapshot)
        self._note("installs")

    def _send(self, message: Message) -> None:
        random, faults = self.random, self.faults
        self._note(type(message.body).__name__)
        if (message.sender in self._cut) != (message.receiver in self._cut) or random.random() < faults.loss:
            self._note("lost")
            return
        times = 2 if random.random() < faults.doubled else 1
        for _ in range(times):
            self._later(random.randint(*faults.delay), lambda: self._deliver(message))

    def _deliver(self, message: Message) -> None:
        node = self.nodes[message.receiver]
        if node.core:
            node.core.step(message)
            self._drive(node)

    # Clients

    def _load(self) -> None:
        """A write and a read, each through a node that may be a leader or not."""
        for ask in (self._write, self._read):
            node = self.random.choice(list(self.nodes.values()))
            if node.core:
                ask(node, node.core)
                self._drive(node)

    def _write(self, node: Node, core: Core) -> None:
        block = self.random.randrange(_BLOCKS)
        self._writes += 1
        try:
            index = core.propose([(block << 32 | self._writes).to_bytes(8, "little")])
        except RefusedError:
            return
        self._waiting[index, core.term] = block, self._writes

    def _read(self, node: Node, core: Core) -> None:
        block = self.random.randrange(_BLOCKS)
        self._keys += 1
        try:
            core.read(self._keys)
        except NotLeaderError:
            return
        self._reads[self._keys] = block, self.written.get(block, 0)

    def _read_at(self, node: Node, key: int, index: int) -> None:
        if index < 0:
            self._reads.pop(key, None)
        elif index <= node.state.index:
            self._answer(node, key)
        else:
            node.waiting.append((index, key))

    def _answer(self, node: Node, key: int) -> None:
        """A read: it sees every write that was acknowledged before it came."""
        asked = self._reads.pop(key, None)
        if asked is None:
            return
        block, lowest = asked
        self.reads += 1
        if self._age(block, node.state.blocks.get(block, 0)) < self._age(block, lowest):
            raise Violation(f"node {node.number} read an older value of block {block} than was acknowledged")

    def _age(self, block: int, value: int) -> int:
        return self._ages.get((block, value), 0)

    # What must hold

    def _apply(self, node: Node, entry: Entry) -> None:
        node.state.apply(entry)
        known = entry.term, entry.data
        if entry.index == len(self.committed) + 1:
            self.committed.append(known)
            if entry.kind == EntryKind.NORMAL:
                block, value = divmod(int.from_bytes(entry.data, "little"), 1 << 32)
                self._ages[block, value] = entry.index
        elif entry.index > len(self.committed) or self.committed[entry.index - 1] != known:
            raise Violation(f"node {node.number} applied another entry {entry.index} than others")
        if node.core and node.core.is_leader and node.core.term == entry.term:
            asked = self._waiting.pop((entry.index, entry.term), None)
            if asked:
                self.acknowledged += 1
                self.written[asked[0]] = asked[1]

    def _observe(self, node: Node) -> None:
        core = node.core
        if core is None:
            return
        if core.is_leader and self.leaders.setdefault(core.term, node.number) != node.number:
            raise Violation(f"nodes {node.number} and {self.leaders[core.term]} both lead in term {core.term}")
        if core.is_leader and self.committed and core.term > (term := self.committed[-1][0]):
            last = len(self.committed)
            if core.log.last_index < last or core.log.term(last) not in (None, term):
                raise Violation(f"leader {node.number} lacks what is committed")
