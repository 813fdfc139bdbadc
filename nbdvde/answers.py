"""The requests of one client that have to wait for something: each, or all flushes together, in a task that answers."""

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from time import perf_counter_ns
from typing import NamedTuple, TypeAlias

import trio

from nbdvde.disk import Disk, located
from nbdvde.errors import DetachedError, NbdErrno, NbdvdeError, RequestError
from nbdvde.limits import Account, Budget, Shared
from nbdvde.metrics import COMMANDS, Traffic
from nbdvde.outbox import Outbox
from nbdvde.protocol import wire
from nbdvde.protocol.connection import LARGE_PAYLOAD
from nbdvde.protocol.constants import Command, CommandFlag
from nbdvde.protocol.messages import Negotiated, Refusal, Request
from nbdvde.protocol.replies import Extents, replies_of
from nbdvde.transport import Transport

_log = logging.getLogger(__name__)

# Enum members are slow, and these are used for every request.
_READ, _WRITE = int(Command.READ), int(Command.WRITE)
_FUA, _NO_HOLE, _REQ_ONE = int(CommandFlag.FUA), int(CommandFlag.NO_HOLE), int(CommandFlag.REQ_ONE)
_FLUSHERS = 2
"""While one flush syncs, the next one can append; more would wait for these."""
MAX_EXTENTS = 1 << 14
"""Extents in one answer to BLOCK_STATUS; the specification allows 2^20, the client asks again for the rest."""
_CHARGE = 1 << 12
_CHARGES = {int(Command.BLOCK_STATUS): 8 * MAX_EXTENTS}
"""Bytes that a request in flight is taken to hold, other than READ and WRITE."""

Origin: TypeAlias = tuple[int, int]
"""Cookie and offset of a request, which its reply repeats."""


class Flush(NamedTuple):
    """A request of which nothing is left to do but to make everything durable that was there when it came."""

    origin: Origin
    command: int
    mark: int
    """Of the disk."""
    begun_ns: int


class Answers(Outbox):
    """Requests in flight, and their answers."""

    def __init__(self, transport: Transport, disk: Disk, negotiated: Negotiated, shared: Shared) -> None:
        limits = shared.limits
        super().__init__(transport, Account(Budget(limits.bytes_in_flight), shared.memory))
        self.requests_in_flight = Budget(limits.requests_in_flight)
        self.traffic = Traffic()
        self._disk, self._shared = disk, shared
        self.lost = False
        """Whether nobody knows what becomes of a request."""
        self._replies = replies_of(negotiated)
        self._begun_ns = 0
        """When the requests were parsed that are being answered."""
        self._noted = [0] * len(COMMANDS)
        """Requests of each command whose latency was noted, or will be by a task."""
        self._contexts = [disk.bind(context) for context in negotiated.contexts]
        self._surveys = trio.Semaphore(limits.client_surveys)
        self._flushes: list[Flush] = []
        """Those that wait for a task."""
        self._flushers = 0
        self._writing = self._writing_bytes = 0
        """Of writes that the disk has begun and that one task answers: how many, and what they hold."""
        self._written: list[tuple[int, int]] = []
        """(bytes, when it came) of those of them that have ended and are not sent yet."""
        self._written_news = trio.lowlevel.ParkingLot()

    def _refuse(self, request: Request, refused: Refusal) -> None:
        command, flags, cookie, offset, *_ = request
        errno, message = refused
        if errno:
            self.traffic.errors += 1
            self._replies.error(self._out, cookie, offset, errno, message)
        elif command == _READ:
            self._replies.data(self._out, cookie, offset, (), flags)
        else:
            self._replies.done(self._out, cookie, offset)

    def _fail(self, origin: Origin, error: Exception) -> None:
        """Tell the client in general terms, and the log what exactly."""
        self.traffic.errors += 1
        if isinstance(error, DetachedError):
            self.lost = True
            self._transport.abort()
            return
        if isinstance(error, RequestError):
            self._replies.error(self._out, *origin, error.nbd_errno, error.message)
            return
        expected = isinstance(error, NbdvdeError)
        errno = error.nbd_errno if isinstance(error, NbdvdeError) else NbdErrno.EIO
        self._replies.error(self._out, *origin, errno, os.strerror(errno).lower() if expected else "internal error")
        if self._shared.failed is not None and isinstance(error, NbdvdeError):
            self._shared.failed(error)
            return
        ending = self._shared.complaints.ending(type(error), trio.current_time())
        if ending is not None:
            if expected:
                _log.warning("a request failed: %s%s", error, ending)
            else:
                _log.error("unexpected failure of a request%s", ending, exc_info=error)

    def _start(self, request: Request, nursery: trio.Nursery) -> None:
        """Give a request a task of its own, and a small payload a copy: the receive buffer goes on being used."""
        command, flags, cookie, offset, length, payload, _ = request
        if payload is not None and length < LARGE_PAYLOAD:
            payload = memoryview(bytearray(payload))
        charge = charge_of(request)
        self.requests_in_flight.take(1)
        self.account.take(charge)
        self._noted[command] += 1
        if command == _WRITE and payload is not None:
            done = partial(self._on_written, (cookie, offset), length, self._begun_ns)
            if self._disk.begin_write(offset, payload, done):
                self._writing += 1
                self._writing_bytes += charge
                if self._writing == 1:
                    nursery.start_soon(self._answer_written)
                return
        nursery.start_soon(self._work, (command, flags, cookie, offset, length, payload, None), charge, self._begun_ns)

    def _on_written(self, origin: Origin, length: int, begun_ns: int, failure: Exception | None) -> None:
        if failure is None:
            self._replies.done(self._out, *origin)
        else:
            self._fail(origin, located(failure, self._disk.name, origin[1], length))
        self._written.append((length, begun_ns))
        self._written_news.unpark()

    async def _answer_written(self) -> None:
        """Send the answers of all writes that end at once in one go, until there is none under way."""
        try:
            while self._writing:
                if not self._written:
                    await self._written_news.park()
                written, self._written = self._written, []
                with suppress(trio.BrokenResourceError):
                    await self._send()
                self._end_writes(written)
        finally:
            self.account.give(self._writing_bytes)
            self.requests_in_flight.give(self._writing)
            self._writing = self._writing_bytes = 0

    def _end_writes(self, written: Sequence[tuple[int, int]]) -> None:
        latency, now_ns = self.traffic.latency(_WRITE), perf_counter_ns()
        for _, begun_ns in written:
            latency.add(now_ns - begun_ns)
        held = sum(length for length, _ in written)
        self._writing -= len(written)
        self._writing_bytes -= held
        self.account.give(held)
        self.requests_in_flight.give(len(written))

    async def _work(self, request: Request, charge: int, begun_ns: int) -> None:
        """Do one request and answer it; what it holds it holds until the client has taken the answer."""
        try:
            try:
                await self._perform(request)
            except Exception as error:  # noqa: BLE001 - a bug in a disk must not end the client
                _, _, cookie, offset, length, *_ = request
                self._fail((cookie, offset), located(error, self._disk.name, offset, length))
            with suppress(trio.BrokenResourceError):
                if self.requests_in_flight.used > 1:  # what others have just done goes in the same call
                    await trio.lowlevel.cancel_shielded_checkpoint()
                await self._send()
                self.traffic.latency(request[0]).add(perf_counter_ns() - begun_ns)
        finally:
            self.account.give(charge)
            self.requests_in_flight.give(1)

    async def _perform(self, request: Request) -> None:
        command, flags, cookie, offset, length, payload, _ = request
        disk = self._disk
        match command:
            case Command.READ:
                # Read first: `_out` is replaced whenever it is sent, so it must not be looked up before the wait.
                pieces = await disk.read(offset, length)
                self._replies.data(self._out, cookie, offset, pieces, flags)
                return
            case Command.BLOCK_STATUS:
                async with self._surveys, self._shared.surveys:
                    found = await self._status(request)
                self._replies.status(self._out, cookie, offset, found)
                return
            case Command.WRITE:
                assert payload is not None
                await disk.write(offset, payload, owned=True)
            case Command.WRITE_ZEROES:
                await disk.zero(offset, length, allocate=bool(flags & _NO_HOLE))
            case Command.TRIM:
                await disk.trim(offset, length)
            case Command.CACHE:
                async with self._surveys, self._shared.surveys:
                    await disk.cache(offset, length)
        if flags & _FUA and command != Command.CACHE:
            await disk.flush()
        self._replies.done(self._out, cookie, offset)

    async def _status(self, request: Request) -> list[tuple[int, Extents]]:
        """Extents of each of the contexts that were asked for."""
        _, flags, _, offset, length, payload, _ = request
        most = 1 if flags & _REQ_ONE else MAX_EXTENTS
        ids = range(len(self._contexts)) if payload is None else wire.ids(payload)
        return [(number, await self._disk.status(self._contexts[number], offset, length, most)) for number in ids]

    def _start_flush(self, flush: Flush, nursery: trio.Nursery) -> None:
        """Flush with the next of a few tasks that is free, which does it for all who wait."""
        self.requests_in_flight.take(1)
        self._noted[flush.command] += 1
        self._flushes.append(flush)
        if self._flushers < _FLUSHERS:
            self._flushers += 1
            nursery.start_soon(self._flush_waiting)

    async def _flush_waiting(self) -> None:
        while self._flushes:
            flushes, self._flushes = self._flushes, []
            try:
                await self._flush(flushes)
                with suppress(trio.BrokenResourceError):
                    await self._send()
                    now_ns = perf_counter_ns()
                    for flush in flushes:
                        self.traffic.latency(flush.command).add(now_ns - flush.begun_ns)
            finally:
                self.requests_in_flight.give(len(flushes))
        self._flushers -= 1

    async def _flush(self, flushes: Sequence[Flush], *, alone: bool = False) -> None:
        """Flush once, if need be, and answer all."""
        mark = max(flush.mark for flush in flushes)
        try:
            if not self._disk.flush_nowait(mark):
                await self._disk.flush(mark, alone=alone)
        except Exception as error:  # noqa: BLE001 - a bug in a disk must not end the client
            for flush in flushes:
                self._fail(flush.origin, error)
        else:
            for flush in flushes:
                self._replies.done(self._out, *flush.origin)


def charge_of(request: Request) -> int:
    """Bytes that a request is taken to hold until it is answered."""
    command, _, _, _, length, _, refused = request
    if refused is not None:
        return 0
    return length if command in (_READ, _WRITE) else _CHARGES.get(command, _CHARGE)
