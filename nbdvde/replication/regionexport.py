"""Regions of a replicated disk as clients use them: who reads finds what was answered before, on any node."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

import msgspec

from nbdvde.disk import BLOCK, Disk, Piece
from nbdvde.engine.managed.regiondisk import RegionDisk
from nbdvde.engine.managed.worm import Worm
from nbdvde.engine.managed.wormdisk import WormDisk
from nbdvde.errors import DetachedError, RefusedError
from nbdvde.moment import NO_CLOCK, RetentionClock

T = TypeVar("T")
APPEND = "worm/append"
"""The call that appends to a WORM region."""


class AppendData(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What that call is asked: data for the WORM region of a disk, up to 1 MiB."""

    data: bytes
    disk: str | None = None
    """The first one without."""
    block: int | None = None
    """Only if the region has so many blocks."""


class Ways(Protocol):
    """How regions reach their group."""

    async def barrier(self) -> None:
        """Wait until what is in the image is everything that was answered before this call."""

    @property
    def taken(self) -> int:
        """How often the image began to become what that of another node is: what was read meanwhile is nothing."""

    async def call(self, path: str, request: bytes, clock: RetentionClock = NO_CLOCK) -> bytes:
        """Have a change made on every node; its answer. Raises NbdvdeError."""


async def _up_to_date(disk: RegionDisk, ways: Ways, look: Callable[[], Awaitable[T]]) -> T:
    """What `look` finds in a region that has everything. Raises DetachedError once it is gone, or another one."""
    while True:
        await ways.barrier()
        taken = ways.taken
        try:
            found = await look()
        except RefusedError:
            if not disk.gone:
                raise
        if disk.gone:
            raise _detached(disk)
        if taken == ways.taken:
            return found


def _detached(disk: RegionDisk) -> DetachedError:
    return DetachedError(f"export {disk.name}", "shows a region that is gone, or was taken over", "connect again")


class UpToDate(RegionDisk):
    """A region that takes no writes."""

    def __init__(self, disk: RegionDisk, ways: Ways) -> None:
        self.name, self.size, self.read_only = disk.name, disk.size, True
        self._disk, self._ways, self._owner = disk, ways, disk.owner

    @property
    def used(self) -> tuple[int, int]:
        return self._disk.used

    @property
    def gone(self) -> bool:
        return self._disk.gone

    async def read(self, offset: int, length: int) -> Sequence[Piece]:
        return await _up_to_date(self, self._ways, lambda: self._disk.read(offset, length))

    async def status(self, context: str, offset: int, length: int, max_extents: int) -> list[tuple[int, int]]:
        look = super().status
        return await _up_to_date(self, self._ways, lambda: look(context, offset, length, max_extents))


class ReplicatedWormDisk(WormDisk):
    """A WORM region: what is written at its mark is appended on all nodes."""

    def __init__(self, worm: Worm, ways: Ways) -> None:
        super().__init__(worm)
        self._ways = ways

    async def read(self, offset: int, length: int) -> Sequence[Piece]:
        look = super().read
        return await _up_to_date(self, self._ways, lambda: look(offset, length))

    async def status(self, context: str, offset: int, length: int, max_extents: int) -> list[tuple[int, int]]:
        look = super().status
        return await _up_to_date(self, self._ways, lambda: look(context, offset, length, max_extents))

    async def put(self, data: memoryview, block: int) -> None:
        worm = self.worm
        request = AppendData(bytes(data), worm.disk.name, block)
        await self._ways.call(APPEND, msgspec.msgpack.encode(request), worm.clock)
        end = block + -(-len(data) // BLOCK)
        while worm.mark < end and not worm.gone:  # who asked hears of it before it is in this image
            await worm.moved.park()

    def _promise(self, offset: int, length: int) -> None:
        if self.gone:
            raise _detached(self)
        super()._promise(offset, length)

    async def _append(self, offset: int, data: memoryview, length: int) -> None:
        try:
            await super()._append(offset, data, length)
        except RefusedError:
            if self.gone:
                raise _detached(self) from None
            raise

    def flush_nowait(self, mark: int) -> bool:
        return True  # a majority has it on disk

    async def flush(self, mark: int | None = None, *, alone: bool = False) -> None: ...


def shown_through(ways: Ways) -> Callable[[Disk], Disk]:
    """Answers regions as clients use them, of the same one always the same."""
    made: dict[str, tuple[Disk, Disk]] = {}

    def shown(disk: Disk) -> Disk:
        assert isinstance(disk, RegionDisk), "it is a region"
        of, known = made.get(disk.name, (None, None))
        if known is None or of is not disk:
            known = ReplicatedWormDisk(disk.worm, ways) if isinstance(disk, WormDisk) else UpToDate(disk, ways)
            made[disk.name] = disk, known
        return known

    return shown
