"""What a client did, block by block: written by processes that have libnbd, read by those that judge it.

The blocks that clients use lie on both sides of the borders of stripes, which several groups may have.
"""

import json
import struct
from typing import NamedTuple

BLOCK, BLOCKS = 4096, 64
RUN_BLOCKS = 16
"""So many of them lie side by side."""
STRIPE = 16 << 20
SIZE = BLOCKS // RUN_BLOCKS * STRIPE
"""Of a disk."""
HEAD = struct.Struct("<QQ")
"""What a block holds, again and again: version, and number of the block."""


class Record(NamedTuple):
    """A block that was read or written by a request."""

    wrote: bool
    acknowledged: bool
    """A read always is."""
    block: int
    version: int
    """What it holds; each write of a block has another one, 0 are zeroes."""
    begin_ns: int
    end_ns: int
    """Latest time at which it can have taken effect, on the clock of all processes of the machine."""


_RECORD = struct.Struct("<??IQqq")


def pack(record: Record) -> bytes:
    """As it is in a file."""
    return _RECORD.pack(*record)


def unpack(data: bytes) -> list[Record]:
    """All of a file."""
    return [Record(*fields) for fields in _RECORD.iter_unpack(data)]


class Shown(NamedTuple):
    """What somebody read of a snapshot, which is there then."""

    label: str
    """DISK@SNAPSHOT."""
    end_ns: int
    """When all of it was read."""
    versions: list[int]
    """Of all blocks."""


def pack_shown(shown: Shown) -> bytes:
    """As it is in a file."""
    return json.dumps(shown).encode() + b"\n"


def unpack_shown(data: bytes) -> list[Shown]:
    """All of a file."""
    return [Shown(*json.loads(line)) for line in data.splitlines()]


def offset_of(block: int) -> int:
    """Where a block lies in its disk."""
    run, at = divmod(block, RUN_BLOCKS)
    return max(0, run * STRIPE - RUN_BLOCKS // 2 * BLOCK) + at * BLOCK


def content_of(version: int, block: int) -> bytes:
    """What a block holds after a write."""
    return HEAD.pack(version, block) * (BLOCK // HEAD.size)


def version_in(data: bytes, block: int) -> int:
    """What a block holds. Raises ValueError when no write of this block wrote all of it."""
    version = int(HEAD.unpack_from(data)[0])
    if bytes(data) != (content_of(version, block) if version else bytes(BLOCK)):
        raise ValueError(f"block {block} is torn, or holds what belongs elsewhere: {bytes(data[:64]).hex()}")
    return version
