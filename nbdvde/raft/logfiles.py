"""The files of a log: segments as they are found, batches into them, entries out of them. Everything blocks."""

import errno
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

from nbdvde.errors import NoSpaceError, PoisonedError, reason
from nbdvde.raft.directory import Directory, File
from nbdvde.raft.messages import Entry
from nbdvde.raft.plan import Batch
from nbdvde.raft.records import (
    BLOCK,
    HEADER_BYTES,
    SECTOR,
    Header,
    data_bytes,
    encode,
    is_payload,
    pack_twin,
    place_of,
    split_place,
    twin_sectors,
)
from nbdvde.raft.segment import Segment

_AHEAD, _TWIN_AHEAD = 256 << 10, 32 << 10
"""Bytes that are made ready at a time behind small batches, and behind their twins."""
_HINT = "mend the device and start the node again"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class _Ahead:
    """How far the end of a growing part of a segment is ready to be written over (`File.make_ready`).

    Only where little is written at a time: else it would cost more than it saves.
    """

    def __init__(self, step: int) -> None:
        self._step, self._segment, self._until = step, 0, 0

    def behind(self, segment: int, start: int, end: int, limit: int) -> int:
        """How many bytes to make ready behind what is written from `start` to `end`; the part ends at `limit`."""
        if segment != self._segment:
            self._segment, self._until = segment, 0
        if end <= self._until or end - start >= self._step:
            return 0
        self._until = min(end + self._step, limit)
        return self._until - end


class LogFiles:
    """The files of a log. One thread at a time writes; others may read meanwhile."""

    def __init__(self, directory: Directory) -> None:
        """Take over a directory. Raises OSError."""
        self._directory = directory
        self._files: dict[int, File] = {}
        self._log = self._chain = 0
        self._spare: tuple[int, File] | None = None
        self._ahead, self._twin_ahead = _Ahead(_AHEAD), _Ahead(_TWIN_AHEAD)
        self.poisoned = False
        with ExitStack() as undo:
            undo.callback(self.close)
            self._files.update((number, directory.open(number)) for number in directory.numbers())
            undo.pop_all()

    @property
    def numbers(self) -> Sequence[int]:
        """Of the segments that there are, ascending."""
        return sorted(self._files)

    def segments(self) -> Iterator[Segment]:
        """What is found in them."""
        for number in self.numbers:
            yield Segment(number, _content(self._files[number]))

    def drop_behind(self, last: int) -> None:
        """Segments that were begun after this one, and never told anything, go. Raises OSError."""
        for number in [number for number in self.numbers if number > last]:
            self._files.pop(number).close()
            self._directory.remove(number)

    def follow(self, log: int, chain: int) -> None:
        """What is written follows a record of the log with that check."""
        self._log, self._chain = log, chain

    def check(self) -> None:
        """Raise PoisonedError if anything failed."""
        if self.poisoned:
            raise PoisonedError("raft log", "a write failed earlier", _HINT)

    def write(self, batch: Batch) -> None:
        """Make a batch durable. Raises NoSpaceError before anything is written, or PoisonedError."""
        self.check()
        with self._poisoning():
            file = self._file(batch)
            buffers, content, chain = encode(
                batch.drafts, self._log, batch.number, self._chain, batch.segment, batch.start
            )
            twin = pack_twin(content, batch.number, batch.start, place_of(batch.segment, batch.twin_start))
            self._make_ready(file, batch)
            file.write(batch.start, buffers)
            file.write(batch.twin_start, [twin])
            file.sync()
            self._chain = chain

    def _make_ready(self, file: File, batch: Batch) -> None:
        segment, end = batch.segment, batch.start + batch.data_bytes
        twin_end = batch.twin_start + twin_sectors(batch.twin_bytes) * SECTOR
        if length := self._ahead.behind(segment, batch.start, end, data_bytes(file.size)):
            file.make_ready(end, length)
        if length := self._twin_ahead.behind(segment, batch.twin_start, twin_end, file.size):
            file.make_ready(twin_end, length)

    def prepare(self, number: int, size: int) -> None:
        """Have the next segment at hand before it is needed; if that fails now, it is tried again then."""
        if self._spare is None:
            with suppress(OSError):
                self._spare = number, self._directory.create(number, size)

    def drop(self, segment: int) -> None:
        """Nobody needs a segment any more, nor the ones before it. Raises PoisonedError."""
        with self._poisoning():
            self._files.pop(segment).close()
            self._directory.remove(segment)

    def read(self, group: int, index: int, term: int, place: int, length: int) -> Entry | None:
        """An entry as it is stored; None when it is not there any more."""
        segment, offset = split_place(place)
        file = self._files.get(segment)
        try:
            data = file.read(offset, HEADER_BYTES + length) if file else b""
        except OSError:
            return None
        if len(data) < HEADER_BYTES:
            return None
        header, payload = Header.unpack(data[:HEADER_BYTES], place), data[HEADER_BYTES:]
        if header is None or (header.group, header.index, header.term) != (group, index, term):
            return None
        return Entry(term, index, header.entry_kind, payload) if is_payload(header, payload) else None

    def close(self) -> None:
        """Let go of all files."""
        for file in self._files.values():
            file.close()
        if self._spare:
            self._spare[1].close()
        self._directory.close()

    @contextmanager
    def _poisoning(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.poisoned = True
            raise PoisonedError("raft log", reason(error), _HINT) from error

    def _file(self, batch: Batch) -> File:
        if batch.segment not in self._files:
            self._files[batch.segment] = self._create(batch.segment, batch.creates)
        return self._files[batch.segment]

    def _create(self, number: int, size: int) -> File:
        spare, self._spare = self._spare, None
        if spare:
            if spare[0] == number and spare[1].size == size:
                return spare[1]
            spare[1].close()
            self._directory.remove(spare[0])
        try:
            return self._directory.create(number, size)
        except OSError as error:
            if error.errno in _FULL:
                raise NoSpaceError("raft log", reason(error), "make room on the host") from error
            raise


def _content(file: File) -> bytes:
    """All bytes of a file; blocks that the device cannot read are there, and damaged."""
    try:
        return file.read(0, file.size)
    except OSError:
        return b"".join(_block(file, offset) for offset in range(0, file.size, BLOCK))


def _block(file: File, offset: int) -> bytes:
    try:
        return file.read(offset, BLOCK)
    except OSError:
        return b"\xff" * BLOCK
