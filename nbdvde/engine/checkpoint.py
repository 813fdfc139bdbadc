"""Writing a checkpoint: changed leaves, the nodes above them, indexes, the root; then a superblock.

A checkpoint is planned on the event loop at a cut (`Plan`), written by a worker while commits go on
(`write`), and taken over on the event loop again (`Result`). Until the superblock is durable nothing points
at what it wrote.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

from nbdvde.engine.layout import (
    ALLOCATED_ZERO,
    BLOCK,
    HOLE,
    LOST_SLOT,
    SUPERBLOCKS,
    TAG_BYTES,
    Kind,
    LogPoint,
    Root,
    Segment,
    Superblock,
    TableEntry,
    UnitRef,
    VolumeEntry,
)
from nbdvde.engine.lbamap import is_hole, uniform_leaf
from nbdvde.engine.metadata import deflate
from nbdvde.engine.segments import Segments, State
from nbdvde.engine.storage import Storage
from nbdvde.engine.versions import FANOUT, LOST_NODE, Leaf, Node, Version, descend
from nbdvde.errors import DamageError, NbdvdeError, UnreadableError

Sync = Callable[[], None]

_TABLE_ENTRIES = 8192
"""Segment table entries in a unit."""
_UNIT_OVERHEAD = TAG_BYTES + 64
"""Most that sealing and compressing can add to a metadata unit of a page."""
_PAGE = 4096


@dataclass(slots=True)
class Plan:
    """Everything a checkpoint writes, as it was at the cut."""

    superblock: Superblock
    """What the new one repeats: identity, options, state."""
    log: LogPoint
    catalogue: list[VolumeEntry]
    """All volumes; those with `heads` have new roots yet to come."""
    next_volume: int
    dedup_mib: int
    versions: list[Version]
    """What to write of maps, each behind the one below it."""
    heads: dict[int, Version]
    """Versions of the volumes that have one that is yet to be written, by volume number."""
    sealed: int
    """`Catalogue.sealed` at the cut."""
    indexes: dict[int, bytes]
    """Indexes to write, by slot."""
    prints: dict[int, bytes]
    """Fingerprints to write behind some of them."""
    entries: dict[int, TableEntry]
    """The segment table without the segments of this checkpoint."""
    next_sequence: int
    statistics: tuple[int, ...]
    meta: list[State]
    """Allocated segments for leaves and nodes, and after them those for indexes and fingerprints."""
    map_segments: int
    """How many of them are for leaves and nodes. Those die soon, indexes only with the segments they belong to."""
    root: State
    """Allocated segment for the root."""
    garbage: list[UnitRef]
    """Units that only the segments left out of this checkpoint needed."""
    both: bool
    """Write both superblocks (at open and at a clean stop), so that neither is behind."""


@dataclass(slots=True)
class Written:
    """A version that was written."""

    root: UnitRef | None
    nodes: dict[tuple[int, int], Node]


@dataclass(slots=True)
class Result:
    """What a checkpoint wrote."""

    superblock: Superblock
    trees: dict[Version, Written]
    indexes: dict[int, tuple[UnitRef, int]]
    """Where indexes lie, and the sealed bytes of the fingerprints behind them."""
    garbage: Counter[int]
    """Units of older checkpoints that this one replaces, by slot."""
    tails: list[Segment]
    """Space that was allocated and not needed."""
    catalogue: tuple[VolumeEntry, ...]
    entries: list[TableEntry]


def map_sizes(versions: Iterable[Version], segment_bytes: int) -> list[int]:
    """Lengths of the segments that surely hold the leaves and nodes of a checkpoint."""
    return _sizes(sum(map(_pages, versions)) * (_PAGE + _UNIT_OVERHEAD), _PAGE + _UNIT_OVERHEAD, segment_bytes)


def index_sizes(indexes: dict[int, bytes], prints: dict[int, bytes], segment_bytes: int) -> list[int]:
    """Lengths of the segments that surely hold the indexes and fingerprints of a checkpoint."""
    pairs = [len(index) + len(prints.get(slot, b"")) for slot, index in indexes.items()]
    units = [size + size // 128 + 2 * _UNIT_OVERHEAD for size in pairs]
    return _sizes(sum(units), max(units, default=0), segment_bytes)


def _sizes(total: int, waste: int, segment_bytes: int) -> list[int]:
    """Lengths of segments for so many bytes of units, of which the longest may not fit at the end of each."""
    if not total:
        return []
    length = max(segment_bytes, -(-2 * waste // BLOCK) * BLOCK)
    whole, rest = divmod(total, length - waste)
    return [length] * whole + [min(length, -(-(rest + waste) // BLOCK) * BLOCK)]


def _pages(version: Version) -> int:
    """Units of a page at most: nodes, leaves, and one for all leaves of allocated zeroes."""
    holes, zeroes = uniform_leaf(HOLE), uniform_leaf(ALLOCATED_ZERO)
    leaves = sum(leaf is not holes and leaf is not zeroes for leaf in version.leaves.values())
    nodes, numbers = 0, set(version.leaves)
    for level in range(1, version.height + 1):
        numbers = {number // FANOUT for number in numbers} | _grown(version, level)
        nodes += len(numbers)
    return leaves + nodes + 1


def _grown(version: Version, level: int) -> set[int]:
    """Nodes of a level to write although nothing below them changed: those above the root of a less tall tree."""
    assert version.below is not None, "it is yet to be written"
    return {0} if level > version.below.height else set()


def root_bytes(entries: int, volumes: int) -> int:
    """Most that a root segment can take."""
    tables = math.ceil(entries / _TABLE_ENTRIES)
    table_bytes = entries * TableEntry.SIZE
    root = 256 + volumes * VolumeEntry.SIZE + 4 * tables
    total = table_bytes + table_bytes // 128 + root + root // 128 + (tables + 1) * (_UNIT_OVERHEAD + 64)
    return -(-total // BLOCK) * BLOCK


class _MetaWriter:
    """Packs units into the segments of a checkpoint."""

    def __init__(self, segments: Segments, states: list[State]) -> None:
        self._storage, self._states = segments.storage, iter(states)
        self._state: State | None = None
        self._pending: list[bytes] = []
        self._written = 0
        self._units: dict[int, tuple[UnitRef, State]] = {}
        """What may be referred to again."""

    def leaf(self, leaf: Leaf) -> UnitRef | None:
        """Write a leaf, one of holes not at all; where one object stands for several, they share a unit."""
        if leaf is uniform_leaf(HOLE) or (id(leaf) not in self._units and is_hole(leaf)):
            return None
        if id(leaf) in self._units:
            ref, state = self._units[id(leaf)]
            state.live += 1
            return ref
        ref = self.put(Kind.LEAF, bytes(memoryview(leaf).cast("B")))
        assert self._state is not None, "a unit lies in a segment"
        self._units[id(leaf)] = ref, self._state
        return ref

    def index(self, index: bytes, prints: bytes) -> tuple[UnitRef, int]:
        """Write an index and, directly behind it, the fingerprints if there are any: (where, sealed bytes of those)."""
        if not prints:
            return self.put(Kind.INDEX, index), 0
        units = deflate(index), deflate(prints)
        self._open(sum(map(len, units)) + 2 * TAG_BYTES)
        ref, behind = self._seal(Kind.INDEX, units[0]), self._seal(Kind.PRINTS, units[1])
        return ref, behind.length

    def put(self, kind: int, data: bytes) -> UnitRef:
        packed = deflate(data)
        self._open(len(packed) + TAG_BYTES)
        return self._seal(kind, packed)

    def _open(self, length: int) -> None:
        """Have a segment that has room for so many bytes."""
        if self._state is None or self._state.used + length > self._state.segment.length:
            self.flush()
            self._state, self._written = self._next(), 0

    def _seal(self, kind: int, packed: bytes) -> UnitRef:
        state, length = self._state, len(packed) + TAG_BYTES
        assert state is not None, "there is room"
        ref = UnitRef(state.segment.slot, state.units, state.used, length)
        state.units += 1
        state.live += 1
        state.used += length
        self._pending.append(state.sealer.seal(ref.unit, kind, packed))
        return ref

    def _next(self) -> State:
        state = next(self._states, None)
        if state is None:
            raise NbdvdeError("checkpoint", "takes more space than was reserved for it", "report this")
        return state

    def flush(self) -> None:
        if self._pending and self._state is not None:
            self._storage.write(self._state.segment.offset + self._written, self._pending)
            self._written = self._state.used
            self._pending = []


def write(segments: Segments, plan: Plan, mac_key: bytes, sync: Sync) -> Result:
    """Write and sync the checkpoint, then the superblock. Blocks; raises OSError and what `sync` raises."""
    writer = _MetaWriter(segments, plan.meta[: plan.map_segments])
    index_writer = _MetaWriter(segments, plan.meta[plan.map_segments :])
    garbage = _Garbage(segments, {state.segment.slot for state in plan.meta})
    for ref in plan.garbage:
        garbage.add(ref, 0)
    trees = _Trees(segments, writer, garbage)
    for version in plan.versions:
        trees.write(version)
    indexes = {slot: index_writer.index(data, plan.prints.get(slot, b"")) for slot, data in plan.indexes.items()}
    for slot in indexes:
        for old in plan.entries[slot].refs:
            garbage.add(old, 0)
    writer.flush()
    index_writer.flush()
    tails = [tail for state in plan.meta if state.units and (tail := segments.shrink(state, state.used))]
    entries = [
        _renewed(entry, indexes.get(slot, (entry.index, entry.prints)), garbage.units[slot])
        for slot, entry in plan.entries.items()
    ]
    entries += [state.entry() for state in plan.meta if state.units]
    catalogue = tuple(
        replace(entry, root=trees.written[plan.heads[entry.volume]].root) if entry.volume in plan.heads else entry
        for entry in plan.catalogue
    )
    root_length = _write_root(segments, plan, entries, catalogue)
    if tail := segments.shrink(plan.root, plan.root.used):
        tails.append(tail)
    sync()
    superblock = replace(
        plan.superblock, root=plan.root.segment, root_length=root_length, log=plan.log,
        disks=tuple((entry.name, entry.size) for entry in catalogue if not (entry.parent or entry.region)),
    )  # fmt: skip
    written = write_superblocks(segments.storage, superblock, mac_key, sync, both=plan.both)
    return Result(written, trees.written, indexes, garbage.units, tails, catalogue, entries)


class _Garbage:
    """Units that a checkpoint replaces, by slot; without those that another volume may use."""

    def __init__(self, segments: Segments, new: set[int]) -> None:
        """`new` slots are of this checkpoint: what replaces a unit there is another version."""
        self._segments, self._new = segments, new
        self.units: Counter[int] = Counter()

    def add(self, ref: UnitRef | None, protected: int) -> None:
        if ref is None or ref.slot == LOST_SLOT or ref.slot in self._new:
            return
        if self._segments.find(ref.slot).born >= protected:
            self.units[ref.slot] += 1


def _renewed(entry: TableEntry, index: tuple[UnitRef | None, int], garbage: int) -> TableEntry:
    if entry.live < garbage:
        where = f"counts less in use in slot {entry.segment.slot} than there is"
        raise DamageError("segment table", where, "run nbdvde check")
    return replace(entry, index=index[0], prints=index[1], live=entry.live - garbage)


def write_superblocks(
    storage: Storage, superblock: Superblock, mac_key: bytes, sync: Sync, *, both: bool
) -> Superblock:  # fmt: skip
    """Write the superblock to the place of the older one, or to both in turn, each time synced; answers the last."""
    for _ in range(2 if both else 1):
        superblock = replace(superblock, sequence=superblock.sequence + 1)
        storage.write(SUPERBLOCKS[superblock.sequence % 2], [superblock.pack(mac_key)])
        sync()
    return superblock


class _Trees:
    """Writes versions: their leaves, and new nodes above them, up to the root."""

    def __init__(self, segments: Segments, writer: _MetaWriter, garbage: _Garbage) -> None:
        self._segments, self._writer, self._garbage = segments, writer, garbage
        self.written: dict[Version, Written] = {}
        self._trees: dict[Version, Version] = {}
        """What each of them stands on in the image."""
        self._new: dict[UnitRef, Node] = {}
        """The nodes written so far."""
        self._equal: dict[bytes, Node] = {}
        """One object for all nodes that hold the same."""

    def write(self, version: Version) -> None:
        """Write a version; the one below is in the image, or was written before."""
        below = version.below
        assert below is not None, "it is yet to be written"
        root = self.written[below].root if below in self.written else below.root
        self._trees[version] = tree = self._trees.get(below, below)
        find = partial(descend, below.height, root, node_at=partial(self._node, tree))
        refs: dict[int, UnitRef | None] = {}
        for number in sorted(version.leaves):
            self._garbage.add(find(0, number), version.protected)
            refs[number] = self._writer.leaf(version.leaves[number])
        nodes: dict[tuple[int, int], Node] = {}
        for level in range(1, version.height + 1):
            above: dict[int, UnitRef | None] = {}
            for index, children in _by_parent(refs, _grown(version, level)).items():
                old = find(level, index) if level <= below.height else None
                node = Node(bytes(self._node(tree, level, index, old).data)) if old else Node()
                if level == below.height + 1 and index == 0:
                    node.set(0, root)
                for child, ref in children:
                    node.set(child, ref)
                self._garbage.add(old, version.protected)
                above[index], nodes[level, index] = self._put(node)
            refs = above
        self.written[version] = Written(refs[0], nodes)

    def _put(self, node: Node) -> tuple[UnitRef | None, Node]:
        data = bytes(node.data)
        node = self._equal.setdefault(data, node)
        if node.is_empty():
            return None, node
        ref = self._writer.put(Kind.NODE, data)
        self._new[ref] = node
        return ref, node

    def _node(self, tree: Version, level: int, index: int, ref: UnitRef) -> Node:
        """A node of this checkpoint, or else of the tree that it changes."""
        node = self._new.get(ref) or tree.nodes.get((level, index))
        if node is None:
            try:
                data = self._segments.read_unit(ref, Kind.NODE)
            except UnreadableError:
                raise
            except DamageError:  # so the commit that loaded it found, and said
                data = LOST_NODE
            node = tree.install(level, index, data)
        return node


def _by_parent(refs: dict[int, UnitRef | None], more: set[int]) -> dict[int, list[tuple[int, UnitRef | None]]]:
    """The parents of some units, and `more`, each with its children among them."""
    parents: dict[int, list[tuple[int, UnitRef | None]]] = {index: [] for index in more}
    for number, ref in refs.items():
        parents.setdefault(number // FANOUT, []).append((number % FANOUT, ref))
    return parents


def _write_root(segments: Segments, plan: Plan, entries: list[TableEntry], catalogue: tuple[VolumeEntry, ...]) -> int:
    """Write the root segment: the ROOT unit first, the tables after it; answers the first one's sealed length."""
    sealer, tables = plan.root.sealer, []
    for number, start in enumerate(range(0, len(entries), _TABLE_ENTRIES), 1):
        raw = b"".join(entry.pack() for entry in entries[start : start + _TABLE_ENTRIES])
        tables.append(sealer.seal(number, Kind.TABLE, deflate(raw)))
    root = Root(
        catalogue, tuple(map(len, tables)), plan.next_sequence, plan.statistics, plan.next_volume, plan.dedup_mib
    )
    first = sealer.seal(0, Kind.ROOT, deflate(root.pack()))
    segments.storage.write(plan.root.segment.offset, [first, *tables])
    plan.root.used = len(first) + sum(map(len, tables))
    return len(first)
