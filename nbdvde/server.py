"""Clients: who may connect, how many, and how it all ends."""

import errno
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import trio

from nbdvde.disk import Disk
from nbdvde.errors import NbdvdeError, reason
from nbdvde.exports import LOCAL, VSOCK, Export, Exports, Peer, Visitor
from nbdvde.limits import Limits, Shared
from nbdvde.listeners import Listener, TcpAddress, VsockAddress
from nbdvde.metrics import Metrics, Traffic, total
from nbdvde.protocol.handshake import Handshake, Phase, Tls
from nbdvde.protocol.messages import Negotiated, ProtocolError
from nbdvde.session import Session, negotiate
from nbdvde.tls import secured
from nbdvde.transport import Transport, keep_alive

_log = logging.getLogger(__name__)

_ACCEPT_PAUSE_S = 0.1
_STANDSTILL_BYTES = 1 << 16
"""Who moves less in `Limits.stall_s` counts as being at a standstill,"""
_TURNOVER_S = 60.0
"""and so does who would not be done with what it holds in this time at that pace."""
_LOOK_S = 10.0
"""Between two looks at whether clients are idle, at most."""
_TAKE_S = 0.5
"""Once the server stops, a client has to take something of its answers this often; who waits for memory, twice that."""
_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}


@dataclass(slots=True)
class Connection:
    """A client, as an administrator sees it."""

    number: int
    """Counts from 1, never used again."""
    peer: str
    transport: Transport
    visitor: Visitor
    """With the export it uses, if the handshake is over."""
    session: Session | None = None
    handshake: Handshake | None = None
    deadline: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Of the handshake."""
    disk: Disk | None = None
    """What it uses of the export's disk, once it was let in."""
    clean: bool = True
    """Whether nothing it asked for can still be on its way."""
    stopped: bool = False

    async def attach(self) -> None:
        """Let it use the disk of the export that it asked for. Raises NbdvdeError."""
        export = self.visitor.export
        assert export is not None, "it was entered"
        self.disk = export.disk if export.info.read_only else await export.disk.attach(self.transport.abort)

    def stop(self, patience_s: float) -> None:
        """End transmission when what is in flight has been answered, or tell who still haggles that it is over."""
        self.stopped = True
        if self.session is not None:
            self.transport.stop()
        elif self.handshake is not None and self.handshake.begun:
            self.handshake.shut_down()
            self.deadline.deadline = min(self.deadline.deadline, trio.current_time() + patience_s)
        else:
            self.deadline.cancel()


class Server:
    """Serves exports to the clients of some listeners."""

    def __init__(
        self,
        exports: Exports,
        *,
        limits: Limits | None = None,
        metrics: Metrics | None = None,
        tls: ssl.SSLContext | None = None,
        failed: Callable[[NbdvdeError], None] | None = None,
    ) -> None:
        """With `tls` every client has to use it. `failed` is told of requests that fail, instead of the log."""
        self.metrics = metrics or Metrics()
        self._exports, self._tls = exports, tls
        self._shared = Shared(limits or Limits(), self.metrics)
        self._shared.failed = failed
        self._connections: dict[int, Connection] = {}
        self._at: Counter[object] = Counter()
        """Connections from each address."""
        self._listening = True
        self._stopping = trio.Event()

    @property
    def connections(self) -> list[Connection]:
        """The clients connected now."""
        return list(self._connections.values())

    def traffic(self, exports: Iterable[Export]) -> list[Traffic]:
        """What all clients of some exports asked for so far, those that have left included."""
        running: dict[Export | None, list[Traffic]] = {}
        for connection in self.connections:
            if connection.session is not None:
                running.setdefault(connection.visitor.export, []).append(connection.session.traffic)
        return [total((export.traffic, *running.get(export, ()))) for export in exports]

    def change(self, limits: Limits, tls: ssl.SSLContext | None) -> None:
        """Let other settings hold for clients that connect from now on."""
        self._shared.change(limits)
        self._tls = tls

    async def dismiss(self, export: Export) -> None:
        """End the connections of an export nobody may use now; what is in flight is answered, if it can be soon."""
        limits = self._shared.limits
        users = [connection for connection in self.connections if connection.visitor.export is export]
        for connection in users:
            connection.stop(limits.linger_s)
        with trio.move_on_after(limits.stop_s) as patience:
            await export.unused()
        if patience.cancelled_caught:
            for connection in users:
                connection.transport.abort()
            await export.unused()

    def stop(self) -> None:
        """Make `run` end: accept nobody, end handshakes, answer what is in flight, close."""
        self._stopping.set()

    async def run(
        self,
        listeners: Sequence[Listener],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until `stop`, then close the listeners, which this call owns. Cancelling it breaks connections off.

        Without a socket that listens it also ends when the last client has gone.
        """
        self._listening = any(listener.sockets for listener in listeners)
        try:
            async with trio.open_nursery() as watch:
                async with trio.open_nursery() as clients:
                    async with trio.open_nursery() as acceptors:
                        for listener in listeners:
                            for sock in listener.connected:
                                self._admit(sock, clients)
                            for sock in listener.sockets:
                                acceptors.start_soon(self._accept, sock, clients)
                        acceptors.start_soon(self._guard_memory)
                        acceptors.start_soon(self._guard_idleness)
                        task_status.started()
                        await self._stopping.wait()
                        acceptors.cancel_scope.cancel()
                    for listener in listeners:
                        listener.close()
                    limits = self._shared.limits
                    clients.cancel_scope.deadline = trio.current_time() + limits.stop_s
                    for connection in self.connections:
                        connection.stop(limits.linger_s)
                    watch.start_soon(self._hurry)
                watch.cancel_scope.cancel()
        finally:
            for listener in listeners:
                listener.close()

    async def _accept(self, listener: socket.socket, clients: trio.Nursery) -> None:
        """Accept for ever. Running out of file descriptors is a reason to pause, not to end or to spin."""
        while True:
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                await trio.lowlevel.wait_readable(listener)
            except OSError as error:
                if error.errno in _OUT_OF_RESOURCES:
                    ending = self._shared.complaints.ending("accept", trio.current_time())
                    if ending is not None:
                        _log.warning("cannot accept a client: %s%s", reason(error), ending)
                    await trio.sleep(_ACCEPT_PAUSE_S)
                # Anything else is the error of a connection that ended while it was queued (accept(2)).
            else:
                self._admit(sock, clients)
                await trio.lowlevel.checkpoint()

    async def _guard_memory(self) -> None:
        """Whenever the memory for all clients stays used up, close those at a standstill who hold some of it."""
        memory = self._shared.memory
        while True:
            await memory.exhausted()
            limits = self._shared.limits
            before = {c.number: c.session.moved for c in self.connections if c.session and c.session.stalled}
            await trio.sleep(limits.stall_s)
            if memory.used < memory.limit:
                continue
            for connection in self.connections:
                then, session = before.get(connection.number), connection.session
                if then is not None and session is not None:
                    enough = max(_STANDSTILL_BYTES, session.account.held * limits.stall_s / _TURNOVER_S)
                    if session.moved - then < enough:
                        self._close_stalled(connection, session)

    async def _hurry(self) -> None:
        """During a stop, do without those who take nothing of their answers, and then those who wait behind them."""
        seen: dict[int, tuple[int, int]] = {}
        while True:
            before, seen = seen, {}
            for connection in self.connections:
                session = connection.session
                if session is not None and (session.stalled or session.account.waiting):
                    moved, looks = before.get(connection.number, (-1, 0))
                    looks = looks + 1 if moved == session.moved else 0
                    seen[connection.number] = session.moved, looks
                    if looks >= (1 if session.stalled else 2):
                        connection.transport.abort()
            await trio.sleep(_TAKE_S)

    def _close_stalled(self, connection: Connection, session: Session) -> None:
        if session.stalled and session.account.held:
            self.metrics.stalled += 1
            _log.warning("client %d (%s) at a standstill while memory is short", connection.number, connection.peer)
            connection.transport.abort()

    async def _guard_idleness(self) -> None:
        """Disconnect clients that have asked for nothing in all of `Limits.idle_s`."""
        seen: dict[int, tuple[int, float]] = {}
        while True:
            idle_s, now = self._shared.limits.idle_s, trio.current_time()
            before, seen = seen, {}
            for connection in self.connections:
                session = connection.session
                if session is None or session.requests_in_flight.used or not connection.transport.receiving:
                    continue
                moved, since = before.get(connection.number, (-1, now))
                seen[connection.number] = moved, since = session.moved, since if moved == session.moved else now
                if now - since >= idle_s:
                    _log.info("client %d (%s) was idle for too long", connection.number, connection.peer)
                    connection.stop(self._shared.limits.linger_s)
            await trio.sleep(min(idle_s / 4, _LOOK_S))

    def _admit(self, sock: socket.socket, clients: trio.Nursery) -> None:
        self.metrics.connections_total += 1
        try:
            peer, name = _peer(sock)
            transport = Transport(sock)
            keep_alive(sock, self._shared.limits.keepalive_s)
        except OSError:  # it has gone again
            sock.close()
            return
        if full := self._full(peer):
            self.metrics.connections_refused += 1
            ending = self._shared.complaints.ending("refused", trio.current_time())
            if ending is not None:
                _log.warning("client %s refused: %s%s", name, full, ending)
            sock.close()
            return
        visitor = Visitor(self._exports, peer)
        connection = Connection(self.metrics.connections_total, name, transport, visitor)
        self._connections[connection.number] = connection
        self._at[peer.place] += 1
        self.metrics.connections = len(self._connections)
        clients.start_soon(self._client, connection)

    def _full(self, peer: Peer) -> str:
        """Why nobody more can be taken, or nobody more from there."""
        limits = self._shared.limits
        if len(self._connections) >= limits.connections:
            return f"{len(self._connections)} are connected"
        if not isinstance(peer.place, str) and self._at[peer.place] >= limits.address_connections:
            return f"{self._at[peer.place]} are connected from its address"
        return ""

    async def _client(self, connection: Connection) -> None:
        """Serve one client, whose errors end here."""
        try:
            await self._serve(connection)
        except ProtocolError as error:
            self.metrics.protocol_errors += 1
            ending = self._shared.complaints.ending(ProtocolError, trio.current_time())
            if ending is not None:
                _log.info("client %d (%s) disconnected: %s%s", connection.number, connection.peer, error, ending)
        except (trio.BrokenResourceError, OSError) as error:
            _log.debug("client %d (%s) lost: %s", connection.number, connection.peer, error)
        except NbdvdeError as error:
            _log.warning("client %d (%s) cannot be let in: %s", connection.number, connection.peer, error)
        except Exception:  # noqa: BLE001 - a bug met by one client must not end the others
            _log.exception("unexpected failure of client %d (%s)", connection.number, connection.peer)
        finally:
            connection.transport.close()
            if connection.disk is not None:
                connection.disk.detach(clean=connection.clean)
            self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        place = connection.visitor.peer.place
        connection.visitor.leave()
        del self._connections[connection.number]
        self._at[place] -= 1
        if not self._at[place]:
            del self._at[place]
        self.metrics.connections = len(self._connections)
        if not self._connections and not self._listening:
            self.stop()

    async def _negotiate(self, connection: Connection) -> tuple[Negotiated, bytes] | None:
        visitor, limits, tls = connection.visitor, self._shared.limits, self._tls
        handshake = Handshake(visitor, Tls.REQUIRED if tls else Tls.OFF, limits.handshake)
        connection.handshake = handshake
        connection.deadline.deadline = trio.current_time() + limits.handshake_s
        with connection.deadline:
            agreed = await negotiate(connection.transport, handshake, connection.attach)
            if handshake.phase is not Phase.TLS or tls is None:
                return agreed
            connection.transport, names = await secured(connection.transport, tls)
            visitor.peer = replace(visitor.peer, names=names)
            handshake.secured()
            return await negotiate(connection.transport, handshake, connection.attach)
        return None

    async def _serve(self, connection: Connection) -> None:
        shared = self._shared
        agreed = await self._negotiate(connection)
        transport, export = connection.transport, connection.visitor.export
        if agreed is None or export is None or connection.disk is None or connection.stopped or self._stopping.is_set():
            return
        buffer = shared.buffers.take()
        connection.session = session = Session(transport, connection.disk, agreed[0], buffer, shared)
        connection.clean = False
        try:
            await session.run(agreed[1])
            connection.clean = not session.lost
            await transport.finish(shared.limits.linger_s)
        finally:
            connection.session = None
            export.traffic.merge(session.traffic)
            shared.buffers.give(buffer)


def _peer(sock: socket.socket) -> tuple[Peer, str]:
    """Who is at the other end, for rules and for people. Raises OSError when it has gone."""
    if sock.family == socket.AF_UNIX:
        return Peer(LOCAL), LOCAL
    name = sock.getpeername()
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        return Peer.at(name[0]), str(TcpAddress(*name[:2]))
    return Peer(VSOCK), str(VsockAddress(*name))
