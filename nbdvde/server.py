"""Clients: who may connect, how many, and how it all ends."""

import errno
import logging
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from nbdvde.errors import reason
from nbdvde.exports import Exports
from nbdvde.limits import Limits, Shared
from nbdvde.listeners import Listener, TcpAddress, VsockAddress
from nbdvde.metrics import Metrics
from nbdvde.protocol.handshake import Handshake, Phase, Tls
from nbdvde.protocol.messages import Negotiated, ProtocolError
from nbdvde.session import Session, negotiate
from nbdvde.tls import secured
from nbdvde.transport import Transport

_log = logging.getLogger(__name__)

_ACCEPT_PAUSE_S = 0.1
_STANDSTILL_BYTES = 1 << 16
"""Who moves less in `Limits.stall_s` counts as being at a standstill,"""
_TURNOVER_S = 60.0
"""and so does who would not be done with what it holds in this time at that pace."""
_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}


@dataclass(slots=True)
class Connection:
    """A client, as an administrator sees it."""

    number: int
    """Counts from 1, never used again."""
    peer: str
    transport: Transport
    export: str | None = None
    """Canonical name; None during the handshake."""
    session: Session | None = None
    handshake: Handshake | None = None
    deadline: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Of the handshake."""

    def stop(self, patience_s: float) -> None:
        """End transmission when what is in flight has been answered, or tell who still haggles that it is over."""
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
    ) -> None:
        """With `tls` every client has to use it."""
        self.metrics = metrics or Metrics()
        self._exports, self._tls = exports, tls
        self._shared = Shared(limits or Limits(), self.metrics)
        self._connections: dict[int, Connection] = {}
        self._stopping = trio.Event()

    @property
    def connections(self) -> list[Connection]:
        """The clients connected now."""
        return list(self._connections.values())

    def stop(self) -> None:
        """Make `run` end: accept nobody, end handshakes, answer what is in flight, close."""
        self._stopping.set()

    async def run(
        self,
        listeners: Sequence[Listener],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until `stop`, then close the listeners, which this call owns. Cancelling it breaks connections off."""
        try:
            async with trio.open_nursery() as clients:
                async with trio.open_nursery() as acceptors:
                    for sock in [sock for listener in listeners for sock in listener.sockets]:
                        acceptors.start_soon(self._accept, sock, clients)
                    acceptors.start_soon(self._guard_memory)
                    task_status.started()
                    await self._stopping.wait()
                    acceptors.cancel_scope.cancel()
                for listener in listeners:
                    listener.close()
                limits = self._shared.limits
                clients.cancel_scope.deadline = trio.current_time() + limits.stop_s
                for connection in self.connections:
                    connection.stop(limits.linger_s)
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
                    _log.warning("cannot accept a client: %s", reason(error))
                    await trio.sleep(_ACCEPT_PAUSE_S)
                # Anything else is the error of a connection that ended while it was queued (accept(2)).
            else:
                self._admit(sock, clients)
                await trio.lowlevel.checkpoint()

    async def _guard_memory(self) -> None:
        """Whenever the memory for all clients stays used up, close those at a standstill who hold some of it."""
        memory, limits = self._shared.memory, self._shared.limits
        while True:
            await memory.exhausted()
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

    def _close_stalled(self, connection: Connection, session: Session) -> None:
        if session.stalled and session.account.held:
            self.metrics.stalled += 1
            _log.warning("client %d (%s) at a standstill while memory is short", connection.number, connection.peer)
            connection.transport.abort()

    def _admit(self, sock: socket.socket, clients: trio.Nursery) -> None:
        self.metrics.connections_total += 1
        if len(self._connections) >= self._shared.limits.connections:
            self.metrics.connections_refused += 1
            if self._shared.complaints.count("refused", trio.current_time()) is not None:
                _log.warning("client refused: %d are connected", len(self._connections))
            sock.close()
            return
        try:
            connection = Connection(self.metrics.connections_total, _peer(sock), Transport(sock))
        except OSError:  # it has gone again
            sock.close()
            return
        self._connections[connection.number] = connection
        self.metrics.connections = len(self._connections)
        clients.start_soon(self._client, connection)

    async def _client(self, connection: Connection) -> None:
        """Serve one client, whose errors end here."""
        try:
            await self._serve(connection)
        except ProtocolError as error:
            self.metrics.protocol_errors += 1
            _log.info("client %d (%s) disconnected: %s", connection.number, connection.peer, error)
        except (trio.BrokenResourceError, OSError) as error:
            _log.debug("client %d (%s) lost: %s", connection.number, connection.peer, error)
        except Exception:  # noqa: BLE001 - a bug met by one client must not end the others
            _log.exception("unexpected failure of client %d (%s)", connection.number, connection.peer)
        finally:
            connection.transport.close()
            del self._connections[connection.number]
            self.metrics.connections = len(self._connections)

    async def _negotiate(self, connection: Connection) -> tuple[Negotiated, bytes] | None:
        handshake = Handshake(self._exports.find, self._exports.listing, Tls.REQUIRED if self._tls else Tls.OFF)
        connection.handshake = handshake
        connection.deadline.deadline = trio.current_time() + self._shared.limits.handshake_s
        with connection.deadline:
            agreed = await negotiate(connection.transport, handshake)
            if handshake.phase is not Phase.TLS or self._tls is None:
                return agreed
            connection.transport = await secured(connection.transport, self._tls)
            handshake.secured()
            return await negotiate(connection.transport, handshake)
        return None

    async def _serve(self, connection: Connection) -> None:
        shared = self._shared
        agreed = await self._negotiate(connection)
        transport = connection.transport
        disk = agreed and self._exports.disk(agreed[0].export.name)
        if agreed is None or disk is None or self._stopping.is_set():
            return
        connection.export = agreed[0].export.name
        buffer = shared.buffers.take()
        try:
            connection.session = Session(transport, disk, agreed[0], buffer, shared)
            await connection.session.run(agreed[1])
            await transport.finish(shared.limits.linger_s)
        finally:
            shared.buffers.give(buffer)


def _peer(sock: socket.socket) -> str:
    """Who is at the other end, for people."""
    if sock.family == socket.AF_UNIX:
        return "unix"
    try:
        name = sock.getpeername()
        return str(TcpAddress(*name[:2]) if sock.family in (socket.AF_INET, socket.AF_INET6) else VsockAddress(*name))
    except OSError:
        return "gone"
