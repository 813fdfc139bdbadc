"""Applying a transaction to the map of a volume, and the counts that follow from it."""

from collections.abc import Sequence

import numpy as np

from nbdvde.engine.layout import ALLOCATED_ZERO, HOLE, SLOT_SHIFT
from nbdvde.engine.lbamap import LEAF_BLOCKS, LEAF_SHIFT, LbaMap
from nbdvde.engine.log import Change
from nbdvde.engine.segments import Segments

_FEW = 100
"""Below, a loop is faster than numpy."""


def leaves_of(lbamap: LbaMap, change: Change) -> set[int]:
    """Numbers of the leaves that must be in memory before `apply`. Raises lbamap.Missing."""
    numbers = {block >> LEAF_SHIFT for block in change.blocks}
    for start, count, allocated in change.zeroes:
        first, last = start >> LEAF_SHIFT, (start + count - 1) >> LEAF_SHIFT
        numbers.update(range(first, last + 1) if allocated else lbamap.leaves_present(first, last))
    return numbers


def apply(segments: Segments, lbamap: LbaMap, change: Change) -> None:
    """Change the map, all leaves being in memory, and count what lives in which segment."""
    for start, count, allocated in change.zeroes:
        _zero(segments, lbamap, start, start + count, ALLOCATED_ZERO if allocated else HOLE)
    if change.blocks:
        _count(segments, change.entries, 1)
        _count(segments, lbamap.assign(change.blocks, change.entries), -1)


def _zero(segments: Segments, lbamap: LbaMap, start: int, stop: int, value: int) -> None:
    first, last = start >> LEAF_SHIFT, (stop - 1) >> LEAF_SHIFT
    for number in _within(lbamap, first, last):
        low = max(start, number << LEAF_SHIFT)
        high = min(stop, (number << LEAF_SHIFT) + LEAF_BLOCKS)
        replaced = lbamap.fill(low, high, value)
        slots, counts = np.unique(replaced[replaced > ALLOCATED_ZERO] >> np.uint64(SLOT_SHIFT), return_counts=True)
        for slot, blocks in zip(slots.tolist(), counts.tolist(), strict=True):
            segments.find(slot).live -= blocks


def _within(lbamap: LbaMap, first: int, last: int) -> list[int]:
    if last - first < len(lbamap.leaves):
        return [number for number in range(first, last + 1) if number in lbamap.leaves]
    return [number for number in lbamap.leaves if first <= number <= last]


def _count(segments: Segments, entries: Sequence[int], step: int) -> None:
    """Count blocks in or out of their segments."""
    if len(entries) < _FEW:
        for entry in entries:
            if entry > ALLOCATED_ZERO:
                segments.states[entry >> SLOT_SHIFT].live += step
        return
    slots, counts = np.unique(np.array(entries, np.uint64) >> np.uint64(SLOT_SHIFT), return_counts=True)
    for slot, blocks in zip(slots.tolist(), counts.tolist(), strict=True):
        if slot:
            segments.states[slot].live += step * blocks
