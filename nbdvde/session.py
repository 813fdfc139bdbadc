"""One client: the only file that knows both the protocol and disks.

A session negotiates, then repeats: receive, parse every complete request, answer at once what needs no waiting, start
a task for each of the others, send all answers in one call. Tasks send their answers themselves.
"""

import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from time import perf_counter_ns
from typing import NamedTuple, TypeAlias

import trio

from nbdvde import workers
from nbdvde.disk import Buffer, Disk, located
from nbdvde.errors import DetachedError, NbdErrno, NbdvdeError, RequestError, UnsupportedError
from nbdvde.limits import Account, Budget, Shared
from nbdvde.metrics import COMMANDS, Traffic
from nbdvde.protocol import wire
from nbdvde.protocol.connection import LARGE_PAYLOAD, RequestParser
from nbdvde.protocol.constants import MAX_PAYLOAD, Command, CommandFlag
from nbdvde.protocol.handshake import Handshake, Phase
from nbdvde.protocol.messages import NOTHING_TO_DO, Negotiated, ProtocolError, Refusal, Request
from nbdvde.protocol.replies import Extents, replies_of
from nbdvde.transport import Transport

_log = logging.getLogger(__name__)

# Enum members are slow, and these are used for every request.
_READ, _WRITE, _FLUSH, _TRIM = int(Command.READ), int(Command.WRITE), int(Command.FLUSH), int(Command.TRIM)
_ZEROING = (_TRIM, int(Command.WRITE_ZEROES))
_CHANGING = (_WRITE, *_ZEROING)
_FUA, _NO_HOLE = int(CommandFlag.FUA), int(CommandFlag.NO_HOLE)
_REQ_ONE, _FAST_ZERO = int(CommandFlag.REQ_ONE), int(CommandFlag.FAST_ZERO)
_TURN = 64
"""Work, about a microsecond each, after which other clients have their turn; a turn costs four [measured]."""
_WORK_BYTES = 8192
"""Bytes whose reception counts as one."""
_FLUSHERS = 2
"""While one flush syncs, the next one can append; more would wait for these."""
_LONE = 16
"""Requests, one after the other, after which a client is taken for the only one."""
MAX_EXTENTS = 1 << 14
"""Extents in one answer to BLOCK_STATUS; the specification allows 2^20, the client asks again for the rest."""
_SAMPLED = 3
"""Of plain reads and writes that come one at a time one in four is timed, and counts for the others: timing each costs
5 % of the 120,000 in a second, timing batches 1 % [measured]."""
_OTHERS = tuple(number for number in range(len(COMMANDS)) if number not in (_READ, _WRITE, Command.DISC))
"""Commands that have an answer, but READ and WRITE."""
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


async def negotiate(
    transport: Transport, handshake: Handshake, agreed: Callable[[], Awaitable[None]] | None = None
) -> tuple[Negotiated, bytes] | None:
    """Speak for `handshake`: what was agreed and the first bytes of transmission.

    None when the client gave up, or when TLS has to begin, which `handshake.phase` tells. `agreed` is awaited before
    the client is told that transmission begins.

    Raises `ProtocolError` and `trio.BrokenResourceError`.
    """
    buffer = memoryview(bytearray(4096))
    if handshake.phase is Phase.FLAGS:
        await transport.send([wire.greeting()])
    while handshake.phase in (Phase.FLAGS, Phase.OPTIONS):
        reply = handshake.step()
        if reply is None:
            count = await transport.receive([buffer])
            if not count:
                return None
            handshake.feed(buffer[:count])
        else:
            if handshake.negotiated is not None and agreed is not None:
                await agreed()
            if reply:
                await transport.send([reply])
    return None if handshake.negotiated is None else (handshake.negotiated, handshake.unread)


class Session:
    """The transmission phase of one client.

    At the limits of what may be in flight no more is received, so that the client waits and nobody else.
    """

    def __init__(
        self, transport: Transport, disk: Disk, negotiated: Negotiated, buffer: memoryview, shared: Shared
    ) -> None:
        """`buffer` is where requests are received; the session has it until `run` ends."""
        limits = shared.limits
        self.requests_in_flight = Budget(limits.requests_in_flight)
        self.account = Account(Budget(limits.bytes_in_flight), shared.memory)
        self._transport, self._disk, self._shared = transport, disk, shared
        self._parser = RequestParser(negotiated, buffer, limits.batch)
        self._replies = replies_of(negotiated)
        self.traffic = Traffic()
        self._reads, self._writes = self.traffic.latency(_READ), self.traffic.latency(_WRITE)
        self._begun_ns = 0
        """When the requests were parsed that are being answered."""
        self._noted = [0] * len(COMMANDS)
        """Requests of each command whose latency was noted, or will be by a task."""
        self._unusual = False
        """Whether there may be any but READ and WRITE to note."""
        self._contexts = [disk.bind(context) for context in negotiated.contexts]
        self._out: list[Buffer] = []
        self._surveys = trio.Semaphore(limits.client_surveys)
        self._pending = self._queued = self._received = 0
        self._flushes: list[Flush] = []
        """Those that wait for a task."""
        self._flushers = 0
        self._sending = False
        self._sent = trio.lowlevel.ParkingLot()
        self._disconnected = False

    async def run(self, first: bytes = b"") -> None:
        """Serve until the client leaves; every request received completely is done, and answered if it can be.

        `first` are bytes that were received already. Raises `ProtocolError` and `trio.BrokenResourceError`, both only
        after the requests before have been done.
        """
        self._parser.targets()[0][: len(first)] = first
        self._parser.received(len(first))
        failure: Exception | None = None
        with self._shared.metrics.counting(self.traffic):
            async with trio.open_nursery() as nursery:
                try:
                    await self._serve(nursery)
                except (ProtocolError, trio.BrokenResourceError) as error:
                    failure = error
                finally:
                    self._release()
        if failure is not None:
            raise failure

    @property
    def stalled(self) -> bool:
        """Whether it is the client that we are waiting for in the middle of a payload or of an answer."""
        transport = self._transport
        return transport.sending or bool(self._pending and transport.receiving)

    @property
    def moved(self) -> int:
        """Bytes received and sent so far."""
        return self._received + self._transport.sent

    async def _serve(self, nursery: trio.Nursery) -> None:
        parser, transport, memory = self._parser, self._transport, self._shared.memory
        work, lone = 0, -1
        while not self._disconnected:
            requests = parser.parse()
            if self._pending and parser.pending != self._pending:
                self._release()
            if requests:
                self._begun_ns = perf_counter_ns()
                alone = self._is_alone(len(requests))
                if memory.used >= memory.limit:
                    requests, alone, work = await self._take_turns(requests, nursery), False, _TURN
                flush = self._dispatch(requests, nursery, alone)
                if flush is not None:
                    await self._flush((flush,), alone=True)
                await (self._send_behind() if self._sending else self._send())
                if len(requests) > 1 or self._unusual or not (lone := lone + 1) & _SAMPLED:
                    self._note()
                if self.requests_in_flight.used:
                    await self._room()
                work += len(requests)
            else:
                if parser.pending and not self._pending:
                    await self._hold(parser.pending)
                poll = not (self.requests_in_flight.used or workers.busy())
                count = await transport.receive(parser.targets(), poll=poll)
                if not count:
                    return
                parser.received(count)
                self._received += count
                work += 1 + count // _WORK_BYTES
            if work >= _TURN:
                work = 0
                await trio.lowlevel.checkpoint()

    async def _room(self) -> None:
        """Wait until more may be in flight; a payload that is on its way has got its room, and is not held up."""
        await self.requests_in_flight.room()
        if not self._pending:
            await self.account.room()

    async def _take_turns(self, requests: list[Request], nursery: trio.Nursery) -> list[Request]:
        """Dispatch while the memory of all clients is used up, one request at a time; the last is left to the caller.

        Each waits for room first, but for large payloads, which had to before. What others may be waiting for is not
        held meanwhile, or they would wait for each other.
        """
        self._release()
        for index, request in enumerate(requests):
            if request[5] is None or request[4] < LARGE_PAYLOAD:
                await (self._send_behind() if self._sending else self._send())
                self._note()
                await self.requests_in_flight.room()
                await self.account.room(_charge(request))
            if index < len(requests) - 1:
                self._dispatch((request,), nursery, alone=False)
            if self._disconnected:
                return []
        return requests[-1:]

    def _note(self) -> None:
        """Note how long it took until everything was sent that needed no task."""
        duration_ns = perf_counter_ns() - self._begun_ns
        requests, noted = self.traffic.requests, self._noted
        if reads := requests[_READ] - noted[_READ]:
            noted[_READ] += reads
            self._reads.add(duration_ns, reads)
        if writes := requests[_WRITE] - noted[_WRITE]:
            noted[_WRITE] += writes
            self._writes.add(duration_ns, writes)
        if self._unusual:
            self._unusual = False
            for command in _OTHERS:
                if others := requests[command] - noted[command]:
                    noted[command] += others
                    self.traffic.latency(command).add(duration_ns, others)

    async def _hold(self, pending: int) -> None:
        """Account for a payload that is on its way, once there is room for it."""
        await self.account.room(pending)
        self.account.take(pending)
        self._pending = pending

    def _release(self) -> None:
        self.account.give(self._pending)
        self._pending = 0

    def _is_alone(self, requests: int) -> bool:
        """Whether this client has been asking one thing after the other for a while, and nobody else anything."""
        shared = self._shared
        if shared.lone is not self or requests > 1 or self.requests_in_flight.used:
            shared.lone, shared.lone_for = self, 0
        shared.lone_for += 1
        return shared.lone_for > _LONE

    def _dispatch(self, requests: Iterable[Request], nursery: trio.Nursery, alone: bool) -> Flush | None:
        """Answer what needs no waiting, and start a task for each of the others.

        Answers the flush that is left to the caller, when the client is `alone`.
        """
        disk, out, replies = self._disk, self._out, self._replies
        counts, lengths = self.traffic.requests, self.traffic.request_bytes
        for request in requests:
            command, flags, cookie, offset, length, payload, refused = request
            left: Request | None = request
            try:
                if refused is None:
                    counts[command] += 1
                    lengths[command] += length
                if command == _READ and refused is None:
                    pieces = disk.read_nowait(offset, length)
                    if pieces is not None:
                        replies.data(out, cookie, offset, pieces, flags)
                        continue
                elif command == _WRITE and not flags and payload is not None:
                    if disk.write_nowait(offset, payload, owned=length >= LARGE_PAYLOAD):
                        replies.done(out, cookie, offset)
                        continue
                else:
                    self._unusual = True
                    left = self._settle(request)
            except Exception as error:  # noqa: BLE001 - a bug in a disk must not end the client
                self._fail((cookie, offset), located(error, disk.name, offset, length))
            else:
                if self._disconnected:
                    break
                if left is None:
                    continue
                if left[0] != _FLUSH:
                    self._start(left, nursery)
                    continue
                flush = Flush((cookie, offset), command, disk.mark(), self._begun_ns)
                if alone:
                    return flush
                self._start_flush(flush, nursery)
        return None

    def _settle(self, request: Request) -> Request | None:
        """Answer what is neither a READ nor a plain WRITE, as far as it needs no waiting; what is left to do of it."""
        command, flags, cookie, offset, length, payload, refused = request
        if refused is not None and not (refused is NOTHING_TO_DO and flags & _FUA and command in _CHANGING):
            self._refuse(request, refused)
            return None
        if command == Command.DISC:
            self._disconnected = True
            return None
        if refused is not None:
            self.traffic.requests[command] += 1
        elif command != _FLUSH:
            if command == _WRITE:
                assert payload is not None
                done = self._disk.write_nowait(offset, payload, owned=length >= LARGE_PAYLOAD)
            else:
                done = command in _ZEROING and self._zeroed(command, flags, offset, length)
            if not done:
                return request
        if (command == _FLUSH or flags & _FUA) and not self._disk.flush_nowait(self._disk.mark()):
            return _FLUSH, 0, cookie, offset, 0, None, None
        self._replies.done(self._out, cookie, offset)
        return None

    def _zeroed(self, command: int, flags: int, offset: int, length: int) -> bool:
        """Do a TRIM or WRITE_ZEROES at once, if that can be.

        A fast zero must be done so, unless it is longer than any write: then it is faster in any case.
        """
        if command == _TRIM:
            return self._disk.trim_nowait(offset, length)
        fast = flags & _FAST_ZERO and length <= MAX_PAYLOAD
        done = not (fast and self._disk.sequential) and self._disk.zero_nowait(
            offset, length, allocate=bool(flags & _NO_HOLE)
        )
        if not done and fast:
            raise UnsupportedError("write zeroes", "not faster than writing here")
        return done

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
        charge = _charge(request)
        self.requests_in_flight.take(1)
        self.account.take(charge)
        self._noted[command] += 1
        nursery.start_soon(self._work, (command, flags, cookie, offset, length, payload, None), charge, self._begun_ns)

    async def _work(self, request: Request, charge: int, begun_ns: int) -> None:
        """Do one request and answer it; what it holds it holds until the client has taken the answer."""
        try:
            try:
                await self._perform(request)
            except Exception as error:  # noqa: BLE001 - a bug in a disk must not end the client
                _, _, cookie, offset, length, *_ = request
                self._fail((cookie, offset), located(error, self._disk.name, offset, length))
            with suppress(trio.BrokenResourceError):
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

    async def _send(self) -> None:
        """Send everything that waits to be sent, or wait until another task has.

        Raises `trio.BrokenResourceError`; answers that cannot be sent are forgotten.
        """
        while self._sending:
            await self._sent.park()
        if not self._out:
            return
        self._sending = True
        try:
            while self._out:
                out, self._out = self._out, []
                if self._queued:
                    self._unqueue()
                rest = self._transport.send_nowait(out)
                if rest:
                    await self._send_slowly(rest)
        finally:
            self._sending = False
            self._sent.unpark_all()

    async def _send_behind(self) -> None:
        """As `_send`, while another task is sending: account for what has to wait for that."""
        queued = sum(map(len, self._out))
        self.account.take(queued - self._queued)
        self._queued = queued
        await self._send()

    def _unqueue(self) -> None:
        self.account.give(self._queued)
        self._queued = 0

    async def _send_slowly(self, buffers: Sequence[Buffer]) -> None:
        """Send what the client has to make room for, and account for it meanwhile."""
        held = sum(map(len, buffers))
        self.account.take(held)
        try:
            await self._transport.send(buffers)
        finally:
            self.account.give(held)


def _charge(request: Request) -> int:
    """Bytes that a request is taken to hold until it is answered."""
    command, _, _, _, length, _, refused = request
    if refused is not None:
        return 0
    return length if command in (_READ, _WRITE) else _CHARGES.get(command, _CHARGE)
