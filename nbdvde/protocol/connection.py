"""The transmission phase, receiving: bytes to requests (spec, "Transmission", "Extended request message").

`RequestParser` works in one receive buffer and hands out every complete request in it at once. Payloads are not
copied, except what came of a large one in one piece with its header.

Limits: one payload of at most `MAX_PAYLOAD` bytes beside the receive buffer; a longer one is refused, and skipped as
it arrives, up to 4 GiB. `parse` stops at `Batch.requests` requests or `Batch.read_bytes` bytes to be read.
"""

from dataclasses import dataclass

import numpy as np

from nbdvde.errors import NbdErrno
from nbdvde.protocol import wire
from nbdvde.protocol.constants import EXTENDED_REQUEST_MAGIC, MAX_PAYLOAD, REQUEST_MAGIC, Command, CommandFlag
from nbdvde.protocol.messages import NOTHING_TO_DO, Negotiated, ProtocolError, Refusal, Request, refusal

LARGE_PAYLOAD = 1 << 16
"""Payloads from this size on are received into pages of their own, which the disk may keep."""
OVER_READ = 1 << 12
"""Bytes received beyond a large payload, or where one is expected: the next header and little that must be copied."""

# Enum members cost an attribute look-up and a slow comparison each; these are used for every request.
_READ, _WRITE, _PAYLOAD_LEN = int(Command.READ), int(Command.WRITE), int(CommandFlag.PAYLOAD_LEN)
_MAX_SKIP = (1 << 32) - 1
"""Bytes of a refused payload that are read and thrown away: what a compact header can announce."""

_FLAGS: dict[int, int] = {
    Command.READ: int(CommandFlag.FUA | CommandFlag.DF),
    Command.WRITE: int(CommandFlag.FUA),
    Command.DISC: 0,
    Command.FLUSH: int(CommandFlag.FUA),
    Command.TRIM: int(CommandFlag.FUA),
    Command.CACHE: int(CommandFlag.FUA),
    Command.WRITE_ZEROES: int(CommandFlag.FUA | CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO),
    Command.BLOCK_STATUS: int(CommandFlag.FUA | CommandFlag.REQ_ONE),
}
"""Flags of each command; FUA must be accepted with every one (spec, "Command flags")."""
_MODIFYING = {Command.WRITE, Command.TRIM, Command.WRITE_ZEROES}
_NO_SPACE_PAST_END = {Command.WRITE, Command.WRITE_ZEROES}


@dataclass(frozen=True, slots=True)
class Batch:
    """How much one call of `RequestParser.parse` may hand out."""

    requests: int = 256
    """So that the buffers of the replies fit one vectored send (IOV_MAX is 1024)."""
    read_bytes: int = 1 << 22
    """The request that reaches this sum is the last."""


class RequestParser:
    """Requests from the bytes of one client.

    1. Receive into `targets()`, one after the other, and tell `received` how many bytes came.
    2. Call `parse` until it returns nothing. Payloads shorter than `LARGE_PAYLOAD` are views of the receive buffer and
       hold only until `targets` is called again; longer ones are the caller's to keep.
    """

    def __init__(self, negotiated: Negotiated, buffer: memoryview, batch: Batch) -> None:
        """`buffer` receives everything but large payloads: writable, at least 64 bytes."""
        self._size = negotiated.export.size
        self._read_only = negotiated.export.read_only
        self._structured = negotiated.structured or negotiated.extended
        self._extended = negotiated.extended
        self._contexts = negotiated.contexts
        self._header = wire.EXTENDED_REQUEST.size if negotiated.extended else wire.REQUEST.size
        self._unpack = wire.EXTENDED_REQUEST.unpack_from if negotiated.extended else wire.REQUEST.unpack_from
        self._magic = EXTENDED_REQUEST_MAGIC if negotiated.extended else REQUEST_MAGIC
        self._buffer = buffer
        self._batch = batch
        self._own_from = min(LARGE_PAYLOAD, len(buffer) - self._header + 1)
        self._start = self._end = 0
        self._skip = 0
        self._payload: memoryview | None = None
        self._payload_end = 0
        self._payload_of = (0, 0, 0)
        self._large_before = False
        self.pending = 0
        """Bytes that the payload takes that is on its way in pages of its own."""

    def targets(self) -> list[memoryview]:
        """Where to receive: the rest of a large payload if one is under way, then free space of the buffer."""
        self._make_room()
        limit = OVER_READ if self._large_before or self._payload is not None else len(self._buffer)
        free = self._buffer[self._end : self._end + limit]
        return [free] if self._payload is None else [self._payload[self._payload_end :], free]

    def received(self, count: int) -> None:
        """`count` bytes were received into the targets."""
        if self._payload is not None:
            direct = min(count, len(self._payload) - self._payload_end)
            self._payload_end += direct
            count -= direct
        self._end += count

    def parse(self) -> list[Request]:  # noqa: C901 - every request goes through it, a call costs a tenth of its time
        """The next complete requests, up to the limits of a batch; empty when more bytes are needed.

        Raises `ProtocolError`, once the requests before have been handed out.
        """
        requests: list[Request] = []
        if not self._end_payload(requests) or self._end - self._start < self._header:
            return requests
        self._start += self._skipped(self._start)
        buffer, position, end = self._buffer, self._start, self._end
        size, last_plain, unpack = self._size, _READ if self._read_only else _WRITE, self._unpack
        last, budget, header = end - self._header, self._batch.read_bytes, self._header
        expected, extended = self._magic, self._extended
        for _ in range(self._batch.requests):
            if position > last or budget <= 0:
                break
            magic, flags, command, cookie, offset, length = unpack(buffer, position)
            if extended and command == _WRITE:
                flags &= ~_PAYLOAD_LEN  # it has its payload even without: QEMU's client (8.2 to 10.0) never says so
            if magic != expected or (extended and (flags & _PAYLOAD_LEN or length > _MAX_SKIP)):
                unusual = self._unusual(position, first=not requests)
                if unusual is None:
                    break
                request, position = unusual
                requests.append(request)
                continue
            body, payload, refused = position + header, None, None
            if flags or command > last_plain or not 0 < length <= MAX_PAYLOAD or offset + length > size:
                refused = self._refusal(command, flags, offset, length)
            if command == _READ:
                budget -= length
            elif command == _WRITE and refused is None:
                if length >= self._own_from:
                    position = self._begin_payload(body, (flags, cookie, offset), length)
                    if self._end_payload(requests):
                        continue
                    break
                if body + length > end:
                    break
                payload = buffer[body : body + length]
                body += length
            elif command == _WRITE:
                self._skip = length
                body += self._skipped(body)
            requests.append((command, flags, cookie, offset, length, payload, refused))
            position = body
        self._start = position
        if requests:
            self._large_before = self._payload is not None or _is_large(requests[-1])
        return requests

    def _unusual(self, position: int, *, first: bool) -> tuple[Request, int] | None:
        """A request that differs from a compact one in more than its header; and where the next one begins.

        None while bytes of it are missing, or when it ends the connection and is not the first to be handed out.
        """
        if not self._extended:
            magic: int = wire.REQUEST.unpack_from(self._buffer, position)[0]
            return _ended(f"magic {magic:#x}", first)
        magic, *header = wire.EXTENDED_REQUEST.unpack_from(self._buffer, position)
        flags, command, cookie, offset, length = header
        body = position + wire.EXTENDED_REQUEST.size
        if magic != EXTENDED_REQUEST_MAGIC:
            return _ended(f"magic {magic:#x}", first)
        if not flags & _PAYLOAD_LEN and command != _WRITE:
            refused = self._refusal(command, flags, offset, length)
            return (command, flags, cookie, offset, length, None, refused), body
        if command == Command.BLOCK_STATUS and self._is_filter(length):
            if body + length > self._end:
                return None
            data = bytes(self._buffer[body : body + length])
            return self._filtered((command, flags, cookie, offset), data), body + length
        if length > _MAX_SKIP:
            return _ended(f"{length} bytes of payload", first)
        self._skip = length
        refused = refusal(NbdErrno.EINVAL, "a payload that does not belong here")
        return (command, flags, cookie, offset, length, None, refused), body + self._skipped(body)

    def _is_filter(self, length: int) -> bool:
        """Whether a payload of this length can name selected contexts, each once."""
        count, rest = divmod(length - wire.STATUS_FILTER.size, 4)
        return not rest and 0 <= count <= len(self._contexts)

    def _filtered(self, header: tuple[int, int, int, int], data: bytes) -> Request:
        """A BLOCK_STATUS that asks for some of the contexts."""
        command, flags, cookie, offset = header
        flags &= ~_PAYLOAD_LEN
        (length,) = wire.STATUS_FILTER.unpack_from(data)
        ids = data[wire.STATUS_FILTER.size :]
        wanted = wire.ids(ids)
        refused = self._refusal(command, flags, offset, length)
        if not wanted or len(set(wanted)) < len(wanted) or max(wanted) >= len(self._contexts):
            refused = refusal(NbdErrno.EINVAL, "context ids that were not agreed on")
        return command, flags, cookie, offset, length, memoryview(ids), refused

    def _make_room(self) -> None:
        """Move an incomplete request to the front once the space behind it gets short."""
        start, end = self._start, self._end
        if start == end:
            self._start = self._end = 0
        elif len(self._buffer) - start < self._own_from + self._header:
            self._buffer[: end - start] = self._buffer[start:end]
            self._start, self._end = 0, end - start

    def _skipped(self, position: int) -> int:
        """How many bytes at `position` belong to the payload of a refused write."""
        count = min(self._skip, self._end - position)
        self._skip -= count
        return count

    def _begin_payload(self, position: int, header: tuple[int, int, int], length: int) -> int:
        """Give a large payload its own pages; where the next request begins."""
        self._payload = np.empty(length, np.uint8).data  # not cleared first: 10 µs less a MiB
        self._payload_of = header
        self._large_before = True
        self.pending = length
        self._payload_end = have = min(length, self._end - position)
        self._payload[:have] = self._buffer[position : position + have]
        return position + have

    def _end_payload(self, requests: list[Request]) -> bool:
        """Hand out a large write once it is complete; False while one is under way."""
        payload = self._payload
        if payload is None:
            return True
        length = len(payload)
        if self._payload_end < length:
            return False
        flags, cookie, offset = self._payload_of
        requests.append((_WRITE, flags, cookie, offset, length, payload, None))
        self._payload = None
        self.pending = 0
        return True

    def _refusal(self, command: int, flags: int, offset: int, length: int) -> Refusal | None:
        """Why a request is not for the disk, None when it is (spec, "Request types", "Error values")."""
        if command not in _FLAGS:
            return refusal(NbdErrno.EINVAL, f"unknown command {command}")
        if command == Command.DISC:
            return None  # it is never answered, so its flags cannot be refused
        if flags & ~_FLAGS[command] or (flags & CommandFlag.DF and not self._structured):
            return refusal(NbdErrno.EINVAL, f"flags {flags:#x} do not belong to command {command}")
        if self._read_only and command in _MODIFYING:
            return refusal(NbdErrno.EPERM, "the export is read-only")
        if command == Command.FLUSH:
            return None  # its range is reserved, and not looked at
        if offset + length > self._size:
            errno = NbdErrno.ENOSPC if command in _NO_SPACE_PAST_END else NbdErrno.EINVAL
            return refusal(errno, "the range reaches past the end of the export")
        return self._length_refusal(command, length)

    def _length_refusal(self, command: int, length: int) -> Refusal | None:
        if command == Command.BLOCK_STATUS:
            allowed = bool(self._contexts) and length > 0
            return None if allowed else refusal(NbdErrno.EINVAL, "no metadata context selected, or no length")
        if length > MAX_PAYLOAD and command in (Command.READ, Command.WRITE):
            errno = NbdErrno.EOVERFLOW if command == Command.READ and self._structured else NbdErrno.EINVAL
            return refusal(errno, f"more than {MAX_PAYLOAD} bytes of payload")
        return None if length else NOTHING_TO_DO


def _is_large(request: Request) -> bool:
    return request[5] is not None and request[4] >= LARGE_PAYLOAD


def _ended(why: str, first: bool) -> tuple[Request, int] | None:
    """Nothing that follows can be understood; the requests before are handed out first."""
    if first:
        raise ProtocolError("request", why)
    return None
