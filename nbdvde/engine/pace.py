"""Reading an image no faster than asked: what runs beside clients leaves them the device."""

import math
import time
from collections.abc import Callable, Sequence

import trio

from nbdvde.disk import Buffer
from nbdvde.engine.storage import Storage
from nbdvde.errors import UsageError

Progress = Callable[[int, int], None]
MIN_RATE = 64 << 10
"""Bytes a second that somebody may ask for. With less than an extent, work seems to have come to a standstill."""
_SLICE_S = 0.1
"""Longest wait without a call of the progress, which may end it all by an exception."""


def check_rate(rate: int) -> int:
    """The rate, if it is one. Raises UsageError."""
    if rate < MIN_RATE:
        raise UsageError(f"rate {rate}", "is less than 64K a second", "like 64M")
    return rate


class Pace:
    """A rate for work on the event loop, of bytes a second; None for no limit."""

    def __init__(self, rate: int | None) -> None:
        self._rate = rate
        self._due_s = -math.inf
        """When the next step may begin."""

    @property
    def gentle(self) -> bool:
        """Whether clients are to be left room: one core, too."""
        return self._rate is not None

    async def spend(self, count: int) -> None:
        """After a step that read or wrote so many bytes: wait until the next one is due, and be cancelled here."""
        now_s = trio.current_time()
        self._due_s = max(self._due_s, now_s - _SLICE_S) + (count / self._rate if self._rate else 0)
        await trio.sleep(max(0.0, self._due_s - now_s))


class Paced(Storage):
    """A storage of which `read` gives `rate` bytes a second on average, from the first one on."""

    def __init__(self, storage: Storage, rate: int, progress: Progress) -> None:
        self._storage, self._rate, self._progress = storage, rate, progress
        self._told = (0, 0)
        self._due_s = time.monotonic()
        """When the next read may begin."""

    def progress(self, done: int, total: int) -> None:
        """To be told how far the work has come."""
        self._told = (done, total)
        self._progress(done, total)

    def read(self, offset: int, length: int) -> bytes:
        while (wait_s := self._due_s - time.monotonic()) > 0:
            time.sleep(min(wait_s, _SLICE_S))
            self._progress(*self._told)
        self._due_s = max(self._due_s, time.monotonic() - _SLICE_S) + length / self._rate
        return self._storage.read(offset, length)

    def size(self) -> int:
        return self._storage.size()

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        return self._storage.read_nowait(offset, length)

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._storage.write(offset, buffers)

    def sync(self) -> None:
        self._storage.sync()

    def allocate(self, offset: int, length: int) -> None:
        self._storage.allocate(offset, length)

    def punch(self, offset: int, length: int) -> None:
        self._storage.punch(offset, length)

    def truncate(self, size: int) -> None:
        self._storage.truncate(size)

    def close(self) -> None:
        self._storage.close()


def paced(storage: Storage, rate: int | None, progress: Progress | None) -> tuple[Storage, Progress | None]:
    """What to read, and what to tell of progress, at `rate` bytes a second at most; at any without one."""
    if rate is None:
        return storage, progress
    slow = Paced(storage, rate, progress or (lambda done, total: None))
    return slow, slow.progress
