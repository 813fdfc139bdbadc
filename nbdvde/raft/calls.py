"""Questions of the layer above to another node, and its own: answered once, or by a stream of bytes.

A connection that breaks ends them all: who asked does not know then whether the other side has done anything.
"""

import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import trio

from nbdvde.errors import NbdvdeError, NetworkError
from nbdvde.raft.link import Link
from nbdvde.raft.messages import NodeId
from nbdvde.raft.wire import (
    PIECE_BYTES,
    WINDOW_BYTES,
    Answer,
    Ask,
    Cancel,
    Credit,
    Failed,
    Piece,
    WireError,
)

CallFrame: TypeAlias = Ask | Answer | Failed | Piece | Credit | Cancel
Handler: TypeAlias = Callable[[NodeId, bytes], Awaitable[bytes]]
"""Answers a question of a node. What it raises, if an NbdvdeError, reaches the asker as PeerError."""
StreamHandler: TypeAlias = Callable[[NodeId, bytes], AsyncGenerator[bytes, None]]
"""As `Handler`, by pieces of any length; waits when the asker does not take them."""

_log = logging.getLogger(__name__)
_SERVED = 1024
"""Questions of a node that are worked at."""
_SERVED_BYTES = 128 << 20
_ASKED_BYTES = 64 << 20
"""Of questions on their way or being worked at, less than the other side accepts; one always may be."""
_TEXT = 1000


class PeerError(NetworkError):
    """Another node refused, or could not do, what it was asked."""

    def __init__(self, node: NodeId, failed: Failed) -> None:
        super().__init__(f"node {node}: {failed.what}", failed.why, failed.hint)
        self.error = failed.error
        """Name of the class of the error there."""


@dataclass(slots=True)
class _Asked:
    """A question of ours that has not been answered to the end."""

    number: int
    news: trio.Event = field(default_factory=trio.Event)
    pieces: deque[bytes] = field(default_factory=deque)
    waiting: int = 0
    """Bytes of pieces that are here and not taken."""
    end: Answer | NetworkError | None = None

    def tell(self) -> None:
        self.news.set()
        self.news = trio.Event()


@dataclass(slots=True)
class _Served:
    """A question of theirs that we work at."""

    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    credit: int = WINDOW_BYTES
    more: trio.Event = field(default_factory=trio.Event)


@dataclass(slots=True)
class Handlers:
    """By kind of question."""

    single: dict[int, Handler] = field(default_factory=dict)
    streams: dict[int, StreamHandler] = field(default_factory=dict)


class Calls:
    """The questions of one connection, of both sides."""

    def __init__(self, node: NodeId, link: Link, handlers: Handlers, nursery: trio.Nursery) -> None:
        """`node` is the other one; handlers run in `nursery`."""
        self._node, self._link, self._handlers, self._nursery = node, link, handlers, nursery
        self._number = 0
        self._asked: dict[int, _Asked] = {}
        self._served: dict[int, _Served] = {}
        self._served_bytes = self._asked_bytes = 0
        self._room = trio.Event()
        self._lost: NetworkError | None = None

    # Ours

    async def request(self, kind: int, body: bytes) -> bytes:
        """Ask; the answer. Raises PeerError, NetworkError."""
        async with self._asking(kind, body, streamed=False) as asked:
            while asked.end is None:
                await asked.news.wait()
            if isinstance(asked.end, Answer):
                return asked.end.body
            raise asked.end

    @asynccontextmanager
    async def stream(self, kind: int, body: bytes) -> AsyncIterator[AsyncIterator[bytes]]:
        """Ask; the pieces of the answer as they come. Leaving early tells the other side. Raises as `request`."""
        async with self._asking(kind, body, streamed=True) as asked, aclosing(self._pieces(asked)) as pieces:
            yield pieces

    async def _pieces(self, asked: _Asked) -> AsyncGenerator[bytes, None]:
        taken = 0
        while True:
            while asked.pieces:
                piece = asked.pieces.popleft()
                asked.waiting -= len(piece)
                yield piece
                taken += len(piece)
                if taken >= WINDOW_BYTES // 2 and asked.end is None:
                    self._tell(Credit(asked.number, taken))
                    taken = 0
            if isinstance(asked.end, NetworkError):
                raise asked.end
            if asked.end is not None:
                return
            await asked.news.wait()

    @asynccontextmanager
    async def _asking(self, kind: int, body: bytes, *, streamed: bool) -> AsyncIterator[_Asked]:
        while self._asked and (len(self._asked) >= _SERVED or self._asked_bytes + len(body) > _ASKED_BYTES):
            await self._room.wait()
        if self._lost:
            raise NetworkError(f"node {self._node}", "is not connected any more", self._lost.message)
        self._number += 1
        asked = self._asked[self._number] = _Asked(self._number)
        self._asked_bytes += len(body)
        try:
            await self._link.send_when_room(Ask(asked.number, kind, body, streamed))
            yield asked
        finally:
            self._asked.pop(asked.number, None)
            self._asked_bytes -= len(body)
            self._room.set()
            self._room = trio.Event()
            if asked.end is None:
                self._tell(Cancel(asked.number))

    def _tell(self, frame: Credit | Cancel) -> None:
        """At once: these are short."""
        self._link.send(frame)
        self._link.flush()

    # What comes

    def receive(self, frame: CallFrame) -> None:
        """A frame of the other side. Raises WireError."""
        match frame:
            case Ask():
                self._on_ask(frame)
            case Cancel():
                if served := self._served.get(frame.number):
                    served.scope.cancel()
            case Credit():
                if served := self._served.get(frame.number):
                    served.credit += frame.count
                    served.more.set()
                    served.more = trio.Event()
            case _:
                self._on_answer(frame)

    def _on_answer(self, frame: Answer | Failed | Piece) -> None:
        asked = self._asked.get(frame.number)
        if asked is None:
            if isinstance(frame, Piece):
                self._tell(Cancel(frame.number))  # the first one came before the question
        else:
            match frame:
                case Answer():
                    asked.end = frame
                case Failed():
                    asked.end = PeerError(self._node, frame)
                case Piece():
                    asked.pieces.append(frame.data)
                    asked.waiting += len(frame.data)
                    if asked.waiting > WINDOW_BYTES + PIECE_BYTES:
                        raise WireError(f"node {self._node}", "sends more of a stream than it may")
            asked.tell()

    def lost(self, error: NetworkError) -> None:
        """The connection has ended."""
        self._lost = error
        for asked in self._asked.values():
            asked.end = asked.end or NetworkError(f"node {self._node}", f"was asked when the {error.message}")
            asked.tell()

    # Theirs

    def _on_ask(self, ask: Ask) -> None:
        if ask.number in self._served:
            raise WireError(f"node {self._node}", f"asks question {ask.number} twice")
        if len(self._served) >= _SERVED or self._served_bytes + len(ask.body) > _SERVED_BYTES:
            raise WireError(f"node {self._node}", "asks more than it may at a time")
        served = self._served[ask.number] = _Served()
        self._served_bytes += len(ask.body)
        self._nursery.start_soon(self._serve, ask, served)

    async def _serve(self, ask: Ask, served: _Served) -> None:
        try:
            with served.scope:
                await self._link.send_when_room(await self._outcome(ask, served))
        except WireError:
            raise
        except NetworkError:
            _log.debug("node %d: nobody hears the answer of question %d any more", self._node, ask.number)
        finally:
            del self._served[ask.number]
            self._served_bytes -= len(ask.body)

    async def _outcome(self, ask: Ask, served: _Served) -> Answer | Failed:
        try:
            if ask.streamed and (streams := self._handlers.streams.get(ask.kind)):
                await self._stream(ask, served, streams)
                return Answer(ask.number)
            if not ask.streamed and (handler := self._handlers.single.get(ask.kind)):
                return Answer(ask.number, await handler(self._node, ask.body))
            return Failed(ask.number, "UnsupportedError", f"question of kind {ask.kind}", "is not known here")
        except NbdvdeError as error:
            what, why, hint = error.what[:_TEXT], error.why[:_TEXT], error.hint[:_TEXT]
            return Failed(ask.number, type(error).__name__, what, why, hint)
        except Exception:  # noqa: BLE001 - a bug of a handler is no reason to end the others
            _log.exception("question of kind %d of node %d", ask.kind, self._node)
            return Failed(
                ask.number, "Exception", f"question of kind {ask.kind}", "failed by a bug", "see the log there"
            )

    async def _stream(self, ask: Ask, served: _Served, handler: StreamHandler) -> None:
        async with aclosing(handler(self._node, ask.body)) as pieces:
            async for data in pieces:
                for start in range(0, len(data), PIECE_BYTES):
                    piece = data[start : start + PIECE_BYTES]
                    while served.credit <= 0:
                        await served.more.wait()
                    served.credit -= len(piece)
                    await self._link.send_when_room(Piece(ask.number, piece))
