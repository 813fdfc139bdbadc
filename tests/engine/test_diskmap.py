"""The map of a disk: every block counted once, in its cell, as what it is."""

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

import nbdvde
from nbdvde import MasterKey
from nbdvde.admin.mapcalls import CELLS_MAX, MapOf, MapRequest, draw, latest
from nbdvde.disk import BLOCK
from nbdvde.engine import diskmap
from nbdvde.engine.diskmap import Drawing, Part
from nbdvde.engine.image import Image
from nbdvde.engine.volume import Volume
from nbdvde.errors import InUseError, UsageError

KEY = MasterKey(bytes(range(32)))
TEXT = (b"all work and no play makes Jack a dull boy. " * 100)[:BLOCK]


def new(folder: Path) -> Path:
    """An image of 16 MiB."""
    path = folder / "image.vde"
    nbdvde.create_image(path, 16 << 20, secret=KEY, segment_bytes=256 << 10)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return new(tmp_path)


def unlike(number: int) -> bytes:
    """A block that does not compress."""
    return random.Random(number).randbytes(BLOCK)


def like(number: int) -> bytes:
    """A block that does."""
    return number.to_bytes(8, "big") + TEXT[8:]


async def write(image: Image, block: int, pages: list[bytes], disk: str = "disk") -> None:
    await image.disk(disk).write(block * BLOCK, memoryview(b"".join(pages)))
    await image.flush()


async def by_block(image: Image, disk: str = "disk", since: str | None = None) -> list[Part]:
    """What each block is: a map with a cell for each."""
    found = await draw(image, MapRequest(disk, since, CELLS_MAX))
    parts = [Part.HOLE] * found.cells
    for name, counts in found.counts.items():
        for cell in np.flatnonzero(counts).tolist():
            assert counts[cell] == 1
            assert parts[cell] == Part.HOLE
            parts[cell] = Part[name.upper()]
    return parts


async def test_each_block_is_what_it_is(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        await write(image, 16, [like(n) for n in range(16)])
        await write(image, 1000, [unlike(n) for n in range(16)])
        await image.disk().zero(3000 * BLOCK, 600 * BLOCK, allocate=True)
        await write(image, 3100, [like(999)])
        expected = [Part.HOLE] * 4096
        expected[16:32] = [Part.COMPRESSED] * 16
        expected[1000:1016] = [Part.INCOMPRESSIBLE] * 16
        expected[3000:3600] = [Part.ZERO] * 600
        expected[3100] = Part.COMPRESSED
        assert await by_block(image) == expected
        await image.volumes.create("two", 16 << 20, "disk")
        await write(image, 7, [*map(unlike, range(16)), unlike(77)], "two")
        expected[1000:1016] = [Part.SHARED] * 16
        assert await by_block(image) == expected
        assert (await by_block(image, "two"))[6:25] == [
            Part.HOLE, *[Part.SHARED] * 16, Part.INCOMPRESSIBLE, Part.HOLE,
        ]  # fmt: skip
    async with nbdvde.open_image(path, key=KEY, read_only=True) as image:
        assert await by_block(image) == expected


async def test_duplicates_in_one_disk_are_shared(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        await write(image, 0, [*map(unlike, range(20))])
        await write(image, 100, [*map(unlike, range(16))])
        parts = await by_block(image)
        assert parts[:20] == [Part.SHARED] * 16 + [Part.INCOMPRESSIBLE] * 4
        assert parts[100:117] == [Part.SHARED] * 16 + [Part.HOLE]


async def test_what_changed_since_a_snapshot(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        await write(image, 0, [unlike(n) for n in range(8)])
        await write(image, 2000, [unlike(n) for n in range(20, 24)])
        await image.volumes.snapshot("disk", "then")
        assert set((await by_block(image, since="then"))[:8]) == {Part.SHARED}
        await write(image, 2, [like(5)])
        await write(image, 700, [like(6)])
        await image.disk().zero(4 * BLOCK, BLOCK)
        await image.disk().zero(2000 * BLOCK, 4 * BLOCK)
        await image.checkpoint()
        await image.disk().zero(3000 * BLOCK, BLOCK, allocate=True)
        parts = await by_block(image, since="disk@then")
        changed = {block for block, part in enumerate(parts) if part == Part.CHANGED}
        assert changed == {2, 4, 700, 2000, 2001, 2002, 2003}, "a hole and zeroes read the same"
        assert parts[3000] == Part.ZERO
        old = await by_block(image, "disk@then")
        assert set(old[:8]) == {Part.SHARED, Part.INCOMPRESSIBLE}
        assert set(await by_block(image, "disk@then", "then")) == {Part.HOLE, *old}


async def test_cells_add_up_whatever_their_number(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        rng = random.Random(4)
        for number in range(40):
            await write(image, rng.randrange(4090), [like(number)] * rng.randrange(1, 6))
        await image.volumes.create("odd", 5 * BLOCK + 512)
        await write(image, 4, [like(1)], "odd")
        parts = await by_block(image)
        for cells in (1, 2, 7, 64, 1000, 4096, 5000):
            found = await draw(image, MapRequest(cells=cells))
            assert found.cells == min(cells, 4096)
            edges = [-(-cell * 4096 // found.cells) for cell in range(found.cells + 1)]
            for name, counts in found.counts.items():
                wanted = [parts[start:stop].count(Part[name.upper()]) for start, stop in pairwise(edges)]
                assert counts == wanted
            assert sum(found.bytes.values()) == 4096 * BLOCK
        odd = await draw(image, MapRequest("odd"))
        assert (odd.cells, odd.blocks, sum(map(sum, odd.counts.values()))) == (6, 6, 1)


async def test_what_was_lost_is_unreadable(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        await write(image, 10, [like(n) for n in range(4)])
        lost = np.zeros(512, np.bool_)
        lost[11] = True
        image.disk().map.lose(0, lost)
        parts = await by_block(image)
        assert parts[10:14] == [Part.COMPRESSED, Part.UNREADABLE, Part.COMPRESSED, Part.COMPRESSED]
        assert (await by_block(image, since=None)).count(Part.UNREADABLE) == 1


async def test_what_is_shared_is_not_looked_for_in_huge_images(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diskmap, "_USES_MAX", 10)
    async with nbdvde.open_image(path, key=KEY) as image:
        await write(image, 0, [unlike(1), unlike(2)])
        found = await draw(image, MapRequest())
        assert not found.shared_known
        assert found.bytes["incompressible"] == 2 * BLOCK


async def test_a_huge_disk_takes_as_long_as_it_has_data(tmp_path: Path) -> None:
    path = tmp_path / "huge.vde"
    nbdvde.create_image(path, 1 << 60, secret=None)
    async with nbdvde.open_image(path) as image:
        await write(image, (1 << 48) - 5, [like(1)])
        found = await draw(image, MapRequest(cells=CELLS_MAX))
        assert found.counts["compressed"][-1] == 1
        assert sum(found.bytes.values()) == 1 << 60


async def test_a_map_anybody_may_ask_for_is_not_drawn_all_the_time(
    path: Path, autojump_clock: trio.testing.MockClock
) -> None:  # fmt: skip
    async with nbdvde.open_image(path, key=KEY) as image:
        first = await latest(image, MapOf())
        await write(image, 0, [like(1)])
        assert await latest(image, MapOf()) is first
        await trio.sleep(1000)
        second = await latest(image, MapOf())
        assert second.bytes["compressed"] == BLOCK
        await trio.sleep(1000)
        assert await latest(image, MapOf()) is second, "nothing has changed"
        await image.volumes.snapshot("disk", "then")
        assert (await latest(image, MapOf())).bytes["shared"] == BLOCK


async def test_maps_of_many_disks_take_no_more_of_the_time(
    path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    async with nbdvde.open_image(path, key=KEY) as image:
        for number in range(3):
            await image.volumes.create(f"d{number}", 1 << 20)
        drawing, drawn = image.drawing, list[str]()

        async def slowly(disk: Volume, *more: Any) -> Drawing:
            drawn.append(disk.name)
            await trio.sleep(0.4)
            return await drawing(disk, *more)

        monkeypatch.setattr(image, "drawing", slowly)
        first = await latest(image, MapOf(disk="d0"))
        await latest(image, MapOf(disk="d1"))  # 16 s of rest are owed then
        await write(image, 0, [like(1)])
        with pytest.raises(InUseError, match=r"map of d2: others were drawn just now \(ask again in [56] s\)"):
            await latest(image, MapOf(disk="d2"))
        await trio.sleep(7)
        await latest(image, MapOf(disk="d2"))
        assert await latest(image, MapOf(disk="d0")) is first, "it is old, and better than none"
        await trio.sleep(1000)
        assert await latest(image, MapOf(disk="d0")) is not first
        assert drawn == ["d0", "d1", "d2", "d0"]


async def test_what_is_written_while_a_map_is_drawn_is_in_the_next_one(
    path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    async with nbdvde.open_image(path, key=KEY) as image:
        drawing = image.drawing

        async def late(*arguments: Any) -> Drawing:
            drawn = await drawing(*arguments)
            await write(image, 0, [like(1)])
            return drawn

        with monkeypatch.context() as patch:
            patch.setattr(image, "drawing", late)
            assert (await latest(image, MapOf())).bytes["compressed"] == 0
        await trio.sleep(1000)
        assert (await latest(image, MapOf())).bytes["compressed"] == BLOCK


async def test_what_cannot_be_drawn_is_told(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        for asked in (MapRequest("other"), MapRequest(since="never"), MapRequest(cells=0), MapRequest(cells=1 << 30)):
            with pytest.raises(UsageError):
                await draw(image, asked)
