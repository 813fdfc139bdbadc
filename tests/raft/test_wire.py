"""Frames to bytes and back: lanes, limits, and any bytes at all."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdvde.raft import wire
from nbdvde.raft.messages import Append, AppendReply, Beat, BeatReply, Elect, Entry, Vote
from nbdvde.raft.wire import (
    Answer,
    Ask,
    BeatReplies,
    Beats,
    Cancel,
    Credit,
    Failed,
    Frame,
    Hello,
    Incoming,
    Lane,
    Outgoing,
    Piece,
    Says,
    WireError,
)

FRAMES: list[Frame] = [
    Hello(1, "cluster", 3, 0),
    Says("default", Vote(3, 9, 2)),
    Says("default", Append(3, 8, 2, (Entry(3, 9, 0, b"data"), Entry(3, 10, 1)), 7)),
    Says("other", Append(3, 8, 2, (Entry(3, 9, 0, b"x" * 300_000),), 7)),
    Says("ä" * 64, AppendReply(3, False, 9, 8, 2)),
    Beats((("default", Beat(3, 7, 1)), ("other", Beat(9, 1, 1, True)))),
    Beats(()),
    BeatReplies((("default", BeatReply(3, 1)),)),
    Ask(1, 7, b"q" * 100_000, False),
    Answer(1, b"a" * wire.BODY_BYTES),
    Failed(1, "RefusedError", "what", "why"),
    Piece(2, b"p" * wire.PIECE_BYTES),
    Credit(2, 1 << 20),
    Cancel(2),
    Says("default", Elect(3)),
]


def fed(data: bytes, step: int) -> list[Frame]:
    incoming, frames, rest = Incoming(), [], memoryview(data)
    while rest:
        target = incoming.target()
        count = min(step, len(target), len(rest))
        target[:count], rest = rest[:count], rest[count:]
        frames += incoming.received(count)
    return frames


def sent(frames: Sequence[Frame]) -> bytes:
    outgoing = Outgoing(1 << 30, 1 << 30, 1 << 30)
    assert all(outgoing.put(frame) for frame in frames)
    return b"".join(outgoing.take(1 << 40))


@pytest.mark.parametrize("step", [1 << 30, 65536, 7])
def test_frames_arrive_whole_and_in_the_order_of_their_lanes(step: int) -> None:
    frames = FRAMES if step > 7 else [frame for frame in FRAMES if len(sent([frame])) < 1000]
    came = fed(sent(frames), step)
    for lane in Lane:
        assert [f for f in came if wire.lane_of(f) is lane] == [f for f in frames if wire.lane_of(f) is lane]
    assert len(came) == len(frames)


def test_what_is_urgent_goes_between_the_chunks_of_entries() -> None:
    outgoing = Outgoing()
    outgoing.put(Says("a", Append(1, 0, 0, (Entry(1, 1, 0, bytes(1 << 20)),), 0)))
    data = b"".join(outgoing.take(1))
    assert len(data) < wire.CHUNK_BYTES + 8
    outgoing.put(Beats((("b", Beat(1, 0, 1)),)))
    data += b"".join(outgoing.take(1 << 30))
    assert [type(frame) for frame in fed(data, 1 << 30)] == [Beats, Says]


def test_entries_and_streams_take_turns() -> None:
    outgoing = Outgoing()
    for number in range(3):
        outgoing.put(Piece(number + 1, bytes(1000)))
        outgoing.put(Says("a", Append(1, number, 0, (Entry(1, number + 1, 0, bytes(1000)),), 0)))
    came = [wire.lane_of(frame) for frame in fed(b"".join(outgoing.take(1 << 30)), 1 << 30)]
    assert came == [Lane.BULK, Lane.ENTRIES] * 3


def test_lanes_are_bounded_each_by_itself() -> None:
    outgoing = Outgoing(entries_bytes=10_000)
    append = Says("a", Append(1, 0, 0, (Entry(1, 1, 0, bytes(6000)),), 0))
    assert outgoing.put(append)
    assert outgoing.put(append), "what begins below the limit may end above it"
    assert not outgoing.put(append)
    assert outgoing.put(Beats(()))
    outgoing.take(1 << 30)
    assert not outgoing
    assert outgoing.put(append)
    with pytest.raises(WireError):
        outgoing.put(Ask(1, 1, bytes(wire.BODY_BYTES + 2000), False))


def head(length: int, lane: int, *, more: bool = False) -> bytes:
    return (length | lane << 24 | more << 31).to_bytes(4, "big")


@pytest.mark.parametrize(
    "data",
    [
        head(0, 0),
        head(wire.CHUNK_BYTES + 1, 1) + bytes(8),
        head(4, 3) + bytes(4),
        head(4, 0) + bytes(4),
        sent([Beats(())]).replace(head(3, 0), head(3, 1)),
        sent([Hello(1, "c", 1, 0)]).replace(b"\xa1c", b"\xa1\xff"),
    ],
)
def test_what_cannot_be_is_an_error(data: bytes) -> None:
    with pytest.raises(WireError):
        fed(data, 1 << 30)


def test_a_frame_that_never_ends_is_an_error_before_it_fills_the_memory() -> None:
    chunk = head(wire.CHUNK_BYTES, Lane.URGENT, more=True) + bytes(wire.CHUNK_BYTES)
    fed(chunk * 16, 1 << 30)
    with pytest.raises(WireError):
        fed(chunk * 17, 1 << 30)


@pytest.mark.parametrize(
    "frame",
    [
        Hello(1, "c" * 65, 1, 0), Hello(1, "", 1, 0), Hello(1, "c", 0, 0), Says("", Elect(1)), Credit(1, 1 << 21),
        Credit(1, 0), Piece(1, b""), Piece(1, bytes(wire.PIECE_BYTES + 1)), Failed(1, "E", "x" * 1001), Cancel(-1),
        Beats((("a", Beat(1, 1, 1)),) * (wire.BATCH_BEATS + 1)),
    ],
)  # fmt: skip
def test_lengths_and_numbers_have_limits(frame: Frame) -> None:
    with pytest.raises(WireError):
        fed(sent([frame]), 1 << 30)


@given(st.binary(max_size=200), st.sampled_from(list(Lane)))
def test_any_bytes_are_frames_or_an_error(body: bytes, lane: Lane) -> None:
    try:
        frames = fed(head(len(body), lane) + body, 1 << 30) if body else []
    except WireError:
        return
    assert fed(sent(frames), 1 << 30) == frames


@given(
    st.sampled_from([frame for frame in FRAMES if len(sent([frame])) < 1000]),
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(1, 50),
)
def test_frames_with_changed_bytes_are_frames_or_an_error(
    frame: Frame, changes: list[tuple[int, int]], step: int
) -> None:
    data = bytearray(sent([frame, Cancel(1)]))
    for at, byte in changes:
        data[at % len(data)] = byte
    try:
        frames = fed(bytes(data), step)
    except WireError:
        return
    for lane in Lane:
        mine = [f for f in frames if wire.lane_of(f) is lane]
        assert [f for f in fed(sent(frames), 1 << 30) if wire.lane_of(f) is lane] == mine
