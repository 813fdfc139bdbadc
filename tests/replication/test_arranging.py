"""Groups come and go while a node works: in which it takes part, whom it asks, and for what it waits."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import msgspec
import pytest
import trio

from nbdvde.admin.calls import Nothing
from nbdvde.admin.clustercalls import status
from nbdvde.disk import BLOCK
from nbdvde.engine.access import open_storage
from nbdvde.errors import DetachedError, MovedError, NoSpaceError, RefusedError
from nbdvde.raft.core import NotLeaderError
from nbdvde.raft.messages import Members
from nbdvde.replication.assembly import DEFAULT
from nbdvde.replication.disk import Attachment
from nbdvde.replication.notes import Notes, Place
from nbdvde.replication.operations import Attach, Operation, Release, Retire
from nbdvde.replication.registry import register
from nbdvde.replication.replica import Replica
from nbdvde.replication.retiring import APPLIED
from nbdvde.replication.roster import CONTROL, LEFT
from nbdvde.replication.routing import STRIPE
from tests.crash.recording import RecordingStorage
from tests.crash.session import KEY
from tests.replication.entries import MEMBERS
from tests.replication.leading import Node, leading
from tests.replication.test_groups import STRIPES, fresh

PATIENCE_S = 60.0


class Here:
    """A replica whose image has `default` and another group."""

    def __init__(self, replica: Replica, node: Node, storage: RecordingStorage) -> None:
        self.replica, self.node, self.assembly, self.storage = replica, node, replica.assembly, storage
        self.group = next(machine.name for machine in replica.assembly.others)

    def stripe_of(self, group: str) -> int:
        """Where one begins that a group has."""
        routing = self.assembly.routing
        return next(at * STRIPE for at in range(STRIPES) if routing.at("disk", at * STRIPE) == group)

    async def propose(self, operation: Operation, group: str = DEFAULT) -> object:
        return await (await self.replica.lane(group)).propose(operation)

    async def agreed_on(self, *groups: str) -> None:
        """These, and `default`, are to share the disks; that is not durable yet."""
        self.assembly.arrange(groups, MEMBERS)
        self.replica.arranged()
        await trio.lowlevel.checkpoint()

    async def noted(self) -> set[str]:
        """The groups that the node would know of after a crash."""
        image = await open_storage(RecordingStorage(bytes(self.storage.image)), KEY)
        notes = await Notes.load(image)
        await image.close()
        assert notes
        return {*notes.found}


@asynccontextmanager
async def one_more() -> AsyncIterator[Here]:
    storage = fresh()
    image = await open_storage(storage, KEY)
    with trio.fail_after(PATIENCE_S):
        async with leading(image) as (replica, node):
            await replica.arrange(1, [])
            yield Here(replica, node, storage)
    await image.close()


# In which it takes part


async def test_a_node_promises_nothing_in_a_group_before_it_knows_of_it_for_good(autojump_clock: object) -> None:
    """Or the log of that would be taken for one of a group that was given up. Without space it waits."""
    async with one_more() as here:
        durable, refusals, noted = here.assembly.durable, [NoSpaceError("image", "is full")], list[set[str]]()

        async def reluctant() -> None:
            if refusals:
                raise refusals.pop()
            await durable()
            if "y" not in here.assembly.machines:
                await here.agreed_on("x", "y")

        async def creating() -> None:
            noted.append(await here.noted() - {DEFAULT, here.group})

        here.assembly.durable, here.node.creating = reluctant, creating  # type: ignore[method-assign]
        await here.agreed_on("x")
        for name in ("x", "y"):
            await here.replica.lane(name)
        assert (refusals, noted) == ([], [{"x"}, {"x", "y"}])


async def test_a_group_that_ends_while_a_node_begins_to_take_part_in_it(autojump_clock: object) -> None:
    async with one_more() as here:

        async def creating() -> None:
            await here.agreed_on(here.group)
            here.assembly.retire(["x"])

        here.node.creating = creating
        await here.agreed_on(here.group, "x")
        await trio.sleep(1)
        assert {*here.replica.lanes} == {*here.node.groups} == {DEFAULT, here.group}


async def test_groups_change_while_a_node_begins_to_take_part_in_them(autojump_clock: object) -> None:
    async with one_more() as here:

        async def creating() -> None:
            await trio.sleep(10)

        here.node.creating = creating
        async with trio.open_nursery() as nursery:
            nursery.start_soon(here.replica.arrange, 1, [])
            await trio.sleep(5)
            await here.agreed_on(*here.assembly.routing.groups, "x")
        assert {*here.replica.lanes} == {*here.assembly.machines} - {"x"}
        await here.replica.lane("x")


async def test_who_waits_for_a_group_that_has_no_part_any_more_is_sent_on(autojump_clock: object) -> None:
    async with one_more() as here:
        lane = here.replica.lanes[here.group]
        await here.replica.arrange(0, [here.group])
        here.node.groups[here.group].leader = 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(here.propose, Retire((here.group,)))
            with pytest.raises(MovedError):
                await lane.propose(Release("disk", 1))


async def test_who_waits_for_a_group_that_a_state_lacks_is_told_that_nobody_knows(autojump_clock: object) -> None:
    """It may be done: another node may have, before the group came to its end."""
    async with one_more() as here:
        lane, main = here.replica.lanes[here.group], here.assembly.machines[DEFAULT].note
        here.node.groups[here.group].leader = 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(here.assembly._become, {DEFAULT: main})
            with pytest.raises(DetachedError) as told:
                await lane.propose(Release("disk", 1))
        assert not isinstance(told.value, MovedError)


# For what it waits


async def test_who_reads_waits_for_who_has_it_and_for_who_says_so(autojump_clock: object) -> None:
    """Which group has a stripe may have changed, as `default` knows."""
    async with one_more() as here:
        asked = list[str]()

        async def reading(group: str) -> None:
            asked.append(group)
            await trio.sleep(1)

        for name, group in here.node.groups.items():
            group.reading = partial(reading, name)
        await here.replica.barrier("disk", here.stripe_of(DEFAULT), BLOCK)
        assert asked == [DEFAULT]
        await here.replica.barrier("disk", here.stripe_of(here.group), BLOCK)
        assert sorted(asked[1:]) == [DEFAULT, here.group]
        await here.replica.barrier()
        assert sorted(asked[3:]) == [DEFAULT, here.group], "without a range it is about everything"


async def test_who_reads_of_a_group_that_ends_asks_who_has_it_then(autojump_clock: object) -> None:
    async with one_more() as here:

        async def ends() -> None:
            group.reading = trio.lowlevel.checkpoint
            await here.agreed_on()
            here.assembly.retire([here.group])
            here.replica.arranged()
            await trio.sleep(1)

        group = here.node.groups[here.group]
        group.reading = ends
        await here.replica.barrier("disk", here.stripe_of(here.group), BLOCK)
        assert {*here.replica.lanes} == {DEFAULT}


async def test_who_is_let_in_has_the_disk_when_all_groups_know(autojump_clock: object) -> None:
    """Somebody else may take it meanwhile: whoever were let in by then could never write."""
    async with one_more() as here:
        ended = list[Attachment]()
        here.node.groups[here.group].leader = 0
        async with trio.open_nursery() as nursery:

            async def attach() -> None:
                ended.append(await here.replica.attach("disk", lambda: None))

            nursery.start_soon(attach)
            await trio.sleep(1)
            taken = await here.propose(Attach("disk", 2))
            here.node.groups[here.group].leader = 1
        epoch, node = here.replica.machine.epochs["disk"]
        assert (ended[0].epoch, node) == (epoch, 1)
        assert epoch > taken  # type: ignore[operator]
        assert here.assembly.machines[here.group].epochs["disk"] == (epoch, 1)


# Whom it asks


async def test_who_joins_becomes_a_member_of_groups_that_come_meanwhile(autojump_clock: object) -> None:
    """They begin with the members that `default` has then, and this node hears of them when it asks."""
    async with one_more() as here:

        async def reading() -> None:
            main.reading = trio.lowlevel.checkpoint
            await here.agreed_on(here.group, "late")

        async def before_it_has_a_number() -> None:
            main.reading = reading
            await trio.lowlevel.checkpoint()

        main, nodes = here.node.groups[DEFAULT], here.replica.machine.nodes
        main.reading = before_it_has_a_number
        nodes |= {node: Place(f"host:{node}", f"node-{node}") for node in MEMBERS}
        number = await here.replica.roster.invite(Place("host:4", "new"))
        members = Members(MEMBERS.voters, frozenset({number}))
        found = {name: group.core.members for name, group in here.node.groups.items()}
        assert found == dict.fromkeys((DEFAULT, here.group, "late"), members)


async def test_who_has_no_vote_in_some_group_is_a_learner(autojump_clock: object) -> None:
    """Whoever takes it for a voter may lose another node, and a majority of that group."""
    async with one_more() as here:
        here.replica.machine.nodes[4] = Place("host:4", "new")
        register(here.replica.image, here.replica)
        for name, role in ((DEFAULT, "learner"), (here.group, "voter")):
            here.node.groups[name].core.members = Members(MEMBERS.voters | {4})
            assert [node.role for node in (await status(here.replica.image, Nothing())).nodes] == [role]


def listening(here: Here, node: int) -> list[int]:
    """Have another node be connected; kinds of what it is asked."""
    told = list[int]()

    async def hears(kind: int, question: bytes) -> bytes:
        told.append(kind)
        await trio.lowlevel.checkpoint()
        return b""

    here.node.others[node] = hears
    return told


def begin_with(here: Here, nodes: int) -> None:
    """Have so many nodes be known."""
    here.replica.machine.nodes |= {node: Place(f"host:{node}", f"node-{node}") for node in range(1, nodes + 1)}


def known(here: Here) -> list[int]:
    """Nodes that have not left."""
    return [node for node, place in here.replica.machine.nodes.items() if place.address]


@pytest.mark.parametrize("there", [True, False])
async def test_other_groups_follow_default_whoever_began_that_and_did_not_end_it(
    there: bool, autojump_clock: object
) -> None:
    """Or nothing would go on that all groups stand still for (seed 400 of the whole stack)."""
    async with one_more() as here:
        main, other = here.node.groups[DEFAULT], here.node.groups[here.group]
        told, members = listening(here, 3) if there else [LEFT], Members(frozenset({1, 2}), frozenset({4}))
        begin_with(here, 5)
        other.leader = 0
        main.core.may_change = lambda: False
        await main.change_members(members)
        await trio.sleep(5)
        other.leader = 1
        await trio.sleep(5)
        assert other.core.members == MEMBERS, "it is being changed"
        main.core.may_change, other.leader = lambda: True, 0
        await trio.sleep(15)
        assert (LEFT in told) != there, "it has a vote there yet"
        other.leader = 1
        await trio.sleep(15)
        assert other.core.members == members
        assert told.count(LEFT) == 1
        assert known(here) == ([1, 2, 4, 5] if there else [1, 2, 3, 4, 5])


@pytest.mark.parametrize(("which", "leads"), [("default", True), ("default", False), ("other", False)])
async def test_who_does_not_lead_any_more_sends_nobody_away(which: str, leads: bool, autojump_clock: object) -> None:
    """What its log says of the members may come to nothing; it may not know that another one leads."""
    async with one_more() as here:
        name, told = DEFAULT if which == "default" else here.group, listening(here, 3)
        begin_with(here, 3)
        here.node.groups[name].core.members = Members(frozenset({1, 2}))
        here.node.groups[name].is_leader = leads
        with pytest.raises(NotLeaderError):
            await here.node.handlers[CONTROL](2, msgspec.msgpack.encode((2, 3, name)))
        assert (LEFT not in told, known(here)) == (True, [1, 2, 3])
        assert {machine.applied.members for machine in here.assembly.machines.values()} == {MEMBERS}


async def test_who_alone_has_a_vote_in_some_group_stays_for_now(autojump_clock: object) -> None:
    async with one_more() as here:
        begin_with(here, 3)
        await here.node.groups[here.group].change_members(Members(frozenset({3}), frozenset({1, 2})))
        with pytest.raises(RefusedError, match="alone has a vote"):
            await here.replica.roster.dismiss(3)
        assert here.node.groups[DEFAULT].core.members == MEMBERS, "nothing is changed"


async def test_who_was_sent_away_meanwhile_is_not_let_in(autojump_clock: object) -> None:
    async with one_more() as here:
        begin_with(here, 4)
        here.replica.machine.nodes[4] = Place("", "")
        with pytest.raises(RefusedError, match="has left"):
            await here.node.handlers[CONTROL](2, msgspec.msgpack.encode((1, 4, DEFAULT)))


async def test_an_address_is_free_when_who_had_it_is_no_member(autojump_clock: object) -> None:
    """As after `cluster recover`. Other groups may count on it: it leaves them first."""
    async with one_more() as here:
        begin_with(here, 4)
        assert await here.replica.roster.invite(Place("host:4", "new")) == 5
        assert known(here) == [1, 2, 3, 5]
        with pytest.raises(RefusedError, match="is that of node 3"):
            await here.replica.roster.invite(Place("host:3", "new"))


async def test_a_member_that_is_known_to_have_left_goes(autojump_clock: object) -> None:
    async with one_more() as here:
        begin_with(here, 3)
        here.replica.machine.nodes[3] = Place("", "")
        await trio.sleep(5)
        left = Members(frozenset({1, 2}))
        assert {group.core.members for group in here.node.groups.values()} == {left}


async def test_whoever_asks_is_told_that_a_change_goes_on_that_some_group_refuses_yet(autojump_clock: object) -> None:
    async with one_more() as here:
        begin_with(here, 3)

        async def refuses(members: Members) -> None:
            await trio.lowlevel.checkpoint()
            raise RefusedError("raft group", "is changing its members")

        here.node.groups[here.group].change_members = refuses  # type: ignore[method-assign]
        with pytest.raises(RefusedError, match="not in all groups yet") as told:
            await here.replica.roster.dismiss(3)
        assert told.value.hint == "that goes on: see nbdvde cluster status"
        assert known(here) == [1, 2, 3]


async def test_who_leaves_waits_for_nothing_that_it_is_not_told(autojump_clock: object) -> None:
    async with one_more() as here:
        asked = list[int]()

        async def request(kind: int, question: bytes) -> bytes:
            asked.append(kind)
            await trio.lowlevel.checkpoint()
            return b""

        here.node.others[2] = request
        here.replica.machine.nodes[1] = Place("host:1", "me")
        here.node.groups[DEFAULT].reading = trio.sleep_forever
        await here.replica.roster.dismiss(1)
        assert asked.count(CONTROL) == 1


async def test_a_node_tells_how_far_it_is_for_good(autojump_clock: object) -> None:
    """What it was told before may be forgotten then."""
    async with one_more() as here:
        durable, noted = here.assembly.durable, list[int]()

        async def keeping() -> None:
            await durable()
            noted.append(here.replica.machine.applied.index)
            await here.propose(Attach("disk", 1))

        here.assembly.durable = keeping  # type: ignore[method-assign]
        answer = await here.node.handlers[APPLIED](2, b"")
        assert [int.from_bytes(answer, "little")] == noted
