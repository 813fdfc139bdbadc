"""A WORM region as a disk: reads as any, and writes are appends at the mark."""

from collections.abc import Sequence

from nbdvde.disk import BLOCK, Piece
from nbdvde.engine.managed.regiondisk import RegionDisk
from nbdvde.engine.managed.worm import APPEND_MAX, Worm
from nbdvde.engine.pieces import cut
from nbdvde.errors import NbdvdeError, RefusedError, RequestError

_ZEROES = memoryview(bytes(APPEND_MAX))


class WormDisk(RegionDisk):
    """All of it has the capacity of the region; from the mark on it reads as zeroes.

    A write, or a write of zeroes, at the mark is appended. One that comes while others are under way takes its place
    behind them in the order in which they came, so that a client may send many at once, but not in another order.
    Below the mark everything is refused (EPERM), beyond it as well (EINVAL), and so is every trim.
    """

    sequential = True

    def __init__(self, worm: Worm) -> None:
        super().__init__(worm.disk, "worm", worm.header.capacity * BLOCK)
        self.worm = worm
        self.read_only = worm.read_only
        self._promised = 0
        """Where the next write has to begin, if any are under way."""
        self._under_way: set[int] = set()
        """Where those begin that were promised their place."""

    @property
    def used(self) -> tuple[int, int]:
        return 0, self.worm.mark * BLOCK

    @property
    def gone(self) -> bool:
        return self.worm.gone

    async def read(self, offset: int, length: int) -> Sequence[Piece]:
        first, stop = offset // BLOCK, -(-(offset + length) // BLOCK)
        data = await self.worm.read(first, stop - first)
        return cut([memoryview(data)], offset - first * BLOCK, length)

    def write_nowait(self, offset: int, data: memoryview, *, owned: bool) -> bool:
        self._promise(offset, len(data))
        return False

    async def write(self, offset: int, data: memoryview, *, owned: bool = False) -> None:
        if offset not in self._under_way:
            self._promise(offset, len(data))
        await self._append(offset, data, len(data))

    def zero_nowait(self, offset: int, length: int, *, allocate: bool) -> bool:
        self._promise(offset, length)
        return False

    async def zero(self, offset: int, length: int, *, allocate: bool = False) -> None:
        if offset not in self._under_way:
            self._promise(offset, length)
        await self._append(offset, _ZEROES, length)

    def trim_nowait(self, offset: int, length: int) -> bool:
        raise self._misplaced(offset)

    async def trim(self, offset: int, length: int) -> None:
        raise self._misplaced(offset)

    def mark(self) -> int:
        return self.worm.volume.mark()

    def flush_nowait(self, mark: int) -> bool:
        return self.worm.volume.flush_nowait(mark)

    async def flush(self, mark: int | None = None, *, alone: bool = False) -> None:
        await self.worm.volume.flush(mark, alone=alone)

    async def put(self, data: memoryview, block: int) -> None:
        """Append something at the mark, which is there."""
        await self.worm.put(data, block)

    def _promise(self, offset: int, length: int) -> None:
        """Give a request its place, if it is at the end of what came before it."""
        if offset != (self._promised if self._under_way else self.worm.mark * BLOCK):
            raise self._misplaced(offset)
        self._under_way.add(offset)
        self._promised = offset + -(-length // BLOCK) * BLOCK

    def _misplaced(self, offset: int) -> NbdvdeError:
        mark = self._promised if self._under_way else self.worm.mark * BLOCK
        if offset < mark:
            return RefusedError(f"export {self.name}", "what was written there cannot be changed")
        return RequestError(f"offset {offset}", f"is not the mark, {mark}: data can only be appended there")

    async def _append(self, offset: int, data: memoryview, length: int) -> None:
        """Append when it is its turn; when that fails, so does what was promised the places behind it."""
        worm = self.worm
        try:
            while worm.mark * BLOCK < offset:
                await worm.moved.park()
                worm.refuse_if_gone()
                if offset not in self._under_way:
                    raise RequestError(f"offset {offset}", "an append before it failed")
            for at in range(0, length, APPEND_MAX):
                count = min(APPEND_MAX, length - at)
                start = 0 if data is _ZEROES else at
                await self.put(data[start : start + count], (offset + at) // BLOCK)
        except BaseException:
            self._under_way.clear()
            raise
        finally:
            self._under_way.discard(offset)
            worm.moved.unpark_all()
