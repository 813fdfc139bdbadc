"""Duplicates on their way into an image: what is shared, what never is, and what stays right after a crash."""

import random

import pytest
import trio

from nbdvde.disk import BLOCK
from nbdvde.engine.access import format_storage, open_storage
from nbdvde.engine.check import check_storage
from nbdvde.engine.image import Image
from nbdvde.engine.layout import KIND_COMPACT, SLOT_SHIFT, unpack_index
from nbdvde.engine.segments import State
from nbdvde.errors import DamageError, RefusedError
from tests.crash.oracle import master_of
from tests.crash.recording import FrozenStorage, RecordingStorage
from tests.crash.session import KEY

MIB = 1 << 20


def data_of(seed: int, blocks: int) -> bytes:
    return random.Random(seed).randbytes(blocks * BLOCK)


class Harness:
    """An image that is written, closed and opened again."""

    def __init__(self, **options: int) -> None:
        self.storage = RecordingStorage()
        format_storage(self.storage, 64 * MIB, KEY, segment_bytes=MIB, **options)  # type: ignore[arg-type]

    async def open(self, **options: int) -> Image:
        if self.storage.closed:
            self.storage = RecordingStorage(bytes(self.storage.image))
        image = await open_storage(self.storage, KEY, **options)  # type: ignore[arg-type]
        await image._hooking.finish()
        return image

    def check(self) -> None:
        report = check_storage(FrozenStorage(bytes(self.storage.image)), master_of)
        assert report.ok, report.errors

    def crash(self) -> "Harness":
        """What is left when the process ends now."""
        other = Harness()
        other.storage = RecordingStorage(bytes(self.storage.image))
        return other


async def put(image: Image, block: int, data: bytes, *, flush: bool = True) -> None:
    await image.disk().write(block * BLOCK, memoryview(data))
    if flush:
        await image.flush()


async def get(image: Image, block: int, blocks: int) -> bytes:
    return b"".join(bytes(piece) for piece in await image.disk().read(block * BLOCK, blocks * BLOCK))


def shared(image: Image) -> int:
    return image.statistics["blocks_shared"]


def entries(image: Image, block: int, blocks: int) -> list[int]:
    return [image.disk().map.lookup(number) or 0 for number in range(block, block + blocks)]


async def test_a_second_copy_is_stored_as_references() -> None:
    harness = Harness()
    image = await harness.open()
    data = data_of(1, 300)
    await put(image, 0, data)
    stored = image.statistics["bytes_stored"]
    await put(image, 1000, data)
    assert shared(image) == 300
    assert image.statistics["bytes_stored"] - stored <= 4 * BLOCK
    assert entries(image, 0, 300) == entries(image, 1000, 300)
    assert await get(image, 1000, 300) == data
    await image.close()
    harness.check()


async def test_duplicates_within_one_commit() -> None:
    harness = Harness()
    image = await harness.open()
    data = data_of(2, 40)
    for start in (0, 100, 200):
        await put(image, start, data, flush=False)
    await image.flush()
    assert shared(image) == 80
    for start in (0, 100, 200):
        assert await get(image, start, 40) == data
    await image.close()
    harness.check()


@pytest.mark.parametrize("extent_bytes", [BLOCK, 3 * 4 * BLOCK, 16 * BLOCK])
async def test_large_commits_with_some_that_is_new_and_some_that_is_not(extent_bytes: int) -> None:
    """Whatever was compressed before the choice is known, what is stored is what was written."""
    harness = Harness(extent_bytes=extent_bytes)
    image = await harness.open()
    old, new, mixed, last = data_of(4, 400), data_of(5, 403), bytearray(data_of(6, 401)), data_of(7, 300)
    mixed[50 * BLOCK : 200 * BLOCK] = old[: 150 * BLOCK]
    for number, data in enumerate((old, new, bytes(mixed), new, last)):
        await put(image, 500 * number, data)
    assert shared(image) == 150 + 403
    for number, data in enumerate((old, new, bytes(mixed), new, last)):
        assert await get(image, 500 * number, len(data) // BLOCK) == data
    await image.close()
    harness.check()


async def test_a_single_block_is_not_worth_a_reference() -> None:
    harness = Harness()
    image = await harness.open()
    await put(image, 0, data_of(3, 20))
    for number in range(10):
        await put(image, 100 + 2 * number, data_of(3, 20)[number * BLOCK :][:BLOCK])
    assert shared(image) == 0
    await image.close()


async def test_without_a_domain_nothing_is_shared() -> None:
    harness = Harness(domain=0)
    image = await harness.open()
    await put(image, 0, data_of(4, 40))
    await put(image, 100, data_of(4, 40))
    assert shared(image) == 0
    assert not any(state.prints.strip(b"\0") for state in image.segments.states.values())
    await image.close()
    assert not any(state.prints_bytes for state in (await harness.open(read_only=True)).segments.states.values())


async def test_a_new_disk_shares_with_none_and_a_clone_with_its_origin() -> None:
    harness = Harness()
    image = await harness.open()
    data = data_of(17, 40)
    await put(image, 0, data)
    await image.volumes.create("other", 64 * MIB)
    await image.volumes.clone("disk", "copy")
    await image.disk("other").write(0, memoryview(data))
    await image.flush()
    assert shared(image) == 0
    await image.disk("copy").write(MIB, memoryview(data))
    await image.flush()
    assert shared(image) == 40
    await image.close()


async def test_a_new_disk_can_share_with_one_that_is_named() -> None:
    harness = Harness()
    image = await harness.open()
    data = data_of(17, 40)
    await put(image, 0, data)
    await image.volumes.create("other", 64 * MIB, "disk")
    await image.close()
    image = await harness.open()
    await image.disk("other").write(0, memoryview(data))
    await image.flush()
    assert shared(image) == 40
    await image.close()


async def test_no_disk_shares_with_one_without_deduplication() -> None:
    image = await Harness(domain=0).open()
    with pytest.raises(RefusedError, match="disk disk: takes no part in deduplication"):
        await image.volumes.create("other", 64 * MIB, "disk")
    await image.close()


async def test_duplicates_are_found_after_opening_again() -> None:
    harness = Harness()
    image = await harness.open()
    data = data_of(5, 600)
    await put(image, 0, data)
    await image.close()
    image = await harness.open()
    await put(image, 1000, data)
    assert shared(image) == 600
    await image.close()
    harness.check()


@pytest.mark.parametrize("after_checkpoint", [False, True])
async def test_references_survive_a_crash(after_checkpoint: bool) -> None:
    harness = Harness()
    image = await harness.open()
    data = data_of(6, 500)
    await put(image, 0, data)
    if after_checkpoint:
        await image.checkpoint()
    await put(image, 3000, data)
    await put(image, 4000, data[: 50 * BLOCK] + data_of(7, 30) + data[50 * BLOCK :])
    assert shared(image) == 1000
    crashed = harness.crash()
    again = await crashed.open()
    assert await get(again, 3000, 500) == data
    assert await get(again, 4000, 530) == data[: 50 * BLOCK] + data_of(7, 30) + data[50 * BLOCK :]
    await again.close()
    crashed.check()
    await image.close()


async def test_a_segment_lives_as_long_as_anything_refers_to_it() -> None:
    harness = Harness()
    image = await harness.open()
    data = data_of(8, 500)
    await put(image, 0, data)
    await put(image, 1000, data)
    await image.disk().trim(0, 500 * BLOCK)
    for _ in range(3):
        await put(image, 5000, data_of(9, 300))
        await image.checkpoint()
    assert await get(image, 1000, 500) == data
    await image.disk().trim(1000 * BLOCK, 500 * BLOCK)
    await put(image, 6000, data_of(10, 300))
    for _ in range(3):
        await image.checkpoint()
    await put(image, 2000, data)
    assert await get(image, 2000, 500) == data
    await image.close()
    harness.check()


def log_states(image: Image, block: int, blocks: int) -> list[State]:
    slots = {entry >> SLOT_SHIFT for entry in entries(image, block, blocks)}
    return [image.segments.states[slot] for slot in sorted(slots)]


async def test_no_reference_leads_into_a_victim() -> None:
    harness = Harness()
    image = await harness.open()
    data = data_of(11, 400)
    await put(image, 0, data)
    for state in log_states(image, 0, 400):
        state.victim = True
    await put(image, 1000, data)
    assert shared(image) == 0
    assert not set(entries(image, 0, 400)) & set(entries(image, 1000, 400))
    await image.close()


async def cleaned(harness: Harness, data: bytes) -> Image:
    """An image with the middle of some data, which was cleaned of the rest."""
    image = await harness.open()
    await put(image, 0, data)
    middle = len(data) // BLOCK // 4
    await image.disk().trim(0, middle * BLOCK)
    await image.disk().trim(len(data) - middle * BLOCK, middle * BLOCK)
    await put(image, 5000, data_of(30, 300))  # the log moves on
    assert await image.clean()
    assert {state.kind for state in log_states(image, middle, 2 * middle)} == {KIND_COMPACT}
    return image


@pytest.mark.parametrize("when", ["at once", "after a checkpoint", "after opening again", "after a crash"])
async def test_what_a_cleaned_segment_kept_is_found_and_nothing_else(when: str) -> None:
    harness = Harness()
    data = data_of(12, 401)
    image = await cleaned(harness, data)
    if when == "after a checkpoint":
        await image.checkpoint()
    if when == "after opening again":
        await image.close()
        image = await harness.open()
    if when == "after a crash":
        crashed = harness.crash()
        await image.close()
        harness, image = crashed, await crashed.open()
    await put(image, 1000, data)
    assert await get(image, 1000, 401) == data
    assert shared(image) == 201
    assert await get(image, 100, 201) == data[100 * BLOCK : 301 * BLOCK]
    assert entries(image, 1100, 201) == entries(image, 100, 201)
    await put(image, 2000, data)
    assert shared(image) == 201 + 401
    await image.close()
    harness.check()


async def test_what_is_referred_to_since_is_not_cleaned_away() -> None:
    harness = Harness()
    data = data_of(12, 400)
    image = await cleaned(harness, data)
    await put(image, 1000, data)
    await image.disk().trim(0, 1150 * BLOCK)
    await put(image, 6000, data_of(31, 300))
    assert await image.clean(0.1)
    assert await get(image, 1150, 250) == data[150 * BLOCK :]
    await put(image, 2000, data)
    assert await get(image, 2000, 400) == data
    assert entries(image, 2150, 250) == entries(image, 1150, 250)
    await image.close()
    harness.check()


async def test_no_reference_revives_a_dead_segment() -> None:
    """A checkpoint that is under way leaves it out: the space goes, whatever refers to it."""
    harness = Harness()
    image = await harness.open()
    data = data_of(13, 300)
    await put(image, 0, data)
    await put(image, 5000, data_of(14, 300))
    dead = log_states(image, 0, 200)
    await image.disk().trim(0, 300 * BLOCK)
    await image.flush()
    assert [state.live for state in dead][:1] == [0]
    await put(image, 1000, data)
    used = {entry >> SLOT_SHIFT for entry in entries(image, 1000, 300)}
    assert dead[0].segment.slot not in used
    for _ in range(3):
        await image.checkpoint()
    assert await get(image, 1000, 300) == data
    await image.close()
    harness.check()


async def test_references_during_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes and trims of the same data while checkpoints are written: nothing is lost, and the counts are right."""
    harness = Harness()
    image = await harness.open()
    rng = random.Random(15)
    sources = [data_of(20 + number, 60) for number in range(6)]
    model: dict[int, bytes] = {}

    async def write() -> None:
        for _ in range(120):
            start, source = rng.randrange(100) * 60, rng.randrange(7)
            if source == 6:
                await image.disk().trim(start * BLOCK, 60 * BLOCK)
                model[start] = bytes(60 * BLOCK)
            else:
                await put(image, start, sources[source])
                model[start] = sources[source]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        for _ in range(25):
            await image.checkpoint()
            await trio.lowlevel.checkpoint()
    assert shared(image) > 1000
    for start, data in model.items():
        assert await get(image, start, 60) == data
    await image.close()
    harness.check()


async def test_little_memory_finds_less_and_breaks_nothing() -> None:
    harness = Harness()
    image = await harness.open(dedup_memory=60_000)
    data = data_of(16, 3000)
    for start in (0, 4000, 8000):
        for at in range(0, 3000, 250):
            await put(image, start + at, data[at * BLOCK : (at + 250) * BLOCK])
    assert image._duplicates._index.memory <= 60_000
    assert shared(image) > 3000
    for start in (0, 4000, 8000):
        assert await get(image, start, 3000) == data
    await image.close()
    harness.check()


def damage_extents(image: Image, harness: Harness) -> None:
    """Flip the last bit of each."""
    for state in image.segments.states.values():
        for position, length, _ in map(unpack_index, image.segments.index(state) if state.holds_blocks else ()):
            if length:
                harness.storage.image[state.segment.offset + position + length - 1] ^= 1


@pytest.mark.parametrize("found_by", ["read", "small read", "check"])
async def test_what_was_found_damaged_is_stored_once_more(found_by: str) -> None:
    harness = Harness()
    image = await harness.open(cache_bytes=0)
    data = data_of(21, 40)
    await put(image, 0, data)
    await image.checkpoint()
    damage_extents(image, harness)
    if found_by == "check":
        assert not (await image.check()).ok
    else:
        with pytest.raises(DamageError):
            await get(image, 0, 40 if found_by == "read" else 1)
    await put(image, 1000, data)
    assert shared(image) == 0
    assert await get(image, 1000, 40) == data
    await image.close()
