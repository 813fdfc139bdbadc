"""What is where on a volume: the metadata contexts of BLOCK_STATUS.

Each context gives every block a number, from the map and from what lies over it in the write buffer.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import groupby, islice
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import trio

from nbdvde import workers
from nbdvde.disk import ALLOCATION, ALLOCATION_DEPTH, BLOCK, Status
from nbdvde.engine.buffer import Generation
from nbdvde.engine.changes import Load, Loads
from nbdvde.engine.layout import ALLOCATED_ZERO, HOLE, LOST, UNIT_SHIFT
from nbdvde.engine.lbamap import LEAF_BLOCKS, LEAF_SHIFT, LbaMap
from nbdvde.engine.loader import drive
from nbdvde.engine.segments import Segments
from nbdvde.engine.versions import Missing
from nbdvde.errors import RefusedError

if TYPE_CHECKING:
    from nbdvde.engine.volume import Volume

EXTENT = "x-nbdvde:extent"
"""How a block is stored: a sum of the numbers below; 0 is "as it is, in a sealed extent"."""
COMPRESSED, ZERO, BUFFERED = 1, 2, 4
DIRTY_BITMAP = "qemu:dirty-bitmap:"
"""Followed by the name of a snapshot: 1 for what changed since (QEMU, docs/interop/nbd.rst)."""
_BOUND = "#"
"""Between the name of a snapshot and its number, in what `bound` answers; no name has it."""
_DEPTH_MAX = 16
"""Snapshots that `qemu:allocation-depth` looks at: what is older than that many has the same depth."""
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


class History(Protocol):
    """The snapshots that a volume can be compared with."""

    @property
    def version(self) -> int:
        """Changes whenever the names do."""

    def names(self) -> Sequence[str]:
        """Of the snapshots of its disk, oldest first."""

    def volume(self, name: str) -> "Volume | None":
        """One of them, if it is still there."""


class NoHistory:
    """Of a volume without snapshots."""

    version = 0

    def names(self) -> Sequence[str]:
        return ()

    def volume(self, name: str) -> "Volume | None":
        return None


def bound(history: History, context: str) -> str:
    """A context that stays with the snapshot that has the name now, whatever is called so later."""
    name = context.removeprefix(DIRTY_BITMAP)
    other = history.volume(name) if name != context else None
    return f"{context}{_BOUND}{other.number}" if other else context


async def status_of(
    volume: "Volume", context: str, offset: int, length: int, max_extents: int
) -> list[tuple[int, int]]:
    """(length, number) of consecutive extents from `offset`; see `Disk.status`. Holes cost nothing, however long."""
    view = await _view(volume, context)
    first, stop = offset // BLOCK, (offset + length - 1) // BLOCK + 1
    numbers = await view.leaves(first >> LEAF_SHIFT, (stop - 1) >> LEAF_SHIFT)
    if len(numbers) > _LOOKED_AT:
        stop = min(stop, numbers.pop() << LEAF_SHIFT)
    extents: list[tuple[int, int]] = []
    block = first
    for count, number in enumerate(numbers):
        start, end = max(number << LEAF_SHIFT, first), min((number + 1) << LEAF_SHIFT, stop)
        _extend(extents, start - block, view.hole)
        for run, code in _runs(await view.codes(start, end)):
            _extend(extents, run, code)
        block = end
        if len(extents) > max_extents:
            break
        if count % 64 == 0:
            await trio.lowlevel.checkpoint()
    _extend(extents, stop - block, view.hole)
    return _trimmed(extents[:max_extents], offset - first * BLOCK, length)


async def _view(volume: "Volume", context: str) -> "_Stored | _Changes | _Depth":
    if context.startswith(DIRTY_BITMAP):
        name, _, bound = context.removeprefix(DIRTY_BITMAP).partition(_BOUND)
        other = volume.history.volume(name)
        if other is None or (bound and other.number != int(bound)):
            raise RefusedError(f"context {context}", "its snapshot was deleted", "connect again")
        await volume.settle()
        return _Changes(volume, other)
    if context == ALLOCATION_DEPTH and (names := volume.history.names()):
        await volume.settle()
        older = (volume.history.volume(name) for name in reversed(names[-_DEPTH_MAX:]))
        return _Depth(volume, [other for other in older if other is not None])
    return _Stored(volume, context)


@dataclass(frozen=True, slots=True)
class _Stored:
    """What is where, from the map and from what lies over it in the write buffer."""

    volume: "Volume"
    context: str

    @property
    def hole(self) -> int:
        """Number of what lies in no leaf."""
        return CONTEXTS[self.context].hole

    async def leaves(self, first: int, last: int) -> list[int]:
        """Numbers of the leaves in [first, last] that may have others, ascending."""
        return await leaves_in(self.volume, first, last)

    async def codes(self, start: int, stop: int) -> Codes:
        """The number of each of the blocks [start, stop) of one leaf."""
        return await _codes(self.volume, self.context, start, stop)


@dataclass(frozen=True, slots=True)
class _Changes:
    """1 where a volume holds something else than a snapshot. The write buffer was committed before."""

    volume: "Volume"
    older: "Volume"
    hole = 0

    async def leaves(self, first: int, last: int) -> list[int]:
        """Those that the two have in different units, or that no checkpoint has written yet."""
        unwritten = {n for v in (self.volume, self.older) for n in v.map.unwritten() if first <= n <= last}
        stored: list[int] = []
        while first <= last and len(stored) <= _LOOKED_AT:
            try:
                numbers = self.volume.map.differing_leaves(self.older.map, first, last, _SLICE)
            except Missing as node:
                await drive(iter([[Load.node(node)]]), self.volume.segments, self.volume.map)
                continue
            stored += numbers
            first = numbers[-1] + 1 if numbers else last + 1
            await trio.lowlevel.checkpoint()
        return sorted(unwritten.union(stored))[: _LOOKED_AT + 1]

    async def codes(self, start: int, stop: int) -> Codes:
        """As of `_Stored`. A hole and an allocated zero read the same."""
        new, old = await entries_of(self.volume, start, stop), await entries_of(self.older, start, stop)
        new[new == ALLOCATED_ZERO] = old[old == ALLOCATED_ZERO] = HOLE
        codes: Codes = (new != old).astype(np.uint32)
        return codes


@dataclass(frozen=True, slots=True)
class _Depth:
    """How far back the contents of a block go: 1 if they are newer than the newest snapshot, and so on; 0 for holes."""

    volume: "Volume"
    older: "list[Volume]"
    """Snapshots, newest first."""
    hole = 0

    async def leaves(self, first: int, last: int) -> list[int]:
        """As of `_Stored`."""
        return await leaves_in(self.volume, first, last)

    async def codes(self, start: int, stop: int) -> Codes:
        """As of `_Stored`."""
        entries = await entries_of(self.volume, start, stop)
        same = entries != HOLE
        codes: Codes = same.astype(np.uint32)
        for older in self.older:
            same &= entries == await entries_of(older, start, stop)
            if not same.any():
                break
            codes += same
        return codes


async def entries_of(volume: "Volume", start: int, stop: int) -> Entries:
    """A copy of the map entries of the blocks [start, stop) of one leaf."""
    leaf = await volume.leaf(start >> LEAF_SHIFT)
    low = start & (LEAF_BLOCKS - 1)
    return np.frombuffer(leaf, np.uint64)[low : low + stop - start].copy()


def _extend(extents: list[tuple[int, int]], blocks: int, code: int) -> None:
    """Add an extent, which may be empty, and merge it with the last."""
    if extents and extents[-1][1] == code:
        extents[-1] = extents[-1][0] + blocks * BLOCK, code
    elif blocks:
        extents.append((blocks * BLOCK, code))


async def leaves_in(volume: "Volume", first: int, last: int) -> list[int]:
    """Numbers of the leaves in [first, last] that may be other than holes, ascending.

    `_LOOKED_AT` and one more at most; what is written from now on may be missing.
    """
    stored: list[int] = []
    sources: list[Iterable[int]] = [stored, sorted(n for n in volume.map.in_memory() if first <= n <= last)]
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
            yield [Load.node(node)]
            continue
        found += numbers
        first = numbers[-1] + 1 if numbers else last + 1
        yield []


async def _codes(volume: "Volume", context: str, start: int, stop: int) -> Codes:
    """The number of each of the blocks [start, stop) of one leaf."""
    numbers = CONTEXTS[context]
    entries = await entries_of(volume, start, stop)
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
    stored = entries > LOST
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
