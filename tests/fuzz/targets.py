"""What fuzzing calls: functions that take any bytes, and fail on nothing but a fault of the server.

Each has its oracle: no exception but the declared ones, a bound on steps and on memory, replies that an independent
parser accepts (`replies`), and answers and contents that are those of a plain model (`model`).
"""

import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import trio
import trio.testing

from nbdvde.disk import Buffer, Disk, Piece
from nbdvde.exports import Export, Exports, Peer, Visitor
from nbdvde.limits import Limits, Shared
from nbdvde.memory import MemoryDisk
from nbdvde.metrics import Metrics
from nbdvde.protocol.connection import Batch, RequestParser
from nbdvde.protocol.handshake import Handshake, HandshakeLimits, Phase, Tls
from nbdvde.protocol.messages import ExportInfo, Negotiated, ProtocolError, Request
from nbdvde.session import Session, negotiate
from nbdvde.transport import Transport
from tests.fuzz import model, replies, texts
from tests.fuzz.model import Agreed, Model

SIZE, LARGE_SIZE = 3000, (1 << 16) + 8292
"""Bytes of the disk: one chunk of `MemoryDisk` in most runs, two in some; no multiple of a block."""
LIMITS = HandshakeLimits(option_bytes=300, handshake_bytes=5000, options=20)
"""So small that short inputs reach them."""
_PIECES, _BUFFERS = (4096, 200, 60, 7), (1 << 14, 600, 128, 128)
_RARE = {14: 1, 15: 4096}
"""Bytes at a time by the upper half of the second byte; 15 has the large disk as well."""


class Hurried(MemoryDisk):
    """Does everything at once; what was read is a copy, so that later writes do not show in it."""

    def read_nowait(self, offset: int, length: int) -> Sequence[Piece]:
        return [piece if isinstance(piece, int) else bytes(piece) for piece in super().read_nowait(offset, length)]


class Hesitant(Hurried):
    """Does nothing at once, so that each request gets a task."""

    def write_nowait(self, offset: int, data: memoryview, *, owned: bool) -> bool:
        return False

    async def write(self, offset: int, data: memoryview, *, owned: bool = False) -> None:
        await trio.lowlevel.checkpoint()
        super().write_nowait(offset, data, owned=owned)

    def zero_nowait(self, offset: int, length: int, *, allocate: bool) -> bool:
        return False

    async def zero(self, offset: int, length: int, *, allocate: bool = False) -> None:
        await trio.lowlevel.checkpoint()
        super().zero_nowait(offset, length, allocate=allocate)

    def flush_nowait(self, mark: int) -> bool:
        return False

    async def flush(self, mark: int | None = None, *, alone: bool = False) -> None:
        await trio.lowlevel.checkpoint()


class Line:
    """A socket whose other side has sent everything already, and takes everything in pieces."""

    family = socket.AF_UNIX

    def __init__(self, data: Buffer, piece: int, taken: int) -> None:
        self._rest, self._piece, self._taken = memoryview(data), piece, taken
        self.sent = bytearray()
        self._calls = 0

    def _step(self) -> None:
        self._calls += 1
        assert self._calls < 1 << 17, "a hang"

    def recv_into(self, target: memoryview, /) -> int:
        return self.recvmsg_into([target])[0]

    def recvmsg_into(self, targets: Sequence[memoryview], /) -> tuple[int]:
        self._step()
        assert sum(map(len, targets)), "nowhere to receive"
        left = self._piece
        for target in targets:
            count = min(len(target), len(self._rest), left)
            target[:count] = self._rest[:count]
            self._rest, left = self._rest[count:], left - count
        return (self._piece - left,)

    def sendmsg(self, buffers: Sequence[Buffer], /) -> int:
        self._step()
        data = b"".join(buffers)[: self._taken]
        self.sent += data
        return len(data)

    def fileno(self) -> int:
        return -1

    def setblocking(self, flag: bool, /) -> None: ...
    def setsockopt(self, level: int, option: int, value: int, /) -> None: ...
    def shutdown(self, how: int, /) -> None: ...
    def close(self) -> None: ...


def visitor(disk: Disk) -> Visitor:
    """A client that may use one export, which is also the default one."""
    return Visitor(Exports([Export(disk.name, disk, description="a disk")], default=disk.name), Peer("unix"))


def handshake(data: bytes) -> None:
    """Negotiation, fed in one piece and in many: the same answers, each well-formed, within the limits."""
    tls = (Tls.OFF, Tls.REQUIRED, Tls.DONE)[data[0] % 3] if data else Tls.OFF
    whole = _haggle(data[1:], tls, max(len(data), 1))
    pieces = _haggle(data[1:], tls, 5)
    if pieces.phase is Phase.TLS and whole.violated:
        return  # what came behind STARTTLS came before its answer, or after it
    assert whole == pieces, "segmentation matters"


@dataclass(frozen=True)
class _Haggled:
    """What became of a handshake."""

    sent: bytes
    violated: bool
    phase: Phase
    negotiated: Negotiated | None


def _haggle(data: bytes, tls: Tls, piece: int) -> _Haggled:
    machine, sent, violated, steps = Handshake(visitor(MemoryDisk(SIZE)), tls, LIMITS), b"", False, 0
    position = 0
    try:
        while machine.phase in (Phase.FLAGS, Phase.OPTIONS) and position < len(data):
            machine.feed(data[position : position + piece])
            position += piece
            while (reply := machine.step()) is not None:
                sent += reply
                steps += 1
                assert steps <= 2 * LIMITS.options + 2, "more steps than options"
            assert len(machine.unread) < LIMITS.option_bytes + 16 + piece, "more is kept than the limit"
    except ProtocolError:
        violated = True
    kinds = replies.option_replies(sent if machine.negotiated is None else _without_export_name(sent, data))
    finals = [kind for _, kind, _ in kinds if kind == replies.ACK or kind & replies.FINAL_ERROR]
    assert len(finals) <= LIMITS.options
    assert tls is not Tls.REQUIRED or machine.negotiated is None, "served without TLS"
    return _Haggled(sent, violated, machine.phase, machine.negotiated)


def _without_export_name(sent: bytes, data: bytes) -> bytes:
    """Option replies without what EXPORT_NAME answers, which has no header: size, flags and perhaps zeroes."""
    zeroes = 0 if data[3] & 2 else 124
    last = sent[-10 - zeroes :]
    is_plain = last[:8] == SIZE.to_bytes(8, "big") and not any(last[10:])
    return sent[: -len(last)] if is_plain else sent


@dataclass(frozen=True)
class Setting:
    """How one input is run; all of it comes from its first two bytes."""

    agreed: Agreed
    raw: bool
    """The input begins with a handshake."""
    hurried: bool
    piece: int
    """Bytes received at a time,"""
    buffer: int
    """and the buffer they are received in."""
    taken: int
    """Bytes sent at a time."""

    @classmethod
    def of(cls, first: int, second: int) -> "Setting":
        extended = bool(first & 4)
        structured = extended or bool(first & 2)
        size = LARGE_SIZE if second >> 4 == 15 else SIZE
        agreed = Agreed(size, bool(first & 8), structured, extended, (first >> 4 & 3) % 3 if structured else 0)
        piece = _RARE.get(second >> 4, _PIECES[second & 3])
        buffer = 1 << 17 if second >> 4 == 15 else _BUFFERS[second & 3]
        return cls(agreed, bool(first & 1), not second & 4, min(piece, buffer), buffer, 100 if second & 8 else 1 << 20)


def _negotiated(agreed: Agreed, disk: Disk) -> Negotiated:
    info = ExportInfo(disk.name, disk.size, agreed.read_only)
    return Negotiated(info, agreed.structured, disk.contexts[: agreed.contexts], agreed.extended)


def transmission(data: bytes) -> None:
    """The parser: the requests and refusals of the model, whatever the segmentation, and no growing."""
    if len(data) < 2:
        return
    setting = Setting.of(data[0], data[1])
    stream, expected = data[2:], Model(setting.agreed)
    expected.run(stream)
    handed, violated = _parse(stream, setting)
    asked = [(a.command, a.cookie, a.offset, a.length, a.error) for a in expected.asked]
    found = [(r[0], r[2], r[3], _length(r), r[6][0] if r[6] else 0) for r in handed if not _ends(r)]
    assert found == asked, (found, asked)
    if not any(map(_ends, handed)):
        assert violated == expected.lost


def _length(request: Request) -> int:
    return request[4]


def _ends(request: Request) -> bool:
    return request[0] == model.DISC and request[6] is None


def _parse(stream: bytes, setting: Setting) -> tuple[list[Request], bool]:
    negotiated = _negotiated(setting.agreed, MemoryDisk(setting.agreed.size))
    parser = RequestParser(negotiated, memoryview(bytearray(setting.buffer)), Batch(requests=5, read_bytes=1 << 17))
    handed: list[Request] = []
    line = Line(stream, setting.piece, 0)
    try:
        while count := line.recvmsg_into(parser.targets())[0]:
            parser.received(count)
            while requests := parser.parse():
                assert len(requests) <= 6, "a batch beyond its limit"
                for request in requests:
                    payload = request[5]
                    assert payload is None or request[0] != model.WRITE or len(payload) == request[4]
                    handed.append(request)
                    if _ends(request):
                        return handed, False
            assert parser.pending <= setting.agreed.size, "a payload that cannot fit the disk"
    except ProtocolError:
        return handed, True
    return handed, False


def session(data: bytes) -> None:
    """A whole client over a stream in memory: its answers, the disk and the accounts afterwards."""
    if len(data) >= 2:
        converse(Setting.of(data[0], data[1]), data[2:])


def converse(setting: Setting, data: bytes) -> None:
    """Serve a client that sends `data`, and compare with the model."""
    stream, agreed = bytearray(data), None
    start = 0
    if setting.raw:
        agreed, start = _entered(bytes(stream), setting.agreed)
    else:
        agreed = setting.agreed
    expected = Model(agreed or setting.agreed, setting.hurried)
    if agreed is not None:
        Model(agreed).run(bytes(stream[start:]), lambda position, number: _rename(stream, start + position, number))
        expected.run(bytes(stream[start:]))
    disk = (Hurried if setting.hurried else Hesitant)(setting.agreed.size, read_only=setting.agreed.read_only)
    outcome = _Outcome(Line(stream, setting.piece, setting.taken), disk)
    trio.run(outcome.serve, setting, clock=trio.testing.MockClock(autojump_threshold=0))
    if agreed is None:
        assert outcome.session is None, "transmission without an agreement"
        return
    reads = {a.cookie: a.length for a in expected.asked if a.command == model.READ}
    expected.check(replies.answers(bytes(outcome.line.sent[outcome.negotiated_at :]), reads))
    if setting.hurried:
        assert b"".join(_spelled(disk.read_nowait(0, disk.size))) == expected.content, "the disk differs"


def _entered(stream: bytes, disk: Agreed) -> tuple[Agreed | None, int]:
    """What a stream that begins with a handshake agrees on, and where its transmission begins."""
    machine = Handshake(visitor(MemoryDisk(disk.size, read_only=disk.read_only)), Tls.OFF, LIMITS)
    machine.feed(stream)
    try:
        while machine.step() is not None:
            pass
    except ProtocolError:
        return None, 0
    found = machine.negotiated
    if found is None:
        return None, 0
    agreed = Agreed(disk.size, found.export.read_only, found.structured, found.extended, len(found.contexts))
    return agreed, len(stream) - len(machine.unread)


def _rename(stream: bytearray, position: int, number: int) -> None:
    """Make the cookie of a request unique, keeping most of what it was."""
    (cookie,) = struct.unpack_from(">Q", stream, position + 8)
    struct.pack_into(">Q", stream, position + 8, cookie & ~0xFFFF | number)


def _spelled(pieces: Sequence[Piece]) -> list[Any]:
    return [bytes(piece) for piece in pieces]


class _Outcome:
    """One client, served as `Server` does it."""

    def __init__(self, line: Line, disk: Disk) -> None:
        self.line, self._disk = line, disk
        self.session: Session | None = None
        self.negotiated_at = 0
        """Bytes sent before transmission."""

    async def serve(self, setting: Setting) -> None:
        limits = Limits(requests_in_flight=8, bytes_in_flight=1 << 17, server_bytes_in_flight=1 << 18)
        shared = Shared(limits, Metrics())
        transport = Transport(self.line)
        agreed: tuple[Negotiated, bytes] | None = _negotiated(setting.agreed, self._disk), b""
        try:
            if setting.raw:
                agreed = await negotiate(transport, Handshake(visitor(self._disk), Tls.OFF, LIMITS))
            if agreed is None:
                return
            self.negotiated_at = len(self.line.sent)
            buffer = memoryview(bytearray(setting.buffer))
            self.session = Session(transport, self._disk, agreed[0], buffer, shared)
            with trio.fail_after(1):  # of a clock that jumps when everything waits
                await self.session.run(agreed[1])
        except ProtocolError:
            pass
        if self.session is not None:
            assert self.session.requests_in_flight.used == 0, "requests left in flight"
            assert self.session.account.held == 0, "memory left accounted for"
            assert shared.memory.used == 0, "memory left accounted for"


TARGETS: dict[str, Callable[[bytes], None]] = {
    "handshake": handshake,
    "transmission": transmission,
    "session": session,
    "config": texts.config,
    "control": texts.control,
}
