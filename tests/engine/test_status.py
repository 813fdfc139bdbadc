"""The metadata contexts of a volume tell how each of its blocks is stored."""

import random

from nbdvde.disk import ALLOCATION, ALLOCATION_DEPTH, BLOCK
from nbdvde.engine.access import format_storage, open_storage
from nbdvde.engine.status import BUFFERED, COMPRESSED, EXTENT, ZERO
from tests.crash.recording import RecordingStorage
from tests.crash.session import KEY

SIZE = 8 << 20
NOISE = random.Random(1).randbytes(8 * BLOCK)


async def test_what_is_where() -> None:
    storage = RecordingStorage()
    format_storage(storage, SIZE, KEY)
    image = await open_storage(storage, KEY)
    disk = image.disk()
    await disk.write(0, memoryview(b"text" * (2 * BLOCK)))
    await image.flush()
    await disk.write(8 * BLOCK, memoryview(NOISE))
    await image.flush()
    await disk.zero(16 * BLOCK, 4 * BLOCK, allocate=True)
    await image.flush()
    await disk.write(20 * BLOCK, memoryview(b"late" * BLOCK))
    rest = SIZE - 24 * BLOCK
    assert await disk.status(EXTENT, 0, SIZE, 99) == [
        (8 * BLOCK, COMPRESSED), (8 * BLOCK, 0), (4 * BLOCK, ZERO), (4 * BLOCK, BUFFERED), (rest, ZERO)
    ]  # fmt: skip
    assert await disk.status(ALLOCATION_DEPTH, 0, SIZE, 99) == [(24 * BLOCK, 1), (rest, 0)]
    assert await disk.status(ALLOCATION, 0, SIZE, 99) == [(16 * BLOCK, 0), (4 * BLOCK, 2), (4 * BLOCK, 0), (rest, 3)]
    assert await disk.status(EXTENT, BLOCK + 5, 8 * BLOCK, 1) == [(7 * BLOCK - 5, COMPRESSED)]
    await image.close()


async def test_indexes_are_read_where_they_have_to_be() -> None:
    """After reopening, what is known of segments is in the image only."""
    storage = RecordingStorage()
    format_storage(storage, SIZE, KEY)
    image = await open_storage(storage, KEY)
    await image.disk().write(0, memoryview(NOISE))
    await image.flush()
    await image.disk().write(64 * BLOCK, memoryview(b"text" * BLOCK))
    await image.close()
    image = await open_storage(RecordingStorage(bytes(storage.image)), KEY)
    assert await image.disk().status(EXTENT, 0, SIZE, 99) == [
        (8 * BLOCK, 0), (56 * BLOCK, ZERO), (4 * BLOCK, COMPRESSED), (SIZE - 68 * BLOCK, ZERO)
    ]  # fmt: skip
    await image.close()
