"""A segment of the log as it is found: which batches it has, whole, in part, or only as twins."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nbdvde.raft.records import (
    BLOCK,
    HEADER_BYTES,
    SECTOR,
    Draft,
    Header,
    Kind,
    data_bytes,
    is_payload,
    place_of,
    split_place,
    twin_records,
    twin_sectors,
    unpack_part,
)


@dataclass(frozen=True, slots=True)
class Found:
    """A record that was written."""

    place: int
    header: Header
    payload: bytes | None
    """None when it is lost."""
    is_whole: bool
    """Whether it is in its place, so that it can be read there again."""

    @property
    def draft(self) -> Draft:
        """What it says."""
        header = self.header
        return Draft(header.kind, header.group, header.term, header.index, self.payload or b"", header.entry_kind)


class Spot(NamedTuple):
    """Offsets in a segment at which a batch and its twin begin."""

    start: int
    twin: int

    def behind(self, found: Sequence[Found]) -> "Spot":
        """Where the next batch begins."""
        _, last = split_place(found[-1].place)
        end = last + found[-1].header.space
        sectors = twin_sectors(sum(record.header.twin_bytes for record in found))
        return Spot(-(-end // BLOCK) * BLOCK, self.twin + sectors * SECTOR)


@dataclass(slots=True)
class _Twin:
    spot: Spot
    parts: dict[int, bytes]
    expected: int

    @property
    def content(self) -> bytes | None:
        """None when a part of it is not there."""
        if len(self.parts) < self.expected:
            return None
        return b"".join(self.parts[number] for number in range(self.expected))


class Segment:
    """The bytes of one file, examined."""

    def __init__(self, number: int, data: bytes) -> None:
        self.number = number
        self._data = memoryview(data)
        self._limit = data_bytes(len(data))
        written = np.frombuffer(data, np.uint8)[: len(data) // SECTOR * SECTOR].reshape(-1, SECTOR).any(axis=1)
        self._written = written.tobytes()
        """For each sector whether there is anything in it. A new file has nothing but zeroes."""
        self._twins: dict[int, _Twin] = {}
        self._strange = -1
        """Offset of the last sector among the twins that is neither empty nor a part of one."""
        self._read_twins()

    @property
    def begin(self) -> Spot:
        """Where the first batch begins."""
        return Spot(0, self._limit)

    @property
    def first(self) -> int | None:
        """Number of its first batch; None when nothing tells."""
        if header := self._header(0):
            return header.batch
        return next((number for number, twin in self._twins.items() if twin.spot == self.begin), None)

    def spot(self, batch: int) -> Spot:
        """Where a batch is of which there is any part of a twin."""
        return self._twins[batch].spot

    def next_twin(self, batch: int) -> int | None:
        """The first batch after one that has any part of a twin."""
        return min((number for number in self._twins if number > batch), default=None)

    def records(self, batch: int, spot: Spot, chain: int | None, log: int | None) -> list[Found] | None:
        """The records of a batch that begins there, behind one whose check is `chain`; None unless all are known.

        A twin that is whole tells which there are, also where their data is lost.
        """
        found = self._by_twin(batch, spot.start, chain, log)
        return self._by_data(batch, spot.start, chain, log) if found is None else found

    def is_torn(self, batch: int, spot: Spot, chain: int | None) -> bool:
        """Whether all that is wrong with the last batch and its twin is that some of their sectors were never written.

        Nothing of a batch that was made durable is missing in both; and what is there but wrong no crash has left so.
        """
        twin = self._twins.get(batch)
        if twin and twin.content is not None:
            return False
        if self._strange >= spot.twin and (twin or self._is_written(spot.twin)):
            return False
        if self.next_twin(batch) is not None or self._has_later(batch, spot.start):
            return False
        offset = spot.start
        while (header := self._header(offset)) and _follows(header, batch, chain, None):
            first, stop = offset // SECTOR, -(-(offset + HEADER_BYTES + header.length) // SECTOR)
            if self._payload(offset, header) is None and all(self._written[first + 1 : stop]):
                return False
            offset, chain = offset + header.space, header.check
            if header.is_last:
                return True
        return offset >= self._limit or not self._is_written(offset)

    def _is_written(self, offset: int) -> bool:
        return bool(self._written[offset // SECTOR : offset // SECTOR + 1].strip(b"\0"))

    def _by_twin(self, batch: int, start: int, chain: int | None, log: int | None) -> list[Found] | None:
        twin = self._twins.get(batch)
        content = twin.content if twin else None
        if content is None:
            return None
        found = []
        for offset, header, double in twin_records(content, self.number, start):
            if not _follows(header, batch, chain, log):
                return None
            is_whole = self._header(offset) == header
            payload = self._payload(offset, header) if is_whole else None
            known = double if payload is None else payload
            found.append(Found(place_of(self.number, offset), header, known, payload is not None))
            chain = header.check
        return found if found and found[-1].header.is_last else None

    def _by_data(self, batch: int, start: int, chain: int | None, log: int | None) -> list[Found] | None:
        found: list[Found] = []
        offset = start
        while not (found and found[-1].header.is_last):
            header = self._header(offset)
            if header is None or not _follows(header, batch, chain, log):
                return None
            payload = self._payload(offset, header)
            if payload is None:
                return None
            found.append(Found(place_of(self.number, offset), header, payload, is_whole=True))
            chain = header.check
            offset += header.space
        return found

    def _header(self, offset: int) -> Header | None:
        data = self._data[offset : min(offset + HEADER_BYTES, self._limit)]
        return Header.unpack(data, place_of(self.number, offset)) if len(data) == HEADER_BYTES else None

    def _payload(self, offset: int, header: Header) -> bytes | None:
        start = offset + HEADER_BYTES
        payload = bytes(self._data[start : min(start + header.length, self._limit)])
        return payload if is_payload(header, payload) else None

    def _has_later(self, batch: int, start: int) -> bool:
        headers = (self._header(offset) for offset in range(start, self._limit, BLOCK) if self._is_written(offset))
        return any(header and header.batch > batch for header in headers)

    def _read_twins(self) -> None:
        for offset, sector in self._twin_sectors():
            unpacked = unpack_part(sector, place_of(self.number, offset))
            if unpacked is None:
                self._strange = offset
                continue
            part, content = unpacked
            spot = Spot(part.start, offset - part.number * SECTOR)
            twin = self._twins.setdefault(part.batch, _Twin(spot, {}, part.parts))
            twin.parts[part.number] = bytes(content)

    def _twin_sectors(self) -> Iterator[tuple[int, memoryview]]:
        for offset in range(self._limit, len(self._data), SECTOR):
            if self._is_written(offset):
                yield offset, self._data[offset : offset + SECTOR]


def _follows(header: Header, batch: int, chain: int | None, log: int | None) -> bool:
    """Whether a record is of a batch, and comes right after the one with that check; None: nobody knows."""
    return (
        header.batch == batch
        and chain in {None, header.chain}
        and log in {None, header.log}
        and Kind.SEGMENT <= header.kind <= Kind.REMOVE
    )
