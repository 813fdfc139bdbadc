"""What a disk is made of, place by place: a number of cells, and how many blocks of each kind are in each of them.

All comes from maps as a checkpoint wrote them: it blocks, and belongs into a thread. The cost is that of reading every
leaf of the image once (for what is shared) and those of the disk once more; holes cost nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import islice
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from nbdvde.engine.layout import (
    ALLOCATED_ZERO,
    BLOCK,
    KIND_META,
    LOST,
    LOST_SLOT,
    SLOT_SHIFT,
    UNIT_MASK,
    UNIT_SHIFT,
    Kind,
    TableEntry,
    UnitRef,
    VolumeEntry,
)
from nbdvde.engine.lbamap import LEAF_BLOCKS, parse_leaf
from nbdvde.engine.mark import Tree, mark
from nbdvde.engine.segments import Segments
from nbdvde.engine.uses import OFTEN, Uses
from nbdvde.engine.versions import FANOUT, Entries, Node

_LEAVES_AT_ONCE = 128
_USES_MAX = 1 << 28
"""Bytes of memory to find out what is shared; beyond that, a TiB in extents of 64 KiB, it is not looked for."""
_NOBODY = np.iinfo(np.int32).max
Counts: TypeAlias = npt.NDArray[np.int64]


class Part(IntEnum):
    """What a block is; of several that fit, the last one."""

    HOLE = 0
    ZERO = 1
    """Allocated, and nothing but zeroes."""
    COMPRESSED = 2
    INCOMPRESSIBLE = 3
    """Stored as it is."""
    SHARED = 4
    """Also what another place has, of this disk, another one, or a snapshot: stored once."""
    CHANGED = 5
    """Other than in the snapshot that it is compared with."""
    UNREADABLE = 6


@dataclass(frozen=True, slots=True)
class Source:
    """An image at a checkpoint."""

    segments: Segments
    volumes: Sequence[VolumeEntry]
    entries: Sequence[TableEntry]
    extent_blocks: int
    """Blocks of an extent, at most."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """Rows are cells, columns the parts."""

    blocks: int
    """Of the disk."""
    counts: Counts
    shared_known: bool
    """Whether it was looked for what is shared."""


def draw(source: Source, volume: int, since: int | None, cells: int) -> Drawing:
    """A volume by number, compared with that numbered `since`, in so many cells at most. Raises DamageError."""
    by_number = {entry.volume: entry for entry in source.volumes}
    entry = by_number[volume]
    blocks = -(-entry.size // BLOCK)
    canvas = _Canvas(blocks, min(cells, blocks))
    kinds = _Kinds(source)
    pairs = _pairs(source.segments, entry, by_number[since] if since is not None else entry)
    while part := list(islice(pairs, _LEAVES_AT_ONCE)):
        numbers = np.array([number for number, _, _ in part], np.int64)
        new = [_entries(source.segments, ref) for _, ref, _ in part]
        old = [
            there if ref == new_ref else _entries(source.segments, ref)
            for there, (_, new_ref, ref) in zip(new, part, strict=True)
        ]
        entries = np.concatenate(new)
        codes = kinds.of(entries)
        codes[_differ(entries, np.concatenate(old)) & (codes < Part.UNREADABLE)] = Part.CHANGED
        canvas.add((numbers[:, None] * LEAF_BLOCKS + np.arange(LEAF_BLOCKS)).ravel(), codes)
    return Drawing(blocks, canvas.finished(), kinds.uses is not None)


class _Canvas:
    """Counts of parts by cell."""

    def __init__(self, blocks: int, cells: int) -> None:
        self._blocks, self._cells = blocks, cells
        self._counts = np.zeros((cells, len(Part)), np.int64)
        self._edges = np.array([-(-cell * blocks // cells) for cell in range(cells + 1)], np.int64)

    def add(self, places: npt.NDArray[np.int64], codes: npt.NDArray[np.uint8]) -> None:
        """Add blocks at ascending places; those behind the end do not count."""
        stop = int(np.searchsorted(places, self._blocks))
        if not stop:
            return
        cells = self._cells_of(places[:stop])
        first, last = int(cells[0]), int(cells[-1])
        found = np.bincount((cells - first) * len(Part) + codes[:stop], minlength=(last - first + 1) * len(Part))
        self._counts[first : last + 1] += found.reshape(-1, len(Part))

    def _cells_of(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        if self._blocks * self._cells < 1 << 63:
            return places * self._cells // self._blocks
        return np.searchsorted(self._edges, places, side="right") - 1

    def finished(self) -> Counts:
        """The counts; what was not added is holes."""
        self._counts[:, Part.HOLE] += np.diff(self._edges) - self._counts.sum(axis=1)
        return self._counts


class _Kinds:
    """Which part a map entry stands for."""

    def __init__(self, source: Source) -> None:
        self._segments = source.segments
        units = {entry.segment.slot: entry.units for entry in source.entries if entry.kind != KIND_META}
        self._units = units
        slots = max((entry.segment.slot for entry in source.entries), default=0) + 1
        sizes = np.zeros(slots, np.int64)
        sizes[list(units)] = list(units.values())
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._compressed = np.zeros(int(self._starts[-1]) + 1, np.bool_)
        self._known = np.zeros(slots, np.bool_)
        self.uses: Uses | None = None
        if sum(units.values()) * source.extent_blocks <= _USES_MAX:
            self.uses = Uses(units, source.extent_blocks, _NOBODY)
            trees = [Tree(volume.volume, volume.height, volume.root) for volume in source.volumes]
            indexes = [ref for entry in source.entries for ref in entry.refs]
            mark(trees, indexes, source.segments.read_unit, slots, self.uses)

    def of(self, entries: Entries) -> npt.NDArray[np.uint8]:
        """Codes of `Part`."""
        codes = np.zeros(len(entries), np.uint8)
        codes[entries == ALLOCATED_ZERO], codes[entries == LOST] = Part.ZERO, Part.UNREADABLE
        stored = np.flatnonzero(entries > LOST)
        found = entries[stored]
        slots = (found >> np.uint64(SLOT_SHIFT)).astype(np.int64)
        self._look_at(slots)
        units = (found >> np.uint64(UNIT_SHIFT) & np.uint64(UNIT_MASK)).astype(np.int64)
        at = np.minimum(self._starts[slots] + units, len(self._compressed) - 1)
        codes[stored] = np.where(self._compressed[at], Part.COMPRESSED, Part.INCOMPRESSIBLE)
        if self.uses is not None:
            codes[stored[self.uses.of(found) == OFTEN]] = Part.SHARED
        return codes

    def _look_at(self, slots: npt.NDArray[np.int64]) -> None:
        for slot in np.unique(slots[~self._known[slots]]).tolist():
            count = self._units.get(slot, 0)
            index = np.array(self._segments.index(self._segments.find(slot))[:count], np.uint64)
            sealed, held = index >> np.uint64(24) & np.uint64(0xFFFFFF), index >> np.uint64(48)
            start = int(self._starts[slot])
            self._compressed[start : start + count] = sealed < held * np.uint64(BLOCK)
            self._known[slot] = True


_Leaf: TypeAlias = tuple[int, UnitRef]


def _leaves(segments: Segments, volume: VolumeEntry) -> Iterator[_Leaf]:
    """(number, reference) of the leaves that the map of a volume has, ascending."""

    def below(level: int, index: int, ref: UnitRef) -> Iterator[_Leaf]:
        if level == 0:
            yield index, ref
            return
        if ref.slot == LOST_SLOT:
            yield from ((index * FANOUT**level + child, ref) for child in range(FANOUT**level))
            return
        rows = np.frombuffer(Node(segments.read_unit(ref, Kind.NODE)).data, np.uint32).reshape(-1, 4)
        for child in np.flatnonzero(rows[:, 3]).tolist():
            yield from below(level - 1, index * FANOUT + child, UnitRef(*rows[child].tolist()))

    if volume.root is not None:
        yield from below(volume.height, 0, volume.root)


def _pairs(
    segments: Segments, volume: VolumeEntry, older: VolumeEntry
) -> Iterator[tuple[int, UnitRef | None, UnitRef | None]]:
    """(number, leaf, leaf of the older one), ascending, of every leaf that one of the two has."""
    if volume is older:
        yield from ((number, ref, ref) for number, ref in _leaves(segments, volume))
        return
    new, old = dict(_leaves(segments, volume)), dict(_leaves(segments, older))
    yield from ((number, new.get(number), old.get(number)) for number in sorted(new.keys() | old.keys()))


def _entries(segments: Segments, ref: UnitRef | None) -> Entries:
    if ref is None or ref.slot == LOST_SLOT:
        return np.full(LEAF_BLOCKS, 0 if ref is None else LOST, np.uint64)
    return np.frombuffer(parse_leaf(segments.read_unit(ref, Kind.LEAF)), np.uint64)


def _differ(new: Entries, old: Entries) -> npt.NDArray[np.bool_]:
    """Where blocks may hold something else. A hole and an allocated zero read the same."""
    differ: npt.NDArray[np.bool_] = np.where(new == ALLOCATED_ZERO, 0, new) != np.where(old == ALLOCATED_ZERO, 0, old)
    return differ
