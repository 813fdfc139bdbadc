"""What nodes say to each other on a connection, as bytes.

A connection has lanes. Each is a row of frames of its own, so that a sign of life need not wait for a megabyte of
entries: a frame travels in chunks, and between the chunks of one lane those of another may come.

A chunk is a head of 32 bits, big-endian, and so many bytes: bit 31 says that the frame goes on in the next chunk of
the lane, bits 24 to 30 name the lane, bits 0 to 23 are the length, from 1 to `CHUNK_BYTES`. A frame is a MessagePack
array that begins with its kind. The first frame of either side is its `Hello`, which no version will change but at
its end; the second one comes only after both.
"""

import struct
from collections import deque
from collections.abc import Sequence
from enum import IntEnum
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from nbdvde.disk import Buffer
from nbdvde.errors import NetworkError
from nbdvde.raft.messages import Append, Beat, BeatReply, Body, NodeId

PROTOCOL = 1
"""Which version of all this."""
CHUNK_BYTES = 1 << 16
BODY_BYTES = (32 << 20) + (1 << 16)
"""Of a question or an answer: a write of the longest payload that NBD has, and what describes it."""
PIECE_BYTES = 1 << 17
"""Of a piece of a stream."""
WINDOW_BYTES = 1 << 20
"""Of a stream, on their way and not taken yet."""
BATCH_BEATS = 4096
"""Signs of life in a frame."""
_RECEIVE_BYTES = 1 << 18
_HEAD = struct.Struct(">I")
_MORE = 1 << 31

Name = Annotated[str, Meta(min_length=1, max_length=64)]
_Number = Annotated[int, Meta(ge=0)]
_Text = Annotated[str, Meta(max_length=1000)]


class Lane(IntEnum):
    """Lanes; the first one goes before all others, which take turns."""

    URGENT = 0
    """What Raft says, but for entries, and what is short and ends a wait."""
    ENTRIES = 1
    BULK = 2
    """Questions, answers and streams of the layer above."""


FRAME_BYTES = {Lane.URGENT: 1 << 20, Lane.ENTRIES: 64 << 20, Lane.BULK: BODY_BYTES + 1024}
"""How long a frame may be."""


class WireError(NetworkError):
    """A node says what cannot be understood; the connection is of no use any more."""


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """Who speaks."""

    protocol: _Number
    cluster: Name
    node: Annotated[NodeId, Meta(ge=1)]
    level: _Number
    """Of features: both sides use those of the lower one."""


class Says(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """A message of a group to its member on the other side."""

    group: Name
    body: Body


class Beats(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Signs of life of the groups that the sender leads. Without any it is one of the sender itself."""

    beats: Annotated[tuple[tuple[Name, Beat], ...], Meta(max_length=BATCH_BEATS)]


class BeatReplies(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """The answers."""

    replies: Annotated[tuple[tuple[Name, BeatReply], ...], Meta(max_length=BATCH_BEATS)]


class Ask(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """A question of the layer above, answered once or, when `streamed`, by any number of pieces and an end."""

    number: _Number
    """Of questions of the sender; none is used twice on a connection."""
    kind: _Number
    body: Annotated[bytes, Meta(max_length=BODY_BYTES)]
    streamed: bool


class Answer(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """To a question; of a stream, that it is complete."""

    number: _Number
    body: Annotated[bytes, Meta(max_length=BODY_BYTES)] = b""


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """A question could not be answered, or not to its end; as the parts of an error."""

    number: _Number
    """0: of no question; the connection is refused after the hello."""
    error: Name
    what: _Text
    why: _Text = ""
    hint: _Text = ""


class Piece(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """Of a stream."""

    number: _Number
    data: Annotated[bytes, Meta(min_length=1, max_length=PIECE_BYTES)]


class Credit(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """So many bytes of a stream were taken: as many more may come."""

    number: _Number
    count: Annotated[int, Meta(ge=1, le=WINDOW_BYTES)]


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """Who asked does not wait any more."""

    number: _Number


Frame: TypeAlias = Hello | Says | Beats | BeatReplies | Ask | Answer | Failed | Piece | Credit | Cancel
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Frame).decode


def lane_of(frame: Frame) -> Lane:
    """The lane that a frame belongs to."""
    match frame:
        case Says(body=Append()):
            return Lane.ENTRIES
        case Ask() | Answer() | Failed() | Piece():
            return Lane.BULK
        case _:
            return Lane.URGENT


class Incoming:
    """Bytes to frames.

    Receive into `target()`, then tell `received` how many bytes came; it hands out the frames that they complete.
    """

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(_RECEIVE_BYTES))
        self._end = 0
        self._parts: dict[Lane, list[bytes]] = {lane: [] for lane in Lane}
        self._lengths = dict.fromkeys(Lane, 0)
        """Of the parts, together."""

    def target(self) -> memoryview:
        """Where to receive; never empty."""
        return self._buffer[self._end :]

    def received(self, count: int) -> list[Frame]:
        """So many bytes came. Raises WireError."""
        frames: list[Frame] = []
        buffer, at, end = self._buffer, 0, self._end + count
        while (body := at + _HEAD.size) <= end:
            head: int = _HEAD.unpack_from(buffer, at)[0]
            length, lane = head & 0xFFFFFF, head >> 24 & 0x7F
            if not 0 < length <= CHUNK_BYTES or lane >= len(Lane):
                raise WireError("what a node says", f"has a chunk of {length} bytes in lane {lane}")
            if body + length > end:
                break
            at = body + length
            if (frame := self._chunk(Lane(lane), buffer[body:at], more=bool(head & _MORE))) is not None:
                frames.append(frame)
        buffer[: end - at] = buffer[at:end]
        self._end = end - at
        return frames

    def _chunk(self, lane: Lane, chunk: memoryview, *, more: bool) -> Frame | None:
        parts = self._parts[lane]
        if self._lengths[lane] + len(chunk) > FRAME_BYTES[lane]:
            raise WireError("what a node says", f"has a frame of more than {FRAME_BYTES[lane]} bytes")
        if more:
            parts.append(bytes(chunk))
            self._lengths[lane] += len(chunk)
            return None
        whole = b"".join((*parts, chunk)) if parts else chunk
        self._parts[lane], self._lengths[lane] = [], 0
        try:
            frame: Frame = _decode(whole)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise WireError("what a node says", str(error).lower()) from None
        if lane_of(frame) is not lane:
            raise WireError("what a node says", f"has a {type(frame).__name__} in lane {lane}")
        return frame


class Outgoing:
    """Frames to bytes: what waits to be sent, bounded in each lane."""

    def __init__(self, urgent_bytes: int = 4 << 20, entries_bytes: int = 32 << 20, bulk_bytes: int = 4 << 20) -> None:
        """A lane is full when so many bytes wait in it."""
        self._room = {Lane.URGENT: urgent_bytes, Lane.ENTRIES: entries_bytes, Lane.BULK: bulk_bytes}
        self._frames: dict[Lane, deque[bytes]] = {lane: deque() for lane in Lane}
        self.waiting = dict.fromkeys(Lane, 0)
        """Bytes."""
        self._total = 0
        """Of all lanes."""
        self._sent = dict.fromkeys(Lane, 0)
        """Of the first frame."""
        self._turn = Lane.ENTRIES

    def __bool__(self) -> bool:
        return self._total > 0

    def put(self, frame: Frame) -> bool:
        """Have a frame sent; False when its lane is full. Raises WireError for one that is too long."""
        lane = lane_of(frame)
        if self.waiting[lane] >= self._room[lane]:
            return False
        data = _encode(frame)
        if len(data) > FRAME_BYTES[lane]:
            raise WireError(f"a {type(frame).__name__} of {len(data)} bytes", "is too long to be sent")
        self._frames[lane].append(data)
        self.waiting[lane] += len(data)
        self._total += len(data)
        return True

    def take(self, max_bytes: int) -> Sequence[Buffer]:
        """What to send next, about so many bytes of it; all that is urgent comes first."""
        buffers: list[Buffer] = []
        while max_bytes > 0 and (lane := self._next()) is not None:
            max_bytes -= self._take_chunk(lane, buffers)
        return buffers

    def _next(self) -> Lane | None:
        if self.waiting[Lane.URGENT]:
            return Lane.URGENT
        self._turn = Lane.BULK if self._turn is Lane.ENTRIES else Lane.ENTRIES
        if not self.waiting[self._turn]:
            self._turn = Lane.BULK if self._turn is Lane.ENTRIES else Lane.ENTRIES
        return self._turn if self.waiting[self._turn] else None

    def _take_chunk(self, lane: Lane, buffers: list[Buffer]) -> int:
        frames, at = self._frames[lane], self._sent[lane]
        frame = frames[0]
        length = min(CHUNK_BYTES, len(frame) - at)
        more = at + length < len(frame)
        buffers.append(_HEAD.pack(length | lane << 24 | (_MORE if more else 0)))
        buffers.append(memoryview(frame)[at : at + length] if more or at else frame)
        self._sent[lane] = at + length if more else 0
        if not more:
            frames.popleft()
        self.waiting[lane] -= length
        self._total -= length
        return length
