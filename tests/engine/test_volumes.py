"""Snapshots, clones and other operations on an open image."""

import random
from collections.abc import Callable

import pytest
import trio
import trio.testing

from nbdvde.disk import ALLOCATION_DEPTH, BLOCK
from nbdvde.engine.access import format_storage, open_storage
from nbdvde.engine.image import Image
from nbdvde.engine.keys import MasterKey
from nbdvde.engine.layout import SUPERBLOCKS
from nbdvde.engine.recovery import read_superblocks
from nbdvde.engine.volume import Volume
from nbdvde.errors import NbdvdeError, RefusedError, UsageError
from tests.crash.recording import FrozenStorage, RecordingStorage

KEY = MasterKey(bytes(range(32)))
SIZE = 64 << 20
LEAF = 512 * BLOCK


async def opened(storage: RecordingStorage) -> Image:
    storage.closed = False
    return await open_storage(storage, KEY)


async def fresh(size: int = SIZE) -> tuple[RecordingStorage, Image]:
    storage = RecordingStorage(b"", None)
    format_storage(storage, size, KEY, 1, 16 << 10, "disk", 64 << 10)
    return storage, await opened(storage)


def page(number: int) -> memoryview:
    return memoryview(number.to_bytes(4, "little") * (BLOCK // 4))


async def number_at(disk: Volume, block: int) -> int:
    pieces = await disk.read(block * BLOCK, BLOCK)
    return int.from_bytes(b"".join(map(bytes, pieces))[:4], "little")


async def test_a_snapshot_keeps_what_was_acknowledged_before_it() -> None:
    storage, image = await fresh()
    disk = image.disk()
    await disk.write(0, page(1))
    await image.volumes.snapshot("disk", "a")
    await disk.write(0, page(2))
    for _ in range(2):
        assert [await number_at(image.disk(name), 0) for name in ("disk", "disk@a")] == [2, 1]
        await image.close()
        image = await opened(storage)
    await image.close()


async def test_a_snapshot_is_never_written() -> None:
    _, image = await fresh()
    await image.volumes.snapshot("disk", "a")
    snapshot = image.disk("disk@a")
    assert snapshot.read_only
    with pytest.raises(RefusedError):
        await snapshot.write(0, page(1))
    await image.close()


@pytest.mark.parametrize("checkpoint", [False, True])
async def test_a_clone_and_its_origin_go_apart(checkpoint: bool) -> None:
    storage, image = await fresh()
    for block in range(0, 4096, 512):
        await image.disk().write(block * BLOCK, page(block + 1))
    await image.volumes.snapshot("disk", "a")
    if checkpoint:
        await image.checkpoint()
    await image.volumes.clone("disk@a", "copy")
    await image.volumes.clone("disk", "live")
    for at, name in enumerate(("disk", "copy", "live")):
        await image.disk(name).write(512 * at * BLOCK, page(100 + at))
    expected = {"disk": [100, 513, 1025], "copy": [1, 101, 1025], "live": [1, 513, 102], "disk@a": [1, 513, 1025]}
    for _ in range(2):
        found = {name: [await number_at(image.disk(name), 512 * at) for at in range(3)] for name in expected}
        assert found == expected
        await image.close()
        image = await opened(storage)
    await image.close()


async def test_a_snapshot_taken_while_a_checkpoint_is_written() -> None:
    storage, image = await fresh()
    disk = image.disk()
    await disk.write(0, page(1))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(image.checkpoint)
        await trio.testing.wait_all_tasks_blocked()
        await image.volumes.snapshot("disk", "a")
        await disk.write(0, page(2))
    await image.checkpoint()
    await image.close()
    image = await opened(storage)
    assert [await number_at(image.disk(name), 0) for name in ("disk", "disk@a")] == [2, 1]
    await image.close()


async def test_rolled_back_a_disk_is_what_it_was() -> None:
    storage, image = await fresh()
    disk = image.disk()
    await disk.write(0, page(1))
    await image.volumes.snapshot("disk", "a")
    await disk.write(0, page(2))
    await image.volumes.snapshot("disk", "b")
    await image.volumes.resize("disk", 2 * SIZE)
    await image.volumes.rollback("disk@a")
    assert disk.size == SIZE
    assert [await number_at(image.disk(name), 0) for name in ("disk", "disk@a", "disk@b")] == [1, 1, 2]
    await image.volumes.rollback("disk@b")
    await image.close()
    image = await opened(storage)
    assert [await number_at(image.disk(name), 0) for name in ("disk", "disk@a", "disk@b")] == [2, 1, 2]
    await image.close()


GIGANTIC = 1 << 50


@pytest.mark.parametrize("blocks", [0, 1, 3])
async def test_a_disk_that_grew_holds_the_same_and_more(blocks: int) -> None:
    storage, image = await fresh(1 << 20)
    for block in range(blocks):
        await image.disk().write(block * BLOCK, page(block + 1))
    for size in (1 << 22, 1 << 32, GIGANTIC):
        await image.volumes.resize("disk", size)
    disk = image.disk()
    assert disk.size == GIGANTIC
    await disk.write(GIGANTIC - BLOCK, page(99))
    for _ in range(3):
        disk = image.disk()
        assert [await number_at(disk, block) for block in range(blocks)] == list(range(1, blocks + 1))
        assert await number_at(disk, GIGANTIC // BLOCK - 1) == 99
        await image.close()
        image = await opened(storage)
    await image.close()


async def test_what_nobody_reads_any_more_is_forgotten() -> None:
    storage, image = await fresh(1 << 30)
    for leaf in range(20):
        await image.disk().write(leaf * LEAF, page(leaf + 1))
    for number in range(60):
        await image.disk().write(0, page(number + 1))
        await image.volumes.snapshot("disk", f"s{number}")
    await image.close()
    image = await opened(storage)
    used = image.disk("disk@s0")
    assert await number_at(used, 0) == 1
    members = [image.volumes.find(f"disk@s{number}") for number in range(60)]
    for number in range(60):
        for leaf in range(20):
            await number_at(image.disk(f"disk@s{number}"), leaf * 512)
    assert image.disk("disk@s0") is used, "it is one and the same as long as somebody has it"
    held = [len(member.map.leaves) + len(member.map.base.nodes) for member in members if member]
    assert held[0]
    assert sum(map(bool, held)) == 16, "with the last few"
    await image.volumes.delete("disk@s59")
    assert await number_at(image.disk("disk@s1"), 0) == 2
    await image.close()


@pytest.mark.parametrize("far", [False, True])
async def test_a_disk_grows_over_what_a_checkpoint_wrote(far: bool) -> None:
    storage, image = await fresh(1 << 22)
    await image.disk().write(0, page(1))
    await image.flush()
    await image.checkpoint()
    await image.volumes.resize("disk", GIGANTIC)
    if far:
        await image.disk().write(GIGANTIC - BLOCK, page(2))
        await image.flush()
    await image.checkpoint()
    for _ in range(2):
        found = [await number_at(image.disk(), block) for block in (0, GIGANTIC // BLOCK - 1)]
        assert found == [1, 2 if far else 0]
        await image.close()
        image = await opened(storage)
    await image.close()


async def test_a_disk_that_shrank_and_grew_holds_zeroes_at_its_end() -> None:
    _, image = await fresh()
    disk = image.disk()
    await disk.write(0, memoryview(b"x" * 4 * BLOCK))
    await disk.write(SIZE - BLOCK, page(1))
    with pytest.raises(RefusedError, match="holds data beyond 9728 bytes"):
        await image.volumes.resize("disk", 2 * BLOCK + 512 * 3)
    await image.volumes.resize("disk", 2 * BLOCK + 512 * 3, discard=True)
    assert disk.size == 2 * BLOCK + 512 * 3
    await image.volumes.resize("disk", SIZE)
    whole = b"".join(map(bytes, await disk.read(0, SIZE)))
    assert whole == b"x" * (2 * BLOCK + 512 * 3) + bytes(SIZE - 2 * BLOCK - 512 * 3)
    await image.close()


async def test_a_disk_shrinks_by_what_it_never_held() -> None:
    _, image = await fresh()
    await image.disk().write(0, page(1))
    await image.disk().trim(BLOCK, SIZE - BLOCK)
    await image.volumes.resize("disk", BLOCK)
    assert image.disk().size == BLOCK
    await image.close()


Wrong = Callable[[Image], object]


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        (lambda i: i.volumes.create("disk", 512), RefusedError, "disk: exists already"),
        (lambda i: i.volumes.create("a/b", 512), UsageError, "name 'a/b': is not"),
        (lambda i: i.volumes.create("b", 100), UsageError, "size 100"),
        (lambda i: i.volumes.snapshot("disk", "a"), RefusedError, "disk@a: exists already"),
        (lambda i: i.volumes.snapshot("disk", ""), UsageError, "name ''"),
        (lambda i: i.volumes.snapshot("disk@a", "b"), UsageError, "cannot be changed"),
        (lambda i: i.volumes.snapshot("none", "b"), UsageError, "disk none: does not exist in this image .it has disk"),
        (lambda i: i.volumes.clone("disk@b", "c"), UsageError, "snapshot disk@b: does not exist .disk has a"),
        (lambda i: i.volumes.clone("disk@a", "disk"), RefusedError, "exists already"),
        (lambda i: i.volumes.delete("disk"), RefusedError, "has a snapshot"),
        (lambda i: i.volumes.rollback("disk"), UsageError, "is no snapshot"),
        (lambda i: i.volumes.resize("disk@a", 512), UsageError, "cannot be changed"),
    ],
)
async def test_what_cannot_be_done_is_refused(
    wrong: Callable[[Image], object], error: type[NbdvdeError], text: str
) -> None:
    _, image = await fresh()
    await image.volumes.snapshot("disk", "a")
    with pytest.raises(error, match=text):
        await wrong(image)  # type: ignore[misc]
    assert image.disks == ["disk"]
    await image.close()


async def test_the_last_disk_stays() -> None:
    _, image = await fresh()
    with pytest.raises(RefusedError, match="is the only one"):
        await image.volumes.delete("disk")
    await image.volumes.create("other", 1 << 20)
    await image.volumes.delete("disk")
    assert image.disks == ["other"]
    await image.close()


async def test_nothing_changes_in_an_image_opened_for_reading() -> None:
    storage, image = await fresh()
    await image.close()
    storage.closed = False
    image = await open_storage(storage, KEY, read_only=True)
    with pytest.raises(RefusedError, match="for reading only"):
        await image.volumes.snapshot("disk", "a")
    await image.close()


async def test_what_changed_since_each_snapshot() -> None:
    """Against a model: a dictionary for the disk and for each of its snapshots."""
    rng = random.Random(4)
    _, image = await fresh()
    disk, blocks = image.disk(), SIZE // BLOCK
    places = [0, 1, 2, 511, 512, 513, 5000, blocks - 1]
    now: dict[int, int] = {}
    kept: dict[str, dict[int, int]] = {}
    for step in range(1, 200):
        block = rng.choice(places)
        action = rng.random()
        if action < 0.6:
            await disk.write(block * BLOCK, page(step))
            now[block] = step
        elif action < 0.8:
            await disk.trim(block * BLOCK, BLOCK)
            now.pop(block, None)
        elif action < 0.9:
            await image.checkpoint()
        elif len(kept) < 8:
            kept[f"s{step}"] = dict(now)
            await image.volumes.snapshot("disk", f"s{step}")
        for name, then in kept.items():
            changed = {block for block in places if then.get(block) != now.get(block)}
            assert ones(await disk.status(f"qemu:dirty-bitmap:{name}", 0, SIZE, 1 << 20)) == changed
    assert len(kept) == 8
    assert disk.contexts[3:] == tuple(f"qemu:dirty-bitmap:{name}" for name in kept)
    first, *_, last = kept
    changed = {block for block in places if kept[first].get(block) != kept[last].get(block)}
    assert ones(await image.disk(f"disk@{last}").status(f"qemu:dirty-bitmap:{first}", 0, SIZE, 1 << 20)) == changed
    await image.close()


def ones(extents: list[tuple[int, int]]) -> set[int]:
    """Blocks of which a context says 1."""
    found: set[int] = set()
    offset = 0
    for length, code in extents:
        if code:
            found.update(range(offset // BLOCK, (offset + length) // BLOCK))
        offset += length
    assert offset == SIZE
    return found


async def test_how_far_back_the_contents_go() -> None:
    _, image = await fresh()
    disk = image.disk()
    for number in range(4):
        await disk.write(number * BLOCK, page(number + 1))
        await image.volumes.snapshot("disk", f"s{number}")
    await disk.write(4 * BLOCK, page(9))
    await disk.trim(0, BLOCK)
    found = await disk.status(ALLOCATION_DEPTH, 0, SIZE, 99)
    assert found == [(BLOCK, 0), (BLOCK, 4), (BLOCK, 3), (BLOCK, 2), (BLOCK, 1), (SIZE - 5 * BLOCK, 0)]
    await image.close()


async def test_a_grown_disk_is_compared_with_its_snapshot() -> None:
    _, image = await fresh(1 << 20)
    disk = image.disk()
    await disk.write(0, page(1))
    await image.volumes.snapshot("disk", "a")
    for size in (1 << 22, GIGANTIC):
        await image.volumes.resize("disk", size)
        await disk.write(size - BLOCK, page(2))
        await image.checkpoint()
    found = await disk.status("qemu:dirty-bitmap:a", 0, GIGANTIC, 99)
    middle = (1 << 22) - BLOCK
    assert found == [(middle, 0), (BLOCK, 1), (GIGANTIC - BLOCK - (1 << 22), 0), (BLOCK, 1)]
    await image.close()


async def test_a_comparison_with_what_was_deleted_is_refused() -> None:
    _, image = await fresh()
    await image.volumes.snapshot("disk", "a")
    await image.volumes.delete("disk@a")
    with pytest.raises(RefusedError, match="its snapshot was deleted"):
        await image.disk().status("qemu:dirty-bitmap:a", 0, SIZE, 99)
    await image.close()


def test_what_a_snapshot_shares_outlives_cleaning_and_overwriting() -> None:
    """The mark after the snapshot counts what both share once; the disk must not count it down all the same."""
    trio.run(_clean_and_overwrite)


async def _clean_and_overwrite() -> None:
    storage, image = await fresh()
    disk = image.disk()
    for number in range(64):
        await disk.write(number * BLOCK, noise(number + 1, 1))
    await image.flush()
    for number in range(0, 64, 2):
        await disk.write(number * BLOCK, noise(101 + number, 1))
    await image.volumes.snapshot("disk", "a")
    assert await image.clean() > 0
    for turn in range(3):
        await disk.write(0, noise(201 + turn, 64))
        await image.flush()
        await image.checkpoint()
    await image.close()
    image = await opened(storage)
    expected = [number + 1 if number % 2 else 101 + number for number in range(64)]
    assert [await number_at(image.disk("disk@a"), block) for block in range(64)] == expected
    await image.close()


def noise(first: int, blocks: int) -> memoryview:
    """Blocks that begin with their numbers and do not compress."""
    numbers = range(first, first + blocks)
    parts = (n.to_bytes(4, "little") + random.Random(n).randbytes(BLOCK - 4) for n in numbers)
    return memoryview(b"".join(parts))


def test_after_cleaning_either_superblock_leads_to_everything() -> None:
    trio.run(_clean_and_look_from_the_older_superblock)


async def _clean_and_look_from_the_older_superblock() -> None:
    storage, image = await fresh()
    for number in range(64):
        await image.disk().write(number * BLOCK, noise(number + 1, 1))
    await image.flush()
    for number in range(0, 64, 2):
        await image.disk().write(number * BLOCK, noise(101 + number, 1))
    await image.flush()
    assert image._writer is not None
    assert await image._cleaner.round(image._writer, 0.25) > 0
    await image.checkpoint()
    older = bytearray(storage.image)
    newest = max(read_superblocks(FrozenStorage(older)), key=lambda superblock: superblock.sequence)
    at = SUPERBLOCKS[newest.sequence % 2]
    older[at : at + BLOCK] = bytes(BLOCK)
    found = await open_storage(FrozenStorage(older), KEY, read_only=True)
    expected = [number + 1 if number % 2 else 101 + number for number in range(64)]
    assert [await number_at(found.disk(), block) for block in range(64)] == expected
    await found.close()
    await image.close()
