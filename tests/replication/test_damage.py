"""What a node does about damage of its own image: others have what it cannot read."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import pytest
import trio

from nbdvde.disk import BLOCK
from nbdvde.errors import DamageError, DetachedError, NetworkError
from nbdvde.raft.messages import Snapshot
from nbdvde.replication.assembly import DEFAULT, Assembly
from nbdvde.replication.compare import CHUNK
from nbdvde.replication.machine import Execute, ImageMachine
from nbdvde.replication.notes import Note
from nbdvde.replication.operations import Action, Arrange, Begin, Call, Change, Hold
from tests.replication.entries import MEMBERS, Author, assembly_of
from tests.replication.leading import without_threads
from tests.replication.test_catchup import everything, image, run, taker
from tests.replication.test_machine import call

PATIENCE_S = 10_000.0
TRIM = [Change("disk", 0, Action.TRIM, 0, BLOCK)]


async def damaged(*_: object) -> Any:
    await trio.lowlevel.checkpoint()
    raise DamageError("extent", "fails its authentication")


@pytest.mark.parametrize("what", ["chunk", "blocks"])
async def test_a_chunk_that_cannot_be_read_is_copied_whole(what: str) -> None:
    source, behind = await image(), await image()
    for one in (source, behind):
        await one.disk().write(CHUNK, memoryview(b"x" * CHUNK))
    await source.disk().write(CHUNK, memoryview(b"y" * BLOCK))
    catching = taker(behind, source)
    setattr(catching._hasher, what, damaged)
    await run(catching)
    assert catching.copied == CHUNK // BLOCK
    assert await everything(behind) == await everything(source)
    for one in (source, behind):
        await one.close()


class Here:
    """A node that cannot apply some entry."""

    def __init__(self) -> None:
        self.asked = list[float]()
        """When others were asked for what they have."""
        self.helps_after = 0
        """So many times nobody can be asked."""
        self.given: Note | None = None
        self.assembly: Assembly
        self.author = Author()

    @property
    def machine(self) -> Any:
        return self.assembly.machines[DEFAULT]

    async def fetch(
        self, source: int, have: Mapping[str, int], begin: Callable[[], Awaitable[None]]
    ) -> Mapping[str, Note]:
        self.asked.append(trio.current_time())
        if len(self.asked) <= self.helps_after or not self.given:
            raise NetworkError("cluster", "has nobody to take the state from")
        await begin()
        return {DEFAULT: self.given}


@asynccontextmanager
async def here() -> AsyncIterator[Here]:
    made, found = await image(), Here()
    with ExitStack() as stack:
        stack.enter_context(without_threads())
        stack.enter_context(trio.fail_after(PATIENCE_S))
        found.assembly = await assembly_of(made, fetch=found.fetch)
        yield found
    await made.close()


async def test_what_cannot_be_applied_for_damage_is_taken_over_with_more_and_more_patience(
    autojump_clock: object,
) -> None:
    async with here() as node:
        change, node.machine._change_volume = node.machine._change_volume, damaged
        node.helps_after, node.given = 3, Note(DEFAULT, Snapshot(1, 1, MEMBERS))
        begun_s = trio.current_time()
        ((unknown,),) = await node.machine.apply([node.author.entry(TRIM)])
        assert isinstance(unknown, DetachedError), "others have done it"
        assert [at - begun_s for at in node.asked] == [2, 2 + 4, 2 + 4 + 8, 2 + 4 + 8 + 16]
        assert (node.machine.applied.index, node.machine.stuck) == (1, "")
        node.machine._change_volume = change
        assert await node.machine.apply([node.author.entry(TRIM)]) == [[None]]
        node.machine._change_volume, begun_s = damaged, trio.current_time()
        node.given = Note(DEFAULT, Snapshot(3, 1, MEMBERS))
        await node.machine.apply([node.author.entry(TRIM)])
        assert node.asked[4:] == [begun_s + 2], "it had helped"


async def test_a_state_that_lacks_the_entry_does_not_help(autojump_clock: object) -> None:
    async with here() as node:
        fails = True

        async def change(*_: object) -> None:
            if fails:
                await damaged()

        node.machine._change_volume = change
        node.given = Note(DEFAULT, Snapshot(0, 0, MEMBERS))
        begun_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.machine.apply, [node.author.entry(TRIM)])
            await trio.sleep(7)
            assert node.machine.stuck
            fails = False
        assert [at - begun_s for at in node.asked] == [2, 2 + 4]
        assert (node.machine.applied.index, node.machine.stuck) == (1, "")


async def test_a_call_has_more_and_more_patience_as_well(autojump_clock: object) -> None:
    """That what comes before it could be done is no reason to hope."""
    async with here() as node:
        node.machine._execute = damaged
        node.helps_after, node.given = 2, Note(DEFAULT, Snapshot(1, 1, MEMBERS))
        begun_s = trio.current_time()
        await node.machine.apply([node.author.entry(call("snapshots/create", "disk@a"))])
        assert [at - begun_s for at in node.asked] == [2, 2 + 4, 2 + 4 + 8]


async def test_a_call_that_was_given_up_for_damage_is_done_under_its_hold(autojump_clock: object) -> None:
    """Others have done it: a node that takes the hold for given up would refuse it, and differ for ever."""
    async with here() as node:
        (hold, arranged) = await node.machine.apply(node.author.entries([Begin(), Arrange(1, (DEFAULT, "g1.0"))]))
        assert (hold, arranged) == (1, None)
        (hold,) = await node.machine.apply([node.author.entry(Begin())])
        assert hold == 3
        await node.assembly.machines["g1.0"].apply([Author("g1.0", 1).entry(Hold(3))])
        execute: Execute = node.machine._execute
        tries = 0

        async def fails_for_long(machine: ImageMachine, asked: Call) -> bytes:
            nonlocal tries
            tries += 1
            if tries < 8:
                await damaged()
            return await execute(machine, asked)

        node.machine._execute = fails_for_long
        asked = call("snapshots/create", "disk@a")
        under = Call(asked.path, asked.request, asked.time_ns, asked.seed, hold=3)
        (result,) = await node.machine.apply([node.author.entry(under)])
        assert isinstance(result, bytes)
        assert len(node.asked) == 1
        assert (node.assembly.holding, node.assembly.settled) == (0, 3)
