"""The rules of a stream: a ring of blocks to which entries are appended, each at a position that is never given again.

    block 0          header
    blocks 1 to L    lengths of the entries, u16 for each place of the ring
    from there on    the places, a block each

An entry lies at its position modulo the capacity: never modulo what is allocated, which only counts.
"""

import enum
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

from nbdvde.engine.layout import BLOCK
from nbdvde.engine.regions.directory import WINDOW, Slot
from nbdvde.engine.regions.form import ROOM, Form
from nbdvde.engine.regions.pages import Read
from nbdvde.errors import UsageError

FORM = Form("STRE", 45, 2)
_HEADER = struct.Struct("<QQQQQIB")
LENGTHS = ROOM // 2
"""Places whose lengths fit into a block."""
CAPACITY_MAX = (WINDOW - 2) * LENGTHS // (LENGTHS + 1)
INCREMENT = 16
"""Blocks that are allocated at a time, by default."""


class StreamPolicy(enum.IntEnum):
    """What an append does when every place is taken."""

    OVERWRITE = 0
    """The oldest entry goes."""
    REJECT = 1
    """It is refused."""
    WAIT = 2
    """It waits until a reader advances the tail."""


@dataclass(frozen=True, slots=True)
class Ring:
    """The header: which entries there are, and where. Blocks, or as many entries; changing it makes a new one."""

    capacity: int
    """Most entries at a time."""
    allocated: int = 0
    """Entries that there were at a time, rounded up to whole increments."""
    head: int = 0
    """Position of the next entry."""
    tail: int = 0
    """Position of the oldest one."""
    increment: int = INCREMENT
    policy: StreamPolicy = StreamPolicy.OVERWRITE

    @classmethod
    def new(cls, capacity: int, increment: int, policy: StreamPolicy) -> Self:
        """An empty one. Raises UsageError."""
        if not 0 < capacity <= CAPACITY_MAX:
            raise UsageError(f"capacity {capacity * BLOCK}", f"is not between 4K and {CAPACITY_MAX >> 18}G")
        if not 0 < increment < 1 << 32:
            raise UsageError(f"increment {increment * BLOCK}", "is not between 4K and 16383G")
        return cls(capacity, increment=increment, policy=policy)

    @property
    def entries(self) -> int:
        """How many there are."""
        return self.head - self.tail

    @property
    def length_blocks(self) -> int:
        """Blocks with the lengths of all places."""
        return -(-self.capacity // LENGTHS)

    @property
    def blocks(self) -> int:
        """That the region may use."""
        return 1 + self.length_blocks + self.capacity

    def appending(self, count: int) -> Self:
        """With so many entries more, `capacity` at most; the oldest ones go as far as they are in the way."""
        head = self.head + count
        tail = max(self.tail, head - self.capacity)
        need = -(-(head - tail) // self.increment) * self.increment
        return replace(self, head=head, tail=tail, allocated=min(self.capacity, max(self.allocated, need)))

    def advancing(self, position: int) -> Self:
        """Without the entries before a position."""
        return replace(self, tail=position)

    def runs(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(first block, how many) that hold the entries from one position to another, `capacity` at most."""
        base, place = 1 + self.length_blocks, start % self.capacity
        before = min(stop - start, self.capacity - place)
        runs = [(base + place, before), (base, stop - start - before)]
        return [(block, count) for block, count in runs if count]

    def lengths_at(self, position: int) -> tuple[int, int]:
        """(block, index in it) of the length of an entry."""
        block, index = divmod(position % self.capacity, LENGTHS)
        return 1 + block, index

    def length_runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """(block, index, first position, how many) of the lengths of the entries from one position to another."""
        while start < stop:
            block, index = self.lengths_at(start)
            count = min(stop - start, LENGTHS - index, self.capacity - start % self.capacity)
            yield block, index, start, count
            start += count

    def pack(self) -> bytes:
        return _HEADER.pack(
            self.capacity, self.allocated, self.head, self.tail, self.entries, self.increment, self.policy
        )

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """That in the first block. Raises DamageError."""
        capacity, allocated, head, tail, entries, increment, policy = _HEADER.unpack_from(body)
        whole = allocated == capacity or (increment and not allocated % increment)
        if not (
            0 < capacity <= CAPACITY_MAX and increment and policy in StreamPolicy.__members__.values() and whole
            and head - tail == entries <= allocated <= capacity and not body[_HEADER.size :].strip(b"\0")
        ):  # fmt: skip
            raise FORM.damage("has a header that makes no sense")
        return cls(capacity, allocated, head, tail, increment, StreamPolicy(policy))


def with_lengths(body: bytes, index: int, lengths: Sequence[int]) -> bytes:
    """The lengths in a block with some of them replaced."""
    here = struct.pack(f"<{len(lengths)}H", *lengths)
    return body[: 2 * index] + here + body[2 * index + len(here) :]


def lengths_in(body: bytes, index: int, count: int) -> tuple[int, ...]:
    """Some lengths of a block. Raises DamageError."""
    lengths = struct.unpack_from(f"<{count}H", body, 2 * index)
    if max(lengths, default=0) > BLOCK:
        raise FORM.damage("has an entry that is longer than a block")
    return lengths


def verify(read: Read, slot: Slot) -> Iterator[str]:
    """See `verify.Verifier`. Raises DamageError."""
    body, newest = FORM.opened(read(0))
    ring = Ring.unpack(body)
    if slot.blocks != ring.blocks:
        yield "the directory gives it another size than it has"
    for block, index, _, count in ring.length_runs(ring.tail, ring.head):
        lengths, generation = FORM.opened(read(block))
        lengths_in(lengths, index, count)
        if generation > newest:
            yield "has a block that is newer than the first"
