"""Whole nodes on simulated disks and connections: crashes inside syncs, rot on one of three, cuts.

Nothing acknowledged is lost, and nothing older is read.
"""

import logging
from contextlib import suppress
from dataclasses import replace
from random import Random

import pytest
import trio
from trio.testing import MockClock

from nbdvde.errors import DamageError, NbdvdeError
from nbdvde.raft.filelog import FileLog, Sizes
from nbdvde.raft.messages import NodeId
from nbdvde.raft.node import Options
from tests.raft.simdisk import Files, SimDirectory, moments
from tests.raft.world import SETTINGS, Cluster, running

SIZES = Sizes(segment_bytes=256 << 10, memory_bytes=2000)
"""So little memory that entries have to be loaded."""
STEPS = 25


class Files3(Cluster):
    """Three nodes with file logs, and a client that notes what was acknowledged."""

    def __init__(self, seed: int) -> None:
        self.quiet = bool(seed % 2)
        """Whether groups fall silent: there is time for that then."""
        settings = replace(SETTINGS, quiet=SETTINGS.election) if self.quiet else SETTINGS
        super().__init__(settings=settings, options=Options(compact_bytes=4000))
        self.random = Random(seed)
        self.directories = {number: SimDirectory() for number in self.logs}
        for number, directory in self.directories.items():
            self.logs[number] = FileLog(directory, SIZES, self.random.randbytes)
            self.logs[number].create("default", self.start)
        self.acknowledged: set[int] = set()
        self.written = 0
        self.lost: set[NodeId] = set()
        """Nodes of whose logs nothing can be made out."""
        self.mended = self.reads = 0

    async def write(self) -> None:
        """A few values at once, through whoever leads."""
        async with trio.open_nursery() as nursery:
            for _ in range(self.random.randint(1, 8)):
                self.written += 1
                nursery.start_soon(self._write, self.written)

    async def _write(self, value: int) -> None:
        with trio.move_on_after(1):
            for node in list(self.nodes.values()):
                group = node.groups["default"]
                if group.is_leader:
                    try:
                        await group.propose(b"%d" % value + b" " * self.random.randrange(300))
                    except NbdvdeError:
                        return
                    self.acknowledged.add(value)

    async def read(self, number: NodeId) -> None:
        """A node shows everything that was acknowledged before it was asked."""
        before, node = set(self.acknowledged), self.nodes[number]
        with trio.move_on_after(1):
            try:
                await node.groups["default"].read_barrier()
            except NbdvdeError:
                return
            self.reads += 1
            assert before <= set(self.states["default"][number].seen), "an old state was read"

    async def trouble(self) -> None:
        """Of the network, and of leaders."""
        match self.random.randrange(6):
            case 0:
                self.world.cut(self.random.choice(sorted(self.logs)))
            case 1:
                self.world.stop(self.random.choice(sorted(self.logs)))
            case 2:
                for node in list(self.nodes.values()):
                    if node.groups["default"].is_leader:
                        with trio.move_on_after(1), suppress(NbdvdeError):
                            await node.groups["default"].transfer(self.random.choice(sorted(self.logs)))
            case _:
                self.world.mend()

    def power_off(self, number: NodeId, *, rot: bool) -> None:
        """What was not synced is there in part."""
        self.crash(number)
        directory = self.directories[number]
        *_, moment = moments(directory.base, directory.events)
        kept = [at for at in range(len(moment.pending)) if self.random.random() < 0.5]
        files = moment.left(kept)
        self.directories[number] = SimDirectory(base=self._spoiled(files) if rot else files)

    def _spoiled(self, files: Files) -> Files:
        number = self.random.choice(sorted(files))
        content = bytearray(files[number])
        written = [at for at in range(0, len(content), 64) if any(content[at : at + 64])]
        for at in self.random.sample(written, min(len(written), self.random.randint(1, 3))):
            content[at + self.random.randrange(64)] ^= self.random.randint(1, 255)
        return {**files, number: bytes(content)}

    async def power_on(self, number: NodeId) -> None:
        try:
            self.logs[number] = FileLog(self.directories[number], SIZES, self.random.randbytes)
        except DamageError:
            self.lost.add(number)
            return
        if not self.logs[number].groups():
            self.lost.add(number)
            return
        await self.up(number)
        self.mended += self.nodes[number].groups["default"].core.mute


async def live(cluster: Files3) -> None:
    """Some time with misfortunes, then none."""
    rotten = cluster.random.choice(sorted(cluster.logs))
    await cluster.leader()
    for _ in range(STEPS):
        await cluster.write()
        number = cluster.random.choice(sorted(cluster.logs))
        if number in cluster.nodes and cluster.random.random() < 0.4:
            cluster.power_off(number, rot=number == rotten and cluster.random.random() < 0.5)
        elif number not in cluster.nodes and number not in cluster.lost:
            await cluster.power_on(number)
        if cluster.nodes:
            cluster.nursery.start_soon(cluster.read, cluster.random.choice(sorted(cluster.nodes)))
        await cluster.trouble()
        await trio.sleep(cluster.random.random() * (3 if cluster.quiet else 1))
    cluster.world.mend()
    for number in sorted(set(cluster.logs) - set(cluster.nodes) - cluster.lost):
        await cluster.power_on(number)


async def play(seed: int) -> Files3:
    """One run; what must hold, held."""
    async with running(Files3(seed)) as cluster:
        await live(cluster)
        leader = await cluster.leader()
        await leader.groups["default"].read_barrier()
        state = await cluster.agree()
        assert cluster.acknowledged <= set(state.seen), "what was acknowledged is lost"
        assert not cluster.failures, "a node ended"
    return cluster


@pytest.mark.parametrize("seed", range(6))
async def test_nothing_acknowledged_is_lost(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    caplog.set_level(logging.CRITICAL)
    cluster = await play(seed)
    assert cluster.acknowledged
    assert cluster.reads
