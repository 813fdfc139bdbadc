"""The connections of a node to all others: one each, made again when it breaks.

Of two nodes the one with the lower number calls. Either side has shown a certificate that names it before the first
frame; then both say hello, and go on only if they mean the same cluster, each other, and the same protocol.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

import trio

from nbdvde.errors import NetworkError
from nbdvde.limits import Complaints
from nbdvde.raft.calls import Calls, Handler, Handlers, StreamHandler
from nbdvde.raft.link import Link, Wire
from nbdvde.raft.messages import Beat, BeatReply, Body, NodeId
from nbdvde.raft.wire import (
    BATCH_BEATS,
    PROTOCOL,
    BeatReplies,
    Beats,
    Failed,
    Frame,
    Hello,
    Says,
    WireError,
)

_log = logging.getLogger(__name__)


class Network(Protocol):
    """How nodes reach each other."""

    departed: frozenset[NodeId]
    """Nodes that have left: their numbers are never used again."""

    def names(self) -> Mapping[NodeId, str]:
        """The other nodes, and the name that the certificate of each must have, in lower case."""

    async def call(self, node: NodeId) -> tuple[Wire, frozenset[str]]:
        """Connect to a node; the wire and the names in its certificate. Raises NetworkError."""

    async def listen(
        self,
        welcome: Callable[[Wire, frozenset[str]], Awaitable[None]],
        *,
        task_status: trio.TaskStatus[None],
    ) -> None:
        """Take calls, for ever: `welcome` has each, with the names in the certificate, in a task of its own."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How patient a node is."""

    greeting_s: float = 5.0
    """For a connection and its hello."""
    pause_first_s: float = 0.05
    """Before it calls again; twice as long each time."""
    pause_most_s: float = 2.0
    silence: int = 20
    """Ticks without a sign of life after which a connection is given up."""
    forgotten_s: float = 10.0
    """After which a node that nobody calls, and that is connected to nobody, calls those that are to call it."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a node is."""

    node: NodeId
    cluster: str
    """Its name, 1 to 64 characters: nodes of another one are refused."""
    level: int = 0
    """Of features."""


class Receiver(Protocol):
    """Who gets what other nodes say. Nothing of it waits."""

    def on_message(self, sender: NodeId, group: str, body: Body) -> None:
        """A message of a group."""

    def on_end(self) -> None:
        """These were all messages that came at once."""

    def on_lost(self, node: NodeId) -> None:
        """What was said to a node last may be lost."""

    def on_departed(self) -> None:
        """Another node says that this one has left."""


class DepartedError(NetworkError):
    """A node has left the cluster, and may not know it."""


class Peer:
    """Another node, connected or not."""

    def __init__(self, node: NodeId, handlers: Handlers) -> None:
        self.node = node
        self.problem = ""
        """Why it is not connected."""
        self._handlers = handlers
        self._link: Link | None = None
        self._calls: Calls | None = None
        self._beats: dict[str, Beat] = {}
        self._replies: dict[str, BeatReply] = {}
        self.level = 0
        """Of features that both sides have."""

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""
        return self._link is not None

    async def request(self, kind: int, body: bytes) -> bytes:
        """Ask it; the answer. Raises PeerError, or NetworkError: then it is not known whether it has done anything."""
        return await self._caller().request(kind, body)

    def stream(self, kind: int, body: bytes) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Ask it; `async with` gives the pieces of the answer as they come. Raises as `request`, there or here."""
        return self._caller().stream(kind, body)

    def _caller(self) -> Calls:
        if self._calls is None:
            raise NetworkError(f"node {self.node}", "is not connected", self.problem)
        return self._calls

    def say(self, group: str, body: Body) -> bool:
        """Have a message sent with the next `flush`; False when it is lost."""
        if self._link is None:
            return False
        match body:  # of the signs of life of a group only the newest one counts
            case Beat():
                self._beats[group] = body
            case BeatReply():
                self._replies[group] = body
            case _:
                return self._link.send(Says(group, body))
        return True

    def flush(self) -> None:
        """Send what was said."""
        if link := self._link:
            if self._beats:
                beats, self._beats = tuple(self._beats.items()), {}
                for start in range(0, len(beats), BATCH_BEATS):
                    link.send(Beats(beats[start : start + BATCH_BEATS]))
            if self._replies:
                replies, self._replies = tuple(self._replies.items()), {}
                for start in range(0, len(replies), BATCH_BEATS):
                    link.send(BeatReplies(replies[start : start + BATCH_BEATS]))
            link.flush()

    def tick(self, silence: int) -> None:
        """A unit of time has passed."""
        if self._link:
            self._link.tick(silence)

    def abort(self) -> None:
        """Break the connection off, if there is one."""
        if self._link:
            self._link.abort()

    async def serve(self, link: Link, level: int, receiver: Receiver) -> None:
        """Use a connection until it ends, instead of the one before."""
        if self._link:
            self._link.abort()
            receiver.on_lost(self.node)
        error = NetworkError("connection of a node", "was given up")
        async with trio.open_nursery() as nursery:
            calls = Calls(self.node, link, self._handlers, nursery)
            self._link, self._calls, self.level, self.problem = link, calls, level, ""
            _log.info("node %d: connected", self.node)
            try:
                error = await link.run(lambda frames: self._deliver(frames, calls, receiver))
            finally:
                calls.lost(error)
                if self._link is link:
                    self._link = self._calls = None
                    self._beats, self._replies, self.problem = {}, {}, error.message
                    receiver.on_lost(self.node)
                    _log.info("node %d: %s", self.node, error.message)
                nursery.cancel_scope.cancel()

    def _deliver(self, frames: Sequence[Frame], calls: Calls, receiver: Receiver) -> None:
        node = self.node
        for frame in frames:
            match frame:
                case Says():
                    receiver.on_message(node, frame.group, frame.body)
                case Beats():
                    for group, beat in frame.beats:
                        receiver.on_message(node, group, beat)
                case BeatReplies():
                    for group, reply in frame.replies:
                        receiver.on_message(node, group, reply)
                case Failed(number=0):
                    if frame.error == DepartedError.__name__:
                        receiver.on_departed()
                    raise NetworkError(f"node {node}", f"refuses the connection: {frame.what}: {frame.why}")
                case Hello():
                    raise WireError(f"node {node}", "says hello twice")
                case _:
                    calls.receive(frame)
        receiver.on_end()


class Mesh:
    """All other nodes, as seen from one."""

    def __init__(
        self, me: Identity, network: Network, receiver: Receiver, timing: Timing, random: Callable[[int, int], int]
    ) -> None:
        """`random(low, high)` draws a whole number, both ends included: nodes should not call all at once."""
        self._me, self._network, self._receiver, self._timing, self._random = me, network, receiver, timing, random
        self._handlers, self._complaints = Handlers(), Complaints()
        self.peers: dict[NodeId, Peer] = {}
        """As the network had them at the last `refresh`."""
        self._calling: dict[NodeId, trio.CancelScope] = {}
        self._nursery: trio.Nursery | None = None
        self.refresh()

    def handle(self, kind: int, handler: Handler) -> None:
        """Have a function answer questions of this kind."""
        self._handlers.single[kind] = handler

    def handle_stream(self, kind: int, handler: StreamHandler) -> None:
        """Have a function answer questions of this kind by a stream."""
        self._handlers.streams[kind] = handler

    def refresh(self) -> None:
        """The network has other nodes now."""
        nodes = set(self._network.names()) - {self._me.node}
        for node in set(self.peers) - nodes:
            self.peers.pop(node).abort()
            if scope := self._calling.pop(node, None):
                scope.cancel()
        for node in nodes - set(self.peers):
            self.peers[node] = peer = Peer(node, self._handlers)
            if self._nursery:
                self._nursery.start_soon(self._call, peer)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Connect, again and again, for ever. Raises NetworkError when nobody could call us."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._listen)
            self._nursery = nursery
            for peer in self.peers.values():
                nursery.start_soon(self._call, peer)
            task_status.started()

    def say(self, node: NodeId, group: str, body: Body) -> bool:
        """Have a message sent with the next `flush`; False when it is lost."""
        peer = self.peers.get(node)
        return peer is not None and peer.say(group, body)

    def flush(self) -> None:
        """Send what was said."""
        for peer in self.peers.values():
            peer.flush()

    def tick(self) -> None:
        """A unit of time has passed."""
        for peer in self.peers.values():
            peer.tick(self._timing.silence)

    async def _listen(self, *, task_status: trio.TaskStatus[None]) -> None:
        await self._network.listen(self._welcome, task_status=task_status)

    async def _welcome(self, wire: Wire, names: frozenset[str]) -> None:
        """Somebody calls."""
        try:
            await self._meet(wire, names)
        except NetworkError as error:
            if (ending := self._complaints.ending("refuse", trio.current_time())) is not None:
                _log.warning("a connection of a node was refused: %s%s", error.message, ending)

    async def _call(self, peer: Peer) -> None:
        """Call a node, again and again; one that is to call us only when it seems that nobody does any more."""
        if self.peers.get(peer.node) is not peer:  # it has gone before this began
            return
        with trio.CancelScope() as self._calling[peer.node]:
            await (self._call_again(peer) if peer.node > self._me.node else self._ask_after(peer))

    async def _ask_after(self, peer: Peer) -> None:
        """Who has left while it was away would never be told."""
        while True:
            await trio.sleep(self._timing.forgotten_s)
            if not any(other.connected for other in self.peers.values()):
                await self._try(peer)

    async def _try(self, peer: Peer) -> None:
        try:
            await self._meet(*await self._connected(peer), peer)
        except NetworkError as error:
            peer.problem = error.message

    async def _call_again(self, peer: Peer) -> None:
        timing, pause_s = self._timing, self._timing.pause_first_s
        while True:
            begun = trio.current_time()
            await self._try(peer)
            if trio.current_time() - begun > timing.greeting_s + timing.pause_most_s:
                pause_s = timing.pause_first_s
            await trio.sleep(pause_s * self._random(50, 100) / 100)
            pause_s = min(2 * pause_s, timing.pause_most_s)

    async def _connected(self, peer: Peer) -> tuple[Wire, frozenset[str]]:
        with trio.move_on_after(self._timing.greeting_s):
            return await self._network.call(peer.node)
        raise NetworkError(f"node {peer.node}", "did not answer")

    async def _meet(self, wire: Wire, names: frozenset[str], called: Peer | None = None) -> None:
        """Say hello, and use the connection until it ends. Raises NetworkError when it is not to be used."""
        link = Link(wire)
        try:
            hello = await self._greeted(link)
            try:
                peer = self._checked(hello, names, called)
            except NetworkError as error:
                link.send(Failed(0, type(error).__name__, error.what, error.why))
                link.flush()
                raise
            await peer.serve(link, min(self._me.level, hello.level), self._receiver)
        finally:
            link.close()

    async def _greeted(self, link: Link) -> Hello:
        me = self._me
        with trio.move_on_after(self._timing.greeting_s):
            return await link.hello(Hello(PROTOCOL, me.cluster, me.node, me.level))
        raise NetworkError("connection of a node", "nobody said hello")

    def _checked(self, hello: Hello, names: frozenset[str], called: Peer | None) -> Peer:
        """Who that is. Raises NetworkError."""
        who = f"node {hello.node}"
        if hello.protocol != PROTOCOL:
            raise NetworkError(who, f"speaks version {hello.protocol} of the protocol, not {PROTOCOL}")
        if hello.cluster != self._me.cluster:
            raise NetworkError(who, f"belongs to cluster '{hello.cluster}', not '{self._me.cluster}'")
        if hello.node in self._network.departed:
            raise DepartedError(who, "belongs to its cluster no more", "delete its image")
        peer = self.peers.get(hello.node)
        if peer is None:
            raise NetworkError(
                who, "is no member of the cluster: it was removed, or has not joined yet", "see nbdvde cluster status"
            )
        if called is not peer and (called or hello.node > self._me.node):
            raise NetworkError(who, f"answers for node {called.node}" if called else "calls, but is to be called")
        if (name := self._network.names()[hello.node]) not in names:
            raise NetworkError(who, f"shows a certificate without the name '{name}'")
        return peer
