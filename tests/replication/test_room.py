"""What is proposed only where images have room for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import msgspec
import pytest
import trio

from nbdvde.admin.streamcalls import AdvanceTail, CreateStream, StreamRequest
from nbdvde.admin.wormcalls import CreateWorm, WormRequest
from nbdvde.disk import BLOCK
from nbdvde.engine.access import open_storage
from nbdvde.engine.image import Image
from nbdvde.errors import NoSpaceError
from nbdvde.replication.compare import CHUNK
from nbdvde.replication.operations import Operation, Repair
from nbdvde.replication.room import Room
from tests.crash.session import KEY
from tests.replication.entries import machine_of
from tests.replication.leading import leading
from tests.replication.test_catchup import image
from tests.replication.test_holds import settled, two_more
from tests.replication.test_regions import append, fresh
from tests.replication.test_verification import Three, compared

LEAST = 64 << 10
"""Bytes that any call may take."""


@contextmanager
def full() -> Iterator[list[int]]:
    """No node has room for more; how much was asked for."""
    asked = list[int]()

    async def refuse(room: Room, group: object, size: int) -> None:
        await trio.lowlevel.checkpoint()
        asked.append(size)
        raise NoSpaceError("image", "is full on the node that leads")

    with mock.patch.object(Room, "admit", refuse):
        yield asked


async def test_calls_are_let_in_where_there_is_room_and_those_that_free_space_always() -> None:
    made = await image()
    async with leading(made) as (replica, _):

        async def ask(path: str, request: msgspec.Struct) -> bytes:
            return await replica.call(path, msgspec.msgpack.encode(request))

        entry = append(*[bytes(BLOCK // 2)] * 5)
        with mock.patch.object(Image, "spare_bytes", 1 << 30):
            await ask("stream/create", CreateStream(16 * BLOCK, increment=BLOCK))
            await ask("worm/create", CreateWorm(4 * BLOCK, 0))
            await replica.call(entry.path, entry.request)
        with full() as asked:
            index = replica.machine.applied.index
            for path, request in (
                (entry.path, entry.request), ("worm/create", msgspec.msgpack.encode(CreateWorm(4 * BLOCK, 0))),
            ):  # fmt: skip
                with pytest.raises(NoSpaceError):
                    await replica.call(path, request)
                assert asked.pop() == LEAST + len(request)
            assert replica.machine.applied.index == index, "nothing was proposed"
            await ask("stream/advance", AdvanceTail(1))
            await ask("worm/tend", WormRequest())
            await ask("stream/delete", StreamRequest())
            assert not asked
    await made.close()


async def test_so_are_those_for_which_all_groups_stand_still(autojump_clock: object) -> None:
    """And the groups go on when there is none."""
    create = msgspec.json.encode({"name": "more", "size": 1 << 20})
    async with two_more() as (replica, _, _):
        with full() as asked:
            with pytest.raises(NoSpaceError):
                await replica.call("disks/create", create)
            assert asked == [LEAST + len(create)]
        await settled(replica)
        await replica.call("disks/create", create)
        assert replica.image.volumes.find("more")


class Full(Three):
    """Nodes without room for what would grow."""

    async def propose(self, operation: Operation, *, growth: int = 0) -> object:
        if isinstance(operation, Repair):
            self.grown = growth
            raise NoSpaceError("image", "is full on the node that leads")
        return await super().propose(operation)


async def test_what_differs_is_repaired_where_there_is_room() -> None:
    """Or all nodes stand still when they come to it."""
    images = [await open_storage(fresh(), KEY) for _ in range(3)]
    nodes = Full(images, [await machine_of(image) for image in images])
    await images[1].disk().write(0, memoryview(b"x" * BLOCK))
    _, differences = await compared(nodes, repair=True)
    assert [(found.nodes, found.repaired) for found in differences] == [([2], False)]
    assert nodes.grown == CHUNK
    for one in images:
        await one.close()
