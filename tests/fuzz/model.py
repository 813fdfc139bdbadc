"""What a client may expect of transmission, as plainly as it can be said: one request after the other on a bytearray.

Nothing of the server's code is used. Numbers are those of the specification, section "Values"; the choices that it
leaves open are those of docs/reference/protocol.md.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

from tests.fuzz.replies import Answer

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))
EPERM, EINVAL, ENOSPC, ENOTSUP = 1, 22, 28, 95
ZERO = 2
_FLAGS = {
    READ: FUA | DF,
    WRITE: FUA,
    DISC: 0xFFFF,
    FLUSH: FUA,
    TRIM: FUA,
    CACHE: FUA,
    WRITE_ZEROES: FUA | NO_HOLE | FAST_ZERO,
    BLOCK_STATUS: FUA | REQ_ONE,
}
_MOST = (1 << 32) - 1


@dataclass(frozen=True)
class Agreed:
    """The result of a handshake."""

    size: int
    read_only: bool = False
    structured: bool = False
    extended: bool = False
    contexts: int = 0
    """How many."""


@dataclass(frozen=True)
class Asked:
    """A request that must be answered, and how."""

    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    error: int = 0
    contexts: Sequence[int] = ()
    """Ids that a BLOCK_STATUS asks for."""
    content: bytes = b""
    """What a READ finds."""
    changes: int = 0
    """How many requests before it changed something."""


class _Incomplete(Exception):
    """The stream ends within a request."""


class _Lost(Exception):
    """Nothing that follows can be understood."""


@dataclass
class Model:
    """A disk and its one client. `hurried`: the disk does everything at once, so a fast zero succeeds."""

    agreed: Agreed
    hurried: bool = True
    content: bytearray = field(init=False)
    versions: list[bytes] = field(init=False)
    """The content after each change."""
    asked: list[Asked] = field(default_factory=list)
    lost: bool = False
    """Whether the stream ended with something that is no request."""

    def __post_init__(self) -> None:
        self.content = bytearray(self.agreed.size)
        self.versions = [bytes(self.content)]

    def run(self, stream: bytes, rename: Callable[[int, int], None] = lambda position, number: None) -> None:
        """Take a whole stream. `rename` is told where each header begins and how many there were before."""
        position, number, end = 0, 0, False
        while not end:
            try:
                position, end = self._request(stream, position, partial(rename, position, number))
            except _Incomplete:
                return
            except _Lost:
                self.lost = True
                return
            number += 1

    def _request(self, stream: bytes, position: int, named: Callable[[], None]) -> tuple[int, bool]:
        """One request; where the next begins, and whether it was the last."""
        extended = self.agreed.extended
        form = ">IHHQQQ" if extended else ">IHHQQI"
        body = position + struct.calcsize(form)
        if len(stream) < body:
            raise _Incomplete
        magic, flags, command, cookie, offset, length = struct.unpack_from(form, stream, position)
        if magic != (0x21E41C71 if extended else 0x25609513):
            raise _Lost
        announced = extended and bool(flags & PAYLOAD_LEN)
        end = body + length if command == WRITE or announced else body
        if end - body > _MOST:
            raise _Lost
        named()
        ids: Sequence[int] | None = range(self.agreed.contexts)
        if announced:
            flags &= ~PAYLOAD_LEN
            if command != WRITE:
                length, ids = self._filter(command, stream, body, length)
        error = EINVAL if ids is None else self._error(flags, command, offset, length)
        if command == WRITE and not error and len(stream) < end:
            raise _Incomplete
        if command == DISC and not error:
            return end, True
        content = bytes(self.content[offset : offset + length]) if command == READ and not error else b""
        self.asked.append(
            Asked(command, flags, cookie, offset, length, error, ids or (), content, len(self.versions) - 1)
        )
        if not error and length and command in (WRITE, TRIM, WRITE_ZEROES):
            self.content[offset : offset + length] = stream[body:end] if command == WRITE else bytes(length)
            self.versions.append(bytes(self.content))
        return end, False

    def _filter(self, command: int, stream: bytes, body: int, length: int) -> tuple[int, Sequence[int] | None]:
        """(length, context ids) that the payload of a BLOCK_STATUS names; no ids when it is not acceptable."""
        count, rest = divmod(length - 8, 4)
        if command != BLOCK_STATUS or rest or not 0 <= count <= self.agreed.contexts:
            return length, None
        if len(stream) < body + length:
            raise _Incomplete
        effect, *ids = struct.unpack_from(f">Q{count}I", stream, body)
        acceptable = ids and len(set(ids)) == count and max(ids) < self.agreed.contexts
        return effect, ids if acceptable else None

    def _error(self, flags: int, command: int, offset: int, length: int) -> int:
        agreed = self.agreed
        if flags & ~_FLAGS.get(command, 0) or command not in _FLAGS:
            return EINVAL
        if flags & DF and command == READ and not (agreed.structured or agreed.extended):
            return EINVAL
        if command in (DISC, FLUSH):
            return 0
        if agreed.read_only and command in (WRITE, TRIM, WRITE_ZEROES):
            return EPERM
        if offset + length > agreed.size:
            return ENOSPC if command in (WRITE, WRITE_ZEROES) else EINVAL
        if command == BLOCK_STATUS and not (length and agreed.contexts):
            return EINVAL
        if command == WRITE_ZEROES and flags & FAST_ZERO and length and not self.hurried:
            return ENOTSUP
        return 0

    def check(self, answers: Sequence[Answer]) -> None:
        """Whether these are the answers that were due, in any order; cookies must be unique."""
        found = {answer.cookie: answer for answer in answers}
        assert len(found) == len(answers), "a request was answered twice"
        assert set(found) == {asked.cookie for asked in self.asked}, "requests without an answer, or the reverse"
        for asked in self.asked:
            self._check(asked, found[asked.cookie])

    def _check(self, asked: Asked, answer: Answer) -> None:
        agreed = self.agreed
        assert answer.error == asked.error, (asked, answer)
        assert answer.offset == (asked.offset if agreed.extended else None), (asked, answer)
        assert not (answer.simple and agreed.extended), "a simple reply with extended headers"
        if asked.command == READ:
            assert answer.simple != (agreed.structured or agreed.extended), "only structured reads once agreed"
        else:
            assert not answer.contents, "content that nobody asked for"
        if asked.error:
            return
        if asked.command == READ and asked.length:
            self._check_read(asked, answer)
        expected = set(asked.contexts) if asked.command == BLOCK_STATUS else set()
        assert set(answer.statuses) == expected
        for extents in answer.statuses.values():
            assert sum(length for length, _ in extents) <= asked.length
            assert not asked.flags & REQ_ONE or len(extents) == 1
            assert all(one[1] != other[1] for one, other in pairwise(extents)), "not merged"
        if 0 in answer.statuses:
            assert any(self._true(asked.offset, answer.statuses[0], v) for v in self.versions[asked.changes :])

    def _check_read(self, asked: Asked, answer: Answer) -> None:
        """Chunks cover the range exactly, without overlap, in any order."""
        at = 0 if answer.simple else asked.offset
        assert not asked.flags & DF or len(answer.contents) == 1, "cut in spite of DF"
        joined = b""
        for offset, part in sorted(answer.contents):
            assert offset == at + len(joined), "gap or overlap"
            joined += part
        assert len(joined) == asked.length
        assert not self.hurried or joined == asked.content, "wrong data"

    @staticmethod
    def _true(offset: int, extents: Sequence[tuple[int, int]], content: bytes) -> bool:
        """Whether what is called zero is zero; context 0 is `base:allocation`."""
        for length, flags in extents:
            if flags & ZERO and content[offset : offset + length].strip(b"\0"):
                return False
            offset += length
        return True
