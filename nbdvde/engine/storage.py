"""The backing file. Everything the engine reads or makes durable goes through `Storage`."""

import abc
import errno
import os
from collections.abc import Sequence

from nbdvde.disk import Buffer

_IOV_MAX = 1024


class Storage(abc.ABC):
    """A growable array of bytes on a device that loses what was not synced.

    Methods are synchronous and may block (call them from a worker thread), except the `*_nowait` one.
    They raise OSError.
    """

    @abc.abstractmethod
    def size(self) -> int:
        """Length in bytes."""

    @abc.abstractmethod
    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes; fewer only at the end of the file."""

    @abc.abstractmethod
    def read_nowait(self, offset: int, length: int) -> bytes | None:
        """As `read`, or None when it would have to wait for the device."""

    @abc.abstractmethod
    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write the buffers one after the other. After an error any part of them may be there."""

    @abc.abstractmethod
    def sync(self) -> None:
        """Make every write, allocation and truncation before this call durable (fdatasync)."""

    @abc.abstractmethod
    def allocate(self, offset: int, length: int) -> None:
        """Reserve space for the range, extending the file; ENOSPC when there is none. Contents are unspecified."""

    @abc.abstractmethod
    def punch(self, offset: int, length: int) -> None:
        """Give the range's space back to the host; a hint. Contents are unspecified afterwards."""

    @abc.abstractmethod
    def truncate(self, size: int) -> None:
        """Cut the file at `size` bytes."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release the file; no method may be called afterwards."""
