"""Checkpoints that find no space, and checkpoints that are not needed any more."""

import pytest
import trio

from nbdvde.disk import BLOCK
from nbdvde.engine.access import format_storage, open_storage
from nbdvde.engine.image import Image
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
    assert not disk.map.frozen
    assert disk.map.dirty
    await image.checkpoint()
    assert not disk.map.dirty
    await image.close()
    expected = {number * BLOCK // 2 // BLOCK: page for number, page in pages.items()}
    assert observe(FrozenStorage(bytes(storage.image))) == digest(expected)


async def test_a_checkpoint_that_another_one_made_needless_is_not_written() -> None:
    _, image = await made()
    assert image._writer
    writer, checkpointer = image._writer, image._checkpointer
    for number in range(70):
        await image.disk().write(number * BLOCK, memoryview(number.to_bytes(2, "little") * 2048))
    writer.log.counters.bytes_stored += 256 << 10
    assert checkpointer.is_due(writer)
    before = image.superblock.sequence
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(checkpointer.run_if_due, writer)
    assert image.superblock.sequence == before + 1
    await image.close()
