"""The transmission phase, sending: replies to buffers (spec, "Simple reply message", "Structured reply types").

Replies are appended to a list of buffers that one vectored send takes: nothing is joined or copied.
"""

import struct
from collections.abc import Sequence
from itertools import chain, groupby
from typing import Protocol, TypeAlias, TypeVar

from nbdvde.disk import Buffer, Piece
from nbdvde.protocol import wire
from nbdvde.protocol.constants import (
    EXTENDED_REPLY_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    CommandFlag,
    ReplyFlag,
)
from nbdvde.protocol.messages import Negotiated

T = TypeVar("T")

# Enum members are slow to use, and these are used for every request.
_DONE = int(ReplyFlag.DONE)
_NONE, _DATA, _HOLE = int(Chunk.NONE), int(Chunk.OFFSET_DATA), int(Chunk.OFFSET_HOLE)
_pack_data, _pack_simple = wire.DATA_CHUNK.pack, wire.SIMPLE_REPLY.pack
_pack_extended, _pack_extended_data = wire.EXTENDED_CHUNK.pack, wire.EXTENDED_DATA_CHUNK.pack
_ZEROES = memoryview(bytes(1 << 20))

Extents: TypeAlias = Sequence[tuple[int, int]]
"""(length, status flags)."""


class Replies(Protocol):
    """How replies are written, as the handshake chose. Each method appends the buffers of one whole reply to `out`.

    `offset` is that of the request.
    """

    def done(self, out: list[Buffer], cookie: int, offset: int) -> None:
        """Success of a request without payload in its reply."""

    def error(self, out: list[Buffer], cookie: int, offset: int, errno: int, message: str) -> None:
        """Failure of any request."""

    def data(self, out: list[Buffer], cookie: int, offset: int, pieces: Sequence[Piece], flags: int) -> None:
        """Success of READ, empty ones too; `flags` are those of the request (DF)."""

    def status(self, out: list[Buffer], cookie: int, offset: int, contexts: Sequence[tuple[int, Extents]]) -> None:
        """Success of BLOCK_STATUS: (id, extents) of each context, at least one."""


def replies_of(negotiated: Negotiated) -> Replies:
    """The replies that were agreed on."""
    if negotiated.extended:
        return ExtendedReplies()
    return StructuredReplies() if negotiated.structured else SimpleReplies()


class SimpleReplies:
    """Replies to a client that negotiated nothing."""

    def done(self, out: list[Buffer], cookie: int, offset: int) -> None:
        """See `Replies`."""
        out.append(_pack_simple(SIMPLE_REPLY_MAGIC, 0, cookie))

    def error(self, out: list[Buffer], cookie: int, offset: int, errno: int, message: str) -> None:
        """See `Replies`; there is no place for the message."""
        out.append(_pack_simple(SIMPLE_REPLY_MAGIC, errno, cookie))

    def data(self, out: list[Buffer], cookie: int, offset: int, pieces: Sequence[Piece], flags: int) -> None:
        """See `Replies`; holes are spelled out."""
        out.append(_pack_simple(SIMPLE_REPLY_MAGIC, 0, cookie))
        _append_pieces(out, pieces)

    def status(self, out: list[Buffer], cookie: int, offset: int, contexts: Sequence[tuple[int, Extents]]) -> None:
        """Contexts cannot be selected without structured replies."""
        raise NotImplementedError


class StructuredReplies:
    """Replies to a client that negotiated structured ones.

    READ, BLOCK_STATUS and errors are answered in chunks, the rest as simple replies, which is allowed and shorter.
    """

    def done(self, out: list[Buffer], cookie: int, offset: int) -> None:
        """See `Replies`."""
        out.append(_pack_simple(SIMPLE_REPLY_MAGIC, 0, cookie))

    def error(self, out: list[Buffer], cookie: int, offset: int, errno: int, message: str) -> None:
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
            out.append(wire.CHUNK.pack(STRUCTURED_REPLY_MAGIC, _DONE, _NONE, cookie, 0))
        position = offset
        for length, run, done in _runs(pieces, flags):
            if run:
                out.append(_pack_data(STRUCTURED_REPLY_MAGIC, done, _DATA, cookie, 8 + length, position))
                _append_pieces(out, run)
            else:
                out.append(wire.HOLE_CHUNK.pack(STRUCTURED_REPLY_MAGIC, done, _HOLE, cookie, 12, position, length))
            position += length

    def status(self, out: list[Buffer], cookie: int, offset: int, contexts: Sequence[tuple[int, Extents]]) -> None:
        """See `Replies`."""
        for (context_id, extents), done in _with_done(contexts):
            length = 4 + wire.EXTENT.size * len(extents)
            header = (STRUCTURED_REPLY_MAGIC, done, Chunk.BLOCK_STATUS, cookie, length, context_id)
            out.append(wire.STATUS_CHUNK.pack(*header) + _packed(extents, "I"))


class ExtendedReplies:
    """Replies to a client that negotiated extended headers: chunks only."""

    def done(self, out: list[Buffer], cookie: int, offset: int) -> None:
        """See `Replies`."""
        out.append(_pack_extended(EXTENDED_REPLY_MAGIC, _DONE, _NONE, cookie, offset, 0))

    def error(self, out: list[Buffer], cookie: int, offset: int, errno: int, message: str) -> None:
        """See `Replies`."""
        text = wire.encode_string(message)
        header = (EXTENDED_REPLY_MAGIC, _DONE, Chunk.ERROR, cookie, offset, 6 + len(text), errno, len(text))
        out.append(wire.EXTENDED_ERROR_CHUNK.pack(*header) + text)

    def data(self, out: list[Buffer], cookie: int, offset: int, pieces: Sequence[Piece], flags: int) -> None:
        """See `Replies`; holes are sent as holes unless DF forbids it."""
        if len(pieces) == 1:
            piece = pieces[0]
            if not isinstance(piece, int):
                length = 8 + len(piece)
                out += (_pack_extended_data(EXTENDED_REPLY_MAGIC, _DONE, _DATA, cookie, offset, length, offset), piece)
                return
        if not pieces:
            self.done(out, cookie, offset)
        position = offset
        for length, run, done in _runs(pieces, flags):
            if run:
                header = (EXTENDED_REPLY_MAGIC, done, _DATA, cookie, offset, 8 + length, position)
                out.append(_pack_extended_data(*header))
                _append_pieces(out, run)
            else:
                fields = (EXTENDED_REPLY_MAGIC, done, _HOLE, cookie, offset, 12, position, length)
                out.append(wire.EXTENDED_HOLE_CHUNK.pack(*fields))
            position += length

    def status(self, out: list[Buffer], cookie: int, offset: int, contexts: Sequence[tuple[int, Extents]]) -> None:
        """See `Replies`."""
        for (context_id, extents), done in _with_done(contexts):
            length = 8 + wire.LONG_EXTENT.size * len(extents)
            header = (EXTENDED_REPLY_MAGIC, done, Chunk.BLOCK_STATUS_EXT, cookie, offset, length)
            out.append(wire.EXTENDED_STATUS_CHUNK.pack(*header, context_id, len(extents)) + _packed(extents, "Q"))


_Run: TypeAlias = tuple[int, Sequence[Piece], int]
"""Length of a chunk, the pieces of its data, none for a hole, and its flags."""


def _runs(pieces: Sequence[Piece], flags: int) -> list[_Run]:
    """Neighbouring holes, and neighbouring buffers, as one chunk each; with DF all as one."""
    runs: list[tuple[int, Sequence[Piece]]] = []
    for hole, group in groupby(pieces, _is_hole):
        parts = list(group)
        runs.append((sum(map(_length, parts)), () if hole else parts))
    if flags & CommandFlag.DF and len(runs) > 1:
        runs = [(sum(map(_length, pieces)), pieces)]
    return [(length, parts, done) for (length, parts), done in _with_done(runs)]


def _with_done(items: Sequence[T]) -> list[tuple[T, int]]:
    """Each with the flags of its chunk: the last one is the end of the reply."""
    last = len(items) - 1
    return [(item, _DONE if index == last else 0) for index, item in enumerate(items)]


def _is_hole(piece: Piece) -> bool:
    return isinstance(piece, int)


def _length(piece: Piece) -> int:
    return piece if isinstance(piece, int) else len(piece)


def _packed(extents: Extents, size: str) -> bytes:
    return struct.pack(f">{2 * len(extents)}{size}", *chain.from_iterable(extents))


def _append_pieces(out: list[Buffer], pieces: Sequence[Piece]) -> None:
    """The pieces as they are, holes as zeroes."""
    for piece in pieces:
        if isinstance(piece, int):
            out.extend([_ZEROES] * (piece // len(_ZEROES)))
            out.append(_ZEROES[: piece % len(_ZEROES)])
        else:
            out.append(piece)
