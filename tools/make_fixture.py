"""Make an image as this version writes it: python tools/make_fixture.py tests/fixtures.

An image of a released version is never made anew: later versions must read it. Content and key are those of
`expected` and `KEY` below, which the test uses too.
"""

import os
import random
import sys
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nbdvde import open_image
from nbdvde.engine.access import create_image
from nbdvde.engine.keys import MasterKey
from nbdvde.engine.volume import Volume

KEY = MasterKey(bytes(range(32)))
SIZE = (5 << 20) + 512
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


async def make(folder: Path) -> None:
    """Write both images into the folder."""
    for name, key in IMAGES.items():
        path = folder / name
        create_image(path, SIZE, secret=key, segment_bytes=65536, compression="optimal")
        for _ in range(2):  # the second opening begins another log segment
            async with open_image(path, key=key) as image:
                await fill(image.disk())
        os.chmod(path, 0o644)
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    trio.run(make, Path(sys.argv[1]))
