"""The metadata contexts of a volume tell how each of its blocks is stored."""

import random

import pytest

from nbdvde.disk import ALLOCATION, ALLOCATION_DEPTH, BLOCK
from nbdvde.engine import status
from nbdvde.engine.access import format_storage, open_storage
from nbdvde.engine.lbamap import LEAF_BLOCKS
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


async def test_holes_cost_nothing() -> None:
    """With extended headers one request may be about a whole disk, most of it never written."""
    size, far = 1 << 55, 1 << 50
    storage = RecordingStorage()
    format_storage(storage, size, KEY)
    image = await open_storage(storage, KEY)
    await image.disk().write(far, memoryview(NOISE))
    await image.close()
    image = await open_storage(RecordingStorage(bytes(storage.image)), KEY)
    disk = image.disk()
    hole, data = 3, len(NOISE)
    assert await disk.status(ALLOCATION, 0, size, 99) == [(far, hole), (data, 0), (size - far - data, hole)]
    await disk.write(far // 2, memoryview(NOISE))
    await disk.zero(far - BLOCK, BLOCK, allocate=True)
    expected = [
        (far // 2, hole), (data, 0), (far // 2 - data - BLOCK, hole), (BLOCK, 2), (data, 0), (size - far - data, hole)
    ]  # fmt: skip
    assert await disk.status(ALLOCATION, 0, size, 99) == expected
    assert await disk.status(ALLOCATION, 0, size, 3) == expected[:3]
    assert await disk.status(ALLOCATION, 5, size - 5, 1) == [(far // 2 - 5, hole)]
    await image.flush()
    assert await disk.status(ALLOCATION, 0, size, 99) == expected
    await image.close()


async def test_an_answer_is_cut_where_too_many_leaves_would_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "_LOOKED_AT", 3)
    leaf = LEAF_BLOCKS * BLOCK
    storage = RecordingStorage()
    format_storage(storage, 100 * leaf, KEY)
    image = await open_storage(storage, KEY)
    disk = image.disk()
    await disk.zero(10 * leaf, 7 * leaf, allocate=True)
    await disk.write(50 * leaf, memoryview(NOISE))
    for _ in range(2):
        assert await disk.status(ALLOCATION, 0, 100 * leaf, 99) == [(10 * leaf, 3), (3 * leaf, 2)]
        assert await disk.status(ALLOCATION, 13 * leaf, 87 * leaf, 99) == [(3 * leaf, 2)]
        rest = 50 * leaf - len(NOISE)
        found = await disk.status(ALLOCATION, 16 * leaf, 84 * leaf, 99)
        assert found == [(leaf, 2), (33 * leaf, 3), (len(NOISE), 0), (rest, 3)]
        await image.flush()
    await image.close()
