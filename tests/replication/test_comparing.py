"""Whose comparisons count, and what is remembered of them."""

from typing import cast

import pytest
import trio
from trio.testing import MockClock

from nbdvde.disk import BLOCK
from nbdvde.errors import RefusedError
from nbdvde.raft.messages import Snapshot
from nbdvde.replication.assembly import DEFAULT
from nbdvde.replication.catchup import Taker
from nbdvde.replication.compare import CHUNK
from nbdvde.replication.comparison import Comparisons
from nbdvde.replication.giving import Giver
from nbdvde.replication.notes import Note
from nbdvde.replication.operations import Action, Change, Compare, Repair
from nbdvde.replication.replica import Replica
from tests.replication.entries import CLUSTER, GROUP, MEMBERS, Author, machine_of
from tests.replication.leading import Node, leading
from tests.replication.test_catchup import image, run
from tests.replication.test_regions import nothing_compared
from tests.replication.test_taking_over import unheard

PATIENCE_S = 60.0
BEHIND_S = 10.0
"""For this long it is waited for who has not come as far."""


async def behind(kind: int, question: bytes) -> bytes:
    await trio.sleep_forever()
    raise AssertionError


async def hashed(kind: int, question: bytes) -> bytes:
    await trio.sleep(BEHIND_S - 1)
    return b"hashes"


async def _compared(replica: Replica) -> int:
    """The index of an entry that compares."""
    index, _ = cast(tuple[int, bytes], await replica.main.propose(Compare("disk", 0, 1)))
    return index


def fall_behind(node: Node) -> None:
    """Nothing comes to this node."""
    node.groups[DEFAULT].news = trio.sleep_forever  # type: ignore[attr-defined]


async def test_who_is_behind_for_long_is_left_out_of_a_comparison(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    made = await image()
    with trio.fail_after(PATIENCE_S):
        async with leading(made) as (replica, node):
            node.others |= {2: behind, 3: hashed}
            index, begun_s = await _compared(replica), trio.current_time()
            found = await replica.compared(DEFAULT, index)
            assert trio.current_time() - begun_s == BEHIND_S
            assert found == {1: replica.machine.comparisons.of(index), 3: b"hashes"}
            assert "node 2 is not compared: it is behind" in caplog.text
    await made.close()


async def test_so_is_this_node(autojump_clock: MockClock) -> None:
    made = await image()
    with trio.fail_after(PATIENCE_S):
        async with leading(made) as (replica, node):
            node.others |= {2: hashed, 3: unheard}
            fall_behind(node)
            assert await replica.compared(DEFAULT, 100) == {2: b"hashes"}
    await made.close()


async def test_it_is_an_error_when_nobody_is_left(autojump_clock: MockClock) -> None:
    made = await image()
    with trio.fail_after(PATIENCE_S):
        async with leading(made) as (replica, node):
            node.others |= {2: behind, 3: unheard}
            fall_behind(node)
            with pytest.raises(RefusedError, match="no node that is as far"):
                await replica.compared(DEFAULT, 100)
    await made.close()


async def test_only_what_was_compared_last_is_remembered_as_touched() -> None:
    """A disk may be written as a whole between two comparisons."""
    made = await image()
    comparisons = Comparisons(CLUSTER.key)
    await comparisons.compare(1, Compare("disk", 2, 3), made.disk())
    for offset, length in ((0, 2 * CHUNK), (5 * CHUNK, 1 << 40), (2 * CHUNK - 1, 0)):
        comparisons.touch("disk", offset, length)
    assert comparisons._touched == set()
    comparisons.touch("disk", 0, 1 << 50)
    assert comparisons._touched == {2, 3, 4}
    await made.close()


@pytest.mark.parametrize(
    ("chunk", "at", "repaired"),
    [(2, 3, True), (3, 3, False), (3, 5, True), (4, 4, False), (1, 1, False), (5, 4, False)],
)
async def test_what_was_touched_is_not_repaired_nor_what_was_not_compared(chunk: int, at: int, repaired: bool) -> None:
    made = await image()
    comparisons = Comparisons(CLUSTER.key)
    await comparisons.compare(1, Compare("disk", 2, 3), made.disk())
    comparisons.touch("disk", at * CHUNK, BLOCK)
    assert await comparisons.repair(Repair("disk", 1, chunk, b"x" * CHUNK), made.disk()) is repaired
    await made.close()


async def test_what_is_copied_while_its_source_goes_on_is_not_compared_as_of_before() -> None:
    """It may be what later entries made of it: it only seems to differ."""
    first, second = await image(), await image()
    source, behind = await machine_of(first), await machine_of(second)

    def write(number: int) -> list[Change]:
        return [Change("disk", 0, Action.WRITE, 0, BLOCK, bytes([number]) * BLOCK)]

    entries = Author().entries([write(1), Compare("disk", 0, 1), write(2), Compare("disk", 0, 1)])
    await source.apply(entries[:1])
    giver = Giver(first, CLUSTER.key, lambda: [source.note], nothing_compared)

    async def ask(question: bytes) -> bytes:
        answer = await giver.answer(question)
        if source.applied.index == 1:
            await source.apply(entries[1:3])
        return answer

    behind.take((await run(Taker(second, CLUSTER.key, ask)))[GROUP])
    assert (behind.note.applied.index, behind.note.ahead) == (1, 3)
    await behind.apply(entries[1:])
    await source.apply(entries[3:])
    assert [machine.comparisons.of(2) is None for machine in (source, behind)] == [False, True]
    assert behind.comparisons.of(4) == source.comparisons.of(4) != source.comparisons.of(2)
    assert behind.note == source.note
    for one in (first, second):
        await one.close()


async def test_a_group_that_ends_while_a_state_is_taken_over() -> None:
    """Its state is taken over as well, and it comes to its end here too."""
    first, second = await image(), await image()
    source, asked = await machine_of(first), 0
    idle = Note("idle", Snapshot(1, 1, MEMBERS))

    def notes() -> list[Note]:
        nonlocal asked
        asked += 1
        return [source.note, idle][: 2 if asked <= 2 else 1]

    giver = Giver(first, CLUSTER.key, notes, nothing_compared)
    assert (await run(Taker(second, CLUSTER.key, giver.answer)))["idle"] == idle
    assert asked > 2
    for one in (first, second):
        await one.close()
