"""Records of the log of a node, as they lie in its segments: docs/raft-log.md, table for table.

A segment has records in batches, a batch for each sync, and a *twin* of every batch in another part of the file: the
headers of its records again, and whatever is not the data of a normal entry. Headers lie within a sector, which a
crash leaves as it was or as it should be; so do the parts of a twin.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
from xxhash import xxh3_64_intdigest

from nbdvde.errors import ImageError
from nbdvde.raft.messages import ENTRY_BYTES, Entry, EntryKind, HardState, Members, Snapshot

SECTOR = 512
"""Bytes that a device writes all or none of."""
BLOCK = 4096
"""A batch begins at a multiple of this."""
ALIGN = 64
"""A record begins at a multiple of this."""
MAGIC = b"NBDVRAFT"
VERSION = 1
TWINS_SHARE = 8
"""A segment gives this part of its bytes, its end, to twins."""
PLACE_BITS = 32
"""A place is a segment's number, and so many bits for the offset in it."""

_HEADER = struct.Struct("<IBBHIIQQQQQQ")
_HEAD = struct.Struct("<8sIIIIQ16s")
_STATE = struct.Struct("<QQQQQHH")
_VOTE = struct.Struct("<Q")
HEADER_BYTES = _HEADER.size
_CHECKED = HEADER_BYTES - 8
_LAST, _UNSURE = 1, 1


class Kind:
    """What a record says."""

    SEGMENT, ENTRY, AGAIN, HARD, TRUNCATE, COMPACT, RESET, GROUP, REMOVE = range(1, 10)


class Header(msgspec.Struct, frozen=True, gc=False):
    """What stands before the payload of a record."""

    length: int
    """Bytes of payload."""
    kind: int
    entry_kind: int
    flags: int
    group: int
    log: int
    """Belongs to the log; another log's records are told apart by it."""
    batch: int
    term: int
    index: int
    chain: int
    """`check` of the record before, in the order of the whole log."""
    digest: int
    """Of the payload."""
    check: int
    """Of the header up to here, at its place."""

    @property
    def is_last(self) -> bool:
        """Whether the batch ends with it."""
        return bool(self.flags & _LAST)

    @property
    def space(self) -> int:
        """Bytes up to the next record."""
        return space(self.length)

    @property
    def is_doubled(self) -> bool:
        """Whether the twin has the payload as well."""
        return _is_doubled(self.kind, self.entry_kind)

    @property
    def twin_bytes(self) -> int:
        """Bytes that it takes in the twin."""
        return HEADER_BYTES + (self.length if self.is_doubled else 0)

    def pack(self) -> bytes:
        """As it is stored."""
        return _HEADER.pack(*msgspec.structs.astuple(self))

    @classmethod
    def unpack(cls, data: bytes | memoryview, place: int) -> "Header | None":
        """What lies at a place; None when it is no header that was written for it."""
        check = xxh3_64_intdigest(data[:_CHECKED], place)
        header = cls(*_HEADER.unpack(data))
        return header if header.check == check else None


def _is_doubled(kind: int, entry_kind: int) -> bool:
    return kind not in {Kind.ENTRY, Kind.AGAIN} or entry_kind != EntryKind.NORMAL


def space(length: int) -> int:
    """Bytes that a record with so much payload takes."""
    return -(-(HEADER_BYTES + length) // ALIGN) * ALIGN


def place_of(segment: int, offset: int) -> int:
    """A place in the log."""
    return segment << PLACE_BITS | offset


def split_place(place: int) -> tuple[int, int]:
    """(segment, offset)."""
    return place >> PLACE_BITS, place & (1 << PLACE_BITS) - 1


def data_bytes(segment_bytes: int) -> int:
    """Bytes of a segment that records may take; behind them lie the twins."""
    return segment_bytes - segment_bytes // TWINS_SHARE


class Draft(msgspec.Struct, frozen=True, gc=False):
    """A record that has no place yet."""

    kind: int
    group: int
    term: int
    index: int
    payload: bytes = b""
    entry_kind: int = 0

    @classmethod
    def of(cls, group: int, entry: Entry, kind: int = Kind.ENTRY) -> "Draft":
        """The record of an entry."""
        return cls(kind, group, entry.term, entry.index, entry.data, entry.kind)

    @property
    def is_entry(self) -> bool:
        """Whether an entry is looked for in it."""
        return self.kind in {Kind.ENTRY, Kind.AGAIN}

    @property
    def entry(self) -> Entry:
        """The entry that it holds."""
        return Entry(self.term, self.index, self.entry_kind, self.payload)

    @property
    def twin_bytes(self) -> int:
        """Bytes that it takes in the twin."""
        return HEADER_BYTES + (len(self.payload) if _is_doubled(self.kind, self.entry_kind) else 0)

    def header(self, log: int, batch: int, chain: int, place: int, *, last: bool) -> Header:
        """Its header at a place."""
        fields = (
            len(self.payload), self.kind, self.entry_kind, _LAST if last else 0, self.group, log, batch, self.term,
            self.index, chain, xxh3_64_intdigest(self.payload),
        )  # fmt: skip
        return Header(*fields, xxh3_64_intdigest(_HEADER.pack(*fields, 0)[:_CHECKED], place))


def is_payload(header: Header, payload: bytes | memoryview) -> bool:
    """Whether a payload is the one that the header was written for."""
    return len(payload) == header.length and xxh3_64_intdigest(payload) == header.digest


@dataclass(frozen=True)
class Head:
    """What the first record of a segment says."""

    segment: int
    next_group: int
    uuid: bytes
    """Of the log, 16 bytes."""
    unsure: bool = False
    """Whether there may have been other groups."""

    @property
    def log(self) -> int:
        """What headers carry of it."""
        return int.from_bytes(self.uuid[:4], "little")

    def draft(self) -> Draft:
        """As a record."""
        payload = _HEAD.pack(
            MAGIC, VERSION, 0, self.next_group, _UNSURE if self.unsure else 0, self.segment, self.uuid
        )  # fmt: skip
        return Draft(Kind.SEGMENT, 0, 0, 0, payload)

    @classmethod
    def unpack(cls, payload: bytes) -> "Head":
        """From a record. Raises ImageError for a version that this one does not know."""
        magic, version, features, next_group, flags, segment, uuid = _HEAD.unpack_from(payload)
        if magic != MAGIC or version != VERSION or features:
            raise ImageError("raft log", "is of a later version", "use the version that wrote it")
        return cls(segment, next_group, uuid, bool(flags & _UNSURE))


@dataclass(slots=True)
class State:
    """What there is to say about a group besides its entries."""

    name: str
    snapshot: Snapshot
    last_index: int
    last_term: int
    hard: HardState
    unsure: bool

    @classmethod
    def begun(cls, name: str, start: Snapshot, *, unsure: bool = False) -> "State":
        """Of a new group."""
        return cls(name, start, start.index, start.term, HardState(), unsure)

    def draft(self, group: int) -> Draft:
        """As a record."""
        name, hard = self.name.encode(), self.hard
        fixed = _STATE.pack(
            self.last_index, self.last_term, hard.term, hard.vote, hard.commit, _UNSURE if self.unsure else 0, len(name)
        )  # fmt: skip
        payload = fixed + name + self.snapshot.members.pack()
        return Draft(Kind.GROUP, group, self.snapshot.term, self.snapshot.index, payload)

    @classmethod
    def unpack(cls, index: int, term: int, payload: bytes) -> "State":
        """From a record."""
        last_index, last_term, hard_term, vote, commit, flags, length = _STATE.unpack_from(payload)
        rest = payload[_STATE.size :]
        return cls(
            rest[:length].decode(), Snapshot(index, term, Members.unpack(rest[length:])), last_index, last_term,
            HardState(hard_term, vote, commit), bool(flags & _UNSURE),
        )  # fmt: skip

    def note(self, draft: Draft) -> None:
        """Take over what a later record of the group says."""
        match draft.kind:
            case Kind.ENTRY:
                self.last_index, self.last_term = draft.index, draft.term
            case Kind.TRUNCATE:
                self.last_index, self.last_term = draft.index - 1, draft.term
            case Kind.HARD:
                [vote] = _VOTE.unpack(draft.payload)
                self.hard = HardState(draft.term, vote, draft.index)
            case Kind.COMPACT | Kind.RESET:
                self.snapshot = Snapshot(draft.index, draft.term, Members.unpack(draft.payload))
                if draft.kind == Kind.RESET or self.last_index < draft.index:
                    self.last_index, self.last_term = draft.index, draft.term


def hard_draft(group: int, hard: HardState) -> Draft:
    """The record of a hard state."""
    return Draft(Kind.HARD, group, hard.term, hard.commit, _VOTE.pack(hard.vote))


def snapshot_draft(group: int, kind: int, snapshot: Snapshot) -> Draft:
    """The record of a compaction, or of a state that was taken over."""
    return Draft(kind, group, snapshot.term, snapshot.index, snapshot.members.pack())


def entry_bytes(length: int) -> int:
    """`Entry.size` of one with so much data."""
    return ENTRY_BYTES + length


# Twins

_PART = struct.Struct("<QIHHH6xQ")
_PART_CHECKED = _PART.size - 8
PART_BYTES = SECTOR - _PART.size
"""Bytes of a twin in a sector."""


class Part(NamedTuple):
    """What a sector of a twin begins with."""

    batch: int
    start: int
    """Offset of the batch in the segment."""
    number: int
    parts: int
    used: int
    """Bytes of the twin in this sector."""
    check: int
    """Of the sector without this, at its place."""


def twin_sectors(length: int) -> int:
    """How many sectors a twin of so many bytes takes."""
    return -(-length // PART_BYTES)


def pack_twin(content: bytes, batch: int, start: int, place: int) -> bytes:
    """The sectors of a twin that begins at a place."""
    parts, sectors = twin_sectors(len(content)), []
    for number in range(parts):
        piece = content[number * PART_BYTES :][:PART_BYTES]
        head = _PART.pack(batch, start, number, parts, len(piece), 0)[:_PART_CHECKED]
        piece = piece.ljust(PART_BYTES, b"\0")
        check = xxh3_64_intdigest(head + piece, place + number * SECTOR)
        sectors += [head, check.to_bytes(8, "little"), piece]
    return b"".join(sectors)


def unpack_part(sector: memoryview, place: int) -> tuple[Part, memoryview] | None:
    """(head, bytes of the twin) of a sector; None when it is none that was written for that place."""
    part = Part(*_PART.unpack_from(sector))
    content = sector[_PART.size :]
    if part.check != xxh3_64_intdigest(bytes(sector[:_PART_CHECKED]) + bytes(content), place):
        return None
    return part, content[: part.used]


def twin_records(content: bytes, segment: int, start: int) -> Iterator[tuple[int, Header, bytes | None]]:
    """(offset in the segment, header, payload if the twin has it) of each record of a batch.

    Ends early when something is no header.
    """
    at, offset = 0, start
    while at < len(content):
        header = Header.unpack(content[at : at + HEADER_BYTES].ljust(HEADER_BYTES, b"\0"), place_of(segment, offset))
        if header is None:
            return
        at += HEADER_BYTES
        payload = content[at : at + header.length] if header.is_doubled else None
        at += len(payload or b"")
        yield offset, header, payload
        offset += header.space


def encode(
    drafts: Sequence[Draft], log: int, batch: int, chain: int, segment: int, start: int
) -> tuple[list[bytes], bytes, int]:
    """(buffers of the batch, its twin's content, `chain` for the next batch)."""
    buffers: list[bytes] = []
    twin: list[bytes] = []
    offset = start
    for number, draft in enumerate(drafts, 1):
        header = draft.header(log, batch, chain, place_of(segment, offset), last=number == len(drafts))
        packed, chain = header.pack(), header.check
        buffers += [packed, draft.payload, bytes(header.space - HEADER_BYTES - header.length)]
        twin.append(packed)
        if header.is_doubled:
            twin.append(draft.payload)
        offset += header.space
    return buffers, b"".join(twin), chain
