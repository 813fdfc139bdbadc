"""Checkpoints that find no space, and checkpoints that are not needed any more."""

import pytest
import trio

from nbdvde.disk import BLOCK
from nbdvde.engine import checkpointer
from nbdvde.engine.access import format_storage, open_storage
from nbdvde.engine.checkpointer import DIRTY_LEAVES_MAX
from nbdvde.engine.image import Image
from nbdvde.engine.lbamap import LEAF_BLOCKS
from nbdvde.engine.space import FreeSpace
from nbdvde.errors import NoSpaceError
from tests.crash.oracle import observe
from tests.crash.recording import FrozenStorage, RecordingStorage
from tests.crash.session import KEY, digest

PAGE = b"x" * BLOCK


async def made() -> tuple[RecordingStorage, Image]:
    storage = RecordingStorage()
    format_storage(storage, 64 << 20, KEY, segment_bytes=64 << 10)
    return storage, await open_storage(storage, KEY, checkpoint_bytes=256 << 10)


@pytest.mark.parametrize("failing", range(3))
async def test_without_room_in_the_image_a_checkpoint_changes_nothing(
    failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, image = await made()
    disk = image.disk()
    pages = {}
    for number in range(0, 40 * 512, 512):  # so many leaves that two segments are needed
        pages[number] = bytes(PAGE)
        await disk.write(number * BLOCK // 2, memoryview(PAGE))
    await image.flush()
    before, calls, allocate = set(image.segments.states), 0, FreeSpace.allocate

    def limited(space: FreeSpace, length: int, **options: bool) -> int:
        nonlocal calls
        calls += 1
        if calls > failing:
            raise NoSpaceError("image", "its capacity is used up")
        return allocate(space, length, **options)

    free = image.segments.space.free_bytes, image.segments.space.end
    with monkeypatch.context() as patch:
        patch.setattr(FreeSpace, "allocate", limited)
        with pytest.raises(NoSpaceError):
            await image.checkpoint()
    assert calls > failing
    assert set(image.segments.states) == before
    assert (image.segments.space.free_bytes, image.segments.space.end) == free
    assert disk.map.changed == 20
    await disk.write(0, memoryview(bytes(PAGE)))
    await image.flush()
    await image.checkpoint()
    assert not disk.map.changed
    await image.close()
    expected = {number // 2: page for number, page in pages.items()}
    assert observe(FrozenStorage(bytes(storage.image))) == digest(expected)


async def test_a_checkpoint_counts_what_it_wrote_for_snapshots() -> None:
    _, image = await made()
    for number in range(5):
        await image.disk().write(0, memoryview(number.to_bytes(2, "little") * 2048))
        await image.volumes.snapshot("disk", f"s{number}")
    await image.disk().write(0, memoryview(PAGE))
    await image.flush()
    await image.checkpoint()
    before = {slot: state.live for slot, state in image.segments.states.items()}
    await image.clean(2.0)  # counts what is in use
    for slot, state in image.segments.states.items():
        assert state.live <= before.get(slot, state.live), "counts are upper bounds"
    await image.close()


async def test_changed_leaves_of_all_disks_make_a_checkpoint_due() -> None:
    """What one replay has to hold, and one checkpoint has to write, is all of them together."""
    storage = RecordingStorage()
    format_storage(storage, 1 << 40, KEY, segment_bytes=64 << 10)
    image = await open_storage(storage, KEY)
    assert image._writer
    await image.volumes.create("other", 1 << 40)
    before, half = image._checkpointer.count, DIRTY_LEAVES_MAX // 2 * LEAF_BLOCKS * BLOCK
    await image.disk().zero(0, half - LEAF_BLOCKS * BLOCK, allocate=True)
    await image.disk("other").zero(0, half - LEAF_BLOCKS * BLOCK, allocate=True)
    await image.flush()
    assert not image._checkpointer.is_due(image._writer)
    await image.disk("other").zero(half, 2 * LEAF_BLOCKS * BLOCK, allocate=True)
    await image.flush()
    await image._checkpointer.keep_up(image._writer)
    assert image._checkpointer.count == before + 1
    await image.close()


async def test_changed_leaves_of_snapshots_make_a_checkpoint_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointer, "DIRTY_LEAVES_MAX", 20)
    _, image = await made()
    before = image._checkpointer.count
    for number in range(100):
        await image.disk().write(0, memoryview(number.to_bytes(2, "little") * 2048))
        await image.volumes.snapshot("disk", f"s{number}")
    assert image._writer
    await image._checkpointer.keep_up(image._writer)
    assert before + 5 < image._checkpointer.count < before + 50
    await image.close()


async def test_a_checkpoint_that_another_one_made_needless_is_not_written() -> None:
    _, image = await made()
    assert image._writer
    writer, checkpoints = image._writer, image._checkpointer
    for number in range(70):
        await image.disk().write(number * BLOCK, memoryview(number.to_bytes(2, "little") * 2048))
    writer.log.counters.bytes_stored += 256 << 10
    assert checkpoints.is_due(writer)
    before = image.superblock.sequence
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(checkpoints.run_if_due, writer)
    assert image.superblock.sequence == before + 1
    await image.close()
