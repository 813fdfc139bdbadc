"""Applying a transaction to the map of a volume, and the counts that follow from it.

`applying` is a generator: it yields what has to be read from the image, changes the map in slices as it goes on,
and leaves the reading, and the waiting, to whoever drives it.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from nbdvde.engine.groups import Change
from nbdvde.engine.layout import ALLOCATED_ZERO, HOLE, LOST, SLOT_SHIFT, Kind, UnitRef
from nbdvde.engine.lbamap import LEAF_SHIFT, LbaMap, parse_leaf, uniform_leaf
from nbdvde.engine.segments import Segments
from nbdvde.engine.versions import Entries, Missing, Version

SLICE = 256
"""Leaves changed between two yields: about a millisecond."""
_FEW = 100
"""Below, a loop is faster than numpy."""


@dataclass(frozen=True, slots=True)
class Load:
    """A leaf (level 0) or a node that must be read from the image."""

    level: int
    index: int
    ref: UnitRef
    tree: Version | None = None
    """That the node belongs to."""

    @classmethod
    def node(cls, missing: Missing) -> "Load":
        """What is missing."""
        return cls(missing.level, missing.index, missing.ref, missing.tree)

    @property
    def kind(self) -> int:
        """Of the unit."""
        return Kind.NODE if self.level else Kind.LEAF

    def install(self, lbamap: LbaMap, data: bytes) -> None:
        """Hand it to the map, unless the map went on while it was read."""
        if self.tree is not None:
            self.tree.install(self.level, self.index, data)
            return
        with suppress(Missing):  # a checkpoint was written: whoever wants the leaf asks again
            if lbamap.held(self.index) is None and lbamap.leaf_ref(self.index) == self.ref:
                lbamap.install_leaf(self.index, parse_leaf(data))


Loads = Iterator[list[Load]]


def loading(lbamap: LbaMap, numbers: Iterable[int]) -> Loads:
    """Have leaves in memory; yields what to load, until they all are."""
    wanted = list(numbers)
    while missing := [number for number in wanted if lbamap.held(number) is None]:
        loads = {}
        for number in missing:
            try:
                ref = lbamap.leaf_ref(number)
            except Missing as node:
                loads[node.level, node.index] = Load.node(node)
            else:
                if ref is None:
                    lbamap.install_leaf(number, uniform_leaf(HOLE))
                else:
                    loads[0, number] = Load(0, number, ref)
        if loads:
            yield list(loads.values())


def applying(segments: Segments, lbamap: LbaMap, change: Change) -> Loads:
    """Change the map, zeroes first; yields what to load, which is nothing between two slices."""
    for start, count, allocated in change.zeroes:
        yield from _zeroing(segments, lbamap, start, start + count, ALLOCATED_ZERO if allocated else HOLE)
    blocks, entries = change.blocks, change.entries
    for at in range(0, len(blocks), SLICE * 16):
        part = blocks[at : at + SLICE * 16]
        yield from loading(lbamap, {block >> LEAF_SHIFT for block in part})
        _count(segments, entries[at : at + len(part)])
        _uncount(segments, lbamap.assign(part, entries[at : at + len(part)]), lbamap.protected)
        yield []


def _zeroing(segments: Segments, lbamap: LbaMap, start: int, stop: int, value: int) -> Loads:
    """Zero the blocks [start, stop), slice by slice; for holes only where there is something."""
    first, last = start >> LEAF_SHIFT, (stop - 1) >> LEAF_SHIFT
    if value != HOLE:
        for at in range(first, last + 1, SLICE):
            yield from _fill(segments, lbamap, range(at, min(at + SLICE, last + 1)), start, stop, value)
        return
    in_memory = [number for number in sorted(lbamap.in_memory()) if first <= number <= last]
    for at in range(0, len(in_memory), SLICE):
        yield from _fill(segments, lbamap, in_memory[at : at + SLICE], start, stop, value)
    done = set(in_memory)
    while first <= last:
        try:
            numbers = lbamap.stored_leaves(first, last, SLICE)
        except Missing as node:
            yield [Load.node(node)]
            continue
        yield from _fill(segments, lbamap, [n for n in numbers if n not in done], start, stop, value)
        first = numbers[-1] + 1 if numbers else last + 1


def _fill(
    segments: Segments, lbamap: LbaMap, numbers: Sequence[int], start: int, stop: int, value: int
) -> Loads:  # fmt: skip
    """Zero the part of [start, stop) that lies in the given leaves."""
    yield from loading(lbamap, numbers)
    for number in numbers:
        low, high = max(start, number << LEAF_SHIFT), min(stop, (number + 1) << LEAF_SHIFT)
        replaced = lbamap.fill(low, high, value)
        if len(replaced):
            _uncount_many(segments, replaced, lbamap.protected)
    yield []


def _count(segments: Segments, entries: Sequence[int]) -> None:
    """Count blocks into their segments. Raises DamageError when the map names one that does not exist."""
    if len(entries) >= _FEW:
        for slot, blocks in _per_slot(np.array(entries, np.uint64)):
            segments.count(slot, blocks)
        return
    for entry in entries:
        segments.count(entry >> SLOT_SHIFT, 1)


def _uncount(segments: Segments, entries: Sequence[int], protected: int) -> None:
    """Count blocks out of their segments, except out of those that others may use (`LbaMap.protected`).

    Raises DamageError when a segment does not exist, or is said to hold less.
    """
    if len(entries) >= _FEW:
        _uncount_many(segments, np.array(entries, np.uint64), protected)
        return
    for entry in entries:
        if entry > LOST:
            segments.uncount(entry >> SLOT_SHIFT, 1, protected)


def _uncount_many(segments: Segments, entries: Entries, protected: int) -> None:
    for slot, blocks in _per_slot(entries[entries > LOST]):
        segments.uncount(slot, blocks, protected)


def _per_slot(entries: Entries) -> Iterator[tuple[int, int]]:
    """(slot, how many) of some entries."""
    slots, counts = np.unique(entries >> np.uint64(SLOT_SHIFT), return_counts=True)
    return zip(slots.tolist(), counts.tolist(), strict=True)
