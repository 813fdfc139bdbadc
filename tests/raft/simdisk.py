"""A directory in memory that knows what a crash may leave of it.

Fault model. What was written before the last completed sync of its file is there after a crash. Of what was written
since then every sector is there or not, each on its own. Files are there once `create` has returned, and gone once
`remove` has. What was synced may rot: bits flip, sectors become something else, a write went to another place.
"""

import errno
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from nbdvde.raft.directory import File

SECTOR = 512
Files = dict[int, bytes]
Sector = tuple[int, int, bytes]
"""File, offset, content."""


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes that went to a file."""

    number: int
    offset: int
    data: bytes

    def sectors(self) -> Iterator[Sector]:
        """In pieces that are there or not."""
        at = 0
        while at < len(self.data):
            stop = min(len(self.data), at + SECTOR - (self.offset + at) % SECTOR)
            yield self.number, self.offset + at, self.data[at:stop]
            at = stop


@dataclass(frozen=True, slots=True)
class Create:
    number: int
    size: int


@dataclass(frozen=True, slots=True)
class Remove:
    number: int


@dataclass(frozen=True, slots=True)
class Sync:
    number: int


@dataclass(frozen=True, slots=True)
class Mark:
    """From here on a crash leaves a state between these two."""

    acknowledged: int
    newest: int


Event = Write | Create | Remove | Sync | Mark


class SimFile:
    """A file that tells its directory what happens to it."""

    def __init__(self, directory: "SimDirectory", number: int, content: bytearray) -> None:
        self._directory, self._number, self._content = directory, number, content
        self.size = len(content)

    def read(self, offset: int, length: int) -> bytes:
        self._directory.enter("read")
        if any(offset <= at < offset + length for number, at in self._directory.unreadable if number == self._number):
            raise OSError(errno.EIO, "unreadable")
        return bytes(self._content[offset : offset + length])

    def write(self, offset: int, buffers: Sequence[bytes]) -> None:
        data = b"".join(buffers)
        assert offset + len(data) <= self.size, "the file does not grow"
        try:
            self._directory.enter("write")
        except OSError:
            self._put(offset, data[: len(data) // 2])
            raise
        self._put(offset, data)

    def make_ready(self, offset: int, length: int) -> None:
        assert 0 < length <= self.size - offset, "the file does not grow"
        assert not any(self._content[offset : offset + length]), "nothing is lost"

    def sync(self) -> None:
        self._directory.enter("sync")
        self._directory.events.append(Sync(self._number))

    def close(self) -> None: ...

    def _put(self, offset: int, data: bytes) -> None:
        self._directory.events.append(Write(self._number, offset, data))
        self._content[offset : offset + len(data)] = data


@dataclass
class SimDirectory:
    """Implements Directory."""

    base: Files = field(default_factory=dict)
    limit: int = 1 << 40
    """Bytes that all files together may take."""
    fault: Callable[[str], int] = lambda operation: 0
    """Asked before every operation, by its name; answers an errno to fail with, or 0."""
    unreadable: set[tuple[int, int]] = field(default_factory=set)
    """(file, offset) of bytes that the device does not find."""
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.files = {number: bytearray(content) for number, content in self.base.items()}

    def enter(self, operation: str) -> None:
        if number := self.fault(operation):
            raise OSError(number, "injected")

    def numbers(self) -> Sequence[int]:
        return sorted(self.files)

    def open(self, number: int) -> File:
        return SimFile(self, number, self.files[number])

    def create(self, number: int, size: int) -> File:
        assert number not in self.files
        self.enter("create")
        if size + sum(map(len, self.files.values())) > self.limit:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.events.append(Create(number, size))
        self.files[number] = bytearray(size)
        return self.open(number)

    def remove(self, number: int) -> None:
        self.enter("remove")
        self.events.append(Remove(number))
        del self.files[number]

    def close(self) -> None: ...

    def content(self) -> Files:
        """Everything written, as if it had been synced."""
        return {number: bytes(content) for number, content in self.files.items()}


@dataclass
class Moment:
    """A point of a history."""

    files: dict[int, bytearray]
    """What is durable."""
    pending: list[Sector]
    """Each of which is durable or not."""
    mark: Mark

    def left(self, kept: Iterable[int]) -> Files:
        """What a crash leaves that keeps some of the pending sectors."""
        files = {number: bytearray(content) for number, content in self.files.items()}
        for at in kept:
            _put(files, self.pending[at])
        return {number: bytes(content) for number, content in files.items()}


def moments(base: Files, events: Sequence[Event]) -> Iterator[Moment]:
    """Every point of a history, from its beginning."""
    moment = Moment({number: bytearray(content) for number, content in base.items()}, [], Mark(0, 0))
    yield moment
    for event in events:
        match event:
            case Write():
                moment.pending += event.sectors()
            case Create(number, size):
                moment.files[number] = bytearray(size)
            case Remove(number):
                del moment.files[number]
                moment.pending = [sector for sector in moment.pending if sector[0] != number]
            case Sync(number):
                for sector in moment.pending:
                    if sector[0] == number:
                        _put(moment.files, sector)
                moment.pending = [sector for sector in moment.pending if sector[0] != number]
            case Mark():
                moment.mark = event
        yield moment


def subsets(count: int, random: Random, budget: int) -> Iterator[list[int]]:
    """Which of so many sectors are left: all choices, or the most telling ones and a sample."""
    if 1 << count <= budget:
        for mask in range(1 << count):
            yield [at for at in range(count) if mask >> at & 1]
        return
    everything = list(range(count))
    yield []
    yield everything
    for _ in range(budget):
        match random.randrange(4):
            case 0:
                yield everything[: random.randrange(count)]
            case 1:
                yield everything[random.randrange(count) :]
            case 2:
                at = random.randrange(count)
                yield everything[:at] + everything[at + 1 :]
            case _:
                yield [at for at in everything if random.random() < 0.5]


def _put(files: dict[int, bytearray], sector: Sector) -> None:
    number, offset, data = sector
    files[number][offset : offset + len(data)] = data
