"""What threads answer and raise reaches the caller, whether it waits in the event loop or holds it up."""

import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from nbdvde import workers
from nbdvde.workers import Patience


async def credited(moment_s: float = 60.0) -> Patience:
    """One that holds up the event loop for the next call."""
    patience = Patience(moment_s)
    await patience.begin(int)
    assert patience.credit == 1
    return patience


@pytest.fixture(params=["run", "patient", "impatient"])
async def run(request: pytest.FixtureRequest) -> Callable[..., Awaitable[Any]]:
    """The ways to have a thread call a function; the last one often holds up the loop too shortly."""
    if request.param == "run":
        return workers.run
    return (await credited(60.0 if request.param == "patient" else 0.0)).begin


async def test_what_a_thread_answers_is_answered(run: Callable[..., Awaitable[Any]]) -> None:
    for number in range(50):
        assert await run(lambda: (threading.get_ident(), number)) != (threading.get_ident(), number)  # noqa: B023
        assert (await run(divmod, number, 7)) == divmod(number, 7)
    assert not workers.busy()


async def test_what_a_thread_raises_is_raised(run: Callable[..., Awaitable[Any]]) -> None:
    for _ in range(5):
        with pytest.raises(ZeroDivisionError):
            await run(divmod, 1, 0)
    assert not workers.busy()


async def test_a_long_call_does_not_hold_up_the_event_loop() -> None:
    async def wait(call: Awaitable[Any]) -> None:
        assert await call

    may_end, patience = threading.Event(), await credited(0.001)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, patience.begin(may_end.wait))
        await trio.lowlevel.checkpoint()
        assert workers.busy()
        may_end.set()
    assert not workers.busy()


async def test_a_short_call_needs_no_event_loop() -> None:
    patience, turns = await credited(), 0

    async def count() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        for credit in range(2, 9):
            await patience.begin(int)
            assert patience.credit == credit
        assert turns == 0
        nursery.cancel_scope.cancel()


async def test_patience_wears_out_and_comes_back() -> None:
    patience, token = await credited(0.0), trio.lowlevel.current_trio_token()

    async def ask_the_loop() -> None:
        """A call that cannot end while the loop is held up."""
        await patience.begin(lambda: trio.from_thread.run_sync(int, trio_token=token))

    await ask_the_loop()
    assert patience.credit == -7
    for credit in range(-6, 2):
        await ask_the_loop()
        assert patience.credit == credit


async def test_a_cancelled_caller_waits_for_its_call(run: Callable[..., Awaitable[Any]]) -> None:
    done: list[int] = []
    with trio.CancelScope() as scope:
        scope.cancel()
        await run(done.append, 1)
    assert done == [1]


def test_work_ahead_is_done_once_and_in_order() -> None:
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        return number * number

    ahead = workers.Ahead(work, range(200))
    assert ahead.get(120) == 120 * 120, "whatever it takes"
    assert [ahead.get(number) for number in range(200)] == [number * number for number in range(200)]
    assert sorted(begun) == list(range(200))


def test_work_ahead_raises_where_its_result_is_wanted() -> None:
    ahead = workers.Ahead(lambda number: 1 // number, [1, 0, 1])
    assert ahead.get(2) == 1
    with pytest.raises(ZeroDivisionError):
        ahead.get(1)
    assert ahead.get(0) == 1


def test_work_ahead_that_is_abandoned_ends() -> None:
    going_on, begun = threading.Event(), list[int]()

    def work(number: int) -> None:
        begun.append(number)
        going_on.wait(60)

    ahead = workers.Ahead(work, range(100))
    ahead.abandon()
    going_on.set()
    assert workers.parallel(list, range(8)) == list(range(8)), "the threads are free"
    assert len(begun) <= 2
