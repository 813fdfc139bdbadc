"""The device of the crash tests: a storage in memory that records what the engine does to it.

Fault model. After a crash everything before the last completed sync is there. Of what was done since then,
any subset is there, whatever the order: writes, allocations, truncations and punched holes. A write that is
there may be torn: at the granularity of 512 or of 4096 bytes any part of it (a prefix, a suffix, a scatter of
sectors) may be missing and still hold what was there before. A file is as long as its longest part that
survived; what lies in between and was never written reads as zeroes. A sync that fails makes nothing durable,
and what it should have made durable stays in doubt for ever: a later sync that succeeds does not save it (Linux
reports a failed write-back once, and drops the pages). What was synced does not decay: that is the business of
the damage tests.
"""

import errno
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from nbdvde.disk import Buffer
from nbdvde.engine.storage import Storage
from tests.crash import stepping

SECTOR = 512


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes that went to an offset."""

    offset: int
    data: bytes

    def apply(self, image: bytearray) -> None:
        _extend(image, self.offset + len(self.data))
        image[self.offset : self.offset + len(self.data)] = self.data

    def pieces(self, unit: int) -> list["Write"]:
        """The write in parts that do not cross a multiple of `unit` bytes."""
        parts, at = [], 0
        while at < len(self.data):
            stop = min(len(self.data), at + unit - (self.offset + at) % unit)
            parts.append(Write(self.offset + at, self.data[at:stop]))
            at = stop
        return parts


@dataclass(frozen=True, slots=True)
class Allocate:
    """Space was reserved; the file is at least that long."""

    end: int

    def apply(self, image: bytearray) -> None:
        _extend(image, self.end)


@dataclass(frozen=True, slots=True)
class Punch:
    """A range was given back."""

    offset: int
    length: int

    def apply(self, image: bytearray) -> None:
        stop = min(len(image), self.offset + self.length)
        if stop > self.offset:
            image[self.offset : stop] = bytes(stop - self.offset)


@dataclass(frozen=True, slots=True)
class Truncate:
    """The file was cut."""

    size: int

    def apply(self, image: bytearray) -> None:
        del image[self.size :]


@dataclass(frozen=True, slots=True)
class Sync:
    """A completed sync: everything before it stays."""


@dataclass(frozen=True, slots=True)
class FailedSync:
    """A sync that answered with an error."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What the workload knows at this point: versions `low` to `high` of the disk may be found after a crash."""

    low: int
    high: int


Change = Write | Allocate | Punch | Truncate
Event = Change | Sync | FailedSync | Mark


def _extend(image: bytearray, size: int) -> None:
    if len(image) < size:
        image.extend(bytes(size - len(image)))


def applied(base: bytes, changes: Iterable[Change]) -> bytes:
    """The image after a crash that left just these changes."""
    image = bytearray(base)
    for change in changes:
        change.apply(image)
    return bytes(image)


class FrozenStorage(Storage):
    """An image that is only read."""

    def __init__(self, image: bytes | bytearray) -> None:
        self._image = image

    def size(self) -> int:
        return len(self._image)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self._image[offset : offset + length])

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        return self.read(offset, length)

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        raise AssertionError("recovery only reads")

    def sync(self) -> None:
        raise AssertionError("recovery only reads")

    def allocate(self, offset: int, length: int) -> None:
        raise AssertionError("recovery only reads")

    def punch(self, offset: int, length: int) -> None:
        raise AssertionError("recovery only reads")

    def truncate(self, size: int) -> None:
        raise AssertionError("recovery only reads")

    def close(self) -> None:
        pass


Fault = Callable[[str], int | None]
"""Asked before every operation, by its name; answers an errno to fail with."""


class RecordingStorage(Storage):
    """A file in memory with a record of every change; each operation of a worker is a point to switch tasks."""

    def __init__(self, base: bytes = b"", limit: int | None = None) -> None:
        self.base = base
        self.image = bytearray(base)
        self.events: list[Event] = []
        self.limit = limit
        """Longest the file may get: beyond it there is no space on the host."""
        self.fault: Fault = lambda operation: None
        self.closed = False

    def _enter(self, operation: str) -> None:
        stepping.pause()
        assert not self.closed, "the storage is closed"
        if number := self.fault(operation):
            raise OSError(number, "injected")

    def _record(self, change: Change) -> None:
        self.events.append(change)
        change.apply(self.image)

    def mark(self, low: int, high: int) -> None:
        """Note what a crash may leave from here on."""
        if not (self.events and self.events[-1] == Mark(low, high)):
            self.events.append(Mark(low, high))

    def size(self) -> int:
        return len(self.image)

    def read(self, offset: int, length: int) -> bytes:
        self._enter("read")
        return bytes(self.image[offset : offset + length])

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        return bytes(self.image[offset : offset + length])

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        data = b"".join(buffers)
        try:
            self._enter("write")
        except OSError:
            self._record(Write(offset, data[: len(data) // 2]))
            raise
        self._record(Write(offset, data))

    def sync(self) -> None:
        try:
            self._enter("sync")
        except OSError:
            self.events.append(FailedSync())
            raise
        self.events.append(Sync())

    def allocate(self, offset: int, length: int) -> None:
        self._enter("allocate")
        if self.limit is not None and offset + length > max(self.limit, len(self.image)):
            raise OSError(errno.ENOSPC, "no space left")
        self._record(Allocate(offset + length))

    def punch(self, offset: int, length: int) -> None:
        self._enter("punch")
        self._record(Punch(offset, length))

    def truncate(self, size: int) -> None:
        self._enter("truncate")
        self._record(Truncate(size))

    def close(self) -> None:
        self.closed = True
