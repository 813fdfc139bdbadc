"""Nodes whose logs have lost something: they promise nothing until others have brought it back."""

from collections.abc import Sequence

import msgspec
import trio
from trio.testing import MockClock

from nbdvde.errors import NetworkError
from nbdvde.raft.core import Core
from nbdvde.raft.messages import Append, Entry, HardState, Members, Message, NodeId, Snapshot
from nbdvde.raft.node import Node
from nbdvde.raft.repair import STATE, Ending, Repair
from nbdvde.raft.store import MemoryLog, MemoryStore, write
from tests.raft.world import SETTINGS, Cluster, State, running, until


class Holed(MemoryStore):
    """A log of which some entries are damaged."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.holes: set[int] = set()
        super().__init__(snapshot)

    @property
    def damaged(self) -> Sequence[range]:
        return [range(index, index + 1) for index in sorted(self.holes) if index > self.snapshot.index]

    @damaged.setter
    def damaged(self, value: Sequence[range]) -> None:
        assert not value

    def get_range(self, start: int, stop: int, max_bytes: int) -> Sequence[Entry]:
        return super().get_range(start, min([stop, *(hole for hole in self.holes if hole >= start)]), max_bytes)

    def mend(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            if entry.index in self.holes and self.term(entry.index) == entry.term:
                self.holes.discard(entry.index)
                self._entries[entry.index - self.first_index] = entry

    def truncate_from(self, index: int) -> None:
        super().truncate_from(index)
        self.holes = {hole for hole in self.holes if hole < index}

    def spoil(self, *indexes: int) -> None:
        for index in indexes:
            self.holes.add(index)
            self._entries[index - self.first_index] = Entry(self.term(index), index, data=b"rot")

    def forget(self, index: int) -> None:
        """The entries from here on, and term and vote, are lost."""
        self.truncate_from(index)
        self.hard, self.unsure = HardState(), True


class Holes(Cluster):
    """Nodes with such logs; states are not durable."""

    def __init__(self) -> None:
        super().__init__()
        self.stores: dict[NodeId, Holed] = {}
        for number in self.logs:
            log = self.logs[number] = MemoryLog()
            store = log._groups["default"] = self.stores[number] = Holed(self.start)
            assert log.group("default") is store

    def restart(self, number: NodeId) -> None:
        self.states["default"][number] = State(self.start)

    async def write(self, leader: Node, count: int) -> None:
        for _ in range(count):
            await leader.groups["default"].propose(b"1")


async def propose(node: Node, results: list[object]) -> None:
    results.append(await node.groups["default"].propose(b"1"))


async def test_damaged_entries_are_fetched_and_then_count(autojump_clock: MockClock) -> None:
    async with running(Holes()) as cluster:
        leader = await cluster.leader()
        await cluster.write(leader, 10)
        await cluster.agree()
        damaged, other = (node.number for node in cluster.others(leader))
        cluster.crash(damaged)
        cluster.stores[damaged].spoil(4, 5, 8)
        cluster.restart(damaged)
        await cluster.up(damaged)
        assert cluster.nodes[damaged].groups["default"].core.mute
        assert (await cluster.agree()).value == 10
        assert not cluster.nodes[damaged].groups["default"].core.mute
        cluster.crash(other)
        await cluster.write(leader, 1)
        cluster.crash(leader.number)
        await cluster.up(other)
        assert await (await cluster.leader()).groups["default"].propose(b"1") == 12


async def test_what_is_in_the_state_need_not_be_fetched(autojump_clock: MockClock) -> None:
    async with running(Holes()) as cluster:
        leader = await cluster.leader()
        await cluster.write(leader, 10)
        number = leader.number
        cluster.crash(number)
        cluster.states["default"][number].keep()
        cluster.stores[number].spoil(3)
        cluster.world.cut(number)
        await cluster.up(number)
        await until(lambda: not cluster.nodes[number].groups["default"].core.mute)
        assert cluster.stores[number].snapshot.index > 3


async def test_who_has_forgotten_its_promises_counts_for_nothing_until_all_have_answered(
    autojump_clock: MockClock,
) -> None:
    async with running(Holes()) as cluster:
        leader = await cluster.leader()
        await cluster.write(leader, 10)
        await cluster.agree()
        unsure, other = (node.number for node in cluster.others(leader))
        cluster.crash(unsure)
        cluster.crash(other)
        cluster.stores[unsure].forget(5)
        cluster.restart(unsure)
        await cluster.up(unsure)
        results: list[object] = []
        cluster.nursery.start_soon(propose, leader, results)
        await trio.sleep(20)
        assert results == []
        assert cluster.nodes[unsure].groups["default"].core.mute
        assert cluster.stores[unsure].last_index >= 11, "it is given what it lacks all the same"
        await cluster.up(other)
        await until(lambda: results == [11])
        await until(lambda: not cluster.nodes[unsure].groups["default"].core.mute)
        assert not cluster.stores[unsure].unsure
        cluster.crash(other)
        await cluster.write(leader, 1)


async def test_who_has_forgotten_an_entry_elects_nobody_without_it(autojump_clock: MockClock) -> None:
    async with running(Holes()) as cluster:
        leader = await cluster.leader()
        await cluster.agree()
        unsure, other = (node.number for node in cluster.others(leader))
        cluster.crash(other)
        await cluster.write(leader, 5)
        cluster.crash(leader.number)
        cluster.crash(unsure)
        term = cluster.stores[unsure].hard.term
        cluster.stores[unsure].forget(2)
        cluster.stores[unsure].hard = HardState(term)
        cluster.restart(unsure)
        await cluster.up(unsure, other)
        await trio.sleep(20)
        assert not any(node.groups["default"].is_leader for node in cluster.nodes.values())
        await cluster.up(leader.number)
        following = await cluster.leader()
        assert await following.groups["default"].propose(b"1") == 6
        assert (await cluster.agree()).value == 6


async def test_two_who_have_forgotten_leave_the_decision_to_a_person(autojump_clock: MockClock) -> None:
    async with running(Holes()) as cluster:
        leader = await cluster.leader()
        await cluster.write(leader, 5)
        await cluster.agree()
        for node in cluster.others(leader):
            cluster.crash(node.number)
            cluster.stores[node.number].forget(3)
            cluster.restart(node.number)
            await cluster.up(node.number)
        results: list[object] = []
        cluster.nursery.start_soon(propose, leader, results)
        await trio.sleep(20)
        assert sum(node.groups["default"].core.mute for node in cluster.nodes.values()) == 2
        assert results == []


async def test_a_vote_that_is_forgotten_is_not_given_again(autojump_clock: MockClock) -> None:
    async with running(Holes()) as cluster:
        leader = await cluster.leader()
        await cluster.agree()
        number = cluster.others(leader)[0].number
        cluster.crash(number)
        cluster.stores[number].forget(2)
        cluster.restart(number)
        await cluster.up(number)
        await until(lambda: not cluster.nodes[number].groups["default"].core.mute)
        hard = cluster.stores[number].hard
        assert (hard.term, hard.vote) == (leader.groups["default"].core.term, leader.number)


class Blackout(Holes):
    """All nodes lose power while they write an entry, of which each has no more than that there was one."""

    async def strike(self) -> None:
        leader = await self.leader()
        await self.write(leader, 5)
        await self.agree()
        for number in [*self.nodes]:
            self.crash(number)
            store = self.stores[number]
            store.append([Entry(store.last_term, store.last_index + 1, data=b"1")])
            store.spoil(store.last_index)
            self.restart(number)


async def test_what_nobody_has_was_never_committed(autojump_clock: MockClock) -> None:
    async with running(Blackout()) as cluster:
        await cluster.strike()
        await cluster.up()
        await cluster.leader()
        assert (await cluster.agree()).value == 5
        assert not any(node.groups["default"].core.mute for node in cluster.nodes.values())


async def test_what_a_node_that_is_away_may_have_is_waited_for(autojump_clock: MockClock) -> None:
    async with running(Blackout()) as cluster:
        await cluster.strike()
        first, second, away = cluster.logs
        store = cluster.stores[away]
        store.mend([Entry(store.last_term, store.last_index, data=b"1")])
        await cluster.up(first, second)
        await trio.sleep(20)
        assert all(node.groups["default"].core.mute for node in cluster.nodes.values())
        await cluster.up(away)
        await cluster.leader()
        assert (await cluster.agree()).value == 6


async def test_what_a_node_has_in_its_state_was_committed(autojump_clock: MockClock) -> None:
    """The third one has compacted it away; without it the two others must not decide that there was nothing."""
    async with running(Blackout()) as cluster:
        await cluster.strike()
        first, second, third = cluster.logs
        store, members = cluster.stores[third], cluster.start.members
        store.mend([Entry(store.last_term, store.last_index, data=b"1")])
        last, term = store.last_index, store.last_term
        await cluster.up(third)
        member = cluster.nodes[third].groups["default"]
        member.core.mute = True  # or it might lead, and bring it back in that way
        store.compact_to(Snapshot(last, store.last_term, members))
        member.core.commit = member.core.applied = last
        member.core.compacted()
        await cluster.up(first, second)
        await trio.sleep(20)
        assert {cluster.stores[number].term(last) for number in cluster.stores} == {term}


async def test_what_others_have_in_their_state_alone_is_taken_over_with_it(autojump_clock: MockClock) -> None:
    async with running(Holes()) as cluster:
        leader = await cluster.leader()
        await cluster.write(leader, 10)
        await cluster.agree()
        damaged = cluster.others(leader)[0].number
        cluster.crash(damaged)
        cluster.stores[damaged].spoil(9)
        cluster.restart(damaged)
        for node in cluster.nodes.values():
            await node.groups["default"].upkeep._compact()
            assert cluster.stores[node.number].first_index > 9
        await cluster.up(damaged)
        await until(lambda: not cluster.nodes[damaged].groups["default"].core.mute)
        assert cluster.states["default"][damaged].installs == 1
        await leader.groups["default"].propose(b"1")
        assert (await cluster.agree()).value == 11


class Forgetful:
    """A member that asks two others, who are in term 2 and have two entries of term 1."""

    def __init__(self) -> None:
        self.members = Members(frozenset({1, 2, 3}))
        self.store = MemoryStore(Snapshot(0, 0, self.members))
        self.store.unsure = True
        self.core = Core(1, self.store, HardState(1), SETTINGS, lambda low, _: low)
        self.core.mute = True
        self.asked: list[NodeId] = []
        self.repair = Repair("default", self.core, self.store, self.ask)

    async def ask(self, node: NodeId, kind: int, body: bytes) -> bytes:
        assert kind == STATE
        self.asked.append(node)
        if len(self.asked) < 3:
            raise NetworkError(f"node {node}", "is not connected")
        return msgspec.msgpack.encode(Ending(2, 1, 2, Snapshot(), self.members, sure=True))

    async def hear(self, term: int, *entries: Entry) -> bool:
        """A leader of a term has entries; whether that was all."""
        core = self.core
        core.step(Message(2, 1, Append(term, core.log.last_index, core.log.last_term, entries, 0)))
        while ready := core.ready():
            write(self.store, ready.hard, ready.entries)
            core.done(ready)
        await self.repair.step()
        return self.repair.is_done


async def test_who_has_forgotten_is_mute_until_it_has_everything() -> None:
    member = Forgetful()
    assert not await member.hear(2, Entry(1, 1))
    assert member.asked == [2, 3]
    assert not await member.hear(2)
    assert member.asked == [2, 3, 2, 3], "entry 2 is missing"
    assert await member.hear(2, Entry(1, 2))
    assert member.asked == [2, 3, 2, 3], "one answer is enough"
    assert member.store.hard == HardState(2, 2, 0)


async def test_who_has_forgotten_is_mute_until_it_is_in_the_newest_term() -> None:
    member = Forgetful()
    await member.hear(1, Entry(1, 1))
    assert not await member.hear(1, Entry(1, 2))
    assert await member.hear(2)
