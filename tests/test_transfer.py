"""Raw files into disks and out of them: the same bytes, and holes where there is nothing."""

import errno
import os
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

import nbdvde
from nbdvde.disk import ALLOCATION, BLOCK, Disk, Piece
from nbdvde.engine.access import new_file
from nbdvde.errors import ImageError, NbdvdeError, NoSpaceError, RefusedError
from nbdvde.memory import MemoryDisk
from nbdvde.transfer import copy_in, copy_out

SIZE = 24 << 20
CHANCE = random.Random(4)


def ignore(done: int, total: int) -> None:
    assert 0 < done <= total


def sparse_file(path: Path, size: int, *parts: tuple[int, int]) -> bytes:
    with path.open("wb") as file:
        file.truncate(size)
        for offset, length in parts:
            file.seek(offset)
            file.write(CHANCE.randbytes(length))
    return path.read_bytes()


async def content(disk: Disk) -> bytes:
    pieces = await disk.read(0, disk.size)
    return b"".join(bytes(piece) for piece in pieces)


@pytest.mark.parametrize(
    "parts",
    [
        (),
        ((0, SIZE),),
        ((5 << 20, 9 << 20),),
        ((12345, 7), (1 << 20, 4095), (SIZE - 3, 3)),
        tuple((number << 20, 100 * number + 1) for number in range(24)),
    ],
)
@pytest.mark.parametrize("size", [SIZE, SIZE - 5000, 4097])
async def test_in_and_out(tmp_path: Path, parts: tuple[tuple[int, int], ...], size: int) -> None:
    inside = tuple((at, min(length, size - at)) for at, length in parts if at < size)
    data = sparse_file(tmp_path / "in", size, *inside)
    disk = MemoryDisk(SIZE)
    await disk.write(0, memoryview(CHANCE.randbytes(SIZE)))
    await copy_in(tmp_path / "in", disk, ignore)
    assert await content(disk) == data.ljust(SIZE, b"\0")
    await copy_out(disk, tmp_path / "out", ignore)
    assert (tmp_path / "out").read_bytes() == data.ljust(SIZE, b"\0")
    assert (tmp_path / "out").stat().st_blocks <= (tmp_path / "in").stat().st_blocks + 256 * (len(parts) + 1)


async def test_with_an_image(tmp_path: Path) -> None:
    nbdvde.create_image(tmp_path / "image", SIZE, secret=None)
    data = sparse_file(tmp_path / "in", SIZE, (1 << 20, 3 << 20), (20 << 20, 1))
    async with nbdvde.open_image(tmp_path / "image") as image:
        await copy_in(tmp_path / "in", image.disk(), ignore)
        stored = sum(length for length, status in await image.disk().status(ALLOCATION, 0, SIZE, 99) if not status)
        assert stored == (3 << 20) + BLOCK
    async with nbdvde.open_image(tmp_path / "image", read_only=True) as image:
        await copy_out(image.disk(), tmp_path / "out", ignore)
    assert (tmp_path / "out").read_bytes() == data
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o600


async def test_what_is_too_large_changes_nothing(tmp_path: Path) -> None:
    disk = MemoryDisk(BLOCK)
    await disk.write(0, memoryview(b"kept" * 1024))
    sparse_file(tmp_path / "in", BLOCK + 1)
    with pytest.raises(RefusedError, match="larger disk"):
        await copy_in(tmp_path / "in", disk, ignore)
    assert await content(disk) == b"kept" * 1024


async def test_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(RefusedError, match="--force"):
        await copy_out(MemoryDisk(BLOCK), tmp_path / "out", ignore)
    assert (tmp_path / "out").read_text() == "precious"
    await copy_out(MemoryDisk(BLOCK), tmp_path / "out", ignore, overwrite=True)
    assert (tmp_path / "out").read_bytes() == bytes(BLOCK)


async def test_a_link_is_not_followed_to_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nothing")
    with pytest.raises(RefusedError):
        await copy_out(MemoryDisk(BLOCK), tmp_path / "out", ignore)


@pytest.mark.parametrize("read_only", [True, False])
@pytest.mark.parametrize("name", ["image", "hard", "soft"])
async def test_an_image_is_not_copied_onto_itself(tmp_path: Path, name: str, read_only: bool) -> None:
    nbdvde.create_image(tmp_path / "image", SIZE, secret=None)
    (tmp_path / "hard").hardlink_to(tmp_path / "image")
    (tmp_path / "soft").symlink_to("image")
    async with nbdvde.open_image(tmp_path / "image", read_only=read_only) as image:
        before = (tmp_path / "image").read_bytes()
        with pytest.raises(RefusedError, match="the image itself"):
            await copy_out(image.disk(), tmp_path / name, ignore, overwrite=True)
        if not read_only:
            with pytest.raises(RefusedError, match="the image itself"):
                await copy_in(tmp_path / name, image.disk(), ignore)
        assert (tmp_path / "image").read_bytes() == before


@pytest.mark.parametrize("name", ["nothing", ".", "fifo", "loop"])
async def test_what_is_no_file(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ImageError) as caught:
        await copy_in(tmp_path / name, MemoryDisk(BLOCK), ignore)
    assert "\n" not in str(caught.value)


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


class Failing(MemoryDisk):
    """A disk that cannot be read beyond its middle."""

    def __init__(self, error: NbdvdeError) -> None:
        super().__init__(SIZE)
        self.error = error

    async def read(self, offset: int, length: int) -> list[bytes | bytearray | memoryview | int]:
        if offset >= SIZE // 2:
            raise self.error
        return [bytes(length)]


async def test_half_a_file_is_removed(tmp_path: Path) -> None:
    disk = Failing(ImageError("image", "is gone"))
    await disk.write(0, memoryview(CHANCE.randbytes(SIZE)))
    with pytest.raises(ImageError, match="gone"):
        await copy_out(disk, tmp_path / "out", ignore)
    assert names(tmp_path) == []


async def test_a_full_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, data: memoryview, at: int) -> int:
        raise OSError(28, "No space left on device")

    disk = MemoryDisk(SIZE)
    await disk.write(0, memoryview(b"x" * BLOCK))
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(NoSpaceError):
        await copy_out(disk, tmp_path / "out", ignore)
    assert names(tmp_path) == []


async def test_a_file_that_becomes_shorter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_file(tmp_path / "in", SIZE, (0, SIZE))
    monkeypatch.setattr(os, "pread", lambda *_: b"")
    with pytest.raises(ImageError, match="shorter"):
        await copy_in(tmp_path / "in", MemoryDisk(SIZE), ignore)


class Watching(MemoryDisk):
    """A disk that does something when it is read."""

    def __init__(self, watch: Callable[[], None]) -> None:
        super().__init__(SIZE)
        self.watch = watch
        self.write_nowait(0, memoryview(b"data" * 1024), owned=False)

    async def read(self, offset: int, length: int) -> Sequence[Piece]:
        self.watch()
        return await super().read(offset, length)


@pytest.mark.parametrize("error", [0, errno.EPERM, errno.EMLINK])
async def test_a_new_file_has_its_name_once_it_is_whole(
    tmp_path: Path, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    if error:  # as where there are no hard links
        monkeypatch.setattr(os, "link", partial(_failing, error))
    await copy_out(Watching(lambda: seen.extend(names(tmp_path))), tmp_path / "out", ignore)
    assert {(name[:4], name[-5:]) for name in seen} == {("out.", ".part")}, "what a killed process leaves"
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").read_bytes()[:BLOCK] == b"data" * 1024


def _failing(error: int, *_: object) -> None:
    raise OSError(error, os.strerror(error))


@pytest.mark.parametrize("error", [0, errno.EPERM])
async def test_what_came_there_meanwhile_stays(tmp_path: Path, error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if error:
        monkeypatch.setattr(os, "link", partial(_failing, error))
    with pytest.raises(NbdvdeError):
        await copy_out(Watching((tmp_path / "out").touch), tmp_path / "out", ignore)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").stat().st_size == 0


def test_a_new_image_has_its_name_once_it_is_whole(tmp_path: Path) -> None:
    with new_file(tmp_path / "image.vde") as storage:
        assert [name[-5:] for name in names(tmp_path)] == [".part"]
        storage.close()
    assert names(tmp_path) == ["image.vde"]
    with pytest.raises(RefusedError, match="exists already"), new_file(tmp_path / "image.vde"):
        pass


def test_a_long_name(tmp_path: Path) -> None:
    with new_file(tmp_path / ("\u00e4" * 127)) as storage:
        storage.close()
    with pytest.raises(ImageError, match="too long"), new_file(tmp_path / ("\u00e4" * 128)):
        pass
    assert names(tmp_path) == ["\u00e4" * 127]
