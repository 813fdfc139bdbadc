"""Nothing is promised before it is durable, and what happens when it cannot be."""

from collections.abc import Sequence

import trio
from trio.testing import MockClock

from nbdvde.errors import NoSpaceError, PoisonedError, RefusedError
from nbdvde.raft.messages import NodeId
from nbdvde.raft.store import MemoryLog, Work
from nbdvde.raft.waiting import GroupEnded
from tests.raft.world import Cluster, running, until


class Disk(MemoryLog):
    """Takes time, can be held up, and can fail."""

    def __init__(self) -> None:
        super().__init__()
        self.syncs = 0
        self.failure: list[Exception] = []
        self.open = trio.Event()
        self.open.set()

    def take(self) -> Work:
        return self._sync

    def _sync(self) -> None:
        self.syncs += 1
        if self.failure:
            raise self.failure.pop(0)


class Disks(Cluster):
    """Nodes whose logs are `Disk`s."""

    def __init__(self, count: int = 3) -> None:
        super().__init__(count)
        self.disks: dict[NodeId, Disk] = {}
        for number in self.logs:
            self.logs[number] = self.disks[number] = Disk()
            self.disks[number].create("default", self.start)

    async def in_thread(self, work: Work) -> None:
        disk = work.__self__  # type: ignore[attr-defined]
        await trio.sleep(0.001)
        await disk.open.wait()
        work()

    def hold(self, numbers: Sequence[NodeId]) -> None:
        for number in numbers:
            self.disks[number].open = trio.Event()

    def go_on(self, number: NodeId) -> None:
        self.disks[number].open.set()


async def propose(cluster: Cluster, number: NodeId, results: list[object]) -> None:
    try:
        results.append(await cluster.nodes[number].groups["default"].propose(b"1"))
    except RefusedError as error:
        results.append(type(error))


async def test_a_write_is_done_when_a_majority_has_it_on_disk(autojump_clock: MockClock) -> None:
    async with running(Disks()) as cluster:
        leader = await cluster.leader()
        others = [node.number for node in cluster.others(leader)]
        results: list[object] = []
        cluster.hold(others)
        cluster.nursery.start_soon(propose, cluster, leader.number, results)
        await trio.sleep(0.5)
        assert results == []
        cluster.go_on(others[0])
        await trio.sleep(0.5)
        assert results == [1]
        cluster.hold([leader.number, others[0]])
        cluster.go_on(others[1])
        cluster.nursery.start_soon(propose, cluster, leader.number, results)
        await trio.sleep(0.5)
        assert results == [1], "what the leader itself has not on disk does not count"
        for number in cluster.disks:
            cluster.go_on(number)
        await until(lambda: results == [1, 2])


async def test_a_vote_is_given_when_it_is_on_disk(autojump_clock: MockClock) -> None:
    async with running(Disks()) as cluster:
        leader = await cluster.leader()
        others = [node.number for node in cluster.others(leader)]
        cluster.hold(others)
        cluster.crash(leader.number)
        await trio.sleep(20)
        assert not any(cluster.nodes[number].groups["default"].is_leader for number in others)
        cluster.go_on(others[0])
        await trio.sleep(20)
        assert not any(cluster.nodes[number].groups["default"].is_leader for number in others)
        cluster.go_on(others[1])
        assert (await cluster.leader()).number in others


async def test_writes_that_come_during_a_sync_share_the_next_one(autojump_clock: MockClock) -> None:
    async with running(Disks()) as cluster:
        leader = await cluster.leader()
        results: list[object] = []
        cluster.hold([leader.number])
        cluster.nursery.start_soon(propose, cluster, leader.number, results)
        await trio.sleep(0.01)
        before = cluster.disks[leader.number].syncs
        for _ in range(50):
            cluster.nursery.start_soon(propose, cluster, leader.number, results)
        await trio.sleep(0.01)
        cluster.go_on(leader.number)
        await trio.sleep(0.5)
        assert sorted(results) == list(range(1, 52))  # type: ignore[type-var]
        assert cluster.disks[leader.number].syncs <= before + 2


async def test_a_node_whose_sync_failed_ends_and_the_others_go_on(autojump_clock: MockClock) -> None:
    async with running(Disks()) as cluster:
        leader = await cluster.leader()
        results: list[object] = []
        await leader.groups["default"].propose(b"1")
        cluster.disks[leader.number].failure = [PoisonedError("raft log", "a sync failed")]
        await propose(cluster, leader.number, results)
        await until(lambda: isinstance(cluster.failures.get(leader.number), PoisonedError))
        assert results == [GroupEnded]
        del cluster.nodes[leader.number]
        following = await cluster.leader()
        assert await following.groups["default"].propose(b"0") in (1, 2), "others may have it"


async def test_a_node_without_space_waits_for_some(autojump_clock: MockClock) -> None:
    async with running(Disks(1)) as cluster:
        leader = await cluster.leader()
        cluster.disks[1].failure = [NoSpaceError("raft log", "no space left on device")] * 5
        begun = trio.current_time()
        assert await leader.groups["default"].propose(b"1") == 1
        assert trio.current_time() - begun > 4
