"""The directory that holds the log of a node, and the files in it. Everything blocks and raises OSError."""

import fcntl
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from nbdvde.errors import InUseError

_IOV_MAX = 1024
_ZEROES = memoryview(bytes(1 << 18))
_SUFFIX = ".log"


class File(Protocol):
    """A file of a fixed length."""

    @property
    def size(self) -> int:
        """In bytes."""

    def read(self, offset: int, length: int) -> bytes:
        """What the device has there."""

    def write(self, offset: int, buffers: Sequence[bytes]) -> None:
        """Write buffers one behind the other. After an error any part of them may be there."""

    def make_ready(self, offset: int, length: int) -> None:
        """Have a range that was never written at hand, which will be soon; it reads as before."""

    def sync(self) -> None:
        """Make everything written durable."""

    def close(self) -> None:
        """Let go of it."""


class Directory(Protocol):
    """Files by number."""

    def numbers(self) -> Sequence[int]:
        """Of the files that there are, ascending."""

    def open(self, number: int) -> File:
        """A file that is there; it is read from the device, not from memory."""

    def create(self, number: int, size: int) -> File:
        """A file of zeroes whose space is reserved, durably; none when that fails."""

    def remove(self, number: int) -> None:
        """A file goes, durably."""

    def close(self) -> None:
        """Let go of the directory."""


class DiskFile:
    """A file of the host."""

    def __init__(self, fd: int) -> None:
        """Takes over an open file descriptor."""
        self._fd = fd
        self.size = os.fstat(fd).st_size

    def read(self, offset: int, length: int) -> bytes:
        parts = []
        while length and (part := os.pread(self._fd, length, offset)):
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return b"".join(parts)

    def write(self, offset: int, buffers: Sequence[bytes]) -> None:
        for start in range(0, len(buffers), _IOV_MAX):
            part = buffers[start : start + _IOV_MAX]
            total = sum(map(len, part))
            done = os.pwritev(self._fd, part, offset)
            if done < total:
                self._write_rest(memoryview(b"".join(part))[done:], offset + done)
            offset += total

    def _write_rest(self, rest: memoryview, offset: int) -> None:
        while rest:
            done = os.pwrite(self._fd, rest, offset)
            rest, offset = rest[done:], offset + done

    def make_ready(self, offset: int, length: int) -> None:
        os.pwritev(self._fd, [_ZEROES[:length]], offset)  # a part of it will do

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


class DiskDirectory:
    """A directory of the host, made if it is not there, for one process at a time."""

    def __init__(self, path: Path) -> None:
        """Raises InUseError when another process has it."""
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise InUseError(str(path), "belongs to another process", "end that process first") from None

    def numbers(self) -> Sequence[int]:
        return sorted(int(path.stem, 16) for path in self._path.glob("[0-9a-f]" * 8 + _SUFFIX))

    def open(self, number: int) -> File:
        fd = os.open(self._name(number), os.O_RDWR, dir_fd=self._fd)
        # After a failed sync the host may show data that the device never got.
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return DiskFile(fd)

    def create(self, number: int, size: int) -> File:
        name = self._name(number)
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=self._fd)
        try:
            os.posix_fallocate(fd, 0, size)
            os.fsync(fd)
            os.fsync(self._fd)
        except OSError:
            os.close(fd)
            with suppress(OSError):
                os.unlink(name, dir_fd=self._fd)
            raise
        return DiskFile(fd)

    def remove(self, number: int) -> None:
        os.unlink(self._name(number), dir_fd=self._fd)
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)

    @staticmethod
    def _name(number: int) -> str:
        return f"{number:08x}{_SUFFIX}"
