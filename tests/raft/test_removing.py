"""A group is removed from a node whatever it is about just then; the node goes on."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from random import Random

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from nbdvde.raft.filelog import FileLog, Sizes
from nbdvde.raft.groups import Group
from nbdvde.raft.messages import Snapshot
from nbdvde.raft.node import Node, Options
from nbdvde.raft.store import Work
from nbdvde.raft.waiting import GroupEnded
from tests.raft.simdisk import SimDirectory
from tests.raft.world import Cluster, Sums, running

SIZES = Sizes(segment_bytes=256 << 10, memory_bytes=2000)


class One(Cluster):
    """A node by itself, with a file log, and threads that wait at a gate."""

    def __init__(self) -> None:
        super().__init__(1, options=Options(compact_bytes=4000))
        self.logs[1] = FileLog(SimDirectory(), SIZES, Random(1).randbytes)
        self.logs[1].create("default", self.start)
        self.gate = trio.Event()
        self.gate.set()

    async def in_thread(self, work: Work) -> None:
        await self.gate.wait()
        await super().in_thread(work)

    @property
    def node(self) -> Node:
        return self.nodes[1]

    async def create(self, machine: Sums | None = None) -> Group:
        return await self.node.create("more", machine or self.machine("more", 1), self.start)


@asynccontextmanager
async def one() -> AsyncIterator[One]:
    """Is still there in the end, and does nothing for a group that it does not have."""
    async with running(One()) as cluster:
        yield cluster
        await trio.sleep(60)
        assert {*cluster.node.groups} == {*cluster.node._awake} == {"default"}
        assert list(cluster.logs[1].groups()) == ["default"]
        assert await cluster.node.groups["default"].propose(b"1") == 1


async def propose(group: Group) -> None:
    with suppress(GroupEnded):
        await group.propose(b"1")


async def test_while_it_writes(autojump_clock: MockClock) -> None:
    async with one() as cluster, trio.open_nursery() as nursery:
        group = await cluster.create()
        await cluster.leader("more")
        cluster.gate = trio.Event()
        nursery.start_soon(propose, group)
        await wait_all_tasks_blocked()
        nursery.start_soon(cluster.node.remove, "more")
        await wait_all_tasks_blocked()
        cluster.gate.set()


async def test_while_it_applies(autojump_clock: MockClock) -> None:
    class Shielded(Sums):
        async def apply(self, entries):
            with trio.CancelScope(shield=True):
                await trio.sleep(5)
            return await super().apply(entries)

    async with one() as cluster, trio.open_nursery() as nursery:
        machine = cluster.machine("more", 1)
        group = await cluster.create(Shielded(machine.state))
        await cluster.leader("more")
        nursery.start_soon(propose, group)
        await trio.sleep(2)
        await cluster.node.remove("more")


async def test_while_its_log_is_made_shorter(autojump_clock: MockClock) -> None:
    class Shielded(Sums):
        async def durable(self) -> Snapshot:
            with trio.CancelScope(shield=True):
                await trio.sleep(5)
            self.state.keep()
            return self.state.durable

    async with one() as cluster:
        machine = cluster.machine("more", 1)
        group = await cluster.create(Shielded(machine.state))
        await cluster.leader("more")
        await group.propose(b"1" + b" " * 5000)
        await trio.sleep(2)
        await cluster.node.remove("more")


async def test_before_it_begins(autojump_clock: MockClock) -> None:
    async with one() as cluster:
        group = await cluster.create()
        await cluster.node.remove("more")
        with pytest.raises(GroupEnded):
            await group.propose(b"1")
