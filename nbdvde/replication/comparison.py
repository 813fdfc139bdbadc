"""Replicas compared while they are written: all hash the same chunks at the same point of the log.

What one of them holds differently is written again on all, as most of them have it. That is an entry like any other,
and changes nothing when the chunk was written, or anything else happened to the disk, after it was compared.
"""

import math
from collections import OrderedDict

import trio

from nbdvde.disk import BLOCK, Disk
from nbdvde.errors import DamageError
from nbdvde.replication.compare import CHUNK, HASH_BYTES, Hasher, chunks_of, length_of
from nbdvde.replication.operations import Compare, Repair

CHUNKS = 16
"""Compared by one entry: some 40 ms in which nothing else is applied."""
UNREADABLE = b"\xff" * HASH_BYTES
"""In place of the hash of a chunk."""
_KEPT = 64
"""Answers of the latest comparisons."""


class Comparisons:
    """Those that a node made."""

    def __init__(self, key: bytes) -> None:
        self._hasher = Hasher(key)
        self._made: OrderedDict[int, bytes] = OrderedDict()
        self._latest = 0
        self.latest_s = -math.inf
        """When one was made last."""
        self.whole_s = -math.inf
        """When the last one of a pass over everything was."""
        self._disk, self._chunks = "", range(0)
        self._touched: set[int] = set()
        """Of these chunks of that disk, those that were written since."""

    def of(self, index: int) -> bytes | None:
        """What the entry of an index found, if that is still known."""
        return self._made.get(index)

    def touch(self, disk: str, offset: int, length: int) -> None:
        """A range was changed."""
        if disk == self._disk:
            first, last = offset // CHUNK, (offset + max(length, 1) - 1) // CHUNK
            self._touched.update(range(max(first, self._chunks.start), min(last + 1, self._chunks.stop)))

    def forget(self) -> None:
        """Anything may have changed."""
        self._latest = 0

    async def compare(self, index: int, asked: Compare, volume: Disk) -> bytes:
        """Hash chunks, now; what cannot be read is `UNREADABLE`."""
        stop = min(asked.first + min(asked.count, CHUNKS), chunks_of(volume.size))
        found = b"".join([await self._hash(volume, number) for number in range(asked.first, stop)])
        self._made[index] = found
        if len(self._made) > _KEPT:
            self._made.popitem(last=False)
        self._latest, self._disk, self._chunks, self._touched = index, asked.disk, range(asked.first, stop), set()
        self.latest_s = trio.current_time()
        return found

    async def _hash(self, volume: Disk, number: int) -> bytes:
        try:
            return await self._hasher.chunk(volume, number)
        except DamageError:
            return UNREADABLE

    async def repair(self, repair: Repair, volume: Disk) -> bool:
        """Write a chunk again, if nothing else has; whether it was."""
        number = repair.chunk
        if repair.compared != self._latest or repair.disk != self._disk:
            return False
        if number not in self._chunks or number in self._touched:
            return False
        if number >= chunks_of(volume.size) or len(repair.data) != length_of(volume, number):
            return False
        start = number * CHUNK
        data = memoryview(repair.data)[: volume.size - start]
        for at in range(0, len(data), BLOCK):
            await volume.write(start + at, data[at : at + BLOCK])
        return True
