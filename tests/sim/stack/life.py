"""A machine from when it is switched on until it is off: the program that serves the image of a node.

Exports, server and sessions, engine, Raft, and what replicates are the real ones, put together as `nbdvde serve` does.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import Context, copy_context
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import outcome
import trio

from nbdvde.admin.replicated import executing
from nbdvde.admin.wormcalls import keep_clocks
from nbdvde.engine.image import Image
from nbdvde.errors import DetachedError, NbdvdeError, NetworkError
from nbdvde.exports import LOCAL, Exports, Peer, Visitor
from nbdvde.hosting import ExportSpec, Host
from nbdvde.listeners import TcpAddress
from nbdvde.raft.messages import NodeId
from nbdvde.raft.sockets import Place
from nbdvde.replication.replica import Replica
from nbdvde.replication.running import Plan, replicated
from nbdvde.server import Connection, Server
from tests.crash.session import KEY
from tests.sim.stack.clock import later
from tests.sim.stack.device import Disks
from tests.sim.stack.universe import CURRENT
from tests.sim.stack.wires import Net, Unreachable, Wire

T = TypeVar("T")
ELECTION_S = 1.0
TENDING_S = 1.5
"""Between two times that the nodes agree on retention clocks."""
_LEFT = "belongs to its cluster no more"
"""Why a node ends that was told to go."""
_JOB_S = 0.0002
"""What a thread takes to begin, and to tell that it is done, at most."""
LOG_BYTES = 8 << 10
"""So short a log that who was away for some seconds has to take over the state of another."""
EXPORT = "disk"
Welcome = Callable[[Wire, frozenset[str]], Awaitable[None]]


def machine_of(node: NodeId) -> str:
    """Its name in the network, and in its certificate."""
    return f"node-{node}"


class Life:
    """One, of a node."""

    def __init__(self, node: NodeId, disks: Disks, net: Net, lives: Mapping[str, "Life"], random: Random) -> None:
        """`lives` are those of all machines that are on."""
        self.node, self.disks, self.net, self.name = node, disks, net, machine_of(node)
        self._lives, self._random = lives, random
        self.slow_s = 0.0
        """How much longer the disk takes for anything, about."""
        self.may_fail = False
        """Whether its disk fails, or it is told to go: it may end by itself."""
        self.failure: BaseException | None = None
        """What it ended with by itself."""
        self.has_left = False
        """Whether it ended because it belongs to its cluster no more."""
        self.over = trio.Event()
        self.replica: Replica
        self._jobs: dict[Callable[[], object], None] = {}
        """What threads are about to do."""
        self._scope = trio.CancelScope()
        self._ending = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._context: Context
        self._calls: trio.Nursery | None = None
        self._welcome: Welcome

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve, until `stop` or `kill`."""
        CURRENT.set(self)
        self._context = copy_context()
        try:
            with self._scope:
                await self._serve(task_status)
        except Exception as error:  # what comes of a machine that is off counts for nothing
            self.has_left = _LEFT in repr(error)
            if not (self.disks.is_off or self.may_fail):
                self.failure = error
        finally:
            self.over.set()

    async def _serve(self, task_status: trio.TaskStatus[None]) -> None:
        exports = Exports()
        self._server = Server(exports)
        async with trio.open_nursery() as images:
            memory = {"buffer_bytes": 128 << 10, "cache_bytes": 1 << 20}
            host = Host(self._server, exports, images, _alone, memory, self._replicate)
            try:
                spec = ExportSpec(name=EXPORT, image=Path("/image"), whole=True)
                await host.add(spec, lambda: KEY)
                async with trio.open_nursery() as clients:
                    self._nursery = clients
                    clients.start_soon(keep_clocks, self.replica.image, TENDING_S)
                    task_status.started()
                    await self._ending.wait()
                    clients.cancel_scope.cancel()
            finally:
                self._nursery = None
                with trio.CancelScope(shield=True):
                    await host.close()

    def _replicate(self, image: Image) -> AbstractAsyncContextManager[Replica]:
        files: Any = self._ether
        plan = Plan(TcpAddress(self.name, 7000), files, Path("/log"), LOG_BYTES, ELECTION_S)
        return self._noted(replicated(image, plan, executing(image)))

    @asynccontextmanager
    async def _noted(self, opening: AbstractAsyncContextManager[Replica]) -> AsyncIterator[Replica]:
        async with opening as self.replica:
            yield self.replica

    # What comes from outside

    @property
    def has_caught_up(self) -> bool:
        """Whether it took over the state of another node."""
        replica: Replica | None = getattr(self, "replica", None)  # it may have ended before
        return replica is not None and replica.taker is not None

    @property
    def callers(self) -> list[str]:
        """Who has connections with it."""
        return sorted({wire.there for wire in self.net.of(self.name)})

    @property
    def is_serving(self) -> bool:
        """Whether clients are let in."""
        return self._nursery is not None and not self.disks.is_off

    async def connect(self, here: str) -> Wire:
        """A client's end of a new connection. Raises Unreachable."""
        ours, theirs = await self.net.connect(here, self.name)
        if self._nursery is None:
            raise Unreachable(self.name)
        server: Any = self._server  # as `Server._admit` does with a socket
        server.metrics.connections_total += 1
        visitor = Visitor(server._exports, Peer(LOCAL))
        transport: Any = theirs
        connection = Connection(server.metrics.connections_total, here, transport, visitor)
        server._connections[connection.number] = connection
        server._at[visitor.peer.place] += 1
        self._context.run(self._nursery.start_soon, server._client, connection)
        return ours

    async def ask(self, work: Callable[[Replica], Awaitable[T]]) -> T:
        """Have its administrator do something. Raises NbdvdeError; DetachedError: nobody knows what became of it."""
        done, found = trio.Event(), list[outcome.Outcome[T]]()

        async def doing() -> None:
            try:
                found.append(outcome.Value(await work(self.replica)))
            except NbdvdeError as error:
                found.append(outcome.Error(error))
            finally:
                done.set()

        if self._nursery is None:
            raise DetachedError(self.name, "is off")
        self._context.run(self._nursery.start_soon, doing)
        await done.wait()
        if not found:
            raise DetachedError(self.name, "went off")
        return found[0].unwrap()

    def stop(self) -> None:
        """End in order: `over` tells when."""
        self._ending.set()

    def kill(self, *, loud: bool) -> Disks:
        """Switch it off at once; what is there afterwards. `loud`: its system tells who is connected."""
        left = self.disks.cut_off(list(self._jobs), self._random)
        self.net.switch(self.name, on=False)
        for wire in self.net.of(self.name):
            wire.vanish(loud=loud)
        self._scope.cancel()
        return left

    # What it has of the world

    async def work(self, job: Callable[[], T]) -> T:
        """What a thread does, which takes its time; who waits for it cannot be cancelled."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._jobs[job] = None

        def do() -> T:
            del self._jobs[job]
            return job()

        return await later(do, self._pause_s(), self._pause_s())

    def _pause_s(self) -> float:
        return (self.slow_s or _JOB_S) * self._random.random()

    def _ether(self, places: Mapping[NodeId, Place]) -> "Ether":
        return Ether(self, places)

    async def accept(self, caller: "Life") -> Wire:
        """The other end of a connection that another node makes. Raises Unreachable."""
        ours, theirs = await self.net.connect(caller.name, self.name)
        if self._calls is None:
            raise Unreachable(self.name)
        self._context.run(self._calls.start_soon, self._welcome, theirs, frozenset({caller.name}))
        return ours

    async def listen(self, welcome: Welcome, task_status: trio.TaskStatus[None]) -> None:
        """Take calls of other nodes."""
        self._welcome = welcome
        async with trio.open_nursery() as calls:
            self._calls = calls
            self.net.switch(self.name, on=not self.disks.is_off)
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._calls = None


class Ether:
    """The network of a node (`raft.transport.Network`)."""

    def __init__(self, life: Life, places: Mapping[NodeId, Place]) -> None:
        self._life, self.places, self.departed = life, places, frozenset[NodeId]()

    def names(self) -> Mapping[NodeId, str]:
        return {node: place.name for node, place in self.places.items()}

    async def call(self, node: NodeId) -> tuple[Wire, frozenset[str]]:
        place = self.places[node]
        other = self._life._lives.get(place.name)
        if other is None or self._life.disks.is_off:
            await trio.sleep(0.01)
            raise NetworkError(place.name, "is off")
        try:
            return await other.accept(self._life), frozenset({place.name})
        except Unreachable:
            raise NetworkError(place.name, "cannot be reached") from None

    async def listen(self, welcome: Welcome, *, task_status: trio.TaskStatus[None]) -> None:
        await self._life.listen(welcome, task_status)


@asynccontextmanager
async def _alone(path: Path) -> AsyncIterator[Callable[[Image], Awaitable[None]]]:
    async def attend(image: Image) -> None:
        await trio.lowlevel.checkpoint()

    yield attend
