"""Changes that share entries, and what those are told whose entry nobody knows of."""

from collections.abc import Sequence

import pytest
import trio

from nbdvde.errors import DetachedError, NbdvdeError
from nbdvde.replication.batches import Batches, unknown
from nbdvde.replication.operations import Action, Change


def change(number: int) -> Change:
    return Change("disk", 0, Action.WRITE, number, 1, b"x")


async def told(batches: Batches, number: int, answers: dict[int, object]) -> None:
    try:
        await batches.put(change(number))
        answers[number] = None
    except DetachedError as error:
        answers[number] = error


async def test_what_comes_meanwhile_shares_an_entry(autojump_clock: object) -> None:
    entries = list[int]()

    async def propose(changes: Sequence[Change]) -> Sequence[NbdvdeError | None]:
        entries.append(len(changes))
        await trio.sleep(1)
        return [None] * len(changes)

    answers = dict[int, object]()
    async with trio.open_nursery() as nursery:
        batches = Batches(nursery, propose)
        async with trio.open_nursery() as clients:
            for number in range(20):
                clients.start_soon(told, batches, number, answers)
    assert len(entries) < 5
    assert answers == dict.fromkeys(range(20))


async def test_nobody_is_told_that_a_change_is_made_whose_entry_was_given_up(autojump_clock: object) -> None:
    """The node ends, and with it the tasks that propose."""
    answers = dict[int, object]()
    async with trio.open_nursery() as clients:
        async with trio.open_nursery() as nursery:

            async def propose(changes: Sequence[Change]) -> Sequence[NbdvdeError | None]:
                await trio.sleep_forever()
                return []

            batches = Batches(nursery, propose)
            for number in range(8):
                clients.start_soon(told, batches, number, answers)
            await trio.sleep(1)
            nursery.cancel_scope.cancel()
        batches.end(unknown())
    assert len(answers) == 8
    assert all(isinstance(answer, DetachedError) for answer in answers.values())
    with pytest.raises(DetachedError):
        await batches.put(change(9))
