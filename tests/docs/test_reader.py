"""docs/format.md suffices: a reader written from it reads what nbdvde wrote, and finds what was damaged."""

import random
from itertools import pairwise
from pathlib import Path

import pytest

import nbdvde
from nbdvde import KeyFile, MasterKey, Passphrase
from nbdvde.engine.keys import Secret
from nbdvde.engine.layout import BLOCK
from tests.docs.reader import Image, ReaderError

SIZE = 2 << 30
BLOCKS = SIZE // BLOCK
SEGMENT = 256 << 10
PATTERN = b"All that is written here compresses well. " * 98
MASTER = MasterKey(bytes(range(32)))


def _pages(chance: random.Random, count: int) -> list[bytes]:
    """Blocks of three kinds: random, compressible, zero."""
    makers = (lambda: chance.randbytes(BLOCK), lambda: PATTERN[:BLOCK], lambda: bytes(BLOCK))
    return [chance.choice(makers)() for _ in range(count)]


class Writer:
    """Writes to a disk, and keeps what it holds by block."""

    def __init__(self, disk, seed: int) -> None:
        self.disk, self.chance = disk, random.Random(seed)
        self.expected: dict[int, bytes] = {}

    async def write(self, first: int, count: int) -> None:
        pages = _pages(self.chance, count)
        await self.disk.write(first * BLOCK, memoryview(b"".join(pages)))
        self.expected.update(enumerate(pages, first))

    async def zero(self, first: int, count: int, *, allocate: bool) -> None:
        await self.disk.zero(first * BLOCK, count * BLOCK, allocate=allocate)
        self.expected.update(dict.fromkeys(range(first, first + count), bytes(BLOCK)))

    async def fill(self) -> None:
        """Some hundreds of blocks all over the disk, several commits, overwrites, holes and allocated zeroes."""
        for _ in range(6):
            for first in (0, 509, 130_000, BLOCKS - 40):
                await self.write(first + self.chance.randrange(8), self.chance.randrange(1, 30))
            await self.zero(self.chance.randrange(20), 5, allocate=bool(self.chance.randrange(2)))
            await self.disk.flush()


def _compare(image: Image, expected: dict[int, bytes]) -> None:
    assert image.disks == {"disk": 1}
    for block in sorted({*expected, 77_777, BLOCKS - 1}):
        assert image.block("disk", block) == expected.get(block, bytes(BLOCK)), block


@pytest.mark.parametrize(("secret", "kind"), [
    (MASTER, 0), (Passphrase("fünf Wörter".encode()), 1), (KeyFile(bytes(range(200))), 2), (None, 0),
], ids=["master", "passphrase", "keyfile", "plain"])  # fmt: skip
@pytest.mark.parametrize("compression", ["fastest", "none"])
async def test_reads_after_a_clean_stop(tmp_path: Path, secret: Secret | None, kind: int, compression: str):
    path = tmp_path / "image.vde"
    nbdvde.create_image(path, SIZE, secret=secret, compression=compression, segment_bytes=SEGMENT)
    expected: dict[int, bytes] = {}
    for seed in range(2):
        async with nbdvde.open_image(path, key=secret) as image:
            writer = Writer(image.disk(), seed)
            await writer.fill()
            expected |= writer.expected
    _compare(Image(path.read_bytes(), secret.data if secret else b"", kind), expected)


async def _crashed(path: Path) -> tuple[bytes, dict[int, bytes]]:
    """The file as it was in mid-run, some groups, segments and a checkpoint after the opening."""
    nbdvde.create_image(path, SIZE, secret=MASTER, segment_bytes=SEGMENT)
    async with nbdvde.open_image(path, key=MASTER) as image:
        writer = Writer(image.disk(), 7)
        await writer.fill()
        await image.checkpoint()
        await writer.fill()
        return _file(path), dict(writer.expected)


async def test_replays_the_log_after_a_crash(tmp_path: Path):
    file, expected = await _crashed(tmp_path / "image.vde")
    image = Image(file, MASTER.data)
    assert len(image.segments) > 4, "the log went on in other segments"
    _compare(image, expected)


async def test_replays_from_the_older_superblock(tmp_path: Path):
    file, expected = await _crashed(tmp_path / "image.vde")
    for damaged in (0, 65536):
        _compare(Image(file[:damaged] + bytes(BLOCK) + file[damaged + BLOCK :], MASTER.data), expected)


async def test_tells_damage_from_a_torn_tail(tmp_path: Path):
    path = tmp_path / "image.vde"
    nbdvde.create_image(path, SIZE, secret=MASTER)
    async with nbdvde.open_image(path, key=MASTER) as image:
        writer = Writer(image.disk(), 9)
        files = [_file(path)]
        for block in range(3):
            await writer.write(block, 1)
            await writer.disk.flush()
            files.append(_file(path))
    groups = [_first_difference(before, after) for before, after in pairwise(files)]
    with pytest.raises(ReaderError, match="record 2 is damaged"):
        Image(_flip(files[-1], groups[1]), MASTER.data)
    torn = Image(_flip(files[-1], groups[2]), MASTER.data)
    _compare(torn, {0: writer.expected[0], 1: writer.expected[1]})


def _file(path: Path) -> bytes:
    return path.read_bytes()


def _first_difference(before: bytes, after: bytes) -> int:
    """Offset of the first byte that differs behind superblocks and key areas."""
    return next(at for at in range(131072, len(after)) if before[at : at + 1] != after[at : at + 1])


def _flip(file: bytes, offset: int) -> bytes:
    return file[:offset] + bytes((file[offset] ^ 1,)) + file[offset + 1 :]


def test_knows_nothing_of_nbdvde():
    source = Path(__file__).with_name("reader.py").read_text(encoding="utf-8")
    assert not [line for line in source.splitlines() if "import" in line and "nbdvde" in line]
