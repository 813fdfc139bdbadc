"""The Disk interface: what a session may ask of a disk, whatever stands behind it."""

import abc
import enum
from collections.abc import Callable, Sequence

from nbdvde.errors import DamageError

Buffer = bytes | bytearray | memoryview
"""Bytes-like object of format 'B', contiguous."""

Piece = Buffer | int
"""Part of a read: bytes, or the length of a hole that reads as zeroes."""

BLOCK = 4096
"""Bytes in a block: the preferred unit of every request."""


Done = Callable[[Exception | None], None]
"""Is told of the end of a request: why it failed, if so. It is called on the event loop, and never raises."""


class Status(enum.IntFlag):
    """Allocation of a range; values of NBD's `base:allocation`."""

    DATA = 0
    HOLE = 1
    ZERO = 2


ALLOCATION, ALLOCATION_DEPTH = "base:allocation", "qemu:allocation-depth"
"""Metadata contexts: `Status`; and 0 for holes, 1 for the rest (QEMU, docs/interop/nbd.rst)."""


def located(error: Exception, disk: str, offset: int, length: int) -> Exception:
    """Damage with the range of a disk that cannot be read for it; any other error as it is."""
    if not isinstance(error, DamageError):
        return error
    why = f"bytes {offset} to {offset + length - 1} cannot be read: {error.message}"
    return type(error)(f"disk {disk}", why, error.hint)


class Disk(abc.ABC):
    """A linear array of bytes.

    Ranges are checked by the caller: `0 <= offset`, `0 < length`, `offset + length <= size`; any alignment.
    Every request has a `*_nowait` form that never blocks and answers None / False when the request needs
    I/O, a lock or space; the caller then awaits the other form, which always does the job or raises an
    `NbdvdeError`. What a `*_nowait` form accepted is visible to every later request at once, and durable
    after the next `flush` that begins later.
    """

    name: str
    size: int
    """Length in bytes, any number."""
    read_only: bool
    sequential = False
    """Whether each write has to begin where the one before it ended."""

    @property
    def owner(self) -> "Disk":
        """The disk with which it is deleted."""
        return self

    @property
    def contexts(self) -> tuple[str, ...]:
        """Metadata contexts that `status` knows."""
        return ALLOCATION, ALLOCATION_DEPTH

    async def attach(self, abort: Callable[[], None]) -> "Disk":
        """The disk as a client uses it that comes now; `abort` ends its connection. May wait, and raise NbdvdeError."""
        return self

    def falter(self) -> None:  # noqa: B027 - most disks do not care
        """The client's connection has ended while requests of it are being worked at."""

    def detach(self, *, clean: bool) -> None:  # noqa: B027 - most disks do not care
        """The client goes; not `clean` if requests of it may still be on their way."""

    @abc.abstractmethod
    def read_nowait(self, offset: int, length: int) -> Sequence[Piece] | None:
        """Pieces that cover the range exactly, or None. The buffers stay valid, and later writes may show in them."""

    @abc.abstractmethod
    async def read(self, offset: int, length: int) -> Sequence[Piece]:
        """As `read_nowait`, waiting for I/O."""

    @abc.abstractmethod
    def write_nowait(self, offset: int, data: memoryview, *, owned: bool) -> bool:
        """Write `data`; False when it has to wait (nothing is changed then).

        With `owned` the disk may keep views of `data`, and change it later: the caller has given it away. Otherwise
        it copies.
        """

    @abc.abstractmethod
    async def write(self, offset: int, data: memoryview, *, owned: bool = False) -> None:
        """As `write_nowait`, waiting for locks, for I/O and for space in the write buffer."""

    def begin_write(self, offset: int, data: memoryview, done: Done) -> bool:
        """Write `data`, which is given away, and call `done` when it is durable; False when `write` is to do it.

        For disks on which every write takes long: none needs a task of its own then.
        """
        return False

    @abc.abstractmethod
    def zero_nowait(self, offset: int, length: int, *, allocate: bool) -> bool:
        """Make the range read as zeroes. `allocate` keeps it from being reported as a hole (NBD NO_HOLE)."""

    @abc.abstractmethod
    async def zero(self, offset: int, length: int, *, allocate: bool = False) -> None:
        """As `zero_nowait`, waiting."""

    def trim_nowait(self, offset: int, length: int) -> bool:
        """Forget the range; it reads as zeroes afterwards."""
        return self.zero_nowait(offset, length, allocate=False)

    async def trim(self, offset: int, length: int) -> None:
        """As `trim_nowait`, waiting."""
        await self.zero(offset, length, allocate=False)

    def mark(self) -> int:
        """Stands for everything that was accepted so far, for `flush`."""
        return 0

    def flush_nowait(self, mark: int) -> bool:
        """Whether everything up to `mark` is known to be durable already."""
        return False

    @abc.abstractmethod
    async def flush(self, mark: int | None = None, *, alone: bool = False) -> None:
        """Make everything durable that was accepted before `mark`, or else before this call.

        With `alone` nobody else is being served just now, so that it may hold up the event loop for a moment (< 1 ms).
        """

    def bind(self, context: str) -> str:
        """A context as `status` takes it, meaning later what it means now."""
        return context

    @abc.abstractmethod
    async def status(self, context: str, offset: int, length: int, max_extents: int) -> list[tuple[int, int]]:
        """(length, number) of consecutive extents from `offset`, equal neighbours merged, at most `max_extents`.

        They lie inside the range, and cover it unless the limit was reached.
        """

    async def cache(self, offset: int, length: int) -> None:  # noqa: B027 - a hint, free to ignore
        """Hint that the range will be read soon."""
