"""A region of a replicated disk as clients read it."""

from collections.abc import Awaitable, Callable, Sequence

from nbdvde.disk import Disk, Piece
from nbdvde.engine.managed.regiondisk import RegionDisk


class UpToDate(RegionDisk):
    """Whoever reads it finds what was answered before on any node. It takes no writes: what is appended is an entry."""

    def __init__(self, disk: RegionDisk, barrier: Callable[[], Awaitable[None]]) -> None:
        self.name, self.size, self.read_only = disk.name, disk.size, True
        self._disk, self._barrier, self._owner = disk, barrier, disk.owner

    @staticmethod
    def on(barrier: Callable[[], Awaitable[None]]) -> Callable[[Disk], Disk]:
        """Makes such disks, of the same disk always the same. `barrier` waits until the image is up to date."""
        made: dict[str, UpToDate] = {}

        def of(disk: Disk) -> Disk:
            assert isinstance(disk, RegionDisk), "it is a region"
            known = made.get(disk.name)
            if known is None or known._disk is not disk:
                known = made[disk.name] = UpToDate(disk, barrier)
            return known

        return of

    @property
    def used(self) -> tuple[int, int]:
        return self._disk.used

    async def read(self, offset: int, length: int) -> Sequence[Piece]:
        await self._barrier()
        return await self._disk.read(offset, length)

    async def status(self, context: str, offset: int, length: int, max_extents: int) -> list[tuple[int, int]]:
        await self._barrier()
        return await super().status(context, offset, length, max_extents)
