"""MemoryDisk against plain bytes."""

from itertools import pairwise

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from nbdvde.disk import ALLOCATION, ALLOCATION_DEPTH, Disk, Status
from nbdvde.errors import NoSpaceError
from nbdvde.memory import CHUNK, MemoryDisk

SIZE = 5 * CHUNK + 777


def contents(disk: Disk, offset: int, length: int) -> bytes:
    pieces = disk.read_nowait(offset, length)
    assert pieces is not None
    return b"".join(bytes(piece) for piece in pieces)


def status(disk: Disk, offset: int, length: int, limit: int = 1000, context: str = ALLOCATION) -> list[tuple[int, int]]:
    return trio.run(disk.status, context, offset, length, limit)


ENDS = st.one_of(
    st.integers(0, SIZE), st.sampled_from([0, CHUNK, 2 * CHUNK, 4 * CHUNK, 5 * CHUNK, SIZE]), st.integers(0, 600)
)


class Model(RuleBasedStateMachine):
    """Every operation on the disk and on a bytearray; which bytes must be data or allocated is kept beside."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = MemoryDisk(SIZE)
        self.bytes = bytearray(SIZE)
        self.allocated = bytearray(SIZE)

    def range(self, a: int, b: int) -> tuple[int, int]:
        start, end = min(a, b), max(a, b)
        return (start, end) if start < end else (0, 1)

    @rule(a=ENDS, b=ENDS, fill=st.integers(1, 255), owned=st.booleans(), frozen=st.booleans())
    def write(self, a: int, b: int, fill: int, owned: bool, frozen: bool) -> None:
        start, end = self.range(a, b)
        data = bytes([fill]) * (end - start)
        page = bytearray(data)
        assert self.disk.write_nowait(start, memoryview(data if frozen else page), owned=owned)
        if not owned:
            page[:] = bytes(len(page))
        self.bytes[start:end] = data
        self.allocated[start:end] = b"\1" * (end - start)

    @rule(a=ENDS, b=ENDS, allocate=st.booleans(), trim=st.booleans())
    def zero(self, a: int, b: int, allocate: bool, trim: bool) -> None:
        start, end = self.range(a, b)
        if trim:
            assert self.disk.trim_nowait(start, end - start)
        else:
            assert self.disk.zero_nowait(start, end - start, allocate=allocate)
        self.bytes[start:end] = bytes(end - start)
        self.allocated[start:end] = bytes([allocate and not trim]) * (end - start)

    @rule(a=ENDS, b=ENDS, limit=st.integers(1, 4))
    def look(self, a: int, b: int, limit: int) -> None:
        start, end = self.range(a, b)
        assert contents(self.disk, start, end - start) == self.bytes[start:end]
        extents = status(self.disk, start, end - start)
        assert status(self.disk, start, end - start, limit) == extents[:limit]
        depths = status(self.disk, start, end - start, context=ALLOCATION_DEPTH)
        assert sum(size for size, depth in depths if not depth) == sum(
            size for size, flags in extents if flags & Status.HOLE
        )
        self.check(start, end, extents)

    def check(self, start: int, end: int, extents: list[tuple[int, int]]) -> None:
        assert all(one[1] != other[1] for one, other in pairwise(extents))
        for length, flags in extents:
            assert length > 0
            if flags & Status.ZERO:
                assert not any(self.bytes[start : start + length])
            if flags & Status.HOLE:
                assert not any(self.allocated[start : start + length])
            start += length
        assert start == end

    @invariant()
    def all_the_same(self) -> None:
        assert contents(self.disk, 0, SIZE) == self.bytes


Model.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestModel = Model.TestCase


def test_a_huge_disk_costs_nothing() -> None:
    disk = MemoryDisk(1 << 60)
    assert disk.trim_nowait(0, 1 << 32)
    assert disk.zero_nowait((1 << 60) - (1 << 32), 1 << 32, allocate=False)
    assert disk.allocated_bytes == 0
    assert disk.read_nowait((1 << 60) - 10, 10) == (10,)


def test_long_requests_cost_what_is_allocated() -> None:
    """With extended headers one request may be about the whole disk."""
    disk = MemoryDisk(1 << 62)
    disk.write_nowait((1 << 61) + 5, memoryview(b"x"), owned=False)
    hole = Status.HOLE | Status.ZERO
    rest = (1 << 61) - CHUNK
    assert status(disk, 0, 1 << 62) == [(1 << 61, hole), (CHUNK, Status.DATA), (rest, hole)]
    assert status(disk, 0, 1 << 62, 2) == [(1 << 61, hole), (CHUNK, Status.DATA)]
    assert status(disk, 7, (1 << 61) + 1, context=ALLOCATION_DEPTH) == [((1 << 61) - 7, 0), (8, 1)]
    disk.trim_nowait(0, 1 << 62)
    assert disk.allocated_bytes == 0
    with pytest.raises(NoSpaceError):
        disk.zero_nowait(1, 1 << 61, allocate=True)
    assert disk.allocated_bytes == 0


def test_holes_come_back_when_chunks_are_zeroed_or_trimmed() -> None:
    disk = MemoryDisk(SIZE)
    disk.write_nowait(0, memoryview(bytes(SIZE)), owned=False)
    assert status(disk, 0, SIZE) == [(SIZE, Status.DATA)]
    disk.trim_nowait(CHUNK, 2 * CHUNK)
    disk.zero_nowait(5 * CHUNK, 777, allocate=False)
    hole = Status.HOLE | Status.ZERO
    assert status(disk, 0, SIZE) == [
        (CHUNK, Status.DATA), (2 * CHUNK, hole), (2 * CHUNK, Status.DATA), (777, hole),
    ]  # fmt: skip
    assert disk.allocated_bytes == 3 * CHUNK


def test_allocated_zeroes_are_zero_but_no_hole() -> None:
    disk = MemoryDisk(SIZE)
    disk.zero_nowait(0, CHUNK, allocate=True)
    assert status(disk, 0, CHUNK) == [(CHUNK, Status.ZERO)]
    disk.write_nowait(5, memoryview(b"x"), owned=False)
    disk.zero_nowait(CHUNK, CHUNK, allocate=True)
    assert contents(disk, 0, 7) == b"\0\0\0\0\0x\0"
    assert contents(disk, CHUNK, CHUNK) == bytes(CHUNK)


def test_a_large_page_given_away_is_not_copied() -> None:
    disk = MemoryDisk(SIZE)
    page = bytearray(3 * CHUNK)
    disk.write_nowait(CHUNK, memoryview(page), owned=True)
    page[CHUNK] = 9
    assert contents(disk, 2 * CHUNK, 1) == b"\x09"


def test_reads_show_pages_without_a_copy() -> None:
    disk = MemoryDisk(SIZE)
    disk.write_nowait(0, memoryview(b"a" * CHUNK), owned=False)
    pieces = disk.read_nowait(0, 10)
    assert pieces is not None
    disk.write_nowait(0, memoryview(b"b"), owned=False)
    assert isinstance(pieces[0], memoryview)
    assert bytes(pieces[0]) == b"baaaaaaaaa"


async def test_waiting_forms_do_the_same() -> None:
    disk = MemoryDisk(4096, "other", read_only=True)
    assert (disk.name, disk.size, disk.read_only) == ("other", 4096, True)
    await disk.write(1, memoryview(b"abc"))
    await disk.zero(2, 1)
    await disk.cache(0, 10)
    await disk.flush()
    assert [bytes(piece) for piece in await disk.read(0, 5) if not isinstance(piece, int)] == [b"\0a\0c\0"]
    await disk.trim(0, 4096)
    assert await disk.read(0, 4096) == (4096,)
    assert await disk.status(ALLOCATION, 0, 4096, 9) == [(4096, Status.HOLE | Status.ZERO)]
