"""A disk in memory: the reference model for tests, and the speed no image can exceed."""

from collections.abc import Iterable, Iterator, Sequence

from nbdvde.disk import ALLOCATION_DEPTH, Disk, Piece, Status
from nbdvde.errors import NoSpaceError

_SHIFT = 16
CHUNK = 1 << _SHIFT
"""Bytes allocated at a time."""
_WITHIN = CHUNK - 1
_ZEROES = memoryview(bytes(CHUNK))
_MOST_ZEROES = 1 << 18
"""Chunks that one request may allocate without sending them; they cost 100 bytes each."""


class MemoryDisk(Disk):
    """A thin disk in a dictionary of chunks; every `*_nowait` form does its job.

    A chunk is missing (a hole), a writable view (data), or a read-only one, which is replaced by a copy before it is
    changed: an allocated zero shares `_ZEROES`. A large write that was given away is kept as views of its buffer, which
    lives as long as one of them.
    """

    def __init__(self, size: int, name: str = "disk", *, read_only: bool = False) -> None:
        self.name, self.size, self.read_only = name, size, read_only
        self._chunks: dict[int, memoryview] = {}

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the chunks that are not holes."""
        return len(self._chunks) * CHUNK

    def read_nowait(self, offset: int, length: int) -> Sequence[Piece]:
        """See `Disk`."""
        start = offset & _WITHIN
        end = start + length
        if end > CHUNK:
            return self._read_chunks(offset, length)
        chunk = self._chunks.get(offset >> _SHIFT)
        return (length,) if chunk is None else (chunk[start:end],)

    async def read(self, offset: int, length: int) -> Sequence[Piece]:
        """See `Disk`."""
        return self.read_nowait(offset, length)

    def write_nowait(self, offset: int, data: memoryview, *, owned: bool) -> bool:
        """See `Disk`."""
        start = offset & _WITHIN
        end = start + len(data)
        if end > CHUNK:
            self._write_chunks(offset, data, owned)
            return True
        chunk = self._chunks.get(offset >> _SHIFT)
        if chunk is None or chunk.readonly:
            chunk = self._writable(offset >> _SHIFT)
        chunk[start:end] = data
        return True

    async def write(self, offset: int, data: memoryview, *, owned: bool = False) -> None:
        """See `Disk`."""
        self.write_nowait(offset, data, owned=owned)

    def zero_nowait(self, offset: int, length: int, *, allocate: bool) -> bool:
        """See `Disk`."""
        end = offset + length
        if end == self.size:
            end = -(-end // CHUNK) * CHUNK
        first, last = -(-offset // CHUNK), end // CHUNK
        if first >= last:
            self._zero_parts(offset, end, allocate)
            return True
        if allocate and last - first > _MOST_ZEROES:
            raise NoSpaceError("write zeroes", f"memory keeps at most {_MOST_ZEROES * CHUNK >> 30} GiB at a time")
        self._zero_parts(offset, first * CHUNK, allocate)
        self._zero_parts(last * CHUNK, end, allocate)
        if allocate:
            self._chunks.update(dict.fromkeys(range(first, last), _ZEROES))
        else:
            self._drop(first, last)
        return True

    async def zero(self, offset: int, length: int, *, allocate: bool = False) -> None:
        """See `Disk`."""
        self.zero_nowait(offset, length, allocate=allocate)

    def flush_nowait(self, mark: int) -> bool:
        return True

    async def flush(self, mark: int | None = None, *, alone: bool = False) -> None:
        """See `Disk`; memory is as durable as it gets."""

    async def status(self, context: str, offset: int, length: int, max_extents: int) -> list[tuple[int, int]]:
        """See `Disk`."""
        extents: list[tuple[int, int]] = []
        end, hole = offset + length, self._number(None, context)
        for index in self._allocated(offset >> _SHIFT, -(-end // CHUNK)):
            start, stop = max(index << _SHIFT, offset), min((index + 1) << _SHIFT, end)
            _extend(extents, start - offset, hole)
            _extend(extents, stop - start, self._number(self._chunks[index], context))
            offset = stop
            if len(extents) > max_extents:
                return extents[:max_extents]
        _extend(extents, end - offset, hole)
        return extents[:max_extents]

    def _number(self, chunk: memoryview | None, context: str) -> int:
        """What a context says of a chunk."""
        if context == ALLOCATION_DEPTH:
            return int(chunk is not None)
        if chunk is None:
            return int(Status.HOLE | Status.ZERO)
        return int(Status.ZERO if chunk is _ZEROES else Status.DATA)

    def _allocated(self, first: int, last: int) -> Iterable[int]:
        """Indexes of the chunks in [first, last) that are not holes, in order; in time bounded by what is allocated."""
        chunks = self._chunks
        if last - first < len(chunks):
            return (index for index in range(first, last) if index in chunks)
        return sorted(index for index in chunks if first <= index < last)

    def _read_chunks(self, offset: int, length: int) -> list[Piece]:
        chunks = self._chunks
        pieces: list[Piece] = []
        for index, start, end in _spans(offset, length):
            chunk = chunks.get(index)
            pieces.append(end - start if chunk is None else chunk[start:end])
        return pieces

    def _write_chunks(self, offset: int, data: memoryview, owned: bool) -> None:
        done = 0
        for index, start, end in _spans(offset, len(data)):
            part = data[done : done + end - start]
            done += end - start
            if end - start == CHUNK:
                self._chunks[index] = part if owned else memoryview(bytearray(part))
            else:
                self._writable(index)[start:end] = part

    def _writable(self, index: int) -> memoryview:
        """The chunk, allocated, and private if it was not."""
        chunk = self._chunks.get(index)
        if chunk is None or chunk.readonly:
            chunk = self._chunks[index] = memoryview(bytearray(CHUNK if chunk is None else chunk))
        return chunk

    def _zero_parts(self, offset: int, end: int, allocate: bool) -> None:
        """Zero less than whole chunks."""
        for index, start, stop in _spans(offset, end - offset):
            chunk = self._chunks.get(index)
            if chunk is None and allocate:
                self._chunks[index] = _ZEROES
            elif chunk is not None and chunk is not _ZEROES:
                self._writable(index)[start:stop] = _ZEROES[: stop - start]

    def _drop(self, first: int, last: int) -> None:
        """Make holes of the chunks in [first, last), in time bounded by what is allocated."""
        for index in list(self._allocated(first, last)):
            del self._chunks[index]


def _extend(extents: list[tuple[int, int]], length: int, number: int) -> None:
    """Add an extent, which may be empty, and merge it with the last."""
    if extents and extents[-1][1] == number:
        extents[-1] = extents[-1][0] + length, number
    elif length:
        extents.append((length, number))


def _spans(offset: int, length: int) -> Iterator[tuple[int, int, int]]:
    """(chunk index, start, end) of the parts of a range, start and end within the chunk."""
    end = offset + length
    while offset < end:
        index, start = divmod(offset, CHUNK)
        stop = min(CHUNK, start + end - offset)
        yield index, start, stop
        offset += stop - start
