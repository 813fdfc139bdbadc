"""While all groups stand still: what `default` agreed on is done or given up, whoever fails meanwhile."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast
from unittest import mock

import msgspec
import trio

from nbdvde.engine.access import open_storage
from nbdvde.engine.image import Image
from nbdvde.errors import DetachedError
from nbdvde.replication.assembly import DEFAULT
from nbdvde.replication.operations import Begin, Call, Hold, Operation
from nbdvde.replication.replica import Replica
from tests.crash.session import KEY
from tests.replication.leading import Node, leading
from tests.replication.test_groups import fresh

PATIENCE_S = 60.0
SNAPSHOT = msgspec.json.encode({"name": "disk@s"})


@asynccontextmanager
async def two_more() -> AsyncIterator[tuple[Replica, Node, list[str]]]:
    """A replica with two groups besides `default`, and their names; there is room for everything."""
    image = await open_storage(fresh(), KEY)
    with trio.fail_after(PATIENCE_S), mock.patch.object(Image, "spare_bytes", 1 << 30):
        async with leading(image) as (replica, node):
            await replica.arrange(2, [])
            yield replica, node, [machine.name for machine in replica.assembly.others]
    await image.close()


async def propose(replica: Replica, group: str, operation: Operation) -> object:
    return await (await replica.lane(group)).propose(operation)


async def settled(replica: Replica) -> None:
    while replica.assembly.holding:  # noqa: ASYNC110 - nobody tells of it
        await trio.sleep(0.1)


async def test_what_was_agreed_on_under_a_hold_is_done_though_a_group_never_heard_of_it(autojump_clock: object) -> None:
    """Or `default` would wait for that group for ever, and the end of the hold behind it."""
    async with two_more() as (replica, _, [heard, _]):
        hold = cast(int, await propose(replica, DEFAULT, Begin()))
        await propose(replica, heard, Hold(hold))
        begun_s = trio.current_time()
        await propose(replica, DEFAULT, Call("snapshots/create", SNAPSHOT, 1, bytes(32), hold=hold))
        assert [snapshot.name for snapshot in replica.image.volumes.snapshots(replica.image.disk())] == ["s"]
        assert trio.current_time() - begun_s < 7
        assert replica.assembly.settled == hold


async def test_who_stands_still_already_is_not_asked_again(autojump_clock: object) -> None:
    """It would not answer before the hold is over."""
    async with two_more() as (replica, _, names):
        hold = cast(int, await propose(replica, DEFAULT, Begin()))
        for name in names:
            await propose(replica, name, Hold(hold))
        begun_s = trio.current_time()
        await settled(replica)
        assert trio.current_time() - begun_s < 7


async def test_a_hold_is_given_up_though_a_group_has_no_leader(autojump_clock: object) -> None:
    async with two_more() as (replica, node, [lost, _]):
        node.groups[lost].leader = 0
        hold = cast(int, await propose(replica, DEFAULT, Begin()))
        await settled(replica)
        assert replica.assembly.settled == hold


async def test_a_hold_is_given_up_though_nobody_knows_what_became_of_asking_for_it(autojump_clock: object) -> None:
    async with two_more() as (replica, _, [lost, _]):
        hold = cast(int, await propose(replica, DEFAULT, Begin()))

        async def unknown(operation: Operation) -> object:
            await trio.lowlevel.checkpoint()
            raise DetachedError("cluster", "lost its leader")

        replica.lanes[lost].propose = unknown  # type: ignore[method-assign,assignment]
        await settled(replica)
        assert replica.assembly.settled == hold


async def test_a_group_without_a_part_of_the_disks_need_not_stand_still(autojump_clock: object) -> None:
    """The other nodes may have ended it: they know that all have applied by what it lost its part, and no more."""
    async with two_more() as (replica, node, [ending, _]):
        await replica.arrange(0, [ending])
        node.groups[ending].leader = 0
        await replica.call("snapshots/create", SNAPSHOT)
        assert [snapshot.name for snapshot in replica.image.volumes.snapshots(replica.image.disk())] == ["s"]
        assert replica.assembly.machines[ending].held < replica.assembly.settled
