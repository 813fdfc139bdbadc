"""Management regions: how the records of a region fill metadata blocks, the same for all of them.

    block   = header (the first block only) | records, none across two blocks | zeroes | trailer
    trailer = tag u32 | generation u32 | xxh64 of the block up to here

The trailer finds corruption and blocks of two generations; tampering is found by the sealing around it.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import xxhash

from nbdvde.engine.layout import BLOCK
from nbdvde.errors import DamageError

_TRAILER = struct.Struct("<II")
TRAILER_BYTES = _TRAILER.size + 8
ROOM = BLOCK - TRAILER_BYTES
"""Bytes of a block for header and records."""
GENERATION_MAX = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Form:
    """What tells one type of region from another."""

    name: str
    """Four ASCII characters."""
    header_bytes: int
    record_bytes: int

    @property
    def tag(self) -> int:
        """The name as a number, its first character in the lowest byte."""
        return int.from_bytes(self.name.encode("ascii"), "little")

    def blocks(self, records: int) -> int:
        """How many blocks so many records take, with the header."""
        first = (ROOM - self.header_bytes) // self.record_bytes
        return 1 + -(-max(0, records - first) // (ROOM // self.record_bytes))

    def pack(self, header: bytes, records: Sequence[bytes], generation: int) -> list[bytes]:
        """The blocks of a region."""
        bodies = [header]
        for record in records:
            if len(bodies[-1]) + self.record_bytes > ROOM:
                bodies.append(b"")
            bodies[-1] += record
        return [self._sealed(body, generation) for body in bodies]

    def _sealed(self, body: bytes, generation: int) -> bytes:
        block = body.ljust(ROOM, b"\0") + _TRAILER.pack(self.tag, generation)
        return block + xxhash.xxh64(block).digest()[::-1]

    def unpack(
        self, read: Callable[[int], bytes], count: Callable[[bytes], int]
    ) -> tuple[bytes, list[bytes], int]:  # fmt: skip
        """(header, records, generation). `read` answers a block, `count` how many records the header tells of.

        Raises DamageError.
        """
        first, generation = self._opened(read(0), None)
        header, body = first[: self.header_bytes], first[self.header_bytes :]
        left, records = count(header), list[bytes]()
        for number in range(1, self.blocks(left) + 1):
            here = min(left, len(body) // self.record_bytes)
            end = here * self.record_bytes
            records += (body[at : at + self.record_bytes] for at in range(0, end, self.record_bytes))
            if body[end:].strip(b"\0"):
                raise self._damage("has bytes behind its records that are not zero")
            left -= here
            if left:
                body, _ = self._opened(read(number), generation)
        return header, records, generation

    def _opened(self, block: bytes, generation: int | None) -> tuple[bytes, int]:
        if len(block) != BLOCK or xxhash.xxh64(block[:-8]).digest()[::-1] != block[-8:]:
            raise self._damage("a block fails its checksum")
        tag, found = _TRAILER.unpack_from(block, ROOM)
        if tag != self.tag:
            raise self._damage("a block belongs to a region of another type")
        if generation not in (None, found):
            raise self._damage("has blocks of two generations")
        return block[:ROOM], found

    def _damage(self, why: str) -> DamageError:
        return DamageError(f"region {self.name}", why, "run nbdvde check")
