"""What is where on a volume: the metadata contexts of BLOCK_STATUS.

Each context gives every block a number, from the map and from what lies over it in the write buffer.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import merge
from itertools import groupby, islice
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import trio

from nbdvde import workers
from nbdvde.disk import ALLOCATION, ALLOCATION_DEPTH, BLOCK, Status
from nbdvde.engine.buffer import Generation
from nbdvde.engine.changes import Load, Loads
from nbdvde.engine.layout import ALLOCATED_ZERO, UNIT_SHIFT
from nbdvde.engine.lbamap import LEAF_BLOCKS, LEAF_SHIFT, LbaMap, Missing
from nbdvde.engine.loader import drive
from nbdvde.engine.segments import Segments

if TYPE_CHECKING:
    from nbdvde.engine.volume import Volume

EXTENT = "x-nbdvde:extent"
"""How a block is stored: a sum of the numbers below; 0 is "as it is, in a sealed extent"."""
COMPRESSED, ZERO, BUFFERED = 1, 2, 4
_LOOKED_AT = 1 << 12
"""Leaves that one answer looks at (8 GiB of blocks in use); the client asks again for the rest."""
_SLICE = 64
"""Leaves looked for between two turns of other tasks."""
_UNITS = (1 << 24) - 1

Codes: TypeAlias = npt.NDArray[np.uint32]
Entries: TypeAlias = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class _Context:
    """The numbers of a context."""

    hole: int
    allocated_zero: int
    extent: int
    """Of a block in a sealed extent that is not compressed, or if that does not matter."""
    buffered: int


CONTEXTS = {
    ALLOCATION: _Context(int(Status.HOLE | Status.ZERO), int(Status.ZERO), int(Status.DATA), int(Status.DATA)),
    ALLOCATION_DEPTH: _Context(0, 1, 1, 1),
    EXTENT: _Context(ZERO, ZERO, 0, BUFFERED),
}


async def status_of(
    volume: "Volume", context: str, offset: int, length: int, max_extents: int
) -> list[tuple[int, int]]:
    """(length, number) of consecutive extents from `offset`; see `Disk.status`. Holes cost nothing, however long."""
    first, stop = offset // BLOCK, (offset + length - 1) // BLOCK + 1
    numbers = await _leaves(volume, first >> LEAF_SHIFT, (stop - 1) >> LEAF_SHIFT)
    if len(numbers) > _LOOKED_AT:
        stop = min(stop, numbers.pop() << LEAF_SHIFT)
    hole = CONTEXTS[context].hole
    extents: list[tuple[int, int]] = []
    block = first
    for count, number in enumerate(numbers):
        start, end = max(number << LEAF_SHIFT, first), min((number + 1) << LEAF_SHIFT, stop)
        _extend(extents, start - block, hole)
        for run, code in _runs(await _codes(volume, context, start, end)):
            _extend(extents, run, code)
        block = end
        if len(extents) > max_extents:
            break
        if count % 64 == 0:
            await trio.lowlevel.checkpoint()
    _extend(extents, stop - block, hole)
    return _trimmed(extents[:max_extents], offset - first * BLOCK, length)


def _extend(extents: list[tuple[int, int]], blocks: int, code: int) -> None:
    """Add an extent, which may be empty, and merge it with the last."""
    if extents and extents[-1][1] == code:
        extents[-1] = extents[-1][0] + blocks * BLOCK, code
    elif blocks:
        extents.append((blocks * BLOCK, code))


async def _leaves(volume: "Volume", first: int, last: int) -> list[int]:
    """Numbers of the leaves in [first, last] that may be other than holes, ascending.

    `_LOOKED_AT` and one more at most; what is written from now on may be missing.
    """
    stored: list[int] = []
    sources: list[Iterable[int]] = [stored, sorted(n for n in volume.map.leaves if first <= n <= last)]
    for generation in (volume.frozen, volume.active):
        if generation is not None:
            leaves = {block >> LEAF_SHIFT for block in generation.blocks}
            sources.append(sorted(n for n in leaves if first <= n <= last))
            sources.append(_kept(generation, first, last))
    await drive(_finding(volume.map, first, last, stored), volume.segments, volume.map)
    return list(islice((number for number, _ in groupby(merge(*sources))), _LOOKED_AT + 1))


def _kept(generation: Generation, first: int, last: int) -> Iterator[int]:
    """Numbers of the leaves in [first, last] that allocated zeroes lie over; the last of one range may come again."""
    for start, stop, kept in generation.zeroed(first << LEAF_SHIFT, (last + 1) << LEAF_SHIFT):
        if kept:
            yield from range(max(start >> LEAF_SHIFT, first), min((stop - 1) >> LEAF_SHIFT, last) + 1)


def _finding(lbamap: LbaMap, first: int, last: int, found: list[int]) -> Loads:
    """Add the numbers of the leaves in [first, last] that the image holds, as many as are looked at and one more."""
    while first <= last and len(found) <= _LOOKED_AT:
        try:
            numbers = lbamap.stored_leaves(first, last, _SLICE)
        except Missing as node:
            yield [Load(node.level, node.index, node.ref)]
            continue
        found += numbers
        first = numbers[-1] + 1 if numbers else last + 1
        yield []


async def _codes(volume: "Volume", context: str, start: int, stop: int) -> Codes:
    """The number of each of the blocks [start, stop) of one leaf."""
    numbers = CONTEXTS[context]
    leaf = await volume.leaf(start >> LEAF_SHIFT)
    low = start & (LEAF_BLOCKS - 1)
    entries = np.frombuffer(leaf, np.uint64)[low : low + stop - start].copy()
    table = np.array([numbers.hole, numbers.allocated_zero, numbers.extent], np.uint32)
    codes = table[np.minimum(entries, 2).astype(np.intp)]
    if context == EXTENT:
        await _mark_compressed(volume.segments, entries, codes)
    for generation in (volume.frozen, volume.active):
        if generation is not None and generation.covers_any(start, stop):
            for zero_start, zero_stop, kept in generation.zeroed(start, stop):
                low, high = max(zero_start - start, 0), zero_stop - start
                codes[low:high] = numbers.allocated_zero if kept else numbers.hole
            written = [block - start for block in range(start, stop) if block in generation.blocks]
            codes[written] = numbers.buffered
    return codes


async def _mark_compressed(segments: Segments, entries: Entries, codes: Codes) -> None:
    stored = entries > ALLOCATED_ZERO
    units = entries >> np.uint64(UNIT_SHIFT)
    for key in np.unique(units[stored]).tolist():
        state = segments.find(key >> 24)
        index = segments.index_nowait(state)
        if index is None:
            index = await workers.run(segments.index, state)
        _, sealed, blocks = segments.locate(state, index, key & _UNITS)
        if sealed < blocks * BLOCK:
            codes[stored & (units == key)] |= COMPRESSED


def _runs(codes: Codes) -> Iterator[tuple[int, int]]:
    """(length, code) of the runs of equal codes."""
    stops = [*(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)]
    start = 0
    for stop in stops:
        yield stop - start, int(codes[start])
        start = stop


def _trimmed(extents: list[tuple[int, int]], skip: int, length: int) -> list[tuple[int, int]]:
    result = []
    for size, code in extents:
        size -= skip  # noqa: PLW2901
        skip = 0
        result.append((min(size, length), code))
        length -= size
        if length <= 0:
            break
    return result
