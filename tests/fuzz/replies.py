"""What a server sent, parsed strictly and with none of the server's code (NBD specification, "Values", "Replies")."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

SIMPLE, STRUCTURED, EXTENDED = 0x67446698, 0x668E33EF, 0x6E8A278C
NONE, DATA, HOLE, STATUS, STATUS_EXT, ERROR = 0, 1, 2, 5, 6, 0x8001
WIRE_ERRORS = {1, 5, 12, 22, 28, 75, 95, 108}
"""EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN."""
ACK, FINAL_ERROR = 1, 1 << 31
OPTION_REPLIES = {1, 2, 3, 4, *(FINAL_ERROR + number for number in range(1, 11))}


@dataclass
class Answer:
    """One whole reply, its chunks put together."""

    cookie: int
    error: int = 0
    contents: list[tuple[int, bytes]] = field(default_factory=list)
    """(offset, bytes) of each content chunk, holes as zeroes; offset 0 in a simple reply."""
    statuses: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """(length, flags) by context id."""
    offset: int | None = None
    """Of the request, which extended replies repeat."""
    simple: bool = False


def option_replies(data: bytes) -> list[tuple[int, int, bytes]]:
    """(option, type, data) of each reply; every byte must belong to one."""
    replies = []
    while data:
        magic, option, kind, length = struct.unpack_from(">QIII", data)
        assert magic == 0x0003E889045565A9, hex(magic)
        assert kind in OPTION_REPLIES, hex(kind)
        assert len(data) >= 20 + length, "a reply breaks off"
        assert kind != ACK or not length, "an ACK has no data"
        if kind & FINAL_ERROR:
            data[20 : 20 + length].decode()
        replies.append((option, kind, data[20 : 20 + length]))
        data = data[20 + length :]
    return replies


def answers(data: bytes, reads: Mapping[int, int]) -> list[Answer]:
    """All replies in `data`, the order of their ends; `reads` are the lengths of READs by cookie."""
    done: list[Answer] = []
    parts: dict[int, Answer] = {}
    position = 0
    while position < len(data):
        (magic,) = struct.unpack_from(">I", data, position)
        if magic == SIMPLE:
            _, error, cookie = struct.unpack_from(">IIQ", data, position)
            assert cookie not in parts, "simple and structured at once"
            answer = Answer(cookie, _checked(error) if error else 0, simple=True)
            position += 16
            if not error and reads.get(cookie):
                answer.contents.append((0, _take(data, position, reads[cookie])))
                position += reads[cookie]
            done.append(answer)
            continue
        offset = None
        if magic == EXTENDED:
            _, flags, kind, cookie, offset, length = struct.unpack_from(">IHHQQQ", data, position)
            position += 32
        else:
            assert magic == STRUCTURED, hex(magic)
            _, flags, kind, cookie, length = struct.unpack_from(">IHHQI", data, position)
            position += 20
        assert flags in (0, 1), flags
        answer = parts.setdefault(cookie, Answer(cookie, offset=offset))
        assert answer.offset == offset, "all chunks repeat the same offset"
        _add(answer, kind, _take(data, position, length), last=bool(flags))
        position += length
        if flags:
            done.append(parts.pop(cookie))
    assert not parts, "a reply without its last chunk"
    return done


def _take(data: bytes, position: int, length: int) -> bytes:
    taken = data[position : position + length]
    assert len(taken) == length, "a reply breaks off"
    return taken


def _checked(error: int) -> int:
    assert error in WIRE_ERRORS, error
    return error


def _add(answer: Answer, kind: int, payload: bytes, *, last: bool) -> None:
    if kind == NONE:
        assert last
        assert not payload
    elif kind == DATA:
        assert len(payload) > 8, "data without data"
        answer.contents.append((int.from_bytes(payload[:8], "big"), payload[8:]))
    elif kind == HOLE:
        offset, length = struct.unpack(">QI", payload)
        assert length, "a hole of nothing"
        answer.contents.append((offset, bytes(length)))
    elif kind == STATUS:
        assert answer.offset is None, "the short form with extended headers"
        _add_status(answer, int.from_bytes(payload[:4], "big"), [*struct.iter_unpack(">II", payload[4:])])
    elif kind == STATUS_EXT:
        assert answer.offset is not None, "the long form without extended headers"
        context, count = struct.unpack_from(">II", payload)
        extents = [*struct.iter_unpack(">QQ", payload[8:])]
        assert len(extents) == count
        _add_status(answer, context, extents)
    else:
        assert kind == ERROR, hex(kind)
        error, length = struct.unpack_from(">IH", payload)
        assert len(payload) == 6 + length
        payload[6:].decode()
        answer.error = _checked(error)


def _add_status(answer: Answer, context: int, extents: list[tuple[int, int]]) -> None:
    assert context not in answer.statuses, "two chunks for one context"
    assert extents, "no extent"
    assert all(length for length, _ in extents), "an empty extent"
    answer.statuses[context] = extents
