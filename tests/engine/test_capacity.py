"""A limited file: filled, trimmed and filled again, it neither leaks nor loses anything."""

import random
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest

import nbdvde
from nbdvde.disk import BLOCK
from nbdvde.engine.image import Image
from nbdvde.errors import NoSpaceError, UsageError

CAPACITY = 64 << 20
PIECE = 256 << 10


async def fill(image: Image, rng: random.Random, start: int = 0) -> dict[int, bytes]:
    """Write random data from some place on until it is refused; answers the pieces that were taken."""
    taken: dict[int, bytes] = {}
    try:
        for offset in range(start, 2 * CAPACITY, PIECE):
            data = rng.randbytes(PIECE)
            await image.disk().write(offset, memoryview(data))
            taken[offset] = data
    except NoSpaceError:
        return taken
    raise AssertionError("more was taken than the capacity allows")


async def reads(image: Image, taken: dict[int, bytes]) -> bool:
    for offset, data in taken.items():
        if b"".join(bytes(piece) for piece in await image.disk().read(offset, PIECE)) != data:
            return False
    return True


def made(path: Path) -> None:
    nbdvde.create_image(path, 2 * CAPACITY, secret=None, compression="none", capacity=CAPACITY)


async def test_ten_times_full_and_trimmed(tmp_path: Path) -> None:
    path, rng = tmp_path / "image.vde", random.Random(1)
    made(path)
    counts, sizes = [], []
    async with AsyncExitStack() as stack:
        image = await stack.enter_async_context(nbdvde.open_image(path, key=None))
        for turn in range(10):
            taken = await fill(image, rng)
            counts.append(len(taken))
            await image.flush()
            assert path.stat().st_size <= CAPACITY
            assert await reads(image, dict(rng.sample(sorted(taken.items()), 10)))
            if turn == 5:
                await stack.aclose()
                assert nbdvde.check_image(path).ok
                image = await stack.enter_async_context(nbdvde.open_image(path, key=None))
                assert await reads(image, taken)
            await image.disk().trim(0, image.disk().size)
            await image.flush()
            await image.clean()
            sizes.append(path.stat().st_blocks * 512)
    assert min(counts) >= counts[0] * 0.95, counts
    assert counts[0] * PIECE > CAPACITY * 0.75
    assert max(sizes) < 8 << 20, sizes
    assert nbdvde.check_image(path).ok
    assert path.stat().st_blocks * 512 < 1 << 20


@pytest.mark.parametrize(("fill_percent", "turns"), [(50, 10), (70, 2)])
async def test_a_full_image_takes_overwrites_while_there_is_garbage(
    tmp_path: Path, fill_percent: int, turns: int
) -> None:
    path, rng = tmp_path / "image.vde", random.Random(2)
    made(path)
    async with nbdvde.open_image(path, key=None) as image:
        disk, pages, blocks = image.disk(), {}, CAPACITY * fill_percent // 100 // BLOCK
        for start in range(0, blocks * BLOCK, PIECE):
            await disk.write(start, memoryview(rng.randbytes(PIECE)))
        for number in range(turns * blocks):
            block = rng.randrange(blocks)
            pages[block] = rng.randbytes(16)
            await disk.write(block * BLOCK, memoryview(pages[block] * (BLOCK // 16)))
            if number % 1000 == 0:
                assert path.stat().st_size <= CAPACITY
        for block, page in rng.sample(sorted(pages.items()), 200):
            assert b"".join(bytes(piece) for piece in await disk.read(block * BLOCK, BLOCK)) == page * (BLOCK // 16)
    assert nbdvde.check_image(path).ok


async def test_a_full_image_is_opened_trimmed_and_written_again(tmp_path: Path) -> None:
    path, rng = tmp_path / "image.vde", random.Random(3)
    made(path)
    async with nbdvde.open_image(path, key=None) as image:
        taken = await fill(image, rng)
    async with nbdvde.open_image(path, key=None) as image:
        assert await reads(image, taken)
        taken |= await fill(image, rng, CAPACITY)
        for offset in list(taken)[::2]:
            await image.disk().trim(offset, PIECE)
            del taken[offset]
        for offset in range(CAPACITY, CAPACITY + CAPACITY // 4, PIECE):
            taken[offset] = rng.randbytes(PIECE)
            await image.disk().write(offset, memoryview(taken[offset]))
        assert await reads(image, taken)
    assert nbdvde.check_image(path).ok


@pytest.mark.parametrize("how", ["delete", "rollback"])
async def test_of_a_full_image_can_be_given_up(tmp_path: Path, how: str) -> None:
    path, rng = tmp_path / "image.vde", random.Random(4)
    made(path)
    async with nbdvde.open_image(path, key=None) as image:
        for offset in range(0, CAPACITY // 3, PIECE):
            await image.disk().write(offset, memoryview(rng.randbytes(PIECE)))
        await image.volumes.snapshot("disk", "before")
        await fill(image, rng)
        with suppress(NoSpaceError):
            for offset in range(0, CAPACITY, BLOCK):  # into the last corner
                await image.disk().write(offset, memoryview(rng.randbytes(BLOCK)))
        await (image.volumes.delete if how == "delete" else image.volumes.rollback)("disk@before")
        await image.flush()
        taken = {offset: rng.randbytes(PIECE) for offset in range(0, CAPACITY // 6, PIECE)}
        for offset, data in taken.items():
            await image.disk().write(offset, memoryview(data))
        assert await reads(image, taken)
    assert nbdvde.check_image(path).ok


@pytest.mark.parametrize("capacity", [1, CAPACITY - 1, 1 << 63])
def test_impossible_capacities_are_refused(tmp_path: Path, capacity: int) -> None:
    with pytest.raises(UsageError):
        nbdvde.create_image(tmp_path / "image.vde", 1 << 20, secret=None, capacity=capacity)
    assert not (tmp_path / "image.vde").exists()
