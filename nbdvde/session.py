"""One client: the only file that knows both the protocol and disks.

A session negotiates, then repeats: receive, parse every complete request, answer at once what needs no waiting, start
a task for each of the others, send all answers in one call. Tasks send their answers themselves.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import trio

from nbdvde import workers
from nbdvde.disk import Buffer, Disk
from nbdvde.errors import NbdErrno, NbdvdeError, UnsupportedError
from nbdvde.metrics import Metrics
from nbdvde.protocol import wire
from nbdvde.protocol.connection import LARGE_PAYLOAD, Batch, RequestParser
from nbdvde.protocol.constants import Command, CommandFlag
from nbdvde.protocol.handshake import Handshake, Phase
from nbdvde.protocol.messages import ExportInfo, Negotiated, ProtocolError, Refusal, Request
from nbdvde.protocol.replies import Replies, SimpleReplies, StructuredReplies, append_status
from nbdvde.transport import BufferPool, Transport

_log = logging.getLogger(__name__)

# Enum members are slow, and these are used for every request.
_READ, _WRITE = int(Command.READ), int(Command.WRITE)
_TURN = 64
"""Work, about a microsecond each, after which other clients have their turn; a turn costs four [measured]."""
_WORK_BYTES = 8192
"""Bytes whose reception counts as one."""
_FUA, _NO_HOLE = int(CommandFlag.FUA), int(CommandFlag.NO_HOLE)
_REQ_ONE, _FAST_ZERO = int(CommandFlag.REQ_ONE), int(CommandFlag.FAST_ZERO)
MAX_EXTENTS = 1 << 14
"""Extents in one answer to BLOCK_STATUS; the specification allows 2^20, the client asks again for the rest."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What clients may take from a server."""

    connections: int = 1024
    handshake_s: float = 10.0
    """From the connection to GO; qemu's deadline since CVE-2024-7409."""
    requests_in_flight: int = 256
    """Per client, waiting for a disk or for their answers to be sent. One batch may come on top."""
    bytes_in_flight: int = 64 << 20
    """Lengths of these requests. One batch may come on top."""
    server_bytes_in_flight: int = 256 << 20
    """As `bytes_in_flight`, of all clients together, while they wait for a disk."""
    receive_buffers: int = 128
    """Clients with a large receive buffer; further ones get a small one."""
    receive_buffer_bytes: int = 1 << 20
    small_receive_buffer_bytes: int = 1 << 14
    stop_s: float = 10.0
    """How long a stop waits for requests in flight and for clients to take their answers."""
    linger_s: float = 1.0
    """How long a stop waits for a client to close its side once everything is answered."""
    batch: Batch = field(default_factory=Batch)


class Shared:
    """What all sessions of a server share."""

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self.limits, self.metrics = limits, metrics
        self.bytes_in_flight = Budget(limits.server_bytes_in_flight)
        self.buffers = BufferPool(
            limits.receive_buffers, limits.receive_buffer_bytes, limits.small_receive_buffer_bytes
        )


class Exports:
    """The disks clients may ask for by name. The empty name is the default one, when there is a default."""

    def __init__(self, disks: Mapping[str, Disk], default: str | None = None) -> None:
        """`default` is a key of `disks`."""
        self._disks = dict(disks)
        self._default = default

    def disk(self, name: str) -> Disk | None:
        """The disk of a name."""
        return self._disks.get(self._canonical(name))

    def find(self, name: str) -> ExportInfo | None:
        """What the handshake tells of a name."""
        disk = self.disk(name)
        return None if disk is None else ExportInfo(self._canonical(name), disk.size, disk.read_only)

    def listing(self) -> Iterator[ExportInfo]:
        """All exports."""
        for name, disk in self._disks.items():
            yield ExportInfo(name, disk.size, disk.read_only)

    def _canonical(self, name: str) -> str:
        return self._default if not name and self._default is not None else name


async def negotiate(transport: Transport, exports: Exports) -> tuple[Negotiated, bytes] | None:
    """The handshake: what was agreed and the first bytes of transmission, or None when the client gave up.

    Raises `ProtocolError` and `trio.BrokenResourceError`.
    """
    handshake = Handshake(exports.find, exports.listing)
    buffer = memoryview(bytearray(4096))
    await transport.send([wire.greeting()])
    while handshake.phase in (Phase.FLAGS, Phase.OPTIONS):
        reply = handshake.step()
        if reply is None:
            count = await transport.receive([buffer])
            if not count:
                return None
            handshake.feed(buffer[:count])
        elif reply:
            await transport.send([reply])
    return None if handshake.negotiated is None else (handshake.negotiated, handshake.unread)


class Budget:
    """A limit on something in flight. Taking never waits and may exceed the limit; `room` waits until it is kept."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._waiting = trio.lowlevel.ParkingLot()

    def take(self, count: int) -> None:
        """Begin to use `count`."""
        self.used += count

    def give(self, count: int) -> None:
        """End the use of `count`."""
        self.used -= count
        if self.used < self.limit:
            self._waiting.unpark_all()

    async def room(self) -> None:
        """Wait, if need be, until less than the limit is used."""
        while self.used >= self.limit:
            await self._waiting.park()


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
        self.bytes_in_flight = Budget(limits.bytes_in_flight)
        self._transport, self._disk, self._shared = transport, disk, shared
        self._parser = RequestParser(negotiated, buffer, limits.batch)
        self._replies: Replies = StructuredReplies() if negotiated.structured else SimpleReplies()
        self._contexts = negotiated.contexts
        self._out: list[Buffer] = []
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
        async with trio.open_nursery() as nursery:
            try:
                await self._serve(nursery)
            except (ProtocolError, trio.BrokenResourceError) as error:
                failure = error
        if failure is not None:
            raise failure

    async def _serve(self, nursery: trio.Nursery) -> None:
        parser, transport = self._parser, self._transport
        work = 0
        while not self._disconnected:
            requests = parser.parse()
            if requests:
                self._dispatch(requests, nursery)
                await self._send()
                if self.requests_in_flight.used:
                    await self._room()
                work += len(requests)
            else:
                count = await transport.receive(
                    parser.targets(), poll=not (self.requests_in_flight.used or workers.busy())
                )
                if not count:
                    return
                parser.received(count)
                work += 1 + count // _WORK_BYTES
            if work >= _TURN:
                work = 0
                await trio.lowlevel.checkpoint()

    async def _room(self) -> None:
        for budget in (self.requests_in_flight, self.bytes_in_flight, self._shared.bytes_in_flight):
            if budget.used >= budget.limit:
                await budget.room()

    def _dispatch(self, requests: Iterable[Request], nursery: trio.Nursery) -> None:
        """Answer what needs no waiting, and start a task for each of the others."""
        disk, out, replies = self._disk, self._out, self._replies
        counts, lengths = self._shared.metrics.requests, self._shared.metrics.request_bytes
        for request in requests:
            command, flags, cookie, offset, length, payload, refused = request
            if refused is not None:
                self._refuse(request, refused)
                continue
            counts[command] += 1
            lengths[command] += length
            try:
                if command == _READ:
                    pieces = disk.read_nowait(offset, length)
                    if pieces is not None:
                        replies.data(out, cookie, offset, pieces, flags)
                        continue
                elif command == _WRITE:
                    assert payload is not None
                    if not flags and disk.write_nowait(offset, payload, owned=length >= LARGE_PAYLOAD):
                        replies.done(out, cookie)
                        continue
                elif command == Command.DISC:
                    self._disconnected = True
                    return
                elif self._zeroed(command, flags, cookie, offset, length):
                    continue
            except Exception as error:  # noqa: BLE001 - a bug in a disk must not end the client
                self._fail(cookie, error)
            else:
                self._start(request, nursery)

    def _zeroed(self, command: int, flags: int, cookie: int, offset: int, length: int) -> bool:
        """Answer a TRIM or WRITE_ZEROES at once, if that can be; a fast zero must be answered so."""
        if command == Command.TRIM and not flags:
            done = self._disk.trim_nowait(offset, length)
        elif command == Command.WRITE_ZEROES and flags & ~_NO_HOLE in (0, _FAST_ZERO):
            done = self._disk.zero_nowait(offset, length, allocate=bool(flags & _NO_HOLE))
            if not done and flags & _FAST_ZERO:
                raise UnsupportedError("write zeroes", "not faster than writing here")
        else:
            return False
        if done:
            self._replies.done(self._out, cookie)
        return done

    def _refuse(self, request: Request, refused: Refusal) -> None:
        command, flags, cookie, offset, *_ = request
        errno, message = refused
        if errno:
            self._shared.metrics.errors += 1
            self._replies.error(self._out, cookie, errno, message)
        elif command == _READ:
            self._replies.data(self._out, cookie, offset, (), flags)
        else:
            self._replies.done(self._out, cookie)

    def _fail(self, cookie: int, error: Exception) -> None:
        self._shared.metrics.errors += 1
        if isinstance(error, NbdvdeError):
            self._replies.error(self._out, cookie, error.nbd_errno, error.message)
        else:
            _log.error("unexpected failure of a request", exc_info=error)
            self._replies.error(self._out, cookie, NbdErrno.EIO, "internal error")

    def _start(self, request: Request, nursery: trio.Nursery) -> None:
        """Give a request a task of its own, and a small payload a copy: the receive buffer goes on being used."""
        command, flags, cookie, offset, length, payload, _ = request
        if payload is not None and length < LARGE_PAYLOAD:
            payload = memoryview(bytearray(payload))
        charge = length if command in (Command.READ, Command.WRITE) else 0
        self.requests_in_flight.take(1)
        self.bytes_in_flight.take(charge)
        self._shared.bytes_in_flight.take(charge)
        nursery.start_soon(self._work, (command, flags, cookie, offset, length, payload, None), charge)

    async def _work(self, request: Request, charge: int) -> None:
        """Do one request and answer it; only the client's own limits last until it has taken the answer."""
        cookie = request[2]
        try:
            try:
                await self._perform(request)
            except Exception as error:  # noqa: BLE001 - a bug in a disk must not end the client
                self._fail(cookie, error)
            finally:
                self._shared.bytes_in_flight.give(charge)
            with suppress(trio.BrokenResourceError):
                await self._send()
        finally:
            self.bytes_in_flight.give(charge)
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
                extents = await disk.status(offset, length, 1 if flags & _REQ_ONE else MAX_EXTENTS)
                append_status(self._out, cookie, [extents] * len(self._contexts))
                return
            case Command.WRITE:
                assert payload is not None
                await disk.write(offset, payload, owned=True)
            case Command.WRITE_ZEROES:
                await self._zero(flags, offset, length)
            case Command.TRIM:
                await disk.trim(offset, length)
            case Command.CACHE:
                await disk.cache(offset, length)
        if command == Command.FLUSH or (flags & _FUA and command != Command.CACHE):
            await disk.flush()
        self._replies.done(self._out, cookie)

    async def _zero(self, flags: int, offset: int, length: int) -> None:
        allocate = bool(flags & _NO_HOLE)
        if not flags & _FAST_ZERO:
            await self._disk.zero(offset, length, allocate=allocate)
        elif not self._disk.zero_nowait(offset, length, allocate=allocate):
            raise UnsupportedError("write zeroes", "not faster than writing here")

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
                await self._transport.send(out)
        finally:
            self._sending = False
            self._sent.unpark_all()
