"""What is where on a volume: the metadata contexts of BLOCK_STATUS.

Each context gives every block a number, from the map and from what lies over it in the write buffer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import trio

from nbdvde import workers
from nbdvde.disk import ALLOCATION, ALLOCATION_DEPTH, BLOCK, Status
from nbdvde.engine.layout import ALLOCATED_ZERO, UNIT_SHIFT
from nbdvde.engine.lbamap import LEAF_BLOCKS, LEAF_SHIFT
from nbdvde.engine.segments import Segments

if TYPE_CHECKING:
    from nbdvde.engine.volume import Volume

EXTENT = "x-nbdvde:extent"
"""How a block is stored: a sum of the numbers below; 0 is "as it is, in a sealed extent"."""
COMPRESSED, ZERO, BUFFERED = 1, 2, 4
_STATUS_BLOCKS = 1 << 21
"""Blocks that one answer covers at most (8 GiB); the client asks again for the rest."""
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
    """(length, number) of consecutive extents from `offset`; see `Disk.status`."""
    first, stop = offset // BLOCK, (offset + length - 1) // BLOCK + 1
    stop = min(stop, first + _STATUS_BLOCKS)
    extents: list[tuple[int, int]] = []
    for start in range(first - first % LEAF_BLOCKS, stop, LEAF_BLOCKS):
        codes = await _codes(volume, context, max(start, first), min(start + LEAF_BLOCKS, stop))
        for count, code in _runs(codes):
            if extents and extents[-1][1] == code:
                extents[-1] = (extents[-1][0] + count * BLOCK, code)
            elif len(extents) == max_extents:
                return _trimmed(extents, offset - first * BLOCK, length)
            else:
                extents.append((count * BLOCK, code))
        if start % (64 * LEAF_BLOCKS) == 0:
            await trio.lowlevel.checkpoint()
    return _trimmed(extents, offset - first * BLOCK, length)


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
