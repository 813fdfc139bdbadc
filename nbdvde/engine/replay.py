"""Reading the log after a crash: every group after the checkpoint is verified, the contiguous chain accepted.

Where the chain breaks, what lies behind decides. A crash can tear only what had not been synced; groups and
links say what was durable when they were sealed (`synced`). One behind the break that says so of the missing
group proves damage, and the image refuses to open; otherwise the rest is a torn tail and is cut.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from blake3 import blake3

from nbdvde.engine.groups import Change
from nbdvde.engine.layout import (
    BLOCK,
    BLOCK_MASK,
    EXTENT_BLOCKS_MAX,
    GROUP_BLOCKS_MAX,
    HEADER_BYTES,
    KIND_LOG,
    LINK_BYTES,
    LOST,
    REFERENCES_MAX,
    SEGMENT_BYTES_MAX,
    Domain,
    GroupHeader,
    Kind,
    Link,
    LogPoint,
    Operation,
    Record,
    TableEntry,
    pack_entry,
    pack_index,
    unpack_index,
)
from nbdvde.engine.sealing import Sealer
from nbdvde.engine.segments import Segments, State, log_room
from nbdvde.errors import DamageError


@dataclass(frozen=True, slots=True)
class Group:
    """One verified group: its record, and where its blocks lie."""

    record: Record
    change: Change


@dataclass(frozen=True, slots=True)
class Transaction:
    """What the log does at once: changes of the map of a volume, in order, or an operation on the catalogue."""

    volume: int
    changes: list[Change]
    operation: Operation | None


class Replay:
    """Follows the log from a point; `transactions` yields what to apply, `state` and so on tell where it ended."""

    def __init__(self, segments: Segments, point: LogPoint, epoch: int, stop: int | None = None) -> None:
        """The record with the sequence `stop`, if that is given, is not read any more."""
        self._segments, self._epoch, self._stop = segments, epoch, stop
        self._sequence, self._chain = point.sequence, point.chain
        self.state = self._enter(point)
        self.units_verified = 0

    @property
    def sequence(self) -> int:
        """Sequence of the next record."""
        return self._sequence

    @property
    def chain(self) -> bytes:
        """Hash of the last accepted record."""
        return self._chain

    def transactions(self) -> Iterator[Transaction]:
        """Each whole transaction. What is left of one that was cut has no effect."""
        parts: list[Group] = []
        for group in self._groups():
            parts.append(group)
            if group.record.final:
                yield Transaction(group.record.volume, [part.change for part in parts], group.record.operation)
                parts = []

    def _enter(self, point: LogPoint) -> State:
        """The segment of a point: one that the table lists, or a new one that a link names."""
        segment = point.segment
        state = self._segments.states.get(segment.slot)
        if state is None or state.segment.sequence != segment.sequence:
            if segment.end > self._segments.storage.size():
                raise DamageError("image", "is truncated: a log segment lies past its end", "restore the file's end")
            state = self._segments.adopt(TableEntry(segment, None, point.position, point.unit, 0, KIND_LOG))
        if (state.used, state.units) != (point.position, point.unit):
            raise DamageError("log point", "does not fit the segment table", "run nbdvde check")
        self._segments.index(state)
        self._data = self._segments.read(segment.offset, segment.length)
        return state

    def _groups(self) -> Iterator[Group]:
        while True:
            while self._sequence != self._stop and (group := self._next_group()) is not None:
                yield group
            if self._sequence == self._stop:
                return
            link = self._link()
            if link is None or (link.position, link.unit, link.sequence, link.chain) != (
                self.state.used, self.state.units, self._sequence, self._chain,
            ):  # fmt: skip
                self._refuse_damage(link)
                return
            if link.segment.sequence <= self.state.segment.sequence:  # or it might go round for ever
                raise DamageError("log link", "leads back", "run nbdvde check")
            self.state = self._enter(LogPoint(link.segment, 0, 0, self._sequence, self._chain))

    def _next_group(self) -> Group | None:
        """The group at the end of what was accepted, or None when there is no valid one."""
        state, position = self.state, self.state.used
        header = self._header(position)
        if header is None or header.sequence != self._sequence or header.unit != state.units:
            return None
        if position + header.length > log_room(state.segment) or header.length % BLOCK:
            return None
        try:
            return self._open_group(state, position, header)
        except DamageError:
            return None

    def _open_group(self, state: State, position: int, header: GroupHeader) -> Group:
        at = position + HEADER_BYTES
        sealed = self._data[at : at + header.record_length]
        record = Record.unpack(state.sealer.open(header.unit, Kind.RECORD, sealed))
        if (record.sequence, record.epoch, record.previous) != (self._sequence, self._epoch, self._chain):
            raise DamageError("log record", "belongs to another history", "run nbdvde check")
        at += header.record_length
        items: list[int] = [0]
        entries: list[int] = []
        held = sum(blocks for _, blocks in record.extents)
        if sum(count for _, count in record.runs) != held:
            raise DamageError("log record", "places another number of blocks than it holds", "run nbdvde check")
        if held > GROUP_BLOCKS_MAX:  # or it might fill the memory
            raise DamageError("log record", "holds more blocks than a group can", "run nbdvde check")
        for unit, (length, blocks) in enumerate(record.extents, header.unit + 1):
            state.sealer.open(unit, Kind.EXTENT, self._data[at : at + length], blocks=blocks)
            items.append(pack_index(at, length, blocks))
            base = pack_entry(state.segment.slot, unit, 0)
            entries.extend(range(base, base + blocks))
            at += length
        places = [block for start, count in record.runs for block in range(start, start + count)]
        _refuse_references(record)
        self._accept(state, header, items, sealed)
        return Group(record, _with_references(record, places, entries))

    def _accept(self, state: State, header: GroupHeader, items: list[int], record: bytes) -> None:
        assert state.index is not None, "the index was loaded on entering"
        state.index.extend(items)
        state.blocks += sum(unpack_index(item)[2] for item in items)
        state.used += header.length
        state.units += len(items)
        self.units_verified += len(items) + 1
        self._sequence += 1
        self._chain = blake3(record).digest()

    def _header(self, position: int) -> GroupHeader | None:
        return find_header(self.state.sealer, self._data, position)

    def _link(self) -> Link | None:
        return _find_link(self.state.sealer, self._data)

    def _refuse_damage(self, link: Link | None) -> None:
        """Raise unless the chain may have been torn here by a crash."""
        if any(synced > self._sequence for synced in self._witnesses(link)):
            where = f"log record {self._sequence} at byte {self.state.segment.offset + self.state.used}"
            raise DamageError(where, "is damaged, and later ones exist", "run nbdvde check")

    def _witnesses(self, link: Link | None) -> Iterator[int]:
        """What the links and headers behind the break, in this segment and those it leads to, say was durable."""
        sealer, data, start = self.state.sealer, self._data, self.state.used
        seen = set()
        while True:
            for position in range(start, len(data) - LINK_BYTES, BLOCK):
                if header := find_header(sealer, data, position):
                    yield header.synced
            if link is None or link.segment.sequence in seen or link.segment.length > SEGMENT_BYTES_MAX:
                return
            yield link.synced
            seen.add(link.segment.sequence)
            sealer, start = self._segments.keyring.sealer(link.segment), 0
            data = self._segments.read(link.segment.offset, link.segment.length)
            link = _find_link(sealer, data)


def _refuse_references(record: Record) -> None:
    """Raise DamageError for references that no group can have."""
    if sum(count for _, _, count in record.references) > REFERENCES_MAX:  # or they might fill the memory
        raise DamageError("log record", "refers to more blocks than a group can", "run nbdvde check")
    for _, entry, count in record.references:
        if entry <= LOST or (entry & BLOCK_MASK) + count > EXTENT_BLOCKS_MAX:
            raise DamageError("log record", "refers to what is no extent", "run nbdvde check")


def _with_references(record: Record, places: list[int], entries: list[int]) -> Change:
    """What a group changes: the blocks that it brings, and those that are stored already."""
    if record.references:
        stored = dict(zip(places, entries, strict=True))
        for start, entry, count in record.references:
            stored.update(zip(range(start, start + count), range(entry, entry + count), strict=True))
        places = sorted(stored)
        entries = [stored[block] for block in places]
    return Change(record.zeroes, places, entries)


def find_header(sealer: Sealer, data: bytes, position: int) -> GroupHeader | None:
    """The group header at a position of a segment, if there is a sound one."""
    sealed = data[position : position + HEADER_BYTES]
    if len(sealed) < HEADER_BYTES:
        return None
    try:
        return GroupHeader.unpack(sealer.open(position // BLOCK, Kind.HEADER, sealed, domain=Domain.HEADER))
    except DamageError:
        return None


def _find_link(sealer: Sealer, data: bytes) -> Link | None:
    """The link in the last blocks of a segment, from whichever of its two copies is sound."""
    for at in (len(data) - LINK_BYTES, len(data) - BLOCK):
        try:
            return Link.unpack(sealer.open(0, Kind.LINK, data[max(at, 0) : at + BLOCK], domain=Domain.LINK))
        except DamageError:
            continue
    return None
