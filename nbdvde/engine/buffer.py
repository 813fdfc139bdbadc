"""Blocks that were written and are not sealed yet.

A `Generation` gathers writes. A commit freezes it, and the next one begins; a frozen generation never
changes, so what is hashed, compressed and encrypted is one and the same. Inside a generation later writes
replace earlier ones, so the order of requests needs no record: blocks lie over zeroed ranges.
"""

from collections.abc import Iterable, Iterator, Sequence

from sortedcontainers import SortedDict

from nbdvde.disk import BLOCK, Buffer
from nbdvde.engine.layout import FRAME_BLOCKS

_LEAF_BLOCKS, _LEAF_COST = 512, 128
ZEROED_LEAVES_MAX = 1 << 18
"""Changed leaves beyond which nothing is allocated as zeroes before a checkpoint: 35 MB, here and in a replay."""


class ZeroRanges:
    """Disjoint ranges of blocks, each zeroed with or without allocation; O(log n) a change."""

    def __init__(self) -> None:
        self._ranges: SortedDict[int, tuple[int, bool]] = SortedDict()  # start: (stop, allocated)

    def __iter__(self) -> Iterator[tuple[int, int, bool]]:
        """(start, stop, allocated) by start."""
        return ((start, stop, kept) for start, (stop, kept) in self._ranges.items())

    def __len__(self) -> int:
        return len(self._ranges)

    def add(self, start: int, stop: int, allocated: bool) -> None:
        """Zero [start, stop); it takes over from what it covers and joins equal neighbours."""
        for low, high, kept in self.overlapping(max(start - 1, 0), stop + 1):
            del self._ranges[low]
            if kept == allocated:
                start, stop = min(start, low), max(stop, high)
                continue
            if low < start:
                self._ranges[low] = (start, kept)
            if high > stop:
                self._ranges[stop] = (high, kept)
        self._ranges[start] = (stop, allocated)

    def overlapping(self, start: int, stop: int) -> list[tuple[int, int, bool]]:
        """The ranges that share a block with [start, stop), whole."""
        at = max(self._ranges.bisect_right(start) - 1, 0)
        found = []
        for low in self._ranges.islice(at):
            high, kept = self._ranges[low]
            if low >= stop:
                break
            if high > start:
                found.append((low, high, kept))
        return found

    def find(self, block: int) -> bool | None:
        """Whether the block is zeroed: allocated (True), as a hole (False), or not at all (None)."""
        at = self._ranges.bisect_right(block) - 1
        if at < 0:
            return None
        stop, kept = self._ranges.peekitem(at)[1]
        return bool(kept) if block < stop else None

    def check(self) -> None:
        """Assert every invariant."""
        before, before_kept = -1, None
        for start, stop, kept in self:
            assert start < stop, "no range is empty"
            assert start >= before, "ranges do not overlap"
            assert start > before or kept != before_kept, "equal neighbours are joined"
            before, before_kept = stop, kept


def zero_cost(start: int, stop: int, allocated: bool) -> int:
    """Bytes to reserve for zeroing [start, stop): allocated zeroes take an entry of the map in memory each 2 MiB."""
    return BLOCK + ((stop - start) // _LEAF_BLOCKS * _LEAF_COST if allocated else 0)


def leaves_of(start: int, stop: int) -> int:
    """Leaves of the map that have a part of [start, stop)."""
    return (stop - 1) // _LEAF_BLOCKS - start // _LEAF_BLOCKS + 1


class Generation:
    """What was written since the last commit: whole blocks, and zeroed ranges beneath them."""

    __slots__ = ("_frames", "blocks", "payload", "zeroed_leaves", "zeroes")

    def __init__(self) -> None:
        self.blocks: dict[int, Buffer] = {}
        self._frames: dict[int, tuple[list[memoryview], memoryview]] = {}
        """By first block: the pages of a frame that were written together, and all of it."""
        self.zeroes: ZeroRanges | None = None
        """None as long as nothing was zeroed."""
        self.zeroed_leaves = 0
        """Leaves that allocated zeroes touch at most."""
        self.payload = 0
        """Bytes accepted, replaced ones included: what the memory and the log can cost at most."""

    def __bool__(self) -> bool:
        return bool(self.blocks) or self.zeroes is not None

    def put(self, first: int, data: memoryview) -> None:
        """Take over whole blocks."""
        pages = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
        self.blocks.update(enumerate(pages, first))
        for at in range(0, len(pages) - FRAME_BLOCKS + 1, FRAME_BLOCKS):
            frame = data[at * BLOCK : (at + FRAME_BLOCKS) * BLOCK]
            self._frames[first + at] = pages[at : at + FRAME_BLOCKS], frame

    def put_many(self, writes: Iterable[tuple[int, memoryview]]) -> None:
        """(offset, whole blocks), in order. Of single blocks copies are kept, as others may be what is kept of one."""
        for offset, data in writes:
            if len(data) == BLOCK:
                self.blocks[offset // BLOCK] = bytes(data)
            else:
                self.put(offset // BLOCK, data)

    def frame(self, first: int, pages: list[Buffer]) -> Buffer:
        """The pages from block `first` joined: without a copy if they still are what was written together."""
        written = self._frames.get(first)
        return written[1] if written and written[0] == pages else b"".join(pages)

    def zero(self, start: int, stop: int, allocated: bool) -> None:
        """Zero the blocks [start, stop): cost is the smaller of their number and of the blocks held."""
        blocks = self.blocks
        if stop - start < len(blocks):
            for block in range(start, stop):
                blocks.pop(block, None)
        else:
            for block in [b for b in blocks if start <= b < stop]:
                del blocks[block]
        self.zeroes = self.zeroes or ZeroRanges()
        self.zeroes.add(start, stop, allocated)
        self.zeroed_leaves += leaves_of(start, stop) if allocated else 0
        self.payload += zero_cost(start, stop, allocated)

    def zeroed(self, start: int, stop: int) -> Sequence[tuple[int, int, bool]]:
        """(start, stop, allocated) of the zeroed ranges that share a block with [start, stop), whole."""
        return self.zeroes.overlapping(start, stop) if self.zeroes is not None else ()

    def covers_any(self, start: int, stop: int) -> bool:
        """Whether any of the blocks [start, stop) is in this generation."""
        blocks = self.blocks
        if blocks and (start in blocks or not blocks.keys().isdisjoint(range(start, stop))):
            return True
        return bool(self.zeroed(start, stop))
