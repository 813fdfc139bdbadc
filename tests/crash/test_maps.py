"""A crashed image of which the log changes a damaged part of the map: what is intact can be read, and nothing else."""

import errno

import pytest

from nbdvde.disk import BLOCK
from nbdvde.engine import recovery
from nbdvde.engine.access import format_storage, open_storage
from nbdvde.engine.check import check_storage
from nbdvde.engine.layout import UnitRef
from nbdvde.engine.lbamap import LEAF_BLOCKS
from nbdvde.engine.volume import Volume
from nbdvde.errors import DamageError, NbdErrno, PoisonedError, UnreadableError
from tests.crash.oracle import master_of
from tests.crash.recording import FrozenStorage, RecordingStorage
from tests.crash.session import KEY

LEAVES = 600
"""Of the disk, so that its map has two levels of nodes."""


def page(number: int) -> bytes:
    return number.to_bytes(2, "little") * (BLOCK // 2)


async def crashed() -> bytes:
    """Blocks 0 to 9 of leaves 0 and 1 in a checkpoint; 3 and 4 of leaf 0 written again, 6 trimmed, and a crash."""
    storage = RecordingStorage()
    format_storage(storage, LEAVES * LEAF_BLOCKS * BLOCK, KEY, extent_bytes=BLOCK, segment_bytes=256 << 10)
    image = await open_storage(storage, KEY)
    disk = image.disk()
    for leaf in range(2):
        for number in range(10):
            await disk.write((leaf * LEAF_BLOCKS + number) * BLOCK, memoryview(page(100 * leaf + number + 1)))
    await image.flush()
    await image.checkpoint()
    await disk.write(3 * BLOCK, memoryview(page(1003) + page(1004)))
    await disk.trim(6 * BLOCK, BLOCK)
    await image.flush()
    after = bytes(storage.image)
    await image.close()
    return after


def damaged(image: bytes, level: int) -> bytes:
    """With a bit of leaf 0 flipped, or of a node above it."""
    loaded = recovery.load(FrozenStorage(image), master_of, replay=False)
    lbamap = loaded.catalogue.members[1].map
    ref = lbamap.root
    for above in range(lbamap.height, level, -1):
        assert ref
        lbamap.base.install(above, 0, loaded.segments.read_unit(ref, 5))
        ref = lbamap.base.find(above - 1, 0)
    assert isinstance(ref, UnitRef)
    at = loaded.segments.find(ref.slot).segment.offset + ref.position
    return image[:at] + bytes([image[at] ^ 1]) + image[at + 1 :]


async def block(disk: Volume, number: int, *, wait: bool) -> bytes:
    pieces = await disk.read(number * BLOCK, BLOCK) if wait else disk.read_nowait(number * BLOCK, BLOCK)
    assert pieces is not None
    return b"".join(map(bytes, pieces))


@pytest.mark.parametrize("level", [0, 1, 2])
async def test_what_is_intact_can_be_read(level: int) -> None:
    image = await open_storage(FrozenStorage(damaged(await crashed(), level)), KEY, read_only=True)
    disk = image.disk()
    for wait in (True, False):
        assert await block(disk, 3, wait=wait) == page(1003)
        assert await block(disk, 4, wait=wait) == page(1004)
        assert await block(disk, 6, wait=wait) == bytes(BLOCK)
        for number in (0, 5, 9, 10, *([LEAF_BLOCKS] if level else [])):
            with pytest.raises(DamageError) as caught:
                await block(disk, number, wait=wait)
            assert caught.value.nbd_errno is NbdErrno.EIO
        if level == 0:
            assert await block(disk, LEAF_BLOCKS + 9, wait=wait) == page(110)
    with pytest.raises(DamageError):
        await disk.read(0, 10 * BLOCK)
    await image.close()


class Unreadable(RecordingStorage):
    """A device that cannot read one sector."""

    def __init__(self, image: bytes, at: int) -> None:
        super().__init__(image)
        self._at = at

    def read(self, offset: int, length: int) -> bytes:
        if offset <= self._at < offset + length:
            raise OSError(errno.EIO, "bad sector")
        return super().read(offset, length)

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        return self.read(offset, length)


async def lost(disk: Volume, number: int) -> None:
    for wait in (True, False):
        with pytest.raises(DamageError) as caught:
            await block(disk, number, wait=wait)
        assert caught.value.nbd_errno is NbdErrno.EIO


async def check_written(disk: Volume, level: int) -> None:
    """What was written since is there, the rest below the damage is an error, and elsewhere nothing happened."""
    assert await block(disk, 3, wait=True) == page(1003)
    assert await block(disk, 6, wait=True) == bytes(BLOCK)
    assert await block(disk, 8, wait=True) == page(2008)
    assert await block(disk, 599 * LEAF_BLOCKS, wait=True) == page(2009)
    for number in (0, 5, 9, 10):
        await lost(disk, number)
    if level:
        await lost(disk, LEAF_BLOCKS)
    else:
        assert await block(disk, LEAF_BLOCKS + 9, wait=True) == page(110)


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("crash", [True, False])
async def test_writing_goes_on_and_what_is_lost_stays_an_error(level: int, crash: bool) -> None:
    storage = RecordingStorage(damaged(await crashed(), level))
    image = await open_storage(storage, KEY)
    await image.disk().write(8 * BLOCK, memoryview(page(2008)))
    await image.disk().write(599 * LEAF_BLOCKS * BLOCK, memoryview(page(2009)))
    await image.flush()
    after = bytes(storage.image)
    await check_written(image.disk(), level)
    with pytest.raises(DamageError):
        await image.disk().write(9 * BLOCK + 512, memoryview(b"x" * 512))
    await image.close()
    again = await open_storage(RecordingStorage(after if crash else bytes(storage.image)), KEY)
    await check_written(again.disk(), level)
    report = await again.check()
    named = set()
    for error in report.errors:
        if error.disk is not None and error.offset is not None and error.length is not None:
            named |= set(range(error.offset // BLOCK, (error.offset + error.length) // BLOCK))
    assert named.isdisjoint({3, 4, 6, 8, 599 * LEAF_BLOCKS}), "what was written since"
    assert named >= {0, 5, 9, 10}
    assert level or named == set(range(LEAF_BLOCKS)) - {3, 4, 6, 8}
    await again.close()


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("flush", [True, False], ids=["flushed", "in the background"])
async def test_a_write_that_meets_damage_fails_nothing_else(level: int, flush: bool) -> None:
    storage = RecordingStorage(damaged(await stopped(), level))
    image = await open_storage(storage, KEY)
    disk = image.disk()
    await disk.write(599 * LEAF_BLOCKS * BLOCK, memoryview(page(2009)))
    await disk.write(8 * BLOCK, memoryview(page(2008)))
    await disk.write(3 * BLOCK, memoryview(page(1003)))
    await disk.zero(6 * BLOCK, BLOCK)
    if flush:
        await image.flush()
        await check_written(disk, level)
        await disk.write(598 * LEAF_BLOCKS * BLOCK, memoryview(page(7)))
    await image.close()
    again = await open_storage(RecordingStorage(bytes(storage.image)), KEY)
    await check_written(again.disk(), level)
    await again.disk().zero(0, 300 * LEAF_BLOCKS * BLOCK)
    await again.flush()
    for number in (0, 3, 9, LEAF_BLOCKS):
        assert await block(again.disk(), number, wait=True) == bytes(BLOCK)
    await again.close()


async def stopped() -> bytes:
    storage = RecordingStorage(await crashed())
    await (await open_storage(storage, KEY)).close()
    return bytes(storage.image)


async def test_what_the_device_cannot_read_is_not_given_up() -> None:
    """It may be read again one day, so it is not replaced."""
    image = await stopped()
    at = next(at for at, (one, two) in enumerate(zip(image, damaged(image, 0), strict=True)) if one != two)
    opened = await open_storage(Unreadable(image, at), KEY)
    await opened.disk().write(8 * BLOCK, memoryview(page(2008)))
    with pytest.raises(UnreadableError, match="map leaf 0 of disk: cannot be read"):
        await opened.flush()
    assert opened.poisoned
    with pytest.raises(PoisonedError):
        await opened.close()


@pytest.mark.parametrize(("level", "what"), [(0, "map leaf 0 of disk"), (2, "map node 0 of level 2 of disk")])
async def test_it_is_not_opened_for_writing_while_the_device_cannot_read_it(level: int, what: str) -> None:
    image = await crashed()
    at = next(at for at, (one, two) in enumerate(zip(image, damaged(image, level), strict=True)) if one != two)
    storage = Unreadable(image, at)
    with pytest.raises(UnreadableError, match=what):
        await open_storage(storage, KEY)
    assert bytes(storage.image) == image
    reading = await open_storage(Unreadable(image, at), KEY, read_only=True)
    assert await block(reading.disk(), 3, wait=True) == page(1003)
    await lost(reading.disk(), 9)
    await reading.close()


@pytest.mark.parametrize("level", [0, 1, 2])
async def test_check_says_what_is_lost(level: int) -> None:
    report = check_storage(FrozenStorage(damaged(await crashed(), level)), master_of)
    assert not report.ok
    assert any(error.disk == "disk" and error.offset == 0 and error.length for error in report.errors)
    assert report.units_verified > 3, "it goes on with the rest"
