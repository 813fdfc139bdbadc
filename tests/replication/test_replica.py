"""How a node has things agreed on, without the others: what of them counts here is put in their place."""

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from nbdvde.errors import DamageError, DetachedError, MovedError, NetworkError, NoSpaceError, RefusedError
from nbdvde.raft.core import NotLeaderError
from nbdvde.raft.messages import Members
from nbdvde.raft.waiting import GroupEnded, LeadershipLost
from nbdvde.replication import results, roster
from nbdvde.replication.assembly import DEFAULT
from nbdvde.replication.disk import Attachment
from nbdvde.replication.lane import Lane
from nbdvde.replication.operations import Action, Change, Release
from nbdvde.replication.replica import Replica
from nbdvde.replication.room import Room
from nbdvde.replication.sealing import Sealer
from tests.replication.entries import CLUSTER
from tests.replication.test_catchup import NOTE, giver, image

ROOM = 64 << 20
CHANGE = Change("disk", 0, Action.TRIM, 0, 4096)


@asynccontextmanager
async def replica(image: object = None) -> AsyncIterator[Any]:
    """Of node 1."""
    async with trio.open_nursery() as nursery:
        node: Any = SimpleNamespace(number=1)
        yield Replica(image, CLUSTER, node, sealer(), nursery)  # type: ignore[arg-type]
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def lane() -> AsyncIterator[Any]:
    """Of a group that node 1 leads."""
    async with trio.open_nursery() as nursery:
        node, group = SimpleNamespace(number=1), Woken()
        yield Lane(None, group, node, sealer(), None, nursery)  # type: ignore[arg-type]
        nursery.cancel_scope.cancel()


class Woken(SimpleNamespace):
    """A group."""

    def __init__(self) -> None:
        super().__init__(leader=1, name=DEFAULT, woken=0)

    def wake(self) -> None:
        self.woken += 1


def sealer() -> Sealer:
    return Sealer(CLUSTER.key, random.Random(1).randbytes)


def failing(*errors: Exception) -> Callable[..., Any]:
    """Raises them, one each time, and answers then."""
    left = list(errors)

    async def call(*_: object) -> object:
        await trio.lowlevel.checkpoint()
        if left:
            raise left.pop(0)
        return "done"

    call.left = left  # type: ignore[attr-defined]
    return call


async def test_a_barrier_waits_until_somebody_leads(autojump_clock: MockClock) -> None:
    async with lane() as here:
        here.group.read_barrier = failing(NotLeaderError("a", "b"), LeadershipLost("g"), NotLeaderError("a", "b"))
        await here.barrier()
        assert not here.group.read_barrier.left
        assert here.group.woken == 3, "it may be quiet, and its leader gone"


async def test_who_does_not_know_what_became_of_it_does_not_ask_again(autojump_clock: MockClock) -> None:
    async with lane() as here:
        here.group.propose = failing(NotLeaderError("a", "b"), LeadershipLost("g"))
        with pytest.raises(DetachedError):
            await here.propose(Release("disk", 1))
        assert here.group.woken == 1


async def test_what_a_group_that_is_gone_did_not_do_is_asked_of_another() -> None:
    async with lane() as here:
        here.group.propose = here.group.read_barrier = failing(*[GroupEnded("raft group g", "is not here")] * 4)
        here.end(gone=True)
        for ask in (here.barrier, lambda: here.propose(Release("disk", 1)), lambda: here.put(CHANGE)):
            with pytest.raises(MovedError):
                await ask()
        answer = await here.propose_for_another(sealer().seal(DEFAULT, [CHANGE]), 0)
        assert isinstance(results.unpack(answer), MovedError)


async def test_an_entry_that_nobody_could_open_is_not_proposed() -> None:
    async with lane() as here:
        answer = await here.propose_for_another(b"x" * 60, 0)
        assert isinstance(results.unpack(answer), DamageError)


async def test_refusals_of_the_leader_are_raised(autojump_clock: MockClock) -> None:
    async with lane() as here:
        here.group.leader, here._node.is_connected = 2, lambda node: True
        answers = [
            results.pack(RefusedError("disk", "is full of errors")),
            results.pack([None, RefusedError("a", "b")]),
        ]

        async def request(kind: int, question: bytes) -> bytes:
            return answers.pop(0)

        here._node.peer = lambda node: SimpleNamespace(request=request)
        with pytest.raises(RefusedError, match="is full of errors"):
            await here.propose(Release("disk", 1))
        assert await here.propose(Release("disk", 1))


async def test_who_is_taken_over_is_told() -> None:
    async with replica() as here:
        told = list[str]()
        here._attachments["disk"] = attachment = Attachment(5)
        attachment.join(lambda: told.append("end"))
        here.attached("disk", 5, 1)
        assert not told
        here.attached("disk", 6, 2)
        assert (told, attachment.over) == (["end"], True)


async def test_a_state_that_is_older_than_what_was_offered_is_not_enough() -> None:
    source, behind = await image(), await image()
    async with replica(behind) as here:
        giving, core = giver(source), SimpleNamespace(members=Members(frozenset()))
        here.lanes[DEFAULT] = SimpleNamespace(group=SimpleNamespace(core=core, leader=0))
        here.node.peer = lambda node: SimpleNamespace(request=lambda kind, question: giving.answer(question))
        with pytest.raises(NetworkError, match="not as far"):
            await here.fetch(2, {DEFAULT: NOTE.applied.index + 1}, trio.lowlevel.checkpoint)
        assert await here.fetch(2, {DEFAULT: NOTE.applied.index}, trio.lowlevel.checkpoint) == {DEFAULT: NOTE}
    await source.close()
    await behind.close()


async def test_learners_that_have_everything_become_voters() -> None:
    members = Members(frozenset({1, 2}), frozenset({4, 5}))
    asked = list[Members]()

    async def change(wanted: Members) -> None:
        asked.append(wanted)

    followers = {4: SimpleNamespace(match=8), 5: SimpleNamespace(match=90_000)}
    log = SimpleNamespace(members_index=80_000, last_index=90_000)
    core = SimpleNamespace(office=SimpleNamespace(followers=followers), members=members, log=log)
    group: Any = SimpleNamespace(core=core, change_members=change)
    await roster._promote(group)
    assert asked == [Members(frozenset({1, 2, 5}), frozenset({4}))]


@pytest.mark.parametrize(
    ("here", "others", "admits"),
    [(ROOM, (ROOM, ROOM), True), (ROOM, (0, ROOM), True), (ROOM, (0, 0), False), (1 << 20, (ROOM, ROOM), False)],
)
async def test_writes_are_let_in_while_most_have_room(
    here: int, others: tuple[int, int], admits: bool, autojump_clock: MockClock
) -> None:
    async def clean(worth: float) -> None:
        await trio.lowlevel.checkpoint()

    core = SimpleNamespace(members=Members(frozenset({1, 2, 3})), office=SimpleNamespace(uncommitted_bytes=0))
    image: Any = SimpleNamespace(spare_bytes=here, clean=clean, path="image")
    node: Any = SimpleNamespace(number=1)
    group: Any = SimpleNamespace(core=core)
    room = Room(image, node, lambda: [group], 4)
    room._others = dict(zip((2, 3), others, strict=True))
    if admits:
        await room.admit(group, 4096)
    else:
        with pytest.raises(NoSpaceError):
            await room.admit(group, 4096)
