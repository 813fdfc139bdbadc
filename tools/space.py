"""What cleaning costs, and that a full image neither leaks nor loses anything.

    python -m tools.space amplify [--capacity 1G] [--fill 50] [--fill 70] [--turns 10] [--skewed]
    python -m tools.space cycle [--capacity 1G] [--turns 10]

`amplify` overwrites a disk of so many percent of the capacity at random, 4 KiB at a time, and tells how many bytes go
to the file for each byte written, and how fast that is beside an image without limit, which is never cleaned. `cycle`
fills an image, checks it, and trims it again, so many times.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import trio

import nbdvde
from nbdvde.config import parse_size
from nbdvde.disk import BLOCK, Buffer
from nbdvde.engine.access import open_file, open_storage
from nbdvde.engine.image import Image
from nbdvde.engine.storage import FileStorage
from nbdvde.engine.volume import Volume
from nbdvde.errors import NoSpaceError

_PIECE = 1 << 20
_FLUSH_EVERY = 1024
"""Writes between two flushes."""


class CountingStorage(FileStorage):
    """A file that counts what is written to it."""

    written = 0

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.written += sum(map(len, buffers))
        super().write(offset, buffers)


async def opened(path: Path) -> tuple[CountingStorage, Image]:
    """An image on a counting storage."""
    file = open_file(path, write=True)
    storage = CountingStorage(file.detach())
    return storage, await open_storage(storage, None, path=str(path))


async def write(disk: Volume, offset: int, data: bytes) -> None:
    """As a session does it: at once if that can be."""
    view = memoryview(data)
    if not disk.write_nowait(offset, view, owned=True):
        await disk.write(offset, view, owned=True)


async def overwrite(image: Image, size: int, writes: int, rng: random.Random, *, skewed: bool) -> float:
    """Random blocks to random places, or nine of ten to a tenth of them; answers writes a second."""
    disk, blocks = image.disk(), size // BLOCK
    data = [rng.randbytes(BLOCK) for _ in range(256)]
    begun = time.monotonic()
    for number in range(writes):
        hot = skewed and rng.random() < 0.9
        await write(disk, rng.randrange(blocks // 10 if hot else blocks) * BLOCK, data[number % 256])
        if number % _FLUSH_EVERY == 0:
            await image.flush()
    await image.flush()
    return writes / (time.monotonic() - begun)


async def amplify(folder: Path, capacity: int, fill: int, turns: int, *, skewed: bool) -> None:
    """Print a line of figures for one fill level."""
    size = capacity * fill // 100 // BLOCK * BLOCK
    rates = []
    for limit in (capacity, 0):
        path, rng = folder / "image.vde", random.Random(1)
        path.unlink(missing_ok=True)
        nbdvde.create_image(path, size, secret=None, compression="none", capacity=limit)
        storage, image = await opened(path)
        for offset in range(0, size, _PIECE):
            await write(image.disk(), offset, rng.randbytes(min(_PIECE, size - offset)))
        await image.flush()
        before, writes = storage.written, turns * size // BLOCK if limit else size // BLOCK
        rates.append(await overwrite(image, size, writes, rng, skewed=skewed))
        factor = (storage.written - before) / (writes * BLOCK)
        if limit:
            amplification = factor
        await image.close()
    kind = "skewed" if skewed else "uniform"
    part = rates[0] / rates[1]
    print(
        f"fill {fill} %, {kind}: written {amplification:.2f} x, {rates[0]:.0f} writes/s, {part:.0%} of {rates[1]:.0f}"
    )


async def cycle(folder: Path, capacity: int, turns: int) -> None:
    """Print a line of figures for each turn. Raises AssertionError when something is wrong."""
    path, rng = folder / "image.vde", random.Random(1)
    nbdvde.create_image(path, 2 * capacity, secret=None, compression="none", capacity=capacity)
    for turn in range(turns):
        taken: dict[int, int] = {}
        async with nbdvde.open_image(path, key=None) as image:
            try:
                for offset in range(0, 2 * capacity, _PIECE):
                    taken[offset] = seed = rng.getrandbits(64)
                    await write(image.disk(), offset, random.Random(seed).randbytes(_PIECE))
            except NoSpaceError:
                del taken[offset]
            await image.flush()
            full = path.stat().st_size
            for offset, seed in taken.items():
                pieces = await image.disk().read(offset, _PIECE)
                assert b"".join(map(bytes, pieces)) == random.Random(seed).randbytes(_PIECE), "nothing is lost"
            await image.disk().trim(0, image.disk().size)
            await image.clean()
        report = nbdvde.check_image(path)
        assert report.ok, report.errors
        empty = path.stat().st_blocks * 512
        print(f"turn {turn + 1}: {len(taken)} MiB taken, file {full >> 20} MiB, {empty >> 10} KiB once trimmed")


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("amplify", "cycle"))
    parser.add_argument("--capacity", type=parse_size)
    parser.add_argument("--fill", type=int, action="append", help="percent")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--skewed", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the image lies")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        capacity = asked.capacity or 1 << 30
        if asked.what == "cycle":
            trio.run(cycle, Path(name), capacity, asked.turns)
            return

        async def levels() -> None:
            for fill in asked.fill or (50, 70):
                await amplify(Path(name), capacity, fill, asked.turns, skewed=asked.skewed)

        trio.run(levels)


if __name__ == "__main__":
    main()
