"""What a disk holds, in hashes: a chunk at a time, and the blocks of a chunk.

Hashes are keyed BLAKE3 with the key of the cluster, so that they tell nothing to who does not have it.
"""

from collections.abc import Sequence

from blake3 import blake3

from nbdvde import workers
from nbdvde.disk import BLOCK, Disk, Piece, Status

CHUNK = 1 << 20
HASH_BYTES = 32
NOTHING = bytes(HASH_BYTES)
"""In place of the hash of what reads as zeroes."""
_ZEROES = bytes(BLOCK)


class Hasher:
    """Hashes what disks hold."""

    def __init__(self, key: bytes) -> None:
        self._key = blake3(b"nbdvde replication: comparing", key=key).digest()

    async def chunk(self, disk: Disk, number: int) -> bytes:
        """Of a chunk: `NOTHING` when it is a hole."""
        if not await is_stored(disk, number):
            return NOTHING
        return await workers.run(self._whole, await read_chunk(disk, number))

    async def blocks(self, disk: Disk, number: int) -> bytes:
        """Of the blocks of a chunk, joined."""
        if not await is_stored(disk, number):
            return NOTHING * (length_of(disk, number) // BLOCK)
        return await workers.run(self._each, await read_chunk(disk, number))

    def _whole(self, data: bytes) -> bytes:
        return NOTHING if not any_in(data) else blake3(data, key=self._key).digest()

    def _each(self, data: bytes) -> bytes:
        pages = (data[at : at + BLOCK] for at in range(0, len(data), BLOCK))
        return b"".join(NOTHING if page == _ZEROES else blake3(page, key=self._key).digest() for page in pages)


def any_in(data: bytes) -> bool:
    """Whether any byte is not zero."""
    return data != bytes(len(data))


def chunks_of(size: int) -> int:
    """How many chunks a disk of so many bytes has."""
    return -(-size // CHUNK)


def length_of(disk: Disk, number: int) -> int:
    """Bytes of a chunk, in whole blocks: the end of the last one may lie behind the disk."""
    return -(-(min((number + 1) * CHUNK, disk.size) - number * CHUNK) // BLOCK) * BLOCK


async def is_stored(disk: Disk, number: int) -> bool:
    """Whether a chunk has anything but holes."""
    start = number * CHUNK
    length = min(CHUNK, disk.size - start)
    (found, status), *others = await disk.status("base:allocation", start, length, 2)
    return bool(others) or not status & Status.HOLE or found < length


async def read_chunk(disk: Disk, number: int) -> bytes:
    """What it holds, filled up with zeroes to whole blocks."""
    start = number * CHUNK
    pieces = await disk.read(start, min(CHUNK, disk.size - start))
    return joined(pieces).ljust(length_of(disk, number), b"\0")


def joined(pieces: Sequence[Piece]) -> bytes:
    """Pieces of a read as bytes."""
    return b"".join(bytes(piece) if isinstance(piece, int) else piece for piece in pieces)
