"""One client: with `answers` the only files that know both the protocol and disks.

A session negotiates, then repeats: receive, parse every complete request, answer at once what needs no waiting, start
a task for each of the others, send all answers in one call. Tasks send their answers themselves.
"""

from collections.abc import Awaitable, Callable, Iterable
from time import perf_counter_ns

import trio

from nbdvde import workers
from nbdvde.answers import Answers, Flush, charge_of
from nbdvde.disk import Disk, located
from nbdvde.errors import UnsupportedError
from nbdvde.limits import Shared
from nbdvde.metrics import COMMANDS
from nbdvde.protocol import wire
from nbdvde.protocol.connection import LARGE_PAYLOAD, RequestParser
from nbdvde.protocol.constants import MAX_PAYLOAD, Command, CommandFlag
from nbdvde.protocol.handshake import Handshake, Phase
from nbdvde.protocol.messages import NOTHING_TO_DO, Negotiated, ProtocolError, Request
from nbdvde.transport import Transport

# Enum members are slow, and these are used for every request.
_READ, _WRITE, _FLUSH, _TRIM = int(Command.READ), int(Command.WRITE), int(Command.FLUSH), int(Command.TRIM)
_ZEROING = (_TRIM, int(Command.WRITE_ZEROES))
_CHANGING = (_WRITE, *_ZEROING)
_FUA, _NO_HOLE = int(CommandFlag.FUA), int(CommandFlag.NO_HOLE)
_FAST_ZERO = int(CommandFlag.FAST_ZERO)
_TURN = 64
"""Work, about a microsecond each, after which other clients have their turn; a turn costs four [measured]."""
_WORK_BYTES = 8192
"""Bytes whose reception counts as one."""
_LONE = 16
"""Requests, one after the other, after which a client is taken for the only one."""
_SAMPLED = 3
"""Of plain reads and writes that come one at a time one in four is timed, and counts for the others: timing each costs
5 % of the 120,000 in a second, timing batches 1 % [measured]."""
_OTHERS = tuple(number for number in range(len(COMMANDS)) if number not in (_READ, _WRITE, Command.DISC))
"""Commands that have an answer, but READ and WRITE."""


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


class Session(Answers):
    """The transmission phase of one client.

    At the limits of what may be in flight no more is received, so that the client waits and nobody else.
    """

    def __init__(
        self, transport: Transport, disk: Disk, negotiated: Negotiated, buffer: memoryview, shared: Shared
    ) -> None:
        """`buffer` is where requests are received; the session has it until `run` ends."""
        super().__init__(transport, disk, negotiated, shared)
        self._parser = RequestParser(negotiated, buffer, shared.limits.batch)
        self._reads, self._writes = self.traffic.latency(_READ), self.traffic.latency(_WRITE)
        self._unusual = False
        """Whether there may be any but READ and WRITE to note."""
        self._pending = self._received = 0
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
                    if self.requests_in_flight.used:
                        self._disk.falter()
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
                await self.account.room(charge_of(request))
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
