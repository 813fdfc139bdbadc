"""Copying a raw file or a block device into a disk, and a disk out to one. Holes stay holes."""

import errno
import fcntl
import os
import stat
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeAlias

import trio

from nbdvde import workers
from nbdvde.disk import ALLOCATION, BLOCK, Disk, Piece, Status, located
from nbdvde.errors import DamageError, ImageError, NoSpaceError, RefusedError, reason
from nbdvde.newfile import NewFile

Progress: TypeAlias = Callable[[int, int], None]
"""Called with bytes done and in all."""
_PIECE = 4 << 20
_EXTENTS = 1024


async def copy_in(path: Path, disk: Disk, progress: Progress) -> int:
    """Make a disk hold what a file holds, and zeroes behind that; durable at the end. Answers how long the file is.

    Raises NbdvdeError. What was on the disk is lost, also when this fails half-way.
    """
    if disk.read_only:
        raise RefusedError(f"disk {disk.name}", "cannot be written", "import into another one")
    with opened(path, os.O_RDONLY) as file:
        size = await workers.run(os.lseek, file, 0, os.SEEK_END)
        if size > disk.size:
            raise RefusedError(str(path), f"has {size} bytes, disk {disk.name} {disk.size}", "make a larger disk")
        at = 0
        while at < size:
            start, stop = await workers.run(_next_data, file, at, size)
            if start > at:
                await disk.zero(at, start - at)
            at = start
            while at < stop:
                data = await workers.run(_read, file, min(_PIECE, stop - at), at)
                await disk.write(at, memoryview(data), owned=True)
                at += len(data)
                progress(at, size)
        if size < disk.size:
            await disk.zero(size, disk.size - size)
        await disk.flush()
    return size


async def copy_out(disk: Disk, path: Path, progress: Progress, *, overwrite: bool = False) -> int:
    """Write a disk to a new file, or with `overwrite` to what is there; durable at the end. Answers how long it is.

    A new file is there once it is whole. Raises NbdvdeError.
    """
    size = disk.size
    async with target(path, overwrite=overwrite) as (file, _):
        await workers.run(_prepare, file, size)
        await _write_out(disk, file, progress)
    return size


@asynccontextmanager
async def target(path: Path, *, overwrite: bool) -> AsyncIterator[tuple[int, Path]]:
    """A descriptor, and the path until the end, of a new file that others cannot read; durable at the end.

    When anything goes wrong there is none. With `overwrite` it may be what is there, not changed yet. Raises
    RefusedError, also for an image that is in use, ImageError, NoSpaceError.
    """
    if await workers.run(os.path.lexists, path):
        if not overwrite:
            raise _exists(path)
        with opened(path, os.O_WRONLY) as file:
            yield file, path
            await workers.run(os.fsync, file)
        return
    with placed(path):
        new = await workers.run(NewFile, path)
        try:
            yield new.file, new.part
            await workers.run(new.finish)
        finally:
            os.close(new.file)
            with trio.CancelScope(shield=True):
                await workers.run(new.abandon)


def _exists(path: Path, option: str = "--force") -> RefusedError:
    return RefusedError(str(path), "exists already", f"choose another name, or use {option}")


async def _write_out(disk: Disk, file: int, progress: Progress) -> None:
    zeroing = not stat.S_ISREG(os.fstat(file).st_mode)
    at = 0
    while at < disk.size:
        for length, status in await disk.status(ALLOCATION, at, disk.size - at, _EXTENTS):
            if status & Status.ZERO and not zeroing:
                at += length
                continue
            for start in range(at, at + length, _PIECE):
                count = min(_PIECE, at + length - start)
                await workers.run(_write, file, start, await _pieces(disk, start, count))
                progress(start + count, disk.size)
            at += length


async def _pieces(disk: Disk, at: int, count: int) -> Sequence[Piece]:
    """Some bytes of a disk. Raises DamageError, of the first block that cannot be read."""
    try:
        return await disk.read(at, count)
    except DamageError as damage:
        if count > BLOCK:
            for start in range(at, at + count, BLOCK):
                await _pieces(disk, start, min(BLOCK, at + count - start))
        raise located(damage, disk.name, at, count) from None


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """A descriptor, with a lock that no image in use grants; its errors tell of the path."""
    try:
        file = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ImageError(str(path), reason(error), "check the path") from None
    try:
        if not (stat.S_ISREG(mode := os.fstat(file).st_mode) or stat.S_ISBLK(mode)):
            raise ImageError(str(path), "is neither a file nor a block device", "copy through nbdcopy")
        _lock(path, file, flags)
        with placed(path):
            yield file
    finally:
        os.close(file)


@contextmanager
def placed(path: Path, option: str = "--force") -> Iterator[None]:
    """Have errors of the system tell of a path, and of the option that replaces what is there."""
    try:
        yield
    except FileExistsError:
        raise _exists(path, option) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(str(path), reason(error), "free some") from None
        raise ImageError(str(path), reason(error), "check the path" if error.filename else "") from None


def _lock(path: Path, file: int, flags: int) -> None:
    """Keep off an image in use, be it the very one that is copied: `access.open_file` locks those as well."""
    try:
        fcntl.flock(file, fcntl.LOCK_NB | (fcntl.LOCK_EX if flags & os.O_ACCMODE else fcntl.LOCK_SH))
    except BlockingIOError:
        raise _in_use(path) from None


def refuse_image(path: Path, image: Path) -> None:
    """Refuse to write a file that is this image, or one in use, by whatever name. Raises RefusedError, ImageError."""
    with opened(path, os.O_WRONLY):
        if image.exists() and path.samefile(image):
            raise _in_use(path)


def _in_use(path: Path) -> RefusedError:
    return RefusedError(str(path), "is the image itself, or in use", "choose another file")


def _next_data(file: int, at: int, size: int) -> tuple[int, int]:
    """(start, stop) of the next data from `at` on; both are the end when there is none."""
    try:
        start = os.lseek(file, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size, size
        return at, size  # a device, or a file system, without holes
    # Blocks that the data fills in part are read as a whole: the file has zeroes there.
    stop = os.lseek(file, start, os.SEEK_HOLE)
    return max(at, start - start % BLOCK), min(size, -(-stop // BLOCK) * BLOCK)


def _read(file: int, count: int, at: int) -> bytes:
    data = os.pread(file, count, at)
    if not data:
        raise OSError(errno.EIO, "the file became shorter")
    return data


def _prepare(file: int, size: int) -> None:
    """Make a file all holes; a device has to be large enough."""
    if stat.S_ISREG(os.fstat(file).st_mode):
        os.ftruncate(file, 0)
        os.ftruncate(file, size)
    elif os.lseek(file, 0, os.SEEK_END) < size:
        raise OSError(errno.ENOSPC, f"the device has fewer than {size} bytes")


def _write(file: int, at: int, pieces: Sequence[Piece]) -> None:
    for piece in pieces:
        data = memoryview(bytes(piece)) if isinstance(piece, int) else memoryview(piece)
        while data:
            count = os.pwrite(file, data, at)
            data, at = data[count:], at + count
