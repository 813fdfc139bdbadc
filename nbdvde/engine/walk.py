"""Going through the map of a disk in the order of addresses while clients change it."""

import trio

from nbdvde.engine.lbamap import LEAF_SHIFT
from nbdvde.engine.status import entries_of, leaves_in
from nbdvde.engine.versions import Entries
from nbdvde.engine.volume import Volume
from nbdvde.errors import DamageError


class Walk:
    """The leaves of a disk. What is damaged is left out: reading it, and `check`, report that."""

    def __init__(self, disk: Volume) -> None:
        self._disk, self._next = disk, 0
        self._numbers: list[int] = []

    @property
    def last(self) -> int:
        """Number of the disk's last leaf."""
        return (self._disk.map.blocks - 1) >> LEAF_SHIFT

    async def leaf(self) -> tuple[int, Entries] | None:
        """(first block, a copy of the map entries) of the next leaf, None at the end."""
        while True:
            if not self._numbers:
                await trio.lowlevel.checkpoint()
                try:
                    self._numbers = await leaves_in(self._disk, self._next, self.last)
                except DamageError:
                    return None
                if not self._numbers:
                    return None
            number = self._numbers.pop(0)
            self._next = number + 1
            first = number << LEAF_SHIFT
            try:
                return first, await entries_of(self._disk, first, number + 1 << LEAF_SHIFT)
            except DamageError:
                continue

    @property
    def done(self) -> int:
        """Leaves that lie behind."""
        return self._next
