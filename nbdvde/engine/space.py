"""Free extents of the image file, on sorted containers: finding and freeing are O(log n), neighbours coalesce."""

from sortedcontainers import SortedDict, SortedSet

from nbdvde.errors import NoSpaceError

_NO_LIMIT = 1 << 63


class FreeSpace:
    """The unused ranges of [start, limit). Everything past `end` is free as well, until the limit.

    Kept twice: by offset, to coalesce, and by (length, offset), to find the smallest that fits.
    """

    def __init__(self, start: int, limit: int | None = None, reserve: int = 0) -> None:
        """Without a limit there is always room; `reserve` bytes of it are not for everyone."""
        self._by_offset: SortedDict[int, int] = SortedDict()
        self._by_length: SortedSet[tuple[int, int]] = SortedSet()
        self._limit, self.reserve_bytes = limit or _NO_LIMIT, reserve
        self._start = start
        self._free = 0
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
    def in_reserve(self) -> bool:
        """Whether only (a part of) the reserve is left."""
        return self.room < self.reserve_bytes

    def is_short(self, parts: int) -> bool:
        """Whether less than one in so many parts of the limit is left, reserve apart."""
        return self._limit != _NO_LIMIT and (self.room - self.reserve_bytes) * parts < self._limit

    def allocate(self, length: int, *, reserved: bool = True) -> int:
        """Offset of `length` bytes that are now in use: the tightest gap (O(log n)), or else the end.

        Not `reserved`, the reserve is left alone. Raises NoSpaceError.
        """
        if not reserved and self.room - length < self.reserve_bytes:
            raise NoSpaceError("image", "its capacity is used up", "trim or delete data")
        at = self._by_length.bisect_left((length, 0))
        if at == len(self._by_length):
            return self._extend(length)
        size, offset = self._by_length[at]
        self._take_gap(offset, size)
        if size > length:
            self._add_gap(offset + length, size - length)
        return offset

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
        self._by_offset[offset] = length
        self._by_length.add((length, offset))

    def _take_gap(self, offset: int, length: int) -> None:
        self._free -= length
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
