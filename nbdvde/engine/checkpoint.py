"""Writing a checkpoint: changed leaves, the nodes above them, indexes, the root; then a superblock.

A checkpoint is planned on the event loop at a cut (`Plan`), written by a worker while commits go on
(`write`), and taken over on the event loop again (`Result`). Until the superblock is durable nothing points
at what it wrote.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from nbdvde.disk import Buffer
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
from nbdvde.engine.lbamap import FANOUT, LbaMap, Leaf, Missing, Node, is_hole, uniform_leaf
from nbdvde.engine.metadata import deflate
from nbdvde.engine.segments import Segments, State
from nbdvde.engine.storage import Storage
from nbdvde.errors import DamageError, NbdvdeError

T = TypeVar("T")
Sync = Callable[[], None]

_TABLE_ENTRIES = 8192
"""Segment table entries in a unit."""
_UNIT_OVERHEAD = TAG_BYTES + 64
"""Most that sealing and compressing can add to a metadata unit of a page."""
_PAGE = 4096


@dataclass(slots=True)
class VolumePlan:
    """A volume at the cut that changed since the last checkpoint: its map, and the leaves that did."""

    number: int
    map: LbaMap
    leaves: dict[int, Leaf]
    protected: int
    """Units in segments of a lower sequence may be in use by another volume, too."""
    shares: bool = False
    """Whether units that are written now may have other volumes as owners, too: `protected` covers them then."""


@dataclass(slots=True)
class Plan:
    """Everything a checkpoint writes, as it was at the cut."""

    superblock: Superblock
    """What the new one repeats: identity, options, state."""
    log: LogPoint
    catalogue: list[VolumeEntry]
    """All volumes; those that changed have new roots yet to come."""
    next_volume: int
    dedup_mib: int
    volumes: list[VolumePlan]
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
class VolumeResult:
    """New references of one volume."""

    root: UnitRef | None
    leaves: dict[int, UnitRef | None]
    nodes: dict[tuple[int, int], Node]


@dataclass(slots=True)
class Result:
    """What a checkpoint wrote."""

    superblock: Superblock
    volumes: dict[int, VolumeResult]
    indexes: dict[int, tuple[UnitRef, int]]
    """Where indexes lie, and the sealed bytes of the fingerprints behind them."""
    garbage: Counter[int]
    """Units of older checkpoints that this one replaces, by slot."""
    tails: list[Segment]
    """Space that was allocated and not needed."""
    catalogue: tuple[VolumeEntry, ...]
    entries: list[TableEntry]


def map_sizes(volumes: Iterable[VolumePlan], segment_bytes: int) -> list[int]:
    """Lengths of the segments that surely hold the leaves and nodes of a checkpoint."""
    return _sizes(sum(map(_pages, volumes)) * (_PAGE + _UNIT_OVERHEAD), _PAGE + _UNIT_OVERHEAD, segment_bytes)


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


def _pages(volume: VolumePlan) -> int:
    """Units of a page at most: nodes, leaves, and one for all leaves of allocated zeroes."""
    holes, zeroes = uniform_leaf(HOLE), uniform_leaf(ALLOCATED_ZERO)
    leaves = sum(leaf is not holes and leaf is not zeroes for leaf in volume.leaves.values())
    nodes, numbers = 0, set(volume.leaves)
    for _ in range(volume.map.height):
        numbers = {number // FANOUT for number in numbers}
        nodes += len(numbers)
    return leaves + nodes + 1 if volume.leaves else 0


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
        self._units: dict[Hashable, tuple[UnitRef, State]] = {}
        """What may be referred to again."""
        self.equal: dict[bytes, Node] = {}
        """One object for all nodes that hold the same."""

    def leaf(self, leaf: Leaf) -> UnitRef | None:
        """Write a leaf, one of holes not at all; where one object stands for several, they share a unit."""
        if leaf is uniform_leaf(HOLE) or (id(leaf) not in self._units and is_hole(leaf)):
            return None
        return self._once(id(leaf), Kind.LEAF, memoryview(leaf).cast("B"))

    def node(self, owner: int, level: int, index: int, data: bytes) -> UnitRef:
        """Write a node; those of one owner that have the same in this place share a unit.

        Volumes that do not expect it must not come to share one: each would count down what it leads to.
        """
        return self._once((owner, level, index, data), Kind.NODE, data)

    def _once(self, key: Hashable, kind: int, data: Buffer) -> UnitRef:
        if key in self._units:
            ref, state = self._units[key]
            state.live += 1
            return ref
        ref = self.put(kind, bytes(data))
        assert self._state is not None, "a unit lies in a segment"
        self._units[key] = ref, self._state
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
    garbage = _Garbage(segments)
    for ref in plan.garbage:
        garbage.add(ref, 0)
    volumes = {volume.number: _write_volume(segments, writer, volume, garbage) for volume in plan.volumes}
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
        replace(entry, root=volumes[entry.volume].root) if entry.volume in volumes else entry
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
    return Result(written, volumes, indexes, garbage.units, tails, catalogue, entries)


class _Garbage:
    """Units that a checkpoint replaces, by slot; without those that another volume may use."""

    def __init__(self, segments: Segments) -> None:
        self._segments = segments
        self.units: Counter[int] = Counter()

    def add(self, ref: UnitRef | None, protected: int) -> None:
        if ref is not None and ref.slot != LOST_SLOT and self._segments.find(ref.slot).born >= protected:
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


def _write_volume(
    segments: Segments, writer: _MetaWriter, volume: VolumePlan, garbage: _Garbage
) -> VolumeResult:  # fmt: skip
    result = VolumeResult(volume.map.root, {}, {})
    for number, leaf in volume.leaves.items():
        old = _with_nodes(segments, volume.map, lambda: volume.map.leaf_ref(number))  # noqa: B023 - called at once
        garbage.add(old, volume.protected)
        result.leaves[number] = writer.leaf(leaf)
    if not result.leaves:
        return result
    refs = result.leaves
    for level in range(1, volume.map.height + 1):
        refs = _write_level(segments, writer, volume, level, refs, result, garbage)
    result.root = refs[0]
    return result


def _write_level(
    segments: Segments, writer: _MetaWriter, volume: VolumePlan, level: int, refs: dict[int, UnitRef | None],
    result: VolumeResult, garbage: _Garbage,
) -> dict[int, UnitRef | None]:  # fmt: skip
    """Copy the nodes above changed children, and write the copies; answers their references."""
    above: dict[int, UnitRef | None] = {}
    for index, children in _by_parent(refs):
        node, old = _with_nodes(segments, volume.map, lambda: volume.map.node_copy(level, index))  # noqa: B023 - at once
        for child, ref in children:
            node.set(child, ref)
        garbage.add(old, volume.protected)
        data = bytes(node.data)
        owner = 0 if volume.shares else volume.number
        above[index] = None if node.is_empty() else writer.node(owner, level, index, data)
        result.nodes[level, index] = writer.equal.setdefault(data, node)
    return above


def _by_parent(refs: dict[int, UnitRef | None]) -> Iterator[tuple[int, list[tuple[int, UnitRef | None]]]]:
    parents: dict[int, list[tuple[int, UnitRef | None]]] = {}
    for number, ref in refs.items():
        parents.setdefault(number // FANOUT, []).append((number % FANOUT, ref))
    yield from parents.items()


def _with_nodes(segments: Segments, lbamap: LbaMap, ask: Callable[[], T]) -> T:
    """Ask the map, loading the nodes it misses."""
    while True:
        try:
            return ask()
        except Missing as missing:
            lbamap.install_node(missing.level, missing.index, segments.read_unit(missing.ref, Kind.NODE))


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
