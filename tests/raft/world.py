"""Nodes in one event loop: connections in memory that can be cut or stop, and a state machine that remembers."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import TypeVar

import trio

from nbdvde.disk import Buffer
from nbdvde.errors import NbdvdeError, NetworkError
from nbdvde.raft.link import Wire
from nbdvde.raft.messages import Entry, EntryKind, Members, NodeId, Snapshot
from nbdvde.raft.node import Node, Options
from nbdvde.raft.settings import Settings
from nbdvde.raft.store import MemoryLog, NodeLog, Work
from nbdvde.raft.transport import Identity

Welcome = Callable[[Wire, frozenset[str]], Awaitable[None]]
SETTINGS = Settings()
PATIENCE_S = 600.0
"""Of virtual time: a test that takes longer has failed."""


class MemoryWire:
    """One end of a connection."""

    def __init__(self, capacity: int) -> None:
        self.other = self
        self.stopped = False
        """Nothing arrives, and nobody is told."""
        self._capacity, self._came = capacity, bytearray()
        self._news, self._ended, self._broken = trio.Event(), False, False

    async def readable(self) -> None:
        while not self._broken and (self.stopped or not (self._came or self._ended)):
            await self._news.wait()

    async def receive(self, targets: Sequence[memoryview], /) -> int:
        await self.readable()
        if self._broken:
            raise trio.BrokenResourceError("broken off")
        count = min(len(self._came), len(targets[0]))
        targets[0][:count] = self._came[:count]
        del self._came[:count]
        self.other.tell()
        return count

    def send_nowait(self, buffers: Sequence[Buffer], /) -> Sequence[Buffer]:
        if self._broken or (self._ended and not self.stopped):
            raise trio.BrokenResourceError("ended")
        if len(self.other._came) >= self._capacity:
            return buffers
        for buffer in buffers:
            self.other._came += buffer
        self.other.tell()
        return ()

    async def send(self, buffers: Sequence[Buffer], /) -> None:
        while buffers := self.send_nowait(buffers):
            await self._news.wait()
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        self._broken = self.other._ended = True
        self.tell()
        self.other.tell()

    def close(self) -> None:
        self.abort()

    def tell(self) -> None:
        self._news.set()
        self._news = trio.Event()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what nobody tells of."""
    while not condition():  # noqa: ASYNC110
        await trio.sleep(0.01)


class World:
    """A network in memory. Names in certificates are `node-1` and so on."""

    def __init__(self, capacity: int = 1 << 18) -> None:
        self.welcomes: dict[NodeId, tuple[Welcome, trio.Nursery]] = {}
        self.wires: dict[frozenset[NodeId], MemoryWire] = {}
        self.known: dict[NodeId, str] = {}
        self.shown: dict[NodeId, str] = {}
        """What certificates say, if not that."""
        self._capacity, self._cut = capacity, set[frozenset[NodeId]]()

    def network(self, node: NodeId) -> "MemoryNetwork":
        self.known[node] = f"node-{node}"
        return MemoryNetwork(self, node)

    def cut(self, *nodes: NodeId) -> None:
        """Have connections of these nodes with others break; none is made."""
        others = set(self.known) - set(nodes)
        self._cut = {frozenset({one, other}) for one in nodes for other in others}
        for pair in self._cut & set(self.wires):
            self.wires.pop(pair).abort()

    def mend(self) -> None:
        self._cut = set()

    def stop(self, node: NodeId) -> None:
        """Have nothing arrive at or from a node, and nobody told; no connection with it is made."""
        self._cut = {frozenset({node, other}) for other in self.known if other != node}
        for pair in self._cut & set(self.wires):
            self.wires[pair].stopped = self.wires[pair].other.stopped = True

    def connect(self, caller: NodeId, called: NodeId) -> MemoryWire:
        pair = frozenset({caller, called})
        if pair in self._cut or called not in self.welcomes:
            raise NetworkError(f"node {called}", "connection refused")
        here, there = MemoryWire(self._capacity), MemoryWire(self._capacity)
        here.other, there.other = there, here
        self.wires[pair] = here
        welcome, nursery = self.welcomes[called]
        nursery.start_soon(welcome, there, self.certificate(caller))
        return here

    def certificate(self, node: NodeId) -> frozenset[str]:
        return frozenset({self.shown.get(node, f"node-{node}")})


class MemoryNetwork:
    """What one node sees of it."""

    def __init__(self, world: World, node: NodeId) -> None:
        self._world, self._node, self.departed = world, node, frozenset[NodeId]()

    def names(self) -> Mapping[NodeId, str]:
        return {node: name for node, name in self._world.known.items() if node not in self.departed}

    async def call(self, node: NodeId) -> tuple[Wire, frozenset[str]]:
        await trio.lowlevel.checkpoint()
        return self._world.connect(self._node, node), self._world.certificate(node)

    async def listen(self, welcome: Welcome, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            self._world.welcomes[self._node] = welcome, nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._world.welcomes.pop(self._node, None)


class Sums:
    """A state machine: adds up what is written. `state` outlasts the node."""

    def __init__(self, state: "State", states: Mapping[NodeId, "State"] | None = None) -> None:
        self.state, self._states = state, states or {}
        self.applied = state.durable
        self.state.value, self.state.at, self.state.seen = state.durable_value, state.durable, list(state.durable_seen)
        self.slow_s = 0.0
        self.batches: list[int] = []

    async def apply(self, entries: Sequence[Entry]) -> Sequence[object]:
        if self.slow_s:
            await trio.sleep(self.slow_s)
        self.batches.append(len(entries))
        return [self._one(entry) for entry in entries]

    def _one(self, entry: Entry) -> object:
        state = self.state
        assert entry.index == state.at.index + 1, "in order, each once"
        members = Members.unpack(entry.data) if entry.kind == EntryKind.MEMBERS else state.at.members
        state.at = Snapshot(entry.index, entry.term, members)
        if entry.kind == EntryKind.NORMAL:
            if entry.data == b"refuse":
                return NetworkError("refused by the machine")
            state.value += int(entry.data)
            state.seen.append(int(entry.data))
        return state.value

    async def durable(self) -> Snapshot:
        await trio.lowlevel.checkpoint()
        self.state.keep()
        return self.state.durable

    async def install(self, source: NodeId, snapshot: Snapshot) -> Snapshot:
        await trio.sleep(0.01)
        other = self._states[source]
        if other.at.index < snapshot.index:
            raise NetworkError(f"node {source}", "has no such state")
        self.state.value, self.state.at, self.state.seen = other.value, other.at, list(other.seen)
        self.state.installs += 1
        self.state.keep()
        return self.state.at


class State:
    """Of one member of one group: what `Sums` holds, and what of it is durable."""

    def __init__(self, start: Snapshot) -> None:
        self.value = self.durable_value = 0
        self.at = self.durable = start
        self.seen: list[int] = []
        self.durable_seen: list[int] = []
        self.installs = 0

    def keep(self) -> None:
        self.durable, self.durable_value, self.durable_seen = self.at, self.value, list(self.seen)


class Cluster:
    """Nodes with a group `default` of all of them."""

    def __init__(self, count: int = 3, *, settings: Settings = SETTINGS, options: Options | None = None) -> None:
        self.world = World()
        self.settings, self.options = settings, options
        self.start = Snapshot(0, 0, Members(frozenset(range(1, count + 1))))
        self.logs: dict[NodeId, NodeLog] = {}
        self.states: dict[str, dict[NodeId, State]] = {}
        self.nodes: dict[NodeId, Node] = {}
        self.machines: dict[tuple[str, NodeId], Sums] = {}
        self.failures: dict[NodeId, NbdvdeError] = {}
        """Errors that nodes ended with."""
        self.nursery: trio.Nursery
        self._random = Random(7)
        for number in range(1, count + 1):
            self.world.network(number)
            self.logs[number] = MemoryLog()
            self.logs[number].create("default", self.start)

    def machine(self, group: str, number: NodeId) -> Sums:
        states = self.states.setdefault(group, {})
        state = states.setdefault(number, State(self.start))
        machine = self.machines[group, number] = Sums(state, states)
        return machine

    async def up(self, *numbers: NodeId) -> None:
        """Start nodes, with all groups that their logs have."""
        for number in numbers or self.logs:
            log = self.logs[number]
            node = self.nodes[number] = Node(
                Identity(number, "test"), log, self.world.network(number), self.settings, self._random.randint,
                options=self.options, in_thread=self.in_thread,
            )  # fmt: skip
            for name in log.groups():
                node.open(name, self.machine(name, number))
            await self.nursery.start(self._run, node)

    async def _run(self, node: Node, *, task_status: trio.TaskStatus[None]) -> None:
        try:
            await node.run(task_status=task_status)
        except NbdvdeError as error:
            self.failures[node.number] = error

    async def in_thread(self, work: Work) -> None:
        await trio.lowlevel.checkpoint()
        work()

    def crash(self, number: NodeId) -> None:
        node = self.nodes.pop(number)
        assert node._nursery is not None
        node._nursery.cancel_scope.cancel()

    async def leader(self, group: str = "default", *, among: Sequence[NodeId] = ()) -> Node:
        """Wait until there is one that has everybody's vote, as far as nodes are up."""
        while True:
            nodes = [self.nodes[number] for number in among or self.nodes]
            found = [node for node in nodes if group in node.groups and node.groups[group].is_leader]
            if len(found) == 1 and all(node.groups[group].leader == found[0].number for node in nodes):
                return found[0]
            await trio.sleep(0.05)

    def others(self, node: Node) -> list[Node]:
        return [other for other in self.nodes.values() if other is not node]

    async def agree(self, group: str = "default") -> State:
        """Wait until all nodes that are up have the same state."""
        while True:
            states = [self.states[group][number] for number in self.nodes]
            if len({state.at.index for state in states}) == 1:
                assert len({state.value for state in states}) == 1
                return states[0]
            await trio.sleep(0.05)


AnyCluster = TypeVar("AnyCluster", bound=Cluster)


@asynccontextmanager
async def running(cluster: AnyCluster) -> AsyncIterator[AnyCluster]:
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            cluster.nursery = nursery
            await cluster.up()
            yield cluster
            nursery.cancel_scope.cancel()
