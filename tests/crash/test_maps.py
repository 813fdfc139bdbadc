"""A crashed image of which the log changes a damaged part of the map: what is intact can be read, and nothing else."""

import pytest

from nbdvde.disk import BLOCK
from nbdvde.engine import recovery
from nbdvde.engine.access import format_storage, open_storage
from nbdvde.engine.check import check_storage
from nbdvde.engine.layout import UnitRef
from nbdvde.engine.lbamap import LEAF_BLOCKS
from nbdvde.engine.volume import Volume
from nbdvde.errors import DamageError, NbdErrno
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
    lbamap = loaded.volumes[1].map
    ref = lbamap.root
    for above in range(lbamap.height, level, -1):
        assert ref
        lbamap.install_node(above, 0, loaded.segments.read_unit(ref, 5))
        ref = lbamap._find(above - 1, 0)
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


@pytest.mark.parametrize(("level", "what"), [(0, "map leaf 0 of disk"), (2, "map node 0 of level 2 of disk")])
async def test_it_cannot_be_opened_for_writing_and_the_error_names_what_is_damaged(level: int, what: str) -> None:
    image = damaged(await crashed(), level)
    storage = RecordingStorage(image)
    with pytest.raises(DamageError, match=what):
        await open_storage(storage, KEY)
    assert bytes(storage.image) == image


@pytest.mark.parametrize("level", [0, 1, 2])
async def test_check_says_what_is_lost(level: int) -> None:
    report = check_storage(FrozenStorage(damaged(await crashed(), level)), master_of)
    assert not report.ok
    assert any(error.disk == "disk" and error.offset == 0 and error.length for error in report.errors)
    assert report.units_verified > 3, "it goes on with the rest"
