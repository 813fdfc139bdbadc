"""The stream and the WORM region of a disk, as they are asked for by way of any node, and what is known of them."""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import TypeVar

import trio

from nbdvde.admin import streamcalls, wormcalls
from nbdvde.admin.calls import Call, Feed, answer, feed
from nbdvde.disk import BLOCK
from nbdvde.errors import NbdvdeError, NoSpaceError, RefusedError, UsageError
from nbdvde.replication.regionexport import AppendData
from nbdvde.replication.replica import Replica
from tests.sim.stack.history import History
from tests.sim.stack.journal import Journal
from tests.sim.stack.life import Life

T = TypeVar("T")
Q = TypeVar("Q")
A = TypeVar("A")
DISK = "disk"
STREAM_ENTRIES, WORM_BLOCKS = 24, 64
_POLICIES = "overwrite", "reject", "wait"
_PATIENCE_S = 6.0
_PAUSE_S = 0.1
CERTAIN = NoSpaceError, RefusedError, UsageError
"""Errors that say that nothing was done."""


class UnknownError(Exception):
    """Nobody knows what became of something."""


class Regions:
    """Both of them."""

    def __init__(self, history: History, random: Random) -> None:
        self.policy = random.choice(_POLICIES)
        overwritten = STREAM_ENTRIES if self.policy == "overwrite" else None
        self.stream = Journal("stream", history, lambda entry: 1, overwritten)
        self.worm = Journal("WORM region", history, lambda entry: -(-len(entry) // BLOCK), None)
        self.has_stream = self.has_worm = False
        """Whether they are there, and may be used."""
        self.may_end = False
        """Whether the WORM region may be given up at any time."""
        self.busy = 0
        """How many use the WORM region."""

    @contextmanager
    def using_worm(self) -> Iterator[None]:
        """Nobody is to give it up within."""
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1

    async def to_stream(self, life: Life, entries: Sequence[bytes], *, wait: bool) -> bool:
        """Append entries; whether that was answered."""
        request = streamcalls.AppendEntries(list(entries), DISK, wait=wait)
        return await self._append(
            self.stream, entries, lambda: call(life, streamcalls.APPEND, request), lambda told: told.positions
        )

    async def to_worm(self, life: Life, entry: bytes) -> bool:
        """The same."""
        request = AppendData(entry, DISK)
        return await self._append(
            self.worm, [entry], lambda: call(life, wormcalls.APPEND, request), lambda told: [told.offset // BLOCK]
        )

    async def _append(
        self, journal: Journal, entries: Sequence[bytes], work: Callable[[], Awaitable[A]],
        positions: Callable[[A], Sequence[int]],
    ) -> bool:  # fmt: skip
        append = journal.begin(entries)
        try:
            journal.done(append, positions(await work()))
        except CERTAIN:
            journal.refused(append)
        except UnknownError:
            return False
        return True

    async def read_stream(self, life: Life) -> None:
        """Read all of it. Raises NbdvdeError, UnknownError, Violation."""
        known = self.stream.known
        found = await lines(life, streamcalls.READ_ENTRIES, streamcalls.ReadEntries(DISK))
        self.stream.saw(known, [(entry.position, entry.data) for entry in found])

    async def read_worm(self, life: Life) -> None:
        """The same."""
        known, request = self.worm.known, wormcalls.WormRequest(DISK)
        records = await lines(life, wormcalls.LIST, request)
        data = b"".join([part.data for part in await lines(life, wormcalls.EXPORT, request)])
        found, at = list[tuple[int, bytes]](), 0
        for record in records:
            found.append((record.offset // BLOCK, data[at : at + record.length]))
            at += record.length
        self.worm.saw(known, found)


async def ask(life: Life, work: Callable[[Replica], Awaitable[T]]) -> T:
    """What an administrator of a node is told. Raises one of `CERTAIN`, or UnknownError."""
    try:
        with trio.move_on_after(_PATIENCE_S):
            return await life.ask(work)
    except CERTAIN:
        raise
    except NbdvdeError as error:
        raise UnknownError from error
    raise UnknownError


async def call(life: Life, what: Call[Q, A], request: Q) -> A:
    """The answer to a call. Raises as `ask`."""
    return await ask(life, lambda replica: answer(what, replica.image, request))


async def lines(life: Life, what: Feed[Q, A], request: Q) -> Sequence[A]:
    """The same of a feed."""
    found = list[A]()

    async def emit(line: object) -> None:
        assert isinstance(line, what.answer)
        found.append(line)

    await ask(life, lambda replica: feed(what, replica.image, request, emit))
    return found


async def append_through(regions: Regions, life: Life) -> None:
    """Append to both, until it is known what became of that."""
    known = False
    while not known:
        await trio.sleep(_PAUSE_S)
        known = not regions.has_stream or await regions.to_stream(life, [regions.stream.fresh(8)], wait=False)
        known &= not regions.has_worm or await regions.to_worm(life, regions.worm.fresh(8))
