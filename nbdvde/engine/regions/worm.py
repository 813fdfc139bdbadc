"""The rules of a WORM region: what was appended stays as it was, and stays there until its retention ends.

    block 0 on       header and log, 48 records a block
    from there on    the data, as many blocks as the capacity

Each record tells of an append, or of the rules themselves, and is chained to the one before it. Time is what the
retention clock shows: the time of creation and as long as the image was open for writing since.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Self

from nbdvde.engine.layout import BLOCK
from nbdvde.engine.regions.directory import Slot
from nbdvde.engine.regions.form import Form
from nbdvde.engine.regions.pages import Pages, Read
from nbdvde.errors import UsageError

FORM = Form("WORM", 48, 84)
_HEADER = struct.Struct("<QQQQIIQ")
_RECORD = struct.Struct("<QQI32s")
_RULES = struct.Struct("<QQQ")
CHAIN_BYTES = 32
RULES_MAX = 1024
"""Records about the rules, at most: one of the creation, and one for each time that the retention is extended."""
CAPACITY_MAX = (1 << 32) - 1 - RULES_MAX
"""Blocks: each append takes one at least, and the header counts them in 32 bits."""
FOREVER = 0
"""As retention."""
_DAY_NS = 24 * 3600 * 10**9
YEAR_NS = 366 * _DAY_NS
_RETENTION_MAX = 500 * YEAR_NS


@dataclass(frozen=True, slots=True)
class Header:
    """What a region is; changing it makes a new one. Blocks and nanoseconds."""

    mark: int
    """Blocks below it are written."""
    capacity: int
    retention_ns: int
    """0 is for ever."""
    created_ns: int
    """Since 1970, as the host said."""
    records: int = 0
    clock_ns: int = 0
    """Retention clock: nanoseconds that the image was open for writing since the creation, as last stored."""

    @classmethod
    def new(cls, capacity: int, retention_ns: int, now_ns: int) -> Self:
        """Of an empty region. Raises UsageError."""
        if not 0 < capacity <= CAPACITY_MAX:
            raise UsageError(f"capacity {capacity * BLOCK}", f"is not between 4K and {CAPACITY_MAX >> 18}G")
        check_retention(retention_ns)
        return cls(0, capacity, retention_ns, now_ns)

    @property
    def log_blocks(self) -> int:
        """Blocks before the data."""
        return FORM.blocks(self.capacity + RULES_MAX)

    @property
    def blocks(self) -> int:
        """That the region may use."""
        return self.log_blocks + self.capacity

    @property
    def rules(self) -> bytes:
        """SHA-256 of what a record about the rules attests."""
        return sha256(_RULES.pack(self.capacity, self.retention_ns, self.created_ns)).digest()

    def left_ns(self, clock_ns: int) -> int | None:
        """How long it is retained when the clock shows this; None for ever."""
        return None if self.retention_ns == FOREVER else max(0, self.retention_ns - clock_ns)

    def pack(self) -> bytes:
        return _HEADER.pack(
            self.mark, self.capacity, self.retention_ns, self.created_ns, self.records, 0, self.clock_ns
        )

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """That in the first block. Raises DamageError."""
        mark, capacity, retention_ns, created_ns, records, reserved, clock_ns = _HEADER.unpack_from(body)
        if reserved or not mark <= capacity <= CAPACITY_MAX or not capacity or records > capacity + RULES_MAX:
            raise FORM.damage("has a header that makes no sense")
        return cls(mark, capacity, retention_ns, created_ns, records, clock_ns)


def check_retention(retention_ns: int) -> None:
    """Raise UsageError unless it can be one."""
    if not 0 <= retention_ns <= _RETENTION_MAX:
        raise UsageError(
            f"retention of {retention_ns / _DAY_NS:g} days", "is not between 0 and 500 years", "use 0 for ever"
        )


@dataclass(frozen=True, slots=True)
class Record:
    """An append, or with length 0 the rules as they are from then on."""

    block: int
    """Where its data begins: the mark until then."""
    time_ns: int
    """Since 1970, by the retention clock."""
    length: int
    """Bytes; the rest of the last block are zeroes."""
    sha256: bytes

    @property
    def blocks(self) -> int:
        """That its data takes."""
        return -(-self.length // BLOCK)

    def chained(self, chain: bytes) -> bytes:
        """As it is stored: with the chain up to it."""
        record = _RECORD.pack(self.block, self.time_ns, self.length, self.sha256)
        return record + sha256(chain + record).digest()


def parse(stored: bytes) -> tuple[Record, bytes]:
    """(record, chain up to it)."""
    return Record(*_RECORD.unpack_from(stored)), stored[_RECORD.size :]


def length(body: bytes, at: int) -> int:
    """See `Pages`."""
    return FORM.record_bytes if any(body[at : at + FORM.record_bytes]) else 0


@dataclass(frozen=True, slots=True)
class Ledger:
    """What follows from the records up to some one; taking one more makes a new one."""

    mark: int = 0
    records: int = 0
    time_ns: int = 0
    chain: bytes = bytes(CHAIN_BYTES)
    rules: bytes = b""
    """That of the last record about them."""
    about_rules: int = 0
    """How many there are."""

    def taking(self, record: Record) -> tuple[Self, bytes]:
        """With a record more; and that as it is stored."""
        stored = record.chained(self.chain)
        after = replace(
            self, mark=self.mark + record.blocks, records=self.records + 1, time_ns=record.time_ns,
            chain=stored[_RECORD.size :],
        )  # fmt: skip
        if not record.length:
            after = replace(after, rules=record.sha256, about_rules=self.about_rules + 1)
        return after, stored

    def following(self, stored: bytes) -> Self:
        """With one that was stored. Raises DamageError when it does not follow."""
        record, _ = parse(stored)
        after, right = self.taking(record)
        if stored != right:
            raise FORM.damage(f"record {self.records} is not what was chained to the one before it")
        if record.block != self.mark or record.time_ns < self.time_ns or (record.length and not self.records):
            raise FORM.damage(f"record {self.records} does not follow from those before it")
        return after

    def agree(self, header: Header) -> None:
        """Raise DamageError unless a header tells the same."""
        if (self.records, self.mark) != (header.records, header.mark):
            raise FORM.damage("has not the records that its header counts")
        if self.rules != header.rules:
            raise FORM.damage("its capacity, retention or time of creation were changed")
        if self.time_ns > header.created_ns + header.clock_ns:
            raise FORM.damage("its clock went back")


def opened(read: Read, slot: Slot) -> tuple[Header, Pages]:
    """The header, and the pages of the log. Raises DamageError."""
    pages = Pages.load(FORM, read, slot.used, length)
    header = Header.unpack(pages.header)
    if slot.blocks != header.blocks:
        raise FORM.damage("the directory gives it another size than it has")
    if pages.generation != slot.flags:
        raise FORM.damage("is an older copy of itself")
    return header, pages


def verify(read: Read, slot: Slot) -> Iterator[str]:
    """See `verify.Verifier`: the log, and all data. Raises DamageError."""
    header, pages = opened(read, slot)
    ledger = Ledger()
    for _, stored in pages.records(read, length):
        ledger = ledger.following(stored)
        record, _ = parse(stored)
        if record.length and _digest(read, header.log_blocks + record.block, record.length) != record.sha256:
            yield f"the data of record {ledger.records - 1} is not what was appended"
    ledger.agree(header)


def _digest(read: Read, block: int, length: int) -> bytes:
    hasher = sha256()
    for at in range(0, length, BLOCK):
        hasher.update(read(block + at // BLOCK)[: length - at])
    return hasher.digest()


def shown(ns: int) -> str:
    """A duration for people, rounded up."""
    seconds = -(-ns // 10**9)
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{-(-seconds // length)} {unit}"
    return f"{seconds} seconds" if seconds > 1 else "1 second"
