"""A small NBD client: messages as bytes, and a connection that speaks them."""

import socket
import struct
from dataclasses import dataclass, field
from typing import Protocol

import trio

from nbdvde.protocol import wire
from nbdvde.protocol.constants import (
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Command,
    CommandFlag,
    Option,
    OptionReply,
)

FLAGS = struct.pack(">I", 3)
"""Client flags: fixed newstyle, no zeroes."""


def option(number: int, data: bytes = b"") -> bytes:
    """An option with its data."""
    return wire.OPTION.pack(OPTION_MAGIC, number, len(data)) + data


def string(text: str | bytes) -> bytes:
    """A string with its length in 32 bits."""
    data = text.encode() if isinstance(text, str) else text
    return struct.pack(">I", len(data)) + data


def info_data(name: str | bytes = "", infos: tuple[int, ...] = ()) -> bytes:
    """Data of INFO and GO."""
    return string(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def meta_data(name: str, *queries: str) -> bytes:
    """Data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    return string(name) + struct.pack(">I", len(queries)) + b"".join(map(string, queries))


def request(
    command: int, offset: int = 0, length: int = 0, *, cookie: int = 1, flags: int = 0, payload: bytes | None = None
) -> bytes:
    """A request; the length of a payload is its own."""
    header = wire.REQUEST.pack(
        REQUEST_MAGIC, flags, command, cookie, offset, length if payload is None else len(payload)
    )
    return header + (payload or b"")


def extended(
    command: int,
    offset: int = 0,
    length: int = 0,
    *,
    cookie: int = 1,
    flags: int = 0,
    payload: bytes | None = None,
) -> bytes:
    """A request with an extended header, which tells of its payload."""
    flags |= 0 if payload is None else CommandFlag.PAYLOAD_LEN
    length = length if payload is None else len(payload)
    header = wire.EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length)
    return header + (payload or b"")


def status_filter(length: int, *ids: int) -> bytes:
    """Payload of a BLOCK_STATUS that asks for some of the contexts."""
    return struct.pack(f">Q{len(ids)}I", length, *ids)


def split_option_replies(data: bytes) -> list[tuple[int, int, bytes]]:
    """(option, reply type, data) of each reply; all bytes must belong to one."""
    replies = []
    while data:
        magic, number, reply, length = wire.OPTION_REPLY.unpack_from(data)
        assert magic == OPTION_REPLY_MAGIC
        start = wire.OPTION_REPLY.size
        assert len(data) >= start + length
        replies.append((number, reply, data[start : start + length]))
        data = data[start + length :]
    return replies


@dataclass
class Reply:
    """A whole reply, its chunks put together."""

    cookie: int
    error: int = 0
    message: str = ""
    data: dict[int, bytes] = field(default_factory=dict)
    """Contents by offset; holes as zeroes."""
    holes: list[tuple[int, int]] = field(default_factory=list)
    contexts: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    chunks: list[int] = field(default_factory=list)
    """Types, empty for a simple reply."""

    @property
    def bytes(self) -> bytes:
        """The contents, which must not leave gaps."""
        joined, start = b"", min(self.data, default=0)
        for offset in sorted(self.data):
            assert offset == start + len(joined)
            joined += self.data[offset]
        return joined


class Stream(Protocol):
    """Bytes in both directions."""

    async def send_all(self, data: bytes, /) -> None: ...
    async def receive_some(self, max_bytes: int | None = None, /) -> bytes | bytearray: ...


class Talk:
    """A conversation with a server, for tests. Methods fail loudly on anything unexpected."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._reads: dict[int, int] = {}
        self._offsets: dict[int, int] = {}
        self.structured = self.extended = False

    async def exactly(self, count: int) -> bytes:
        """The next bytes; EOFError when the server closes first."""
        data = bytearray()
        while len(data) < count:
            more = await self.stream.receive_some(count - len(data))
            if not more:
                raise EOFError
            data += more
        return bytes(data)

    async def greet(self) -> None:
        """Take the greeting and answer with the flags."""
        assert await self.exactly(18) == wire.greeting()
        await self.stream.send_all(FLAGS)

    async def option(self, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; (type, data) of its replies up to the final one."""
        await self.stream.send_all(option(number, data))
        replies = []
        while True:
            magic, echoed, reply, length = wire.OPTION_REPLY.unpack(await self.exactly(wire.OPTION_REPLY.size))
            assert (magic, echoed) == (OPTION_REPLY_MAGIC, number)
            replies.append((reply, await self.exactly(length)))
            if reply == OptionReply.ACK or reply >> 31:
                return replies

    async def go(
        self, name: str = "", *, structured: bool = True, contexts: tuple[str, ...] = (), wide: bool = False
    ) -> None:
        """The whole handshake, `wide` with extended headers."""
        await self.greet()
        self.structured, self.extended = structured, wide
        if wide:
            assert await self.option(Option.EXTENDED_HEADERS) == [(OptionReply.ACK, b"")]
        elif structured:
            assert await self.option(Option.STRUCTURED_REPLY) == [(OptionReply.ACK, b"")]
        if contexts:
            await self.option(Option.SET_META_CONTEXT, meta_data(name, *contexts))
        assert (await self.option(Option.GO, info_data(name)))[-1] == (OptionReply.ACK, b"")

    async def send(self, command: int, offset: int = 0, length: int = 0, **options: object) -> None:
        """Send a request."""
        make = extended if self.extended else request
        data = make(command, offset, length, **options)  # type: ignore[arg-type]
        cookie = wire.REQUEST.unpack_from(data)[3]
        self._offsets[cookie] = offset
        if command == Command.READ:
            self._reads[cookie] = length
        await self.stream.send_all(data)

    async def reply(self) -> Reply:
        """The next reply. Chunks of different replies must not interleave, which this server never does."""
        (magic,) = struct.unpack(">I", await self.exactly(4))
        if magic == SIMPLE_REPLY_MAGIC:
            assert not self.extended, "a simple reply with extended headers"
            error, cookie = struct.unpack(">IQ", await self.exactly(12))
            reply = Reply(cookie, error)
            length = self._reads.pop(cookie, 0)
            assert not (self.structured and length), "a read was answered without structure"
            if length and not error:
                reply.data[0] = await self.exactly(length)
            return reply
        return await self._chunks(magic)

    async def _chunks(self, magic: int) -> Reply:
        reply: Reply | None = None
        while True:
            assert self.structured
            if self.extended:
                assert magic == EXTENDED_REPLY_MAGIC
                flags, kind, cookie, offset, length = struct.unpack(">HHQQQ", await self.exactly(28))
                assert offset == self._offsets.get(cookie, offset), "the offset is that of the request"
            else:
                assert magic == STRUCTURED_REPLY_MAGIC
                flags, kind, cookie, length = struct.unpack(">HHQI", await self.exactly(16))
            reply = reply or Reply(cookie)
            assert reply.cookie == cookie
            add_chunk(reply, kind, await self.exactly(length))
            if flags & 1:
                self._reads.pop(cookie, None)
                return reply
            (magic,) = struct.unpack(">I", await self.exactly(4))

    async def ask(self, command: int, offset: int = 0, length: int = 0, **options: object) -> Reply:
        """One request and its reply."""
        await self.send(command, offset, length, **options)
        return await self.reply()

    async def at_end(self) -> bool:
        """Whether the server closed without another byte."""
        return not await self.stream.receive_some(1)


class Client(Talk):
    """The same, through a socket."""

    stream: trio.abc.Stream

    def __init__(self, sock: socket.socket) -> None:
        self.socket = trio.socket.from_stdlib_socket(sock)
        super().__init__(trio.SocketStream(self.socket))


def add_chunk(reply: Reply, kind: int, payload: bytes) -> None:
    """Add a chunk of a structured reply, checking its form."""
    reply.chunks.append(kind)
    if kind == Chunk.OFFSET_DATA:
        assert len(payload) > 8
        reply.data[struct.unpack_from(">Q", payload)[0]] = payload[8:]
    elif kind == Chunk.OFFSET_HOLE:
        offset, length = struct.unpack(">QI", payload)
        assert length > 0
        reply.data[offset] = bytes(length)
        reply.holes.append((offset, length))
    elif kind == Chunk.BLOCK_STATUS:
        (context,) = struct.unpack_from(">I", payload)
        assert context not in reply.contexts
        reply.contexts[context] = [*struct.iter_unpack(">II", payload[4:])]
    elif kind == Chunk.BLOCK_STATUS_EXT:
        context, count = struct.unpack_from(">II", payload)
        assert context not in reply.contexts
        reply.contexts[context] = [*struct.iter_unpack(">QQ", payload[8:])]
        assert len(reply.contexts[context]) == count
    elif kind == Chunk.ERROR:
        reply.error, length = struct.unpack_from(">IH", payload)
        assert reply.error
        assert len(payload) == 6 + length
        reply.message = payload[6:].decode()
    else:
        assert (kind, payload) == (Chunk.NONE, b"")


def read_replies(data: bytes, simple_lengths: dict[int, int] | None = None) -> list[Reply]:
    """All replies in `data`; `simple_lengths` are the lengths of reads that are answered without structure."""
    replies: list[Reply] = []
    open_reply: Reply | None = None
    position = 0
    while position < len(data):
        (magic,) = struct.unpack_from(">I", data, position)
        if magic == SIMPLE_REPLY_MAGIC:
            _, error, cookie = wire.SIMPLE_REPLY.unpack_from(data, position)
            position += wire.SIMPLE_REPLY.size
            length = 0 if error else (simple_lengths or {}).get(cookie, 0)
            replies.append(Reply(cookie, error, data={0: data[position : position + length]} if length else {}))
            position += length
            continue
        if magic == EXTENDED_REPLY_MAGIC:
            _, flags, kind, cookie, _, length = wire.EXTENDED_CHUNK.unpack_from(data, position)
            position += wire.EXTENDED_CHUNK.size
        else:
            assert magic == STRUCTURED_REPLY_MAGIC
            _, flags, kind, cookie, length = wire.CHUNK.unpack_from(data, position)
            position += wire.CHUNK.size
        open_reply = open_reply or Reply(cookie)
        assert open_reply.cookie == cookie
        add_chunk(open_reply, kind, data[position : position + length])
        position += length
        if flags & 1:
            replies.append(open_reply)
            open_reply = None
    assert open_reply is None
    assert position == len(data)
    return replies
