"""Three nodes in one event loop: writing, reading, and losing each other."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from nbdvde.errors import NetworkError, RefusedError, UsageError
from nbdvde.raft.applier import CONTAINED, Applier
from nbdvde.raft.core import NotLeaderError
from nbdvde.raft.groups import Group
from nbdvde.raft.messages import Append, AskRead, Body, Entry, Members, NodeId, ReadReply, Snapshot
from nbdvde.raft.node import Options
from nbdvde.raft.waiting import GroupEnded, LeadershipLost, Wait
from tests.raft.world import SETTINGS, Cluster, State, Sums, running

SMALL = Options(compact_bytes=2000)


async def propose(group: Group, number: int, results: list[object]) -> None:
    """What comes of a proposal, errors included."""
    try:
        results.append(await group.propose(b"%d" % number))
    except RefusedError as error:
        results.append(type(error))


async def test_what_is_proposed_is_applied_everywhere(autojump_clock: MockClock) -> None:
    async with running(Cluster()) as cluster:
        leader = await cluster.leader()
        group = leader.groups["default"]
        assert [await group.propose(b"%d" % number) for number in (1, 2, 3)] == [1, 3, 6]
        assert (await cluster.agree()).seen == [1, 2, 3]
        with pytest.raises(NotLeaderError):
            await cluster.others(leader)[0].groups["default"].propose(b"1")
        with pytest.raises(NetworkError, match="refused by the machine"):
            await group.propose(b"refuse")


async def test_proposals_of_many_tasks_are_one_batch(autojump_clock: MockClock) -> None:
    async with running(Cluster()) as cluster:
        leader = await cluster.leader()
        results: list[object] = []
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(propose, leader.groups["default"], 1, results)
        assert sorted(results) == list(range(1, 101))  # type: ignore[type-var]
        assert max(cluster.machines["default", leader.number].batches) == 100


async def test_more_than_may_be_uncommitted_waits(autojump_clock: MockClock) -> None:
    async with running(Cluster(settings=replace(SETTINGS, uncommitted_bytes=50))) as cluster:
        leader = await cluster.leader()
        results: list[object] = []
        async with trio.open_nursery() as nursery:
            cluster.world.cut(leader.number)
            nursery.start_soon(propose, leader.groups["default"], 1, results)
            await wait_all_tasks_blocked()
            for _ in range(100):
                nursery.start_soon(propose, leader.groups["default"], 1, results)
            await wait_all_tasks_blocked()
            cluster.world.mend()
        assert sorted(results) == list(range(1, 102))  # type: ignore[type-var]


async def test_who_does_not_wait_any_more_proposes_nothing(autojump_clock: MockClock) -> None:
    async with running(Cluster(settings=replace(SETTINGS, uncommitted_bytes=1))) as cluster:
        leader = await cluster.leader()
        group, results = leader.groups["default"], list[object]()
        async with trio.open_nursery() as nursery:
            cluster.world.cut(leader.number)
            nursery.start_soon(propose, group, 1, results)
            await wait_all_tasks_blocked()
            with trio.move_on_after(0.01) as scope:
                await group.propose(b"5")
            assert scope.cancelled_caught
            cluster.world.mend()
        assert results == [1]
        assert await group.propose(b"1") == 2


async def test_another_node_takes_over_and_nothing_is_lost(autojump_clock: MockClock) -> None:
    async with running(Cluster()) as cluster:
        leader = await cluster.leader()
        for _ in range(10):
            await leader.groups["default"].propose(b"1")
        cluster.crash(leader.number)
        begun = trio.current_time()
        following = await cluster.leader()
        assert trio.current_time() - begun < 3
        assert await following.groups["default"].propose(b"1") == 11
        await cluster.up(leader.number)
        assert (await cluster.agree()).value == 11


async def test_who_is_cut_off_stops_leading_and_says_that_it_does_not_know(autojump_clock: MockClock) -> None:
    async with running(Cluster()) as cluster:
        leader = await cluster.leader()
        group, results, seen = leader.groups["default"], list[object](), list[bool]()
        group.watchers.append(lambda group: seen.append(group.is_leader))
        async with trio.open_nursery() as nursery:
            cluster.world.cut(leader.number)
            nursery.start_soon(propose, group, 1, results)
        assert results == [LeadershipLost]
        assert seen[0] is False
        numbers = [node.number for node in cluster.others(leader)]
        following = await cluster.leader(among=numbers)
        assert await following.groups["default"].propose(b"2") == 2
        cluster.world.mend()
        assert (await cluster.agree()).seen == [2]


async def test_a_connection_on_which_nothing_arrives_is_given_up(autojump_clock: MockClock) -> None:
    async with running(Cluster()) as cluster:
        leader = await cluster.leader()
        cluster.world.stop(leader.number)
        numbers = [node.number for node in cluster.others(leader)]
        following = await cluster.leader(among=numbers)
        assert await following.groups["default"].propose(b"2") == 2
        cluster.world.mend()
        assert (await cluster.agree()).seen == [2]


@pytest.mark.parametrize("lease", [False, True])
async def test_reads_everywhere_see_what_was_done_before(autojump_clock: MockClock, lease: bool) -> None:
    async with running(Cluster(settings=replace(SETTINGS, lease=lease))) as cluster:
        leader = await cluster.leader()
        for value in range(1, 20):
            await leader.groups["default"].propose(b"1")
            for node in cluster.nodes.values():
                await node.groups["default"].read_barrier()
                assert cluster.states["default"][node.number].value == value


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("stood_still", [False, True])
async def test_who_stood_still_counts_on_no_lease(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, elsewhere: bool, stood_still: bool
) -> None:
    """Nobody knows what was done meanwhile, and its clock has not ticked yet when it is asked."""
    async with running(Cluster(settings=replace(SETTINGS, lease=True))) as cluster:
        leader = await cluster.leader()
        await leader.groups["default"].propose(b"1")
        await trio.sleep(1)
        group, other = leader.groups["default"], cluster.others(leader)[0]
        said, read = list[type[Body]](), Wait()

        def say(node: NodeId, name: str, body: Body) -> bool:
            said.append(type(body))
            return True

        monkeypatch.setattr(leader.mesh, "say", say)
        if stood_still:
            autojump_clock.jump(60)
        if elsewhere:
            leader.on_message(other.number, "default", AskRead(group.core.term, 7))
        else:
            group._barriers.add(read)
        leader.touch(group)
        leader._pass()
        answered = ReadReply in said if elsewhere else read._done.is_set()
        assert answered == (not stood_still)


async def test_a_read_waits_until_what_is_slow_is_applied(autojump_clock: MockClock) -> None:
    async with running(Cluster()) as cluster:
        leader = await cluster.leader()
        slow = cluster.others(leader)[0]
        cluster.machines["default", slow.number].slow_s = 5
        await leader.groups["default"].propose(b"1")
        assert cluster.states["default"][slow.number].value == 0
        await slow.groups["default"].read_barrier()
        assert cluster.states["default"][slow.number].value == 1


async def test_who_is_cut_off_reads_nothing_until_it_is_back(autojump_clock: MockClock) -> None:
    async with running(Cluster()) as cluster:
        leader = await cluster.leader()
        group, read = leader.groups["default"], trio.Event()

        async def reading() -> None:
            await group.read_barrier()
            read.set()

        await group.propose(b"1")
        cluster.world.cut(leader.number)
        cluster.nursery.start_soon(reading)
        following = await cluster.leader(among=[node.number for node in cluster.others(leader)])
        await following.groups["default"].propose(b"1")
        await trio.sleep(20)
        assert not read.is_set()
        cluster.world.mend()
        await read.wait()
        assert cluster.states["default"][leader.number].value == 2


async def test_who_asks_a_leader_that_is_gone_asks_the_next_one(autojump_clock: MockClock) -> None:
    async with running(Cluster(settings=replace(SETTINGS, quiet=20))) as cluster:
        leader = await cluster.leader()
        await leader.groups["default"].propose(b"1")
        await trio.sleep(5)
        asking = cluster.others(leader)[0]
        cluster.world.stop(leader.number)
        await asking.groups["default"].read_barrier()
        assert asking.groups["default"].leader != leader.number
        assert cluster.states["default"][asking.number].value == 1


async def test_entries_that_a_state_contains_are_left_out() -> None:
    state = State(Snapshot(3, 1))
    applied: list[Sequence[object]] = []
    applier = Applier(Sums(state), lambda entries, results: applied.append(results), lambda snapshot: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(applier.run)
        applier.hand([Entry(1, index, 0, b"1") for index in range(2, 6)])
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert applied == [(CONTAINED, CONTAINED), [1, 2]]


async def test_what_became_of_an_entry_that_a_state_contains_is_not_known(autojump_clock: MockClock) -> None:
    async with running(Cluster()) as cluster:
        group = (await cluster.leader()).groups["default"]
        await group.propose(b"1")
        last = group.core.log.last_index
        wait = group._proposals.watch(last)
        group._applied(group.core.log.slice(last, last + 1, 1), (CONTAINED,))
        with pytest.raises(LeadershipLost):
            await wait.result()


async def test_handing_over_loses_no_proposal(autojump_clock: MockClock) -> None:
    async with running(Cluster()) as cluster:
        leader = await cluster.leader()
        following = cluster.others(leader)[1]
        begun = trio.current_time()
        results: list[object] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(propose, leader.groups["default"], 1, results)
            nursery.start_soon(leader.groups["default"].transfer, following.number)
            await wait_all_tasks_blocked()
            nursery.start_soon(propose, leader.groups["default"], 1, results)
        assert await cluster.leader() is following
        assert trio.current_time() - begun < 0.3
        assert (
            await following.groups["default"].propose(b"0") == sum(result == NotLeaderError for result in results) ^ 2
        )


async def test_who_cannot_take_over_is_not_waited_for(autojump_clock: MockClock) -> None:
    async with running(Cluster()) as cluster:
        leader = await cluster.leader()
        absent = cluster.others(leader)[0].number
        cluster.crash(absent)
        with pytest.raises(RefusedError, match="did not take over"):
            await leader.groups["default"].transfer(absent)
        assert await leader.groups["default"].propose(b"1") == 1


async def test_who_stops_in_order_hands_over_first(autojump_clock: MockClock) -> None:
    async with running(Cluster()) as cluster:
        leader = await cluster.leader()
        await leader.groups["default"].propose(b"1")
        begun = trio.current_time()
        await leader.stop()
        del cluster.nodes[leader.number]
        following = await cluster.leader()
        assert await following.groups["default"].propose(b"1") == 2
        assert trio.current_time() - begun < 0.09, "less than a tick: nobody had to be missed"
        with pytest.raises(RefusedError):
            await leader.groups["default"].propose(b"1")


async def hear(group: Group, outcomes: list[object]) -> None:
    """Wait for what happens until the group ends."""
    try:
        while True:
            await group.news()
    except GroupEnded as error:
        outcomes.append(type(error))


async def test_groups_come_and_go_while_others_work(autojump_clock: MockClock) -> None:
    async with running(Cluster()) as cluster:
        await cluster.leader()
        for number, node in cluster.nodes.items():
            await node.create("more", cluster.machine("more", number), cluster.start)
        leader = await cluster.leader("more")
        assert await leader.groups["more"].propose(b"7") == 7
        waiting: list[object] = []
        cluster.world.cut(leader.number)
        cluster.nursery.start_soon(propose, leader.groups["more"], 1, waiting)
        cluster.nursery.start_soon(hear, leader.groups["more"], waiting)
        await wait_all_tasks_blocked()
        cluster.world.mend()
        for node in cluster.nodes.values():
            await node.remove("more")
        await wait_all_tasks_blocked()
        assert waiting == [GroupEnded, GroupEnded]
        assert all(list(log.groups()) == ["default"] for log in cluster.logs.values())
        assert await (await cluster.leader()).groups["default"].propose(b"1") == 1
        with pytest.raises(UsageError):
            await leader.remove("more")
        with pytest.raises(UsageError):
            leader.open("more", cluster.machine("more", leader.number))


async def test_logs_are_compacted_and_who_was_away_gets_the_state(autojump_clock: MockClock) -> None:
    async with running(Cluster(options=SMALL)) as cluster:
        leader = await cluster.leader()
        absent = cluster.others(leader)[0].number
        cluster.crash(absent)
        for _ in range(400):
            await leader.groups["default"].propose(b"1")
        for log in (log for number, log in cluster.logs.items() if number != absent):
            store = log.group("default")
            assert store is not None
            assert store.snapshot.index > 200
            assert store.size < 4 * 2000 + 500
        await cluster.up(absent)
        assert (await cluster.agree()).value == 400
        assert cluster.states["default"][absent].installs == 1
        assert await leader.groups["default"].propose(b"1") == 401
        cluster.crash(absent)
        await cluster.up(absent)
        assert (await cluster.agree()).value == 401


async def test_members_change_at_once(autojump_clock: MockClock) -> None:
    cluster = Cluster(4)
    cluster.start = replace_members(cluster, Members(frozenset({1, 2, 3})))
    async with running(cluster):
        leader = await cluster.leader(among=[1, 2, 3])
        await leader.groups["default"].propose(b"1")
        gone = next(number for number in (1, 2, 3) if number != leader.number)
        await leader.groups["default"].change_members(Members(frozenset({1, 2, 3, 4}) - {gone}))
        assert leader.groups["default"].status().members == Members(frozenset({1, 2, 3, 4}) - {gone})
        core = leader.groups["default"].core
        assert core.log.members_index <= core.commit, "who was dismissed is not needed any more"
        cluster.crash(gone)
        assert await leader.groups["default"].propose(b"1") == 2
        assert (await cluster.agree()).value == 2


async def test_members_change_once_a_new_leader_may(autojump_clock: MockClock) -> None:
    changed = trio.Event()

    async def change(group: Group, members: Members) -> None:
        with pytest.raises(RefusedError, match="in the middle of a change"):
            await group.change_members(members)
        await group.changeable()
        await group.change_members(members)
        changed.set()

    async with running(Cluster(4)) as cluster:
        leader = await cluster.leader()
        members = Members(frozenset({1, 2, 3, 4}) - {leader.number})

        def watch(group: Group) -> None:
            if group.is_leader:
                cluster.nursery.start_soon(change, group, members)

        for node in cluster.others(leader):
            node.groups["default"].watchers.append(watch)
        cluster.crash(leader.number)
        await changed.wait()
        assert (await cluster.leader()).groups["default"].status().members == members


def replace_members(cluster: Cluster, members: Members):
    from nbdvde.raft.messages import Snapshot
    from nbdvde.raft.store import MemoryLog

    start = Snapshot(0, 0, members)
    for number in cluster.logs:
        cluster.logs[number] = MemoryLog()
        cluster.logs[number].create("default", start)
    return start


async def test_quiet_groups_are_in_no_set_and_wake_up(autojump_clock: MockClock) -> None:
    async with running(Cluster(settings=replace(SETTINGS, quiet=20))) as cluster:
        leader = await cluster.leader()
        await leader.groups["default"].propose(b"1")
        await trio.sleep(5)
        assert all(not node._awake for node in cluster.nodes.values())
        for node in cluster.nodes.values():
            await node.groups["default"].read_barrier()
        assert await leader.groups["default"].propose(b"1") == 2
        await trio.sleep(5)
        assert all(not node._awake for node in cluster.nodes.values())
        cluster.crash(leader.number)
        following = await cluster.leader()
        assert await following.groups["default"].propose(b"1") == 3


async def test_a_quiet_leader_that_nobody_hears_of_is_missed(autojump_clock: MockClock) -> None:
    async with running(Cluster(settings=replace(SETTINGS, quiet=20))) as cluster:
        leader = await cluster.leader()
        await trio.sleep(5)
        cluster.world.stop(leader.number)
        following = await cluster.leader(among=[node.number for node in cluster.others(leader)])
        assert await following.groups["default"].propose(b"1") == 1


async def test_entries_that_are_there_already_do_not_fill_anything(autojump_clock: MockClock) -> None:
    """A leader that asks again and again sends the same ones."""
    async with running(Cluster(settings=replace(SETTINGS, message_bytes=1000, window_bytes=1000))) as cluster:
        leader = await cluster.leader()
        await leader.groups["default"].propose(b"1".rjust(900))
        group = cluster.others(leader)[0].groups["default"]
        entries = tuple(group.core.log.slice(1, 3, 1 << 20))
        for _ in range(20):
            cluster.nodes[group.core.node].on_message(
                leader.number, "default", Append(group.core.term, 0, 0, entries, 0)
            )
            cluster.nodes[group.core.node].on_end()
        assert await leader.groups["default"].propose(b"1".rjust(900)) == 2
        assert (await cluster.agree()).value == 2


async def test_a_flood_of_entries_is_dropped_and_asked_for_again(autojump_clock: MockClock) -> None:
    async with running(Cluster(settings=replace(SETTINGS, message_bytes=1000, window_bytes=1000))) as cluster:
        leader = await cluster.leader()
        node = cluster.others(leader)[0]
        last = node.groups["default"].core.log.last_index
        for index in range(last, last + 20):
            entry = Entry(leader.groups["default"].core.term, index + 1, 0, b"0".rjust(900))
            node.on_message(leader.number, "default", Append(entry.term, index, entry.term, (entry,), 0))
        assert node.groups["default"].core.log.last_index <= last + 5


async def test_a_status(autojump_clock: MockClock) -> None:
    async with running(Cluster()) as cluster:
        leader = await cluster.leader()
        await leader.groups["default"].propose(b"1")
        status = leader.groups["default"].status()
        assert (status.name, status.role, status.leader, status.mute) == ("default", "leader", leader.number, False)
        assert status.applied == status.commit == status.last
        assert set(status.matches) == {node.number for node in cluster.others(leader)}
