"""Zeroing much at once: in pieces, within bounds of memory and space, while others are served."""

import time
import tracemalloc

import pytest
import trio

from nbdvde.disk import ALLOCATION, BLOCK, Status
from nbdvde.engine import volume
from nbdvde.engine.access import format_storage, open_storage
from nbdvde.engine.buffer import ZEROED_LEAVES_MAX
from nbdvde.engine.check import check_storage
from nbdvde.engine.checkpoint import _MetaWriter, map_sizes
from nbdvde.engine.image import Image
from nbdvde.engine.layout import ALLOCATED_ZERO, HOLE, Kind
from nbdvde.engine.lbamap import LEAF_BLOCKS, height_for, uniform_leaf
from nbdvde.engine.recovery import load
from nbdvde.engine.versions import Version
from nbdvde.engine.volume import Volume
from nbdvde.errors import NbdvdeError, NoSpaceError
from tests.crash.oracle import master_of
from tests.crash.recording import FrozenStorage, RecordingStorage
from tests.crash.session import KEY

GIB, TIB = 1 << 30, 1 << 40
LEAF = LEAF_BLOCKS * BLOCK
PAGE = b"x" * BLOCK


async def opened(size: int, limit: int | None = None) -> tuple[RecordingStorage, Image, Volume]:
    storage = RecordingStorage(limit=limit)
    format_storage(storage, size, KEY, segment_bytes=1 << 20)
    image = await open_storage(storage, KEY, buffer_bytes=8 << 20)
    return storage, image, image.disk()


async def allocated(disk: Volume, offset: int) -> bool:
    [(_, status)] = await disk.status(ALLOCATION, offset, BLOCK, 1)
    return status == Status.ZERO


async def test_allocated_zeroes_take_little_space_and_memory() -> None:
    storage, image, disk = await opened(TIB, limit=24 << 20)
    await disk.write(5 * LEAF, memoryview(PAGE))
    tracemalloc.start()
    try:
        await disk.zero(BLOCK, 200 * GIB, allocate=True)
        await image.flush()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20
    assert disk.map.changed < 2 * volume._ZERO_BLOCKS // LEAF_BLOCKS
    for offset, zeroed in ((0, False), (BLOCK, True), (5 * LEAF, True), (200 * GIB, True), (200 * GIB + BLOCK, False)):
        assert await allocated(disk, offset) is zeroed
    await image.close()
    segments = load(FrozenStorage(bytes(storage.image)), master_of).segments.states.values()
    assert sum(state.segment.length for state in segments) < 256 << 10
    report = check_storage(FrozenStorage(bytes(storage.image)), master_of)
    assert report.ok, report.errors


@pytest.mark.parametrize("allocate", [True, False])
async def test_others_are_served_in_between(allocate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume, "_ZERO_BLOCKS", 4 * LEAF_BLOCKS)
    _, image, disk = await opened(TIB)
    for number in range(20):
        await disk.write(number * LEAF, memoryview(PAGE))
    done = False
    async with trio.open_nursery() as nursery:

        async def zero() -> None:
            nonlocal done
            await disk.zero(0, 40 * LEAF, allocate=allocate)
            done = True

        nursery.start_soon(zero)
        while await read(disk, 0) == PAGE:
            await trio.lowlevel.checkpoint()
        assert not done
        assert await read(disk, 19 * LEAF) == PAGE
        await disk.write(39 * LEAF + BLOCK, memoryview(PAGE))
        await disk.write(50 * LEAF, memoryview(PAGE))
        await disk.flush()
        assert not done
    assert await read(disk, 50 * LEAF) == PAGE
    assert await read(disk, 39 * LEAF + BLOCK) == bytes(BLOCK)
    await image.close()


async def read(disk: Volume, offset: int) -> bytes:
    return b"".join(map(bytes, await disk.read(offset, BLOCK)))


@pytest.mark.parametrize("steps", [5, 60, 200])
async def test_one_that_is_cancelled_did_a_part_from_the_start(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume, "_ZERO_BLOCKS", 4 * LEAF_BLOCKS)
    storage, image, disk = await opened(TIB)
    for number in range(400):
        await disk.write(number * LEAF, memoryview(PAGE))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.zero, 0, 400 * LEAF)
        for _ in range(steps):
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    await image.flush()
    found = [await read(disk, number * LEAF) == PAGE for number in range(400)]
    assert found == sorted(found)
    assert sum(found) % 4 == 0
    assert any(found)
    crashed = await open_storage(RecordingStorage(bytes(storage.image)), KEY)
    assert [await read(crashed.disk(), number * LEAF) == PAGE for number in range(400)] == found
    await crashed.close()
    await image.close()


async def test_a_large_trim_costs_what_is_there() -> None:
    _, image, disk = await opened(1 << 60)
    for number in range(512):
        await disk.write(number * (4 << 30), memoryview(PAGE))
    await image.checkpoint()
    begun = time.process_time()
    await disk.trim(0, 2 * TIB)
    assert time.process_time() - begun < 1.0
    await image.flush()
    assert not disk.map.mapped
    await disk.write(1 << 59, memoryview(PAGE))
    begun = time.process_time()
    await disk.trim(0, 1 << 60)
    assert time.process_time() - begun < 4.0
    await image.flush()
    assert not disk.map.mapped
    await image.close()


async def zero_one_by_one(disk: Volume) -> None:
    for offset in range(0, disk.size, 64 * GIB):
        if not disk.zero_nowait(offset, 64 * GIB, allocate=True):
            await disk.zero(offset, 64 * GIB, allocate=True)
        await disk.flush()


async def test_without_checkpoints_allocated_zeroes_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a crash would leave a log that a replay refuses."""
    storage, image, disk = await opened(8 * TIB)
    await disk.write(0, memoryview(PAGE))
    await image.flush()

    def full(*_: object) -> list[int]:
        raise NoSpaceError("image", "is full")

    with monkeypatch.context() as patch:
        patch.setattr("nbdvde.engine.checkpointer.map_sizes", full)
        with pytest.raises(NoSpaceError):
            await zero_one_by_one(disk)
        assert ZEROED_LEAVES_MAX // 2 < disk.map.changed <= ZEROED_LEAVES_MAX
    again = await open_storage(RecordingStorage(bytes(storage.image)), KEY)
    assert await allocated(again.disk(), 0)
    await again.close()
    await disk.zero(7 * TIB, 64 * GIB, allocate=True)
    await image.close()


def test_the_estimate_of_a_checkpoint_is_close() -> None:
    leaves = dict.fromkeys(range(TIB // LEAF), uniform_leaf(ALLOCATED_ZERO))
    leaves |= dict.fromkeys(range(1000), uniform_leaf(HOLE))
    height = height_for(2 * TIB // BLOCK)
    version = Version(height, below=Version(height), leaves=leaves)
    assert sum(map_sizes([version], 16 << 20)) < 16 << 20
    leaves |= {number: leaf[:] for number, leaf in list(leaves.items())[:4096]}
    assert sum(map_sizes([version], 16 << 20)) > 16 << 20


async def test_an_estimate_that_was_too_low_has_a_name() -> None:
    _, image, _ = await opened(TIB)
    with pytest.raises(NbdvdeError, match="takes more space than was reserved"):
        _MetaWriter(image.segments, []).put(Kind.NODE, bytes(BLOCK))
    await image.close()


async def test_a_stop_after_zeroing_much_needs_little_space() -> None:
    storage, image, disk = await opened(TIB, limit=24 << 20)
    await disk.zero(0, 64 * GIB, allocate=True)
    await image.flush()
    storage.limit = len(storage.image) + (4 << 20)
    await image.close()
    report = check_storage(FrozenStorage(bytes(storage.image)), master_of)
    assert report.ok, report.errors
