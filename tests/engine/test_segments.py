"""Segments in memory: what opening costs, what is kept, what a hostile table may ask for."""

from unittest import mock

import pytest

from nbdvde.disk import BLOCK
from nbdvde.engine import sealing, segments
from nbdvde.engine.access import format_storage, open_storage
from nbdvde.engine.image import Image
from nbdvde.engine.layout import DATA_START, KIND_LOG, KIND_META, Segment, TableEntry, UnitRef
from nbdvde.engine.recovery import load
from nbdvde.engine.sealing import derive
from nbdvde.engine.segments import State
from nbdvde.errors import DamageError
from tests.crash.oracle import master_of
from tests.crash.recording import FrozenStorage, RecordingStorage
from tests.crash.session import KEY

BLOCKS = 60
"""Written in each round: several segments."""


def page(number: int) -> bytes:
    return number.to_bytes(8, "little") * (BLOCK // 8)


async def made() -> tuple[RecordingStorage, Image]:
    storage = RecordingStorage()
    format_storage(storage, 4 << 20, KEY, 0, 4096, segment_bytes=64 << 10)
    return storage, await open_storage(storage, KEY)


async def write(image: Image, first: int) -> None:
    for number in range(first, first + BLOCKS):
        await image.disk().write(number * BLOCK, memoryview(page(number + 1)))
    await image.flush()


def in_memory(image: Image) -> list[State]:
    """Log segments with an index in memory, those apart that wait to be used."""
    states = image.segments.states.values()
    return [state for state in states if state.kind == KIND_LOG and state.linked and state.index is not None]


async def test_opening_derives_no_key_of_a_segment_before_it_is_read() -> None:
    storage, image = await made()
    await write(image, 0)
    await image.close()
    with mock.patch.object(sealing, "derive", side_effect=derive) as deriving:
        loaded = load(FrozenStorage(bytes(storage.image)), master_of)
    assert len(loaded.segments.states) > 4
    assert deriving.call_count == 2, "of the superblocks, and of the root"


async def test_indexes_made_since_opening_are_dropped_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_LOADED_BYTES_MAX", 200)
    _, image = await made()
    for first in range(0, 4 * BLOCKS, BLOCKS):
        await write(image, first)
        await image.checkpoint()
    assert len([state for state in image.segments.states.values() if state.kind == KIND_LOG]) > 10
    await image.checkpoint()
    assert image._writer
    closed = [state for state in in_memory(image) if state is not image._writer.log.state]
    assert len(closed) <= 1
    pieces = await image.disk().read(0, 4 * BLOCKS * BLOCK)
    assert b"".join(map(bytes, pieces)) == b"".join(page(number + 1) for number in range(4 * BLOCKS))
    await image.close()


async def test_a_segment_that_closes_without_growing_after_a_checkpoint_is_dropped_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(segments, "_LOADED_BYTES_MAX", 8)
    _, image = await made()
    await write(image, 0)
    await image.checkpoint()
    assert image._writer
    was_open = image._writer.log.state
    await image.disk().write(1 << 20, memoryview(b"".join(bytes(range(n, n + 128)) * 32 for n in range(10))))
    await image.flush()
    assert image._writer.log.state is not was_open
    await image.checkpoint()
    await write(image, 200)
    await image.checkpoint()
    assert was_open.indexed == was_open.units
    assert was_open not in in_memory(image)
    await image.close()


async def test_a_removed_segment_gives_back_what_its_index_took() -> None:
    _, image = await made()
    await write(image, 0)
    await image.checkpoint()
    await image.disk().trim(0, BLOCKS * BLOCK)
    for _ in range(3):
        await image.checkpoint()
    table = image.segments
    assert set(table._loaded) <= set(table.states.values())
    assert table._loaded_bytes == sum(table._loaded.values())
    await image.close()


SEGMENT = Segment(3, 65536, 9, DATA_START, bytes(32))
REF = UnitRef(4, 0, 0, 100)


@pytest.mark.parametrize(
    "entry",
    [
        TableEntry(SEGMENT, None, 65536, 2**32 - 1, 1, KIND_META),
        TableEntry(SEGMENT, REF, 65536, 2**32 - 1, 1, KIND_LOG),
        TableEntry(SEGMENT, REF, 65537, 1, 1, KIND_LOG),
        TableEntry(SEGMENT, None, 4096, 2, 1, KIND_LOG),
        TableEntry(SEGMENT, None, 0, 0, 1, KIND_LOG),
        TableEntry(Segment(3, 1 << 31, 9, DATA_START, bytes(32)), None, 0, 0, 0, KIND_LOG),
        TableEntry(SEGMENT, None, 0, 0, 0, 9),
    ],
)
async def test_a_table_that_claims_more_than_fits_is_damage(entry: TableEntry) -> None:
    storage = RecordingStorage()
    format_storage(storage, 1 << 20, None)
    table = load(storage, master_of).segments
    table.space = type(table.space)(DATA_START, 1 << 40)
    with pytest.raises(DamageError, match="slot 3"):
        table.adopt(entry)
    assert not table.states
