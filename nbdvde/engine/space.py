"""Free extents of the image file, on sorted containers: finding and freeing are O(log n), neighbours coalesce."""

from sortedcontainers import SortedDict, SortedSet

from nbdvde.errors import NoSpaceError

_NO_LIMIT = 1 << 63
_ZONE = 4
"""Whole segments that a zone of the file has room for: what is cleaned together, so that gaps join. Uniform overwrites
at 70 % fill write 3.1 times as much; with 2 it is 3.5, with 1 no gap takes a segment in the end."""
_SCRATCH_PART = 5
"""Eighths of the reserve that a round of cleaning may write."""
_LEAST = 8
"""Whole segments that writes leave, and half of the reserve, although cleaning would win the rest of it back."""
_WIDE_PART = 0.75
"""Part of what writes leave that is in gaps that take any segment: the cleaner needs them."""


class FreeSpace:
    """The unused ranges of [start, limit). Everything past `end` is free as well, until the limit.

    Kept twice: by offset, to coalesce, and by (length, offset), to find the smallest that fits.
    """

    def __init__(self, start: int, limit: int | None = None, reserve: int = 0, wide: int = 1) -> None:
        """Without a limit there is always room; `reserve` bytes of it are not for everyone.

        Gaps from `wide` bytes on take any segment, and most of the reserve is kept in such.
        """
        self._by_offset: SortedDict[int, int] = SortedDict()
        self._by_length: SortedSet[tuple[int, int]] = SortedSet()
        self._limit, self.reserve_bytes = limit or _NO_LIMIT, reserve
        self._start, self._wide = start, wide
        self._zone = max(wide, min(_ZONE * wide, reserve * _SCRATCH_PART // 8))
        self._least = max(reserve // 2, _LEAST * wide)
        self._free = self._wide_free = 0
        self.reclaimable = 0
        """Bytes that cleaning would surely free, as far as it is known: writes may take as much of the reserve."""
        self.end = start
        """First byte past everything in use."""

    @property
    def free_bytes(self) -> int:
        """Bytes in the gaps below `end`."""
        return self._free

    @property
    def used_bytes(self) -> int:
        """Bytes in use."""
        return self.end - self._start - self._free

    @property
    def room(self) -> int:
        """Bytes that are not in use, reserve included."""
        return self._limit - self.end + self._free

    @property
    def wide_room(self) -> int:
        """Bytes that are not in use in gaps that take any segment, that behind the end included."""
        tail = self._limit - self.end
        return self._wide_free + (tail if tail >= self._wide else 0)

    @property
    def scratch(self) -> int:
        """Bytes that a round of cleaning may write, whatever is written meanwhile: checkpoints fit beside it."""
        if self._limit == _NO_LIMIT:
            return _NO_LIMIT
        return min(self.reserve_bytes * _SCRATCH_PART // 8, self.room - self._for_checkpoints, self.wide_room * 3 // 4)

    @property
    def _for_checkpoints(self) -> int:
        return self.reserve_bytes // 8

    def leaves_checkpoints(self, length: int) -> bool:
        """Whether checkpoints have room when the cleaner takes `length` bytes."""
        return self.room - length >= self._for_checkpoints

    @property
    def kept(self) -> int:
        """Bytes that writes have to leave."""
        return max(self.reserve_bytes - self.reclaimable, min(self.reserve_bytes, self._least))

    @property
    def in_reserve(self) -> bool:
        """Whether only (a part of) what writes have to leave is left."""
        return self.room < self.kept

    def is_short(self, parts: int) -> bool:
        """Whether less than one in so many parts of the limit is left for writes."""
        return self._limit != _NO_LIMIT and (self.room - self.kept) * parts < self._limit

    def allocate(self, length: int, *, reserved: bool = True) -> int:
        """Offset of `length` bytes that are now in use: the tightest gap (O(log n)), or else the end.

        Not `reserved`, the reserve is left alone. Raises NoSpaceError.
        """
        if not reserved and not self.fits(length):
            raise NoSpaceError("image", "its capacity is used up", "trim or delete data")
        at = self._by_length.bisect_left((length, 0))
        if at == len(self._by_length):
            return self._extend(length)
        size, offset = self._by_length[at]
        self._take_gap(offset, size)
        if size > length:
            self._add_gap(offset + length, size - length)
        return offset

    def fits(self, length: int) -> bool:
        """Whether `length` bytes can be allocated that leave the reserve alone, and it wide enough."""
        at = self._by_length.bisect_left((length, 0))
        gap = self._by_length[at][0] if at < len(self._by_length) else self._limit - self.end
        left = gap - length
        narrowed = (gap if gap >= self._wide else 0) - (left if left >= self._wide else 0)
        wide_enough = self.wide_room - narrowed >= self.kept * _WIDE_PART or not narrowed
        return left >= 0 and wide_enough and self.room - length >= self.kept

    def beside(self, offset: int, length: int) -> int:
        """Bytes of the gap that follows a range in use and does not take any segment; 0 without a limit."""
        gap = self._by_offset.get(offset + length, 0)
        return gap if gap < self._wide and self._limit != _NO_LIMIT else 0

    def zone(self, offset: int) -> int:
        """Number, from 1 on, of the zone in which a byte lies; 0 without a limit, where gaps need not be joined."""
        return 1 + offset // self._zone if self._limit != _NO_LIMIT else 0

    def _extend(self, length: int) -> int:
        if self.end + length > self._limit:
            raise NoSpaceError("image", "its capacity is used up", "trim or delete data")
        offset, self.end = self.end, self.end + length
        return offset

    def reserve(self, offset: int, length: int) -> None:
        """Mark a range as used that an image says is used; it must be free."""
        if offset >= self.end:
            if offset > self.end:
                self._add_gap(self.end, offset - self.end)
            self.end = offset + length
            return
        at = self._by_offset.bisect_right(offset) - 1
        if at >= 0:
            start, size = self._by_offset.peekitem(at)
            if offset + length <= start + size:
                self._take_gap(start, size)
                if offset > start:
                    self._add_gap(start, offset - start)
                if start + size > offset + length:
                    self._add_gap(offset + length, start + size - offset - length)
                return
        raise ValueError(f"bytes {offset} to {offset + length} are used twice")

    def free(self, offset: int, length: int) -> None:
        """Give a used range back, O(log n)."""
        at = self._by_offset.bisect_right(offset)
        if at > 0:
            start, size = self._by_offset.peekitem(at - 1)
            if start + size > offset:
                raise ValueError(f"byte {offset} is freed twice")
            if start + size == offset:
                self._take_gap(start, size)
                offset, length = start, size + length
        following = self._by_offset.get(offset + length)
        if following is not None:
            self._take_gap(offset + length, following)
            length += following
        if offset + length == self.end:
            self.end = offset
        else:
            self._add_gap(offset, length)

    def _add_gap(self, offset: int, length: int) -> None:
        self._free += length
        self._wide_free += length if length >= self._wide else 0
        self._by_offset[offset] = length
        self._by_length.add((length, offset))

    def _take_gap(self, offset: int, length: int) -> None:
        self._free -= length
        self._wide_free -= length if length >= self._wide else 0
        del self._by_offset[offset]
        self._by_length.remove((length, offset))

    def gaps(self) -> list[tuple[int, int]]:
        """(offset, length) of every gap, by offset."""
        return list(self._by_offset.items())

    def check(self) -> None:
        """Assert every invariant."""
        assert len(self._by_offset) == len(self._by_length), "both orders hold the same gaps"
        before = -1
        for offset, length in self._by_offset.items():
            assert length > 0, "no gap is empty"
            assert offset > before, "gaps neither overlap nor touch"
            assert (length, offset) in self._by_length, "both orders hold the same gaps"
            before = offset + length
        assert before < self.end, "the last gap ends before the end"
        assert self._free == sum(self._by_offset.values()), "the gaps are counted"
        wide = sum(length for length in self._by_offset.values() if length >= self._wide)
        assert self._wide_free == wide, "and the wide ones among them"
