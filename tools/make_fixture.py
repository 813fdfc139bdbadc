"""Make an image as this version writes it: python tools/make_fixture.py tests/fixtures.

An image of a released version is never made anew: later versions must read it. Content and key are those of
`expected` and `KEY` below, which the test uses too.
"""

import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import trio
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nbdvde import open_image
from nbdvde.engine.access import create_image
from nbdvde.engine.dictionaries import identified
from nbdvde.engine.image import Image
from nbdvde.engine.keys import MasterKey
from nbdvde.engine.volume import Volume

KEY = MasterKey(bytes(range(32)))
SIZE = (5 << 20) + 512
HISTORY = "v1-history.vde"
IMAGES = {"v1-encrypted.vde": KEY, "v1-plain.vde": None}
_TEXT = b"The quick brown fox jumps over the lazy dog. "


def requests() -> list[tuple[int, bytes]]:
    """Writes in order: compressible, incompressible, unaligned, overwriting, far apart, at the end."""
    noise = random.Random(1).randbytes(20_000)
    return [
        (0, _TEXT * 2000),
        (200_000, noise),
        (4096, b"\xff" * 4096),
        (70_001, b"unaligned"),
        (3 << 20, noise[:8192]),
        (SIZE - 512, b"the end".ljust(512, b".")),
        (8192, bytes(12_288)),
    ]


def expected() -> bytes:
    """What the disk holds."""
    content = bytearray(SIZE)
    for offset, data in requests():
        content[offset : offset + len(data)] = data
    content[40_960:49_152] = bytes(8192)
    return bytes(content)


async def fill(disk: Volume) -> None:
    """Write it, with a flush after each request, so that there are several commits."""
    for offset, data in requests():
        await disk.write(offset, memoryview(data))
        await disk.flush()
    await disk.zero(40_960, 8192, allocate=True)


class History:
    """An image with snapshots, a clone, a second disk, duplicates, a dictionary, and cleaned segments."""

    def __init__(self, image: Image | None) -> None:
        """Without an image only what it holds is worked out."""
        self._image = image
        self.disks = {"disk": bytearray(SIZE)}
        """Content of all disks and snapshots."""
        self._rng = random.Random(2)

    async def write(self, disk: str, block: int, data: bytes) -> None:
        """One commit."""
        self.disks[disk][block * 4096 : block * 4096 + len(data)] = data
        if self._image:
            await self._image.disk(disk).write(block * 4096, memoryview(data))
            await self._image.flush()

    async def copy(self, source: str, name: str) -> None:
        """A snapshot DISK@NAME, or a clone."""
        self.disks[name] = bytearray(self.disks[source])
        if self._image and "@" in name:
            await self._image.volumes.snapshot(source, name.partition("@")[2])
        elif self._image:
            await self._image.volumes.clone(source, name)

    async def all(self) -> None:
        """Everything, in order."""
        lines = [b"%08d %s level=%d message=fox%d\n" % (n, _TEXT, n % 7, n * n % 1000) for n in range(8000)]
        text = b"".join(lines)
        noise = self._rng.randbytes(64 << 10)
        if self._image:
            samples = [text[at : at + 4096] for at in range(0, len(text) - 4096, 4096)]
            await self._image.register_dictionary(identified(train(8 << 10, samples)), len(samples))
            await self._image.volumes.create("other", SIZE, "disk")
        self.disks["other"] = bytearray(SIZE)
        for block in range(40):
            await self.write("disk", block * 3, text[block * 4096 :][:4096])
        await self.write("disk", 200, noise)
        await self.copy("disk", "disk@first")
        await self.write("disk", 300, noise)
        await self.write("other", 0, noise)
        await self.copy("disk@first", "clone")
        for block in range(0, 40, 2):
            await self.write("disk", 200 + block, self._rng.randbytes(4096))
            await self.write("clone", 400 + block % 10, text[block * 100 :][:4096])
        await self.copy("disk", "disk@second")
        if self._image:
            await self._image.clean(0.05)
        await self.write("disk", 7, b"after cleaning".ljust(4096, b"."))


def train(size: int, samples: Sequence[bytes | bytearray | memoryview]) -> bytes:
    """A dictionary of zstd."""
    return zstandard.train_dictionary(size, list(samples), k=200, d=8).as_bytes()


async def make_history(path: Path) -> None:
    """Write the image with a history."""
    create_image(path, SIZE, secret=KEY, segment_bytes=65536)
    async with open_image(path, key=KEY) as image:
        await History(image).all()
    os.chmod(path, 0o644)


async def make(folder: Path) -> None:
    """Write all images into the folder that are not there."""
    if not (folder / HISTORY).exists():
        await make_history(folder / HISTORY)
    for name, key in IMAGES.items():
        path = folder / name
        if path.exists():
            continue
        create_image(path, SIZE, secret=key, segment_bytes=65536, compression="optimal")
        for _ in range(2):  # the second opening begins another log segment
            async with open_image(path, key=key) as image:
                await fill(image.disk())
        os.chmod(path, 0o644)
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    trio.run(make, Path(sys.argv[1]))
