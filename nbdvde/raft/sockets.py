"""Nodes that reach each other through TCP, with TLS 1.3 and certificates on both sides.

What is checked: the certificate was issued by the authority of the cluster and is valid now; among its alternative
names and its common name is, letter by letter but for case, the name that the configuration gives to the node that it
says it is. Where a node runs is not checked: it may move. If a certificate restricts its use, it must be good for both
sides, servers and clients (RFC 5280, 4.2.1.12).
"""

import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import trio

from nbdvde.errors import NetworkError, reason
from nbdvde.limits import Complaints
from nbdvde.listeners import Listener, TcpAddress
from nbdvde.raft.link import Wire
from nbdvde.raft.messages import NodeId
from nbdvde.tls import TlsFiles, folded, node_contexts, secured
from nbdvde.transport import Transport, keep_alive

_log = logging.getLogger(__name__)
_CALLERS = 64
"""Connections that are not known to be of a node yet."""
_GREETING_S = 5.0
_UNSENT_BYTES = 1 << 17
"""That the kernel may hold and not send yet: what is urgent waits behind no more of what is not."""
_SILENCE_S = 10
_PAUSE_S = 0.2
"""After a call could not be taken."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a node is, and how it proves that."""

    address: TcpAddress
    name: str
    """In its certificate."""


class TlsNetwork:
    """Other nodes by their places. Who changes `places` or `departed` tells `Mesh.refresh`."""

    def __init__(self, files: TlsFiles, listener: Listener, places: Mapping[NodeId, Place]) -> None:
        """`listener` is closed at the end of `listen`. Raises UsageError, KeyFailure."""
        self._called, self._caller = node_contexts(files)
        self._listener, self._complaints = listener, Complaints()
        self.places, self.departed = dict(places), frozenset[NodeId]()

    def names(self) -> Mapping[NodeId, str]:
        return {node: folded(place.name) for node, place in self.places.items()}

    async def call(self, node: NodeId) -> tuple[Wire, frozenset[str]]:
        address = self.places[node].address
        try:
            stream = await trio.open_tcp_stream(address.host, address.port)
        except OSError as error:
            raise NetworkError(f"node {node} at {address}", reason(error)) from None
        sock = socket.socket(fileno=stream.socket.detach())
        try:
            return await secured(_transport(sock), self._caller, server_side=False)
        except trio.BrokenResourceError as error:
            raise NetworkError(f"node {node} at {address}", str(error)) from None

    async def listen(
        self, welcome: Callable[[Wire, frozenset[str]], Awaitable[None]], *, task_status: trio.TaskStatus[None]
    ) -> None:
        callers = trio.Semaphore(_CALLERS)
        try:
            async with trio.open_nursery() as nursery:
                for sock in self._listener.sockets:
                    nursery.start_soon(self._accept, sock, callers, welcome, nursery)
                task_status.started()
        finally:
            self._listener.close()

    async def _accept(
        self,
        listener: socket.socket,
        callers: trio.Semaphore,
        welcome: Callable[[Wire, frozenset[str]], Awaitable[None]],
        nursery: trio.Nursery,
    ) -> None:
        while True:
            await callers.acquire()
            sock = await self._next(listener)
            nursery.start_soon(self._take, sock, callers, welcome)

    async def _next(self, listener: socket.socket) -> socket.socket:
        while True:
            await trio.lowlevel.wait_readable(listener)
            try:
                return listener.accept()[0]
            except BlockingIOError:
                continue
            except OSError as error:
                self._complain("accept", f"cannot take the call of a node: {reason(error)}")
                await trio.sleep(_PAUSE_S)

    async def _take(
        self,
        sock: socket.socket,
        callers: trio.Semaphore,
        welcome: Callable[[Wire, frozenset[str]], Awaitable[None]],
    ) -> None:
        made = None
        try:
            with trio.move_on_after(_GREETING_S):
                made = await secured(_transport(sock), self._called)
        except trio.BrokenResourceError as error:
            self._complain("refuse", f"a connection of a node was refused: {error}")
        finally:
            callers.release()
        if made:
            await welcome(*made)

    def _complain(self, kind: str, line: str) -> None:
        if (ending := self._complaints.ending(kind, trio.current_time())) is not None:
            _log.warning("%s%s", line, ending)


def _transport(sock: socket.socket) -> Transport:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
    keep_alive(sock, _SILENCE_S)
    return Transport(sock)
