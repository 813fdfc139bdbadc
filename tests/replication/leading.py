"""A replica whose node leads all groups: what it proposes is agreed on at once. What others answer is up to a test."""

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import msgspec
import trio

from nbdvde import workers
from nbdvde.engine.image import Image
from nbdvde.errors import UsageError
from nbdvde.raft.groups import Status
from nbdvde.raft.messages import Entry, EntryKind, Members, NodeId, Snapshot
from nbdvde.raft.waiting import GroupEnded
from nbdvde.replication.assembly import DEFAULT
from nbdvde.replication.changes import GroupMachine
from nbdvde.replication.replica import Replica
from nbdvde.replication.sealing import Sealer
from tests.replication.entries import CLUSTER, MEMBERS, assembly_of

Answer = Callable[[int, bytes], Awaitable[bytes]]


class Group:
    """One of them."""

    def __init__(self, name: str, machine: GroupMachine) -> None:
        self.name, self.machine = name, machine
        self.leader, self.is_leader = 1, True
        self.core = SimpleNamespace(members=MEMBERS, office=None, may_change=lambda: True)
        self.reading: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        """What whoever is about to read waits for."""
        self._turn, self._ended = trio.Lock(), False

    async def propose(self, data: bytes) -> object:
        async with self._turn:
            self._refuse_if_ended()
            entry = Entry(1, self.machine.applied.index + 1, EntryKind.NORMAL, data)
            (result,) = await self.machine.apply([entry])
        if isinstance(result, Exception):
            raise result
        return result

    async def read_barrier(self) -> None:
        self._refuse_if_ended()
        await self.reading()
        self._refuse_if_ended()

    def wake(self) -> None: ...

    async def changeable(self) -> None:
        await trio.lowlevel.checkpoint()

    async def change_members(self, members: Members) -> None:
        await trio.lowlevel.checkpoint()
        self.core.members = members
        self.machine.applied = msgspec.structs.replace(self.machine.applied, members=members)

    async def hand_over(self) -> None:
        await trio.lowlevel.checkpoint()
        self.leader = 2

    def status(self) -> Status:
        index, members = self.machine.applied.index, self.core.members
        return Status(self.name, "leader", 1, self.leader, members, index, index, index, 0, {}, 0, False, False)

    def end(self) -> None:
        self._ended = True

    def _refuse_if_ended(self) -> None:
        if self._ended:
            raise GroupEnded(f"raft group {self.name}", "is not here any more")


class Node:
    """Node 1."""

    number = CLUSTER.node

    def __init__(self) -> None:
        self.groups: dict[str, Group] = {}
        self.others: dict[NodeId, Answer] = {}
        """What those answer that can be reached, by kind and question."""
        self.handlers: dict[int, Callable[[NodeId, bytes], Awaitable[bytes]]] = {}
        self.mesh = SimpleNamespace(handle=self.handlers.__setitem__)
        self.creating: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        """What comes before a group is there."""

    def is_connected(self, node: NodeId) -> bool:
        return node in self.others

    def peer(self, node: NodeId) -> Any:
        if node not in self.others:
            raise UsageError(f"node {node}", "is not known")
        return SimpleNamespace(request=self.others[node])

    async def hand_over(self, patience_s: float) -> None:
        await trio.lowlevel.checkpoint()

    async def create(self, name: str, machine: GroupMachine, start: Snapshot) -> Group:
        await self.creating()
        self.groups[name] = Group(name, machine)
        return self.groups[name]

    async def remove(self, name: str) -> None:
        self.groups.pop(name).end()
        await trio.lowlevel.checkpoint()


async def _at_once(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    await trio.lowlevel.checkpoint()
    return function(*args, **kwargs)


@contextmanager
def without_threads() -> Iterator[None]:
    """Virtual time would go on while they work."""
    with (
        mock.patch.object(workers, "run", _at_once),
        mock.patch.object(workers.Patience, "begin", staticmethod(_at_once)),
    ):
        yield


@asynccontextmanager
async def leading(image: Image) -> AsyncIterator[tuple[Replica, Node]]:
    """A replica of an image that belongs to a cluster, or does from now on."""
    with without_threads():
        async with _leading(image) as found:
            yield found


@asynccontextmanager
async def _leading(image: Image) -> AsyncIterator[tuple[Replica, Node]]:
    async with trio.open_nursery() as nursery:
        node = Node()
        sealer = Sealer(CLUSTER.key, random.Random(3).randbytes)
        replica = Replica(image, CLUSTER, cast(Any, node), sealer, nursery)
        assembly = await assembly_of(image, replica, replica.fetch)
        group = await node.create(DEFAULT, assembly.machines[DEFAULT], Snapshot())
        await replica.start(assembly, {DEFAULT: cast(Any, group)})
        yield replica, node
        replica.end()
        nursery.cancel_scope.cancel()
