"""Replies as buffers, read back by the client's decoder."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdvde.disk import Buffer, Piece, Status
from nbdvde.protocol.constants import MAX_STRING, Chunk, CommandFlag
from nbdvde.protocol.replies import ExtendedReplies, Replies, SimpleReplies, StructuredReplies
from tests.protocol.client import Reply, read_replies

COOKIE = (1 << 64) - 2
DF = int(CommandFlag.DF)
ALL = pytest.mark.parametrize("replies", [SimpleReplies(), StructuredReplies(), ExtendedReplies()])
CHUNKED = pytest.mark.parametrize("replies", [StructuredReplies(), ExtendedReplies()])


def spelled_out(pieces: list[Piece]) -> bytes:
    return b"".join(bytes(piece) for piece in pieces)


def read(replies: Replies, offset: int, pieces: list[Piece], flags: int = 0) -> Reply:
    out: list[Buffer] = []
    replies.data(out, COOKIE, offset, pieces, flags)
    (reply,) = read_replies(b"".join(out), {COOKIE: len(spelled_out(pieces))})
    assert (reply.cookie, reply.error) == (COOKIE, 0)
    return reply


PIECES = st.lists(st.one_of(st.integers(1, 3 << 20), st.binary(min_size=1, max_size=20)), max_size=8)


@CHUNKED
@given(pieces=PIECES, offset=st.integers(0, 1 << 62), flags=st.sampled_from([0, DF, 1]))
def test_structured_data_cover_the_range_in_the_fewest_chunks(
    replies: Replies, pieces: list[Piece], offset: int, flags: int
) -> None:
    reply = read(replies, offset, pieces, flags)
    assert reply.bytes == spelled_out(pieces)
    if pieces:
        assert min(reply.data) == offset
        kinds = [isinstance(piece, int) for piece in pieces]
        runs = 1 + sum(a != b for a, b in pairwise(kinds))
        assert len(reply.chunks) == (1 if flags == DF else runs)
    else:
        assert reply.chunks == [Chunk.NONE]


@given(PIECES)
def test_simple_data_spell_out_holes(pieces: list[Piece]) -> None:
    assert read(SimpleReplies(), 5, pieces).bytes == spelled_out(pieces)


@CHUNKED
def test_a_hole_is_sent_as_a_hole(replies: Replies) -> None:
    assert read(replies, 4096, [512, 3584]).holes == [(4096, 4096)]
    assert read(replies, 4096, [512], DF).holes == [(4096, 512)]
    assert read(replies, 4096, [b"x", 512], DF).holes == []


@ALL
def test_pages_are_handed_on_without_a_copy(replies: Replies) -> None:
    page = memoryview(bytearray(4096))
    cases: list[list[Piece]] = [[page], [page, b"x"], [7, page]]
    for pieces in cases:
        out: list[Buffer] = []
        replies.data(out, COOKIE, 0, pieces, 0)
        assert any(buffer is page for buffer in out)


@ALL
def test_done(replies: Replies) -> None:
    out: list[Buffer] = []
    replies.done(out, COOKIE, 512)
    (reply,) = read_replies(b"".join(out))
    assert (reply.cookie, reply.error, reply.bytes) == (COOKIE, 0, b"")


@ALL
@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("", ""),
        ("größer", "größer"),
        ("a\0b", "a?b"),
        ("\ud800", "?"),
        ("ß" * MAX_STRING, "ß" * (MAX_STRING // 2)),
        ("aß" + "ß" * MAX_STRING, "a" + "ß" * (MAX_STRING // 2 - 1)),
    ],
)
def test_errors_carry_a_legal_message(replies: Replies, message: str, expected: str) -> None:
    out: list[Buffer] = []
    replies.error(out, COOKIE, 512, 28, message)
    (reply,) = read_replies(b"".join(out))
    assert (reply.cookie, reply.error) == (COOKIE, 28)
    assert reply.message == ("" if isinstance(replies, SimpleReplies) else expected)


@CHUNKED
def test_status_is_one_chunk_for_each_context(replies: Replies) -> None:
    extents = [(4096, Status.HOLE | Status.ZERO), (512, Status.DATA)]
    out: list[Buffer] = []
    replies.status(out, COOKIE, 512, [(2, extents), (7, extents[:1])])
    (reply,) = read_replies(b"".join(out))
    assert reply.contexts == {2: [(4096, 3), (512, 0)], 7: [(4096, 3)]}
    assert len(reply.chunks) == 2


def test_extended_status_has_long_lengths() -> None:
    out: list[Buffer] = []
    ExtendedReplies().status(out, COOKIE, 512, [(0, [(1 << 40, 3), (1, 1 << 33)])])
    (reply,) = read_replies(b"".join(out))
    assert reply.contexts == {0: [(1 << 40, 3), (1, 1 << 33)]}
    assert reply.chunks == [Chunk.BLOCK_STATUS_EXT]
