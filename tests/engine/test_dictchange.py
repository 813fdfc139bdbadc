"""Dictionaries of an image: registered, used, replaced and removed, and never gone while anything needs them."""

import random
from collections.abc import Awaitable
from pathlib import Path

import pytest

import nbdvde
from nbdvde import MasterKey
from nbdvde.disk import BLOCK
from nbdvde.engine.dictionaries import CONTENT_AT, FORM
from nbdvde.engine.image import Image
from nbdvde.engine.layout import DICTIONARIES
from nbdvde.engine.repair import salvage_image
from nbdvde.errors import DamageError, RefusedError, UsageError
from tests.docs.reader import Image as SecondReader
from tests.engine.trained import dictionary, text

KEY = MasterKey(bytes(range(32)))
SIZE = 64 << 20
WORDS, BETTER = dictionary(1), dictionary(1, 1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return made(tmp_path)


def made(folder: Path) -> Path:
    """An image."""
    path = folder / "image.vde"
    nbdvde.create_image(path, SIZE, secret=KEY, segment_bytes=256 << 10)
    return path


async def refusal(action: Awaitable[None]) -> str:
    """Why it is refused, if it is."""
    try:
        await action
    except RefusedError as error:
        return error.why
    return ""


def content(path: Path) -> bytes:
    """Of a file."""
    return path.read_bytes()


def flip(path: Path, at: int) -> None:
    """Change a bit."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


async def write(image: Image, *blocks: int, disk: str = "disk") -> dict[int, bytes]:
    """Texts, each in an extent of its own."""
    pages = {block: text(1, random.Random(block)) for block in blocks}
    for block, page in pages.items():
        await image.disk(disk).write(block * BLOCK, memoryview(page))
        await image.flush()
    return pages


async def holds(image: Image, pages: dict[int, bytes], disk: str = "disk") -> bool:
    found = [await image.disk(disk).read(block * BLOCK, BLOCK) for block in pages]
    return [b"".join(map(bytes, pieces)) for pieces in found] == list(pages.values())


async def test_small_writes_are_compressed_with_it_and_read_again(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        before = await write(image, *range(0, 20, 2))
        plain = (await image.space()).compressed_bytes
        entry = await image.register_dictionary(WORDS, 100)
        assert (entry.slot, entry.size, entry.samples) == (0, len(WORDS), 100)
        pages = before | await write(image, *range(100, 120, 2))
        own = len(WORDS) + BLOCK
        assert (await image.space()).compressed_bytes - plain < 0.8 * plain + own
        assert await holds(image, pages)
    for read_only in (True, False):
        async with nbdvde.open_image(path, key=KEY, read_only=read_only) as image:
            assert await holds(image, pages)
            assert [entry.sha256 for entry in image.dictionaries.table] == [entry.sha256]
            assert (await image.check()).ok
    assert nbdvde.check_image(path, key=KEY).ok
    second = SecondReader(content(path), KEY.data)
    assert all(second.block("disk", block) == page for block, page in pages.items())


async def test_it_is_nobodys_disk(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        await image.register_dictionary(WORDS, 1)
        assert image.disks == [disk.name for disk in image.info().disks] == ["disk"]
        assert [member.name for member in image.volumes] == ["disk"]
        space = await image.space()
        rows = {row.name: row for row in space.disks}
        assert rows["region DICT"].logical_bytes == 3 * BLOCK
        assert (space.logical_bytes, space.unique_bytes, space.shared_bytes) == (0, 0, 0)
        for name in ("DICT", "region DICT"):
            with pytest.raises(UsageError, match="does not exist"):
                image.disk(name)
        await image.volumes.create("DICT", BLOCK)
    assert [disk.name for disk in nbdvde.read_info(path).disks] == ["disk", "DICT"]


async def test_who_does_not_know_dictionaries_must_not_open_the_image(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        assert not image.superblock.incompatible & DICTIONARIES
        await image.register_dictionary(WORDS, 1)
        assert image.superblock.incompatible & DICTIONARIES
    for at in (16, 65536 + 16):
        assert content(path)[at] & DICTIONARIES


async def test_it_stays_while_an_extent_needs_it(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        await image.register_dictionary(WORDS, 1)
        pages = await write(image, *range(0, 10, 2))
        assert await refusal(image.remove_dictionary(0)) == "5 extents need it"
        assert await write(image, 50)
        await image.disk().trim(0, 4 * BLOCK)
        assert await refusal(image.remove_dictionary(0)) == "4 extents need it"
        assert await holds(image, {block: pages[block] for block in (4, 6, 8)})


async def test_a_snapshot_needs_it_too(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        await image.register_dictionary(WORDS, 1)
        pages = await write(image, 3)
        await image.volumes.snapshot("disk", "old")
        await image.disk().trim(0, SIZE)
        assert await refusal(image.remove_dictionary(0)) == "1 extents need it"
        assert await holds(image, pages, "disk@old")
        await image.volumes.delete("disk@old")
        await image.remove_dictionary(0)
        assert not list(image.dictionaries.table)


async def test_what_a_duplicate_may_be_made_of_is_kept_with_its_dictionary(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        await image.register_dictionary(WORDS, 1)
        data = text(1, random.Random(1), 2 * BLOCK)
        other = text(1, random.Random(2), 2 * BLOCK)
        for block, what in ((0, data), (10, other)):
            await image.disk().write(block * BLOCK, memoryview(what))
            await image.flush()
        await image.disk().trim(0, 2 * BLOCK)
        await image.disk().write(10 * BLOCK, memoryview(random.Random(3).randbytes(2 * BLOCK)))
        await image.remove_dictionary(0)
        assert not list(image.dictionaries.table)
        assert len(image.dictionaries.table.kept) == 1
        await image.disk().write(20 * BLOCK, memoryview(data))
        await image.flush()
        assert image.statistics["blocks_shared"] == 2, "the extent that nobody used is in use again"
    async with nbdvde.open_image(path, key=KEY) as image:
        assert b"".join(map(bytes, await image.disk().read(20 * BLOCK, 2 * BLOCK))) == data
        with pytest.raises(UsageError, match="dictionary 0: does not exist"):
            await image.remove_dictionary(0)


async def test_once_it_is_cleaned_away_nothing_is_kept(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        await image.register_dictionary(WORDS, 1)
        await write(image, *range(0, 10, 2))
        await image.disk().trim(0, SIZE)
        await image.disk().write(0, memoryview(random.Random(3).randbytes(BLOCK)))
        await image.flush()
        await image.clean()
        await image.register_dictionary(BETTER, 1)
        await image.remove_dictionary(1)
        await image.remove_dictionary(0)
        rows = {row.name: row.logical_bytes for row in (await image.space()).disks}
        assert rows["region DICT"] <= BLOCK + 2 * len(WORDS)
        assert (await image.check()).ok


async def test_a_replaced_one_is_kept_for_what_it_was_used_for(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        first = await image.register_dictionary(WORDS, 1)
        pages = await write(image, 0, 2)
        second = await image.replace_dictionary(0, BETTER, 2)
        assert (second.slot, second.number == first.number) == (0, False)
        pages |= await write(image, 100, 102)
        assert [entry.number for entry in image.dictionaries.table.kept] == [first.number]
        assert await holds(image, pages)
        with pytest.raises(UsageError, match="dictionary 5: does not exist"):
            await image.replace_dictionary(5, BETTER, 1)
    async with nbdvde.open_image(path, key=KEY) as image:
        assert await holds(image, pages)
        assert (await image.check()).ok
        assert await refusal(image.remove_dictionary(0)) == "2 extents need it"
        await image.disk().trim(0, SIZE)
        await image.flush()
        await image.clean()
        third = await image.replace_dictionary(0, WORDS, 3)
        assert third.number not in (first.number, second.number)


async def test_the_cleaner_keeps_extents_with_a_dictionary(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        await image.register_dictionary(WORDS, 1)
        pages = {}
        for block in range(0, 400, 4):
            data = text(1, random.Random(block), 2 * BLOCK)
            await image.disk().write(block * BLOCK, memoryview(data))
            await image.flush()
            await image.disk().trim((block + 1) * BLOCK, BLOCK)
            pages[block] = data[:BLOCK]
        assert await image.clean(0.01) > 0
        assert await holds(image, pages)
        assert (await image.check()).ok
    async with nbdvde.open_image(path, key=KEY) as image:
        assert await holds(image, pages)
        assert await holds(image, {block + 1: bytes(BLOCK) for block in pages})


async def test_an_image_for_reading_takes_none(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY, read_only=True) as image:
        with pytest.raises(RefusedError, match="reading only"):
            await image.register_dictionary(WORDS, 1)
        with pytest.raises(RefusedError, match="reading only"):
            await image.remove_dictionary(0)


def place(image: Image, block: int) -> int:
    """A byte of the file that belongs to a block of the region."""
    entry = image.volumes._regions[FORM.tag, 0].map.lookup(block)
    assert entry
    state = image.segments.find(entry >> 40)
    position, _, _ = image.segments.locate(state, image.segments.index(state), entry >> 16 & 0xFFFFFF)
    return state.segment.offset + position + 8


async def damaged(path: Path, block: int) -> dict[int, bytes]:
    """An image with texts that need a dictionary, of whose region a block is damaged."""
    async with nbdvde.open_image(path, key=KEY) as image:
        await image.register_dictionary(WORDS, 1)
        pages = await write(image, 0, 2)
        plain = random.Random(1).randbytes(BLOCK)
        await image.disk().write(500 * BLOCK, memoryview(plain))
        await image.flush()
        at = place(image, block)
    flip(path, at)
    return {500: plain} | pages


@pytest.mark.parametrize("block", [0, CONTENT_AT])
async def test_without_it_only_what_needs_it_is_lost(path: Path, tmp_path: Path, block: int) -> None:
    pages = await damaged(path, block)
    errors = nbdvde.check_image(path, key=KEY).errors
    assert {(error.disk, error.offset) for error in errors} >= {("disk", 0), ("disk", 2 * BLOCK)}
    async with nbdvde.open_image(path, key=KEY) as image:
        assert await holds(image, {500: pages[500]})
        with pytest.raises(DamageError, match="dictionary 0"):
            await holds(image, {0: pages[0]})
        if block == 0:
            with pytest.raises(DamageError, match="dictionaries"):
                await image.register_dictionary(BETTER, 1)
    report = await salvage_image(path, tmp_path / "new.vde", key=KEY)
    assert {(error.disk, error.offset) for error in report.errors} >= {("disk", 0), ("disk", 2 * BLOCK)}
    async with nbdvde.open_image(tmp_path / "new.vde", key=KEY) as image:
        assert await holds(image, {500: pages[500]})
        await image.register_dictionary(BETTER, 1)
        pages = await write(image, 900, 902)
    async with nbdvde.open_image(tmp_path / "new.vde", key=KEY) as image:
        assert await holds(image, pages)


async def test_nothing_becomes_a_duplicate_of_what_needs_a_lost_one(path: Path) -> None:
    pairs = [text(1, random.Random(n), 2 * BLOCK) for n in range(64)]
    async with nbdvde.open_image(path, key=KEY) as image:
        await image.register_dictionary(WORDS, 1)
        for number, pair in enumerate(pairs):
            await image.disk().write(number * 2 * BLOCK, memoryview(pair))
            await image.flush()
        await image.register_dictionary(dictionary(2), 1)
        at = place(image, CONTENT_AT)
    flip(path, at)
    assert [e.where for e in nbdvde.check_image(path, key=KEY).errors if e.offset is None] == ["dictionary 0"]
    new = path.parent / "new.vde"
    report = await salvage_image(path, new, key=KEY)
    assert ("disk", 0) in {(error.disk, error.offset) for error in report.errors}
    for damaged_path in (path, new):
        async with nbdvde.open_image(damaged_path, key=KEY) as image:
            await image._hooking.finish()
            before = image.statistics["blocks_shared"]
            await image.disk().write(200 * BLOCK, memoryview(b"".join(pairs)))
            await image.flush()
            assert image.statistics["blocks_shared"] == before
            assert b"".join(map(bytes, await image.disk().read(200 * BLOCK, 128 * BLOCK))) == b"".join(pairs)


async def test_salvage_takes_dictionaries_along(path: Path, tmp_path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        await image.register_dictionary(WORDS, 1)
        pages = await write(image, 0, 2)
    assert (await salvage_image(path, tmp_path / "new.vde", key=KEY)).ok
    async with nbdvde.open_image(tmp_path / "new.vde", key=KEY) as image:
        assert await holds(image, pages)
