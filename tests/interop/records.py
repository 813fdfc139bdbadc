"""What a client did, block by block: written by processes that have libnbd, read by those that judge it."""

import struct
from typing import NamedTuple


class Record(NamedTuple):
    """A block that was read or written by a request."""

    wrote: bool
    acknowledged: bool
    """A read always is."""
    block: int
    version: int
    """What it holds; each write of a block has another one, 0 is what there was before any."""
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
