"""Nodes with file logs that lose power in the middle of their syncs, some or all at once."""

from random import Random

import pytest
import trio
from trio.testing import MockClock

from nbdvde.errors import NbdvdeError
from nbdvde.raft.filelog import FileLog, Sizes
from nbdvde.raft.messages import NodeId
from nbdvde.raft.node import Node
from tests.raft.simdisk import SimDirectory, moments
from tests.raft.world import Cluster, State, running

SIZES = Sizes(segment_bytes=1 << 16, memory_bytes=1 << 12)


def _data(value: int) -> bytes:
    return str(value).encode().rjust(1500)


class Powerless(Cluster):
    """Nodes with such logs; of their states what was made durable is left, to the byte."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = Random(seed)
        self.directories: dict[NodeId, SimDirectory] = {}
        self.acknowledged: list[int] = []
        self.damaged = 0
        for number in self.logs:
            self._open(number, SimDirectory()).create("default", self.start)

    def _open(self, number: NodeId, directory: SimDirectory) -> FileLog:
        self.directories[number] = directory
        log = self.logs[number] = FileLog(directory, SIZES, self.random.randbytes)
        return log

    def cut_power(self, number: NodeId) -> None:
        """Of what it was about to make durable some sectors are left."""
        self.crash(number)
        states = self.states["default"]
        before, states[number] = states[number], State(self.start)  # the old one is not done yet with what it has
        states[number].durable, states[number].durable_value = before.durable, before.durable_value
        states[number].durable_seen = before.durable_seen
        directory, log = self.directories[number], self.logs[number]
        acknowledged = len(directory.events)
        if work := log.take():
            work()
        stop = self.random.randint(acknowledged, len(directory.events))
        *_, moment = moments(directory.base, directory.events[:stop])
        share = self.random.choice((0.5, 0.9))
        kept = [at for at in range(len(moment.pending)) if self.random.random() < share]
        found = self._open(number, SimDirectory(moment.left(kept))).group("default")
        assert found
        self.damaged += len(found.damaged)

    def spoil(self, number: NodeId, value: int) -> None:
        """What a node has stored of a write is something else."""
        for content in self.directories[number].files.values():
            at = content.find(_data(value))
            if at >= 0:
                content[at] ^= 1

    async def propose(self, node: Node, value: int) -> None:
        """Try to write."""
        try:
            await node.groups["default"].propose(_data(value))
        except NbdvdeError:
            return
        self.acknowledged.append(value)


@pytest.mark.parametrize("seed", range(4))
async def test_what_was_acknowledged_outlives_power_cuts(autojump_clock: MockClock, seed: int) -> None:
    cluster = Powerless(seed)
    random, written = cluster.random, 0
    async with running(cluster):
        for _ in range(8):
            leader = await cluster.leader()
            await cluster.propose(leader, written + 1)
            for value in range(written + 2, written + 6):
                cluster.nursery.start_soon(cluster.propose, leader, value)
            written += 5
            for _ in range(random.randint(1, 30)):
                await trio.lowlevel.checkpoint()
            numbers = random.sample(sorted(cluster.nodes), random.choice((1, 3)))
            for number in numbers:
                cluster.cut_power(number)
            await cluster.up(*numbers)
        await cluster.propose(await cluster.leader(), written + 1)
        seen = (await cluster.agree()).seen
        assert set(cluster.acknowledged) <= set(seen)
        assert len(seen) == len(set(seen))
        assert written + 1 in seen


async def test_rot_that_is_found_while_reading_is_mended(autojump_clock: MockClock) -> None:
    cluster = Powerless(0)
    async with running(cluster):
        leader = await cluster.leader()
        away = cluster.others(leader)[0].number
        cluster.crash(away)
        for value in range(1, 21):
            await cluster.propose(leader, value)
        cluster.spoil(leader.number, 3)
        await cluster.up(away)
        assert (await cluster.agree()).seen == [*range(1, 21)]
        log = cluster.logs[leader.number].group("default")
        assert log
        assert not log.damaged
        assert len(cluster.directories[leader.number].files) > 1
