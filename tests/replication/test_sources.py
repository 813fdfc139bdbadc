"""Nodes take over states while others take theirs over, or wait for theirs."""

from collections.abc import Awaitable, Callable, Mapping

import msgspec
import pytest
import trio

from nbdvde.disk import BLOCK
from nbdvde.errors import RefusedError
from nbdvde.raft.messages import Snapshot
from nbdvde.replication.assembly import DEFAULT
from nbdvde.replication.catchup import Taker
from nbdvde.replication.notes import Note
from nbdvde.replication.questions import AskChunks, AskState, Question
from nbdvde.replication.replica import CATCH_UP
from tests.replication.entries import CLUSTER, MEMBERS, assembly_of
from tests.replication.leading import leading
from tests.replication.test_catchup import NOTE, everything, image, run
from tests.replication.test_taking_over import answering


async def test_it_begins_again_when_the_source_itself_takes_over_a_state() -> None:
    """What was told before and what is told then would not go together."""
    newest, source, behind, states = await image(), await image(), await image(), 0
    await newest.disk().write(0, memoryview(b"x" * BLOCK))
    async with leading(source) as (replica, node):
        node.others[3] = answering(newest)

        async def ask(question: bytes) -> bytes:
            nonlocal states
            kind = msgspec.msgpack.decode(question, type=Question)
            states += isinstance(kind, AskState)
            if states == 1 and isinstance(kind, AskChunks) and not replica.taken:
                await replica.assembly.take_over(3, DEFAULT, NOTE.applied)
            return await node.handlers[CATCH_UP](2, question)

        notes = await run(Taker(behind, CLUSTER.key, ask))
    assert states == 4
    assert notes[DEFAULT].applied == NOTE.applied
    assert await everything(behind) == await everything(newest)
    for one in (newest, source, behind):
        await one.close()


async def test_who_has_half_a_state_gives_none() -> None:
    newest, source = await image(), await image()
    answer, refused = answering(newest), 0
    async with leading(source) as (replica, node):

        async def meanwhile(kind: int, question: bytes) -> bytes:
            nonlocal refused
            if replica.incomplete:
                with pytest.raises(RefusedError, match="is itself taking over"):
                    await node.handlers[CATCH_UP](2, msgspec.msgpack.encode(AskState()))
                refused += 1
            return await answer(kind, question)

        node.others[3] = meanwhile
        await replica.assembly.take_over(3, DEFAULT, NOTE.applied)
        assert refused
        assert await node.handlers[CATCH_UP](2, msgspec.msgpack.encode(AskState()))
    for one in (newest, source):
        await one.close()


async def test_the_state_that_came_for_one_group_serves_the_others() -> None:
    behind, asked = await image(), list[int]()
    names = DEFAULT, "g5.0", "g5.1"

    async def fetch(source: int, have: Mapping[str, int], begin: Callable[[], Awaitable[None]]) -> Mapping[str, Note]:
        asked.append(source)
        await begin()
        return {name: Note(name, Snapshot(100 * len(asked), 2, MEMBERS)) for name in names}

    assembly = await assembly_of(behind, fetch=fetch)
    assembly.arrange(names, MEMBERS)
    async with trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(assembly.take_over, 2, name, Snapshot(90, 2, MEMBERS))
    assert asked == [2]
    assert (await assembly.take_over(3, "g5.1", Snapshot(100, 2, MEMBERS))).index == 100
    assert asked == [2]
    assert (await assembly.take_over(3, "g5.1", Snapshot(101, 2, MEMBERS))).index == 200
    assert asked == [2, 3]
    await behind.close()


async def test_half_a_state_serves_nobody() -> None:
    behind, asked = await image(), list[int]()

    async def fetch(source: int, have: Mapping[str, int], begin: Callable[[], Awaitable[None]]) -> Mapping[str, Note]:
        asked.append(source)
        await begin()
        return {DEFAULT: Note(DEFAULT, Snapshot(100, 2, MEMBERS))}

    assembly = await assembly_of(behind, fetch=fetch)
    await assembly.take_over(2, DEFAULT, Snapshot(100, 2, MEMBERS))
    assembly.incomplete = True
    await assembly.take_over(2, DEFAULT, Snapshot(100, 2, MEMBERS))
    assert asked == [2, 2]
    assert not assembly.incomplete
    await behind.close()
