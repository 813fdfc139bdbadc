"""How the records of a management region fill metadata blocks, the same for all of them.

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


def tag_of(block: bytes) -> int:
    """That in the trailer of a block, sound or not."""
    return int(_TRAILER.unpack_from(block, ROOM)[0])


def name_of(tag: int) -> str:
    """Four characters, as far as they are ASCII."""
    return tag.to_bytes(4, "little").decode("ascii", "replace")


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

    def capacity(self, blocks: int) -> int:
        """Records that fit into so many blocks, with the header."""
        return (ROOM - self.header_bytes) // self.record_bytes + (blocks - 1) * (ROOM // self.record_bytes)

    def blocks(self, records: int) -> int:
        """How many blocks so many records take, with the header."""
        return 1 + -(-max(0, records - self.capacity(1)) // (ROOM // self.record_bytes))

    def pack(self, header: bytes, records: Sequence[bytes], generation: int) -> list[bytes]:
        """The blocks of a region."""
        bodies = [header]
        for record in records:
            if len(bodies[-1]) + self.record_bytes > ROOM:
                bodies.append(b"")
            bodies[-1] += record
        return [self.block(body, generation) for body in bodies]

    def block(self, body: bytes, generation: int) -> bytes:
        """A block that holds this, `ROOM` bytes at most."""
        block = body.ljust(ROOM, b"\0") + _TRAILER.pack(self.tag, generation)
        return block + xxhash.xxh64(block).digest()[::-1]

    def unpack(
        self, read: Callable[[int], bytes], count: Callable[[bytes], int]
    ) -> tuple[bytes, list[bytes], int]:  # fmt: skip
        """(header, records, generation). `read` answers a block, `count` how many records the header tells of.

        Raises DamageError.
        """
        first, generation = self.opened(read(0))
        header, body = first[: self.header_bytes], first[self.header_bytes :]
        left, records = count(header), list[bytes]()
        for number in range(1, self.blocks(left) + 1):
            here = min(left, len(body) // self.record_bytes)
            end = here * self.record_bytes
            records += (body[at : at + self.record_bytes] for at in range(0, end, self.record_bytes))
            if body[end:].strip(b"\0"):
                raise self.damage("has bytes behind its records that are not zero")
            left -= here
            if left:
                body, found = self.opened(read(number))
                if found != generation:
                    raise self.damage("has blocks of two generations")
        return header, records, generation

    def opened(self, block: bytes) -> tuple[bytes, int]:
        """What a block holds, `ROOM` bytes, and its generation. Raises DamageError."""
        if len(block) != BLOCK or xxhash.xxh64(block[:-8]).digest()[::-1] != block[-8:]:
            raise self.damage("a block fails its checksum")
        _, found = _TRAILER.unpack_from(block, ROOM)
        if tag_of(block) != self.tag:
            raise self.damage("a block belongs to a region of another type")
        return block[:ROOM], found

    def damage(self, why: str) -> DamageError:
        """The error that says that the region is damaged."""
        return DamageError(f"region {self.name}", why, "run nbdvde check")
