"""The state of another node is taken over: nobody reads half of one, and it becomes a whole one."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, cast

import msgspec
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from nbdvde.disk import BLOCK, Piece
from nbdvde.engine.image import Image
from nbdvde.errors import NetworkError, RefusedError
from nbdvde.raft.messages import Members, NodeId, Snapshot
from nbdvde.replication.assembly import DEFAULT
from nbdvde.replication.catchup import Taker
from nbdvde.replication.disk import ReplicatedDisk
from nbdvde.replication.machine import ImageMachine
from nbdvde.replication.notes import Note, Notes
from nbdvde.replication.operations import Call
from nbdvde.replication.questions import AskState, Question
from tests.replication import test_machine
from tests.replication.entries import CLUSTER, MEMBERS, Author, Heard, assembly_of, machine_of
from tests.replication.leading import Answer, leading, without_threads
from tests.replication.test_catchup import NOTE, everything, giver, image, run
from tests.replication.test_disk import Volume, Ways

PATIENCE_S = 60.0
DATA = memoryview(b"x" * BLOCK)


async def half_taken_over() -> Image:
    """An image that was becoming that of another node when its own node ended."""
    made = await image()
    await Notes.make(made, CLUSTER)
    notes = await Notes.load(made)
    assert notes
    await notes.put(lambda: [Note(DEFAULT, Snapshot(3, 1, MEMBERS), incomplete=True)])
    return made


def answering(source: Image) -> Answer:
    given = giver(source)

    async def answer(kind: int, question: bytes) -> bytes:
        return await given.answer(question)

    return answer


async def unheard(kind: int, question: bytes) -> bytes:
    await trio.lowlevel.checkpoint()
    raise NetworkError("a node", "is not connected any more")


# Who reads meanwhile


class Changing(Volume):
    """Becomes what another node has while it is read, the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = Ways(self)

    def read_nowait(self, offset: int, length: int) -> Any:
        return None

    async def read(self, offset: int, length: int) -> Sequence[Piece]:
        return [await self._held()]

    async def status(self, context: str, offset: int, length: int, max_extents: int) -> list[tuple[int, int]]:
        return [(len(await self._held()), 0)]

    async def _held(self) -> bytes:
        held = self.held
        await trio.lowlevel.checkpoint()
        if not self.ways.taken:
            self.ways.taken, self.held = 1, b"another"
        return held


async def test_what_is_read_while_a_state_is_taken_over_is_read_again() -> None:
    changing = Changing()
    disk = ReplicatedDisk("disk", lambda: cast(Any, changing), changing.ways)
    assert await disk.read(0, 3) == [b"another"]
    changing.ways.taken, changing.held = 0, b"old"
    assert await disk.status("base:allocation", 0, 3, 1) == [(len(b"another"), 0)]


async def test_nobody_reads_before_a_state_is_whole(autojump_clock: object) -> None:
    source, half = await image(), await half_taken_over()
    await source.disk().write(0, DATA)
    with trio.fail_after(PATIENCE_S):
        async with leading(half) as (replica, node):
            with trio.move_on_after(5) as early:
                await replica.barrier("disk", 0, BLOCK)
            assert early.cancelled_caught
            node.others[2] = answering(source)
            await replica.barrier("disk", 0, BLOCK)
            assert await everything(half) == await everything(source)
    for one in (source, half):
        await one.close()


async def test_who_reads_while_a_state_begins_to_be_taken_over_waits_for_it(autojump_clock: object) -> None:
    source, behind, rounds = await image(), await image(), list[int]()
    answer = answering(source)

    async def slowly(kind: int, question: bytes) -> bytes:
        await trio.sleep(5)
        return await answer(kind, question)

    with trio.fail_after(PATIENCE_S):
        async with leading(behind) as (replica, node), trio.open_nursery() as nursery:
            node.others[2] = slowly

            async def reading() -> None:
                rounds.append(replica.taken)
                if len(rounds) == 1:
                    nursery.start_soon(replica.assembly.take_over, 2, DEFAULT, NOTE.applied)
                    await trio.sleep(7)
                    assert replica.incomplete

            node.groups[DEFAULT].reading = reading
            await replica.barrier("disk", 0, BLOCK)
            assert not replica.incomplete
            assert rounds == [0, 1]
    for one in (source, behind):
        await one.close()


# It is completed


async def test_half_a_state_is_completed_though_nobody_reads_and_nothing_is_to_apply(autojump_clock: object) -> None:
    source, half = await image(), await half_taken_over()
    with trio.fail_after(PATIENCE_S):
        async with leading(half) as (replica, node):
            node.others[3] = answering(source)
            while replica.incomplete:  # noqa: ASYNC110 - nobody tells of it
                await trio.sleep(0.1)
            assert replica.machine.applied == NOTE.applied
    for one in (source, half):
        await one.close()


async def test_it_is_completed_by_whoever_waits_when_another_one_waits_no_longer(autojump_clock: object) -> None:
    half, failures = await half_taken_over(), [NetworkError("node 2", "has gone")]

    async def fetch(source: NodeId, have: object, begin: Callable[[], Awaitable[None]]) -> Mapping[str, Note]:
        if failures:
            raise failures.pop()
        await begin()
        return {DEFAULT: NOTE}

    assembly = await assembly_of(half, fetch=fetch)

    async def impatient() -> None:
        with trio.move_on_after(0.2):  # it is tried again later than that
            await assembly.whole()

    with without_threads(), trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(impatient)
            await wait_all_tasks_blocked()
            await assembly.whole()
    assert not assembly.incomplete
    await half.close()


async def test_what_came_with_a_state_is_told_though_nobody_waits_for_it_any_more() -> None:
    """A group may end while it takes a state over: the state is there for all groups."""
    behind, heard = await image(), Heard()

    async def fetch(source: NodeId, have: object, begin: Callable[[], Awaitable[None]]) -> Mapping[str, Note]:
        return {DEFAULT: NOTE}

    assembly = await assembly_of(behind, heard, fetch)
    with trio.CancelScope() as scope:

        async def durable() -> None:
            scope.cancel()
            await trio.lowlevel.checkpoint()

        assembly.durable = durable  # type: ignore[method-assign]
        await assembly.take_over(2, DEFAULT, NOTE.applied)
    assert scope.cancelled_caught
    assert heard.attachments == [("disk", *NOTE.epochs["disk"])]
    assert heard.arrangements == 1
    await behind.close()


@pytest.mark.parametrize(("leader", "asked"), [(2, [2, 3]), (3, [3]), (0, [2, 3])])
async def test_whoever_can_be_reached_has_a_state_to_give_the_leader_first(leader: int, asked: list[int]) -> None:
    """A leader may be half of a state itself."""
    source, half, found = await image(), await half_taken_over(), list[int]()
    answer = answering(source)

    async def give(kind: int, question: bytes) -> bytes:
        found.append(3)
        return await answer(kind, question)

    async def refuse(kind: int, question: bytes) -> bytes:
        found.append(2)
        return await unheard(kind, question)

    async with leading(half) as (replica, node):
        node.groups[DEFAULT].leader = leader
        node.others |= {3: give, 2: refuse}
        assert await replica.fetch(0, {}, trio.lowlevel.checkpoint) == {DEFAULT: NOTE}
    assert list(dict.fromkeys(found)) == asked
    for one in (source, half):
        await one.close()


@pytest.mark.parametrize(("first", "asked"), [(3, [3]), (2, [2, 3])])
async def test_who_offers_a_state_is_asked_first_and_others_when_that_is_behind_in_another_group(
    first: int, asked: list[int]
) -> None:
    """Two nodes, each behind in a group that the other one leads, would wait for each other for ever."""
    source, behind, found = await image(), await image(), list[int]()
    older = giver(source, note=Note(DEFAULT, Snapshot(1, 1, MEMBERS)))
    answer = answering(source)

    async def give(kind: int, question: bytes) -> bytes:
        found.append(3)
        return await answer(kind, question)

    async def lag(kind: int, question: bytes) -> bytes:
        found.append(2)
        return await older.answer(question)

    async with leading(behind) as (replica, node):
        with pytest.raises(NetworkError, match="nobody to take the state from"):
            await replica.fetch(0, {}, trio.lowlevel.checkpoint)
        node.groups[DEFAULT].leader = 2
        node.others |= {2: lag, 3: give}
        have = {DEFAULT: NOTE.applied.index}
        assert await replica.fetch(first, have, trio.lowlevel.checkpoint) == {DEFAULT: NOTE}
    assert list(dict.fromkeys(found)) == asked
    for one in (source, behind):
        await one.close()


async def test_who_knows_no_members_yet_asks_who_offers_a_state() -> None:
    source, fresh = await image(), await image()
    async with leading(fresh) as (replica, node):
        node.groups[DEFAULT].core.members = Members(frozenset())
        node.others[3] = answering(source)
        assert await replica.fetch(3, {}, trio.lowlevel.checkpoint) == {DEFAULT: NOTE}
    for one in (source, fresh):
        await one.close()


# Whose disks change meanwhile


async def test_it_begins_again_when_a_disk_went_back() -> None:
    """That shows in no list of disks."""
    source, behind, states = await image(), await image(), 0
    given = giver(source, lambda: 2 * (states > 1))

    async def ask(question: bytes) -> bytes:
        nonlocal states
        if isinstance(msgspec.msgpack.decode(question, type=Question), AskState):
            states += 1
            if states == 2:
                await source.disk().write(0, DATA)
        return await given.answer(question)

    await run(Taker(behind, CLUSTER.key, ask))
    assert states == 4
    assert await everything(behind) == await everything(source)
    for one in (source, behind):
        await one.close()


async def test_who_changes_its_disks_just_now_has_no_state_to_give() -> None:
    """Notes and disks would not go together."""
    source = await image()
    with pytest.raises(RefusedError, match="just now"):
        await giver(source, lambda: 1).answer(msgspec.msgpack.encode(AskState()))
    await source.close()


@pytest.mark.parametrize("name", ["disk@s", "none@s"], ids=["done", "refused"])
async def test_a_change_of_disks_is_told_from_its_beginning_to_its_end(name: str) -> None:
    made, seen = await image(), list[int]()
    machine = await machine_of(made)
    assembly, execute = machine._assembly, machine._execute

    async def watched(machine: ImageMachine, call: Call) -> bytes:
        seen.append(assembly.changing)
        return await execute(machine, call)

    machine._execute = watched
    regions = Call("stream/create", b"", 1, bytes(32))
    await machine.apply(Author().entries([test_machine.call("snapshots/create", name), regions]))
    assert (seen, assembly.changing) == ([1, 2], 2)
    await made.close()
