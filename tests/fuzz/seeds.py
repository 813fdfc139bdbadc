"""Where fuzzing begins: sessions as clients hold them."""

import itertools
from collections.abc import Iterator

from nbdvde.protocol.constants import Command, CommandFlag, Option
from tests.protocol.client import FLAGS, extended, info_data, meta_data, option, request, status_filter

_READ, _WRITE, _DISC, _FLUSH, _TRIM, _CACHE, _ZEROES, _STATUS = Command
_FUA, _NO_HOLE, _DF, _ONE, _FAST, _ = CommandFlag
_GO = option(Option.GO, info_data("", (0, 1, 2, 3)))
_AGREED = option(Option.STRUCTURED_REPLY) + option(Option.SET_META_CONTEXT, meta_data("", "base:allocation"))
_WIDE = option(Option.EXTENDED_HEADERS) + option(Option.SET_META_CONTEXT, meta_data("", "base:allocation"))
_OPTIONS = (
    option(Option.EXPORT_NAME, b""),
    option(Option.ABORT),
    option(Option.LIST),
    option(Option.LIST, b"data"),
    option(Option.STARTTLS),
    option(Option.INFO, info_data("", (3,))),
    option(Option.INFO, info_data("unknown")),
    _GO,
    _AGREED + _GO,
    _WIDE + _GO,
    option(Option.STRUCTURED_REPLY) + option(Option.LIST_META_CONTEXT, meta_data("", "base:", "qemu:")),
    option(99, b"?" * 40),
    option(Option.INFO, bytes(400)),
)
_OPENINGS = (*_OPTIONS, b"".join(_OPTIONS[2:8]), option(99) * 30)
_HANDSHAKES = (*(FLAGS + data for data in _OPENINGS), b"\0\0\0\1" + _OPTIONS[0])
_REQUESTS = (
    (_WRITE, 90, 0, 0, b"ten bytes."),
    (_WRITE, 65530, 0, _FUA, b"over the boundary"),
    (_WRITE, 1 << 20, 0, 0, b"past the end"),
    (_WRITE, 100, 0, 0, bytes(range(140))),
    (_READ, 80, 40, 0, None),
    (_READ, 0, 2900, _DF, None),
    (_READ, (1 << 64) - 512, 1024, 0, None),
    (_TRIM, 65000, 1000, 0, None),
    (_WRITE, 90, 0, 0, b"ten bytes."),
    (_ZEROES, 0, 2000, _NO_HOLE, None),
    (_READ, 85, 40, 0, None),
    (_ZEROES, 95, 5, _FAST | _FUA, None),
    (_FLUSH, 0, 0, 0, None),
    (_CACHE, 0, 96, 0, None),
    (_STATUS, 0, 2999, 0, None),
    (_STATUS, 96, 100, _ONE, None),
    (_READ, 0, 0, 0, None),
    (99, 0, 0, 0, None),
    (_READ, 0, 1, 1 << 9, None),
    (_DISC, 0, 0, 0, None),
)


def _messages(wide: bool) -> list[bytes]:
    make = extended if wide else request
    parts = [
        make(command, offset, length, flags=flags, payload=payload)
        for command, offset, length, flags, payload in _REQUESTS
    ]
    if wide:
        named = extended(_STATUS, 0, payload=status_filter(2096, 0))
        parts[-1:] = [named, extended(_TRIM, 0, payload=b"stray"), parts[-1]]
    return parts


def _transmissions() -> Iterator[bytes]:
    """Each way of agreeing, segmenting and hurrying; bits as `targets.Setting` reads them."""
    for form, contexts, segmentation in itertools.product(range(4), (0, 2), (0, 2, 5, 11, 0xE0, 0xF3, 0xF6)):
        parts = _messages(wide=bool(form & 2))
        for first in range(0, len(parts), 5):
            yield bytes([form << 1 | contexts << 4, segmentation]) + b"".join(parts[first : first + 6])


def _sessions() -> list[bytes]:
    """Streams that begin with a handshake, and those that do not."""
    agreements = ((FLAGS + _GO, False), (FLAGS + _AGREED + _GO, False), (FLAGS + _WIDE + _GO, True))
    whole = [
        bytes([1, segmentation]) + opening + b"".join(_messages(wide)[4:9])
        for opening, wide in agreements
        for segmentation in (2, 5)
    ]
    return [*_transmissions(), *whole, b"\1\0" + _HANDSHAKES[0] + b"".join(_messages(wide=False)[:3])]


def _post(path: str, body: bytes) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


SEEDS: dict[str, list[bytes]] = {
    "handshake": [bytes([tls]) + data for tls in range(3) for data in _HANDSHAKES],
    "transmission": list(_transmissions()),
    "session": _sessions(),
    "config": [
        b'[server]\nlisten = ["unix:/run/nbd.sock", "localhost:10809"]\nread_only = true\n[limits]\nconnections = 10\n',
        b'[tls]\ncert = "a.pem"\nkey = "b.pem"\n[engine]\ncache_size = "64M"\nwrite_buffer_size = 1048576\n',
        b'[limits]\nhandshake_s = 1.5\nstop_s = 1e3\n[[export]]\nname = "a"\nimage = "a.vde"\n',
        b"a = [[[[1, 2], {b = 0x7f}], 1979-05-27T07:32:00Z], '''x''', \"\\u00e9\"]\n",
    ],
    "control": [
        _post("/add", b'{"name": "a", "image": "a.vde", "read_only": true}'),
        _post("/remove", b'{"name": "a"}'),
        _post("/key", b'{"secret": {"passphrase": "x"}, "slot": 1}'),
        b"GET /add HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /add HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
    ],
}
