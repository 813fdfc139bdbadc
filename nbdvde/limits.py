"""What clients may take from a server, and what all of them take now."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from nbdvde.errors import NbdvdeError
from nbdvde.metrics import Metrics
from nbdvde.protocol.connection import Batch
from nbdvde.protocol.handshake import HandshakeLimits
from nbdvde.transport import BufferPool

SMALL_BYTES = 1 << 17
"""What a client that holds nothing may take even while the memory of all clients is used up."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What clients may take from a server."""

    connections: int = 1024
    address_connections: int = 512
    """From one IP address."""
    handshake_s: float = 10.0
    """From the connection to GO; qemu's deadline since CVE-2024-7409."""
    handshake: HandshakeLimits = field(default_factory=HandshakeLimits)
    idle_s: float = math.inf
    """How long a client may ask for nothing: then it is disconnected."""
    keepalive_s: int = 60
    """After this long without a byte TCP asks whether the client is still there, and gives it half as long again."""
    requests_in_flight: int = 256
    """Per client, waiting for a disk or for their answers to be sent. One batch may come on top."""
    bytes_in_flight: int = 64 << 20
    """What these requests hold in memory. One batch may come on top."""
    server_bytes_in_flight: int = 256 << 20
    """As `bytes_in_flight`, of all clients together, with the payloads still on their way.

    One batch may come on top, and `SMALL_BYTES` of each client.
    """
    stall_s: float = 5.0
    """How long a client may be at a standstill while all of `server_bytes_in_flight` is used: then it is closed."""
    surveys: int = 16
    """CACHE and BLOCK_STATUS at a time, of all clients: they take long, and hold much while they are at it."""
    client_surveys: int = 4
    receive_buffers: int = 128
    """Clients with a large receive buffer; further ones get a small one."""
    receive_buffer_bytes: int = 1 << 20
    small_receive_buffer_bytes: int = 1 << 14
    stop_s: float = 10.0
    """How long a stop waits for requests in flight and for clients to take their answers."""
    linger_s: float = 1.0
    """How long a stop waits for a client to close its side once everything is answered."""
    batch: Batch = field(default_factory=Batch)


class Budget:
    """A limit on something in flight. Taking never waits and may exceed the limit; `room` waits until it is kept."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._changed, self._exhausted = trio.lowlevel.ParkingLot(), trio.lowlevel.ParkingLot()
        self.dependents: dict[Budget, None] = {}
        """Budgets with waiters that must hear of room in this one as well, the longest wait first."""

    def take(self, count: int) -> None:
        """Begin to use `count`."""
        self.used += count
        if self.used >= self.limit:
            self._exhausted.unpark_all()

    def give(self, count: int) -> None:
        """End the use of `count`."""
        self.used -= count
        if self.used < self.limit:
            self._changed.unpark_all()
            for dependent in self.dependents:
                dependent._changed.unpark_all()

    def change(self, limit: int) -> None:
        """Keep another limit from now on."""
        self.limit = limit
        self.take(0)
        self.give(0)

    async def room(self) -> None:
        """Wait, if need be, until less than the limit is used; the caller takes before it waits again."""
        while self.used >= self.limit:
            await self.changed()

    async def changed(self) -> None:
        """Wait until there is room in this budget, or in one that it depends on."""
        await self._changed.park()

    async def exhausted(self) -> None:
        """Wait, if need be, until the limit is used up."""
        while self.used < self.limit:
            await self._exhausted.park()


class Account:
    """What one client holds of its own budget and of the server's."""

    def __init__(self, own: Budget, server: Budget) -> None:
        self._own, self._server = own, server

    @property
    def held(self) -> int:
        """Bytes."""
        return self._own.used

    @property
    def waiting(self) -> bool:
        """Whether it waits for room."""
        return self._own in self._server.dependents

    def take(self, count: int) -> None:
        """Hold `count` more bytes."""
        self._own.take(count)
        self._server.take(count)

    def give(self, count: int) -> None:
        """Hold `count` bytes less."""
        self._own.give(count)
        self._server.give(count)

    async def room(self, count: int = 0) -> None:
        """Wait until neither budget is used up; the caller takes `count` bytes before it waits again.

        Who holds nothing need not wait for the server to take a few (`SMALL_BYTES`).
        """
        if self._has_room(count):
            return
        waiting = self._server.dependents
        waiting[self._own] = None
        try:
            while not self._has_room(count):
                await self._own.changed()
        finally:
            del waiting[self._own]

    def _has_room(self, count: int) -> bool:
        own, server = self._own, self._server
        if server.used >= server.limit and (own.used or count > SMALL_BYTES):
            return False
        return own.used < own.limit


class Complaints:
    """Lets one line of each kind into the log every so often, so that clients cannot flood it, reconnecting or not."""

    PAUSE_S = 10.0

    def __init__(self) -> None:
        self._kinds: dict[type | str, tuple[float, int]] = {}

    def ending(self, kind: type | str, now: float) -> str | None:
        """What a line ends with: how many were kept back since the last one. None when it is to be kept back too."""
        last, kept = self._kinds.get(kind, (-math.inf, 0))
        if now - last < self.PAUSE_S:
            self._kinds[kind] = last, kept + 1
            return None
        self._kinds[kind] = now, 0
        return f"; {kept} more like it since the last line" if kept else ""


class Shared:
    """What all sessions of a server share."""

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self.limits, self.metrics = limits, metrics
        self.memory = Budget(limits.server_bytes_in_flight)
        self.surveys = trio.Semaphore(limits.surveys)
        self.complaints = Complaints()
        self.failed: Callable[[NbdvdeError], None] | None = None
        """Who is told of requests that failed, instead of the log."""
        self.buffers = BufferPool(
            limits.receive_buffers, limits.receive_buffer_bytes, limits.small_receive_buffer_bytes
        )
        self.lone: object = None
        """The client that was the last to ask, and how often nobody else did in between."""
        self.lone_for = 0

    def change(self, limits: Limits) -> None:
        """Let new limits hold, for clients that are connected as far as they concern all of them."""
        if limits.surveys != self.limits.surveys:
            self.surveys = trio.Semaphore(limits.surveys)  # those under way end in the old one
        self.limits = limits
        self.memory.change(limits.server_bytes_in_flight)
