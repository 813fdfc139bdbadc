"""A client that costs next to nothing, so that the server alone decides: requests are made before, replies counted."""

import random
import socket
import struct
import time
from pathlib import Path

from nbdvde.protocol import wire
from nbdvde.protocol.constants import OPTION_MAGIC, Command, Info, Option, OptionReply

HEADERS = ("simple", "structured", "extended")
"""Forms of replies: a client asks for one of the last two by an option."""
_ASK = {"structured": Option.STRUCTURED_REPLY, "extended": Option.EXTENDED_HEADERS}
_REQUEST_MAGIC, _EXTENDED_MAGIC = 0x25609513, 0x21E41C71
_REPLY_HEAD = {"simple": 16, "structured": 20 + 8, "extended": 32 + 8}
_GROUP = 8
"""Requests that are sent together, as soon as as many were answered."""
_GROUPS = 512


def read_rate(path: Path, headers: str, *, block: int, depth: int, size: int, seconds: float) -> float:
    """Random reads a second over a Unix socket, `depth` in flight. Raises ConnectionError for anything unexpected."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(path))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        negotiate(sock, headers)
        _check(sock, headers, block)
        return _read(sock, _groups(headers, block, size), _GROUP * (_REPLY_HEAD[headers] + block), depth, seconds)


def negotiate(sock: socket.socket, headers: str) -> None:
    """Go for the default export with replies of a form. Raises ConnectionError."""
    exactly(sock, 18)
    sock.sendall(struct.pack(">I", 3))
    if headers in _ASK:
        _option(sock, _ASK[headers], b"")
    _option(sock, Option.GO, struct.pack(">IHH", 0, 1, Info.EXPORT))


def _option(sock: socket.socket, number: int, data: bytes) -> None:
    sock.sendall(wire.OPTION.pack(OPTION_MAGIC, number, len(data)) + data)
    reply = 0
    while reply != OptionReply.ACK:
        _, _, reply, length = wire.OPTION_REPLY.unpack(exactly(sock, wire.OPTION_REPLY.size))
        exactly(sock, length)
        if reply >> 31:
            raise ConnectionError(f"option {number} was refused with {reply:#x}")


def _groups(headers: str, block: int, size: int) -> list[bytes]:
    chance = random.Random(1)
    return [
        b"".join(_request(headers, chance.randrange(size // block) * block, block) for _ in range(_GROUP))
        for _ in range(_GROUPS)
    ]


def _request(headers: str, offset: int, length: int) -> bytes:
    if headers == "extended":
        return struct.pack(">IHHQQQ", _EXTENDED_MAGIC, 0, Command.READ, 0, offset, length)
    return struct.pack(">IHHQQI", _REQUEST_MAGIC, 0, Command.READ, 0, offset, length)


def _check(sock: socket.socket, headers: str, block: int) -> None:
    """A read is answered by one chunk, so that replies can be counted by their bytes."""
    sock.sendall(_request(headers, 0, block))
    head = exactly(sock, _REPLY_HEAD[headers] + block)
    error_or_flags = struct.unpack_from(">I" if headers == "simple" else ">H", head, 4)[0]
    if error_or_flags != (headers != "simple"):
        raise ConnectionError(f"a read was answered with {head[:32].hex()}")


def _read(sock: socket.socket, groups: list[bytes], answer: int, depth: int, seconds: float) -> float:
    buffer = memoryview(bytearray(1 << 20))
    sent = depth // _GROUP
    for group in groups[:sent]:
        sock.sendall(group)
    pending = done = 0
    started = time.perf_counter()
    end = started + seconds
    while time.perf_counter() < end:
        pending += sock.recv_into(buffer)
        while pending >= answer:
            pending -= answer
            done += _GROUP
            sock.sendall(groups[sent % _GROUPS])
            sent += 1
    rate = done / (time.perf_counter() - started)
    left = depth // _GROUP * answer - pending
    while left > 0:  # nbdkit 1.32 ends when a client leaves with answers outstanding
        left -= sock.recv_into(buffer)
    return rate


def exactly(sock: socket.socket, count: int) -> bytes:
    """So many bytes. Raises ConnectionError when there are no more."""
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise ConnectionError("the server closed")
        data += more
    return data
