"""The transmission phase, sending: replies to buffers (spec, "Simple reply message", "Structured reply types").

Replies are appended to a list of buffers that one vectored send takes: nothing is joined or copied.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Protocol

from nbdvde.disk import Buffer, Piece, Status
from nbdvde.protocol import wire
from nbdvde.protocol.constants import SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, Chunk, CommandFlag, ReplyFlag

# Enum members are slow to use, and these are used for every request.
_DONE = int(ReplyFlag.DONE)
_DATA, _HOLE = int(Chunk.OFFSET_DATA), int(Chunk.OFFSET_HOLE)
_pack_data, _pack_simple = wire.DATA_CHUNK.pack, wire.SIMPLE_REPLY.pack
_ZEROES = memoryview(bytes(1 << 20))


class Replies(Protocol):
    """How replies are written, as the handshake chose. Each method appends the buffers of one whole reply to `out`."""

    def done(self, out: list[Buffer], cookie: int) -> None:
        """Success of a request without payload in its reply."""

    def error(self, out: list[Buffer], cookie: int, errno: int, message: str) -> None:
        """Failure of any request."""

    def data(self, out: list[Buffer], cookie: int, offset: int, pieces: Sequence[Piece], flags: int) -> None:
        """Success of READ, empty ones too; `flags` are those of the request (DF)."""


class SimpleReplies:
    """Replies to a client that did not negotiate structured ones."""

    def done(self, out: list[Buffer], cookie: int) -> None:
        """See `Replies`."""
        out.append(_pack_simple(SIMPLE_REPLY_MAGIC, 0, cookie))

    def error(self, out: list[Buffer], cookie: int, errno: int, message: str) -> None:
        """See `Replies`; there is no place for the message."""
        out.append(_pack_simple(SIMPLE_REPLY_MAGIC, errno, cookie))

    def data(self, out: list[Buffer], cookie: int, offset: int, pieces: Sequence[Piece], flags: int) -> None:
        """See `Replies`; holes are spelled out."""
        out.append(_pack_simple(SIMPLE_REPLY_MAGIC, 0, cookie))
        _append_pieces(out, pieces)


class StructuredReplies:
    """Replies to a client that negotiated structured ones.

    READ, BLOCK_STATUS and errors are answered in chunks, the rest as simple replies, which is allowed and shorter.
    """

    def done(self, out: list[Buffer], cookie: int) -> None:
        """See `Replies`."""
        out.append(_pack_simple(SIMPLE_REPLY_MAGIC, 0, cookie))

    def error(self, out: list[Buffer], cookie: int, errno: int, message: str) -> None:
        """See `Replies`."""
        text = wire.encode_string(message)
        header = (STRUCTURED_REPLY_MAGIC, _DONE, Chunk.ERROR, cookie, 6 + len(text), errno, len(text))
        out.append(wire.ERROR_CHUNK.pack(*header) + text)

    def data(self, out: list[Buffer], cookie: int, offset: int, pieces: Sequence[Piece], flags: int) -> None:
        """See `Replies`; holes are sent as holes unless DF forbids it."""
        if len(pieces) == 1:
            piece = pieces[0]
            if not isinstance(piece, int):
                out += (_pack_data(STRUCTURED_REPLY_MAGIC, _DONE, _DATA, cookie, 8 + len(piece), offset), piece)
                return
        if not pieces:
            out.append(wire.CHUNK.pack(STRUCTURED_REPLY_MAGIC, _DONE, Chunk.NONE, cookie, 0))
            return
        runs = _runs(pieces)
        if flags & CommandFlag.DF and len(runs) > 1:
            runs = [(sum(map(_length, pieces)), pieces)]
        _append_runs(out, cookie, offset, runs)


def append_status(out: list[Buffer], cookie: int, contexts: Sequence[Sequence[tuple[int, Status]]]) -> None:
    """Success of BLOCK_STATUS, always structured: the extents of each selected context, the index being its id."""
    for context_id, extents in enumerate(contexts):
        flags = _DONE if context_id == len(contexts) - 1 else 0
        length = 4 + wire.EXTENT.size * len(extents)
        header = (STRUCTURED_REPLY_MAGIC, flags, Chunk.BLOCK_STATUS, cookie, length, context_id)
        out.append(wire.STATUS_CHUNK.pack(*header) + b"".join([wire.EXTENT.pack(*extent) for extent in extents]))


_Run = tuple[int, Sequence[Piece]]
"""Length of a chunk and the pieces of its data, none for a hole."""


def _runs(pieces: Sequence[Piece]) -> list[_Run]:
    """Neighbouring holes, and neighbouring buffers, as one chunk each: the fewer chunks the better."""
    runs: list[_Run] = []
    for hole, group in groupby(pieces, _is_hole):
        parts = list(group)
        runs.append((sum(map(_length, parts)), () if hole else parts))
    return runs


def _is_hole(piece: Piece) -> bool:
    return isinstance(piece, int)


def _length(piece: Piece) -> int:
    return piece if isinstance(piece, int) else len(piece)


def _append_runs(out: list[Buffer], cookie: int, offset: int, runs: Sequence[_Run]) -> None:
    last = len(runs) - 1
    for index, (length, pieces) in enumerate(runs):
        flags = _DONE if index == last else 0
        if pieces:
            out.append(_pack_data(STRUCTURED_REPLY_MAGIC, flags, _DATA, cookie, 8 + length, offset))
            _append_pieces(out, pieces)
        else:
            out.append(wire.HOLE_CHUNK.pack(STRUCTURED_REPLY_MAGIC, flags, _HOLE, cookie, 12, offset, length))
        offset += length


def _append_pieces(out: list[Buffer], pieces: Sequence[Piece]) -> None:
    """The pieces as they are, holes as zeroes."""
    for piece in pieces:
        if isinstance(piece, int):
            out.extend([_ZEROES] * (piece // len(_ZEROES)))
            out.append(_ZEROES[: piece % len(_ZEROES)])
        else:
            out.append(piece)
