"""What regions have in common that clients use as disks."""

import abc

from nbdvde.disk import ALLOCATION_DEPTH, Disk, Status
from nbdvde.errors import RefusedError


class RegionDisk(Disk):
    """Holds data in one range, `used`, and zeroes elsewhere; takes no changes."""

    def __init__(self, owner: Disk, region: str, size: int) -> None:
        self.name, self.size, self.read_only = f"{owner.name}/{region}", size, True
        self._owner = owner

    @property
    def owner(self) -> Disk:
        return self._owner

    @property
    @abc.abstractmethod
    def used(self) -> tuple[int, int]:
        """Where data may be: start and stop in bytes."""

    @property
    @abc.abstractmethod
    def gone(self) -> bool:
        """Whether the region was given up, or is another one by now."""

    def read_nowait(self, offset: int, length: int) -> None:
        return None

    def write_nowait(self, offset: int, data: memoryview, *, owned: bool) -> bool:
        return False

    async def write(self, offset: int, data: memoryview, *, owned: bool = False) -> None:
        raise self._unchangeable()

    def zero_nowait(self, offset: int, length: int, *, allocate: bool) -> bool:
        return False

    async def zero(self, offset: int, length: int, *, allocate: bool = False) -> None:
        raise self._unchangeable()

    def flush_nowait(self, mark: int) -> bool:
        return True

    async def flush(self, mark: int | None = None, *, alone: bool = False) -> None:
        pass

    async def status(self, context: str, offset: int, length: int, max_extents: int) -> list[tuple[int, int]]:
        depth = context == ALLOCATION_DEPTH
        hole, data = (0, 1) if depth else (int(Status.HOLE | Status.ZERO), int(Status.DATA))
        start, stop = self.used
        edges = [offset, *(min(max(edge, offset), offset + length) for edge in (start, stop)), offset + length]
        found = zip(edges, edges[1:], (hole, data, hole), strict=False)
        return [(high - low, number) for low, high, number in found if high > low][:max_extents]

    def _unchangeable(self) -> RefusedError:
        return RefusedError(f"export {self.name}", "cannot be written")
