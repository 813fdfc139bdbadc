"""Replicas compared in the background."""

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from nbdvde.disk import BLOCK
from nbdvde.engine.access import open_storage
from nbdvde.errors import RefusedError
from nbdvde.replication.replica import Replica
from nbdvde.replication.scrubbing import Scrubbed, Scrubbing
from tests.crash.session import KEY
from tests.replication.entries import machine_of
from tests.replication.test_regions import fresh
from tests.replication.test_verification import Three

WEEK_S, HOUR_S, AGAIN_S = 7 * 86400.0, 3600.0, 600.0
RATE = 1 << 20
SIZE = 3 << 20


async def three(nursery: trio.Nursery, *, leads: bool = True) -> tuple[Any, Scrubbing]:
    """Three nodes, of which the first compares."""
    images = [await open_storage(fresh(SIZE), KEY) for _ in range(3)]
    replica: Any = Three(images, [await machine_of(image) for image in images])
    replica.group = SimpleNamespace(is_leader=leads)
    replica.lanes = {machine.name: SimpleNamespace(machine=machine) for machine in replica.machines[:1]}
    scrubbing = Scrubbing(cast(Replica, replica), WEEK_S, RATE)
    nursery.start_soon(scrubbing.run)
    await wait_all_tasks_blocked()
    return replica, scrubbing


async def closed(replica: Any, nursery: trio.Nursery) -> None:
    nursery.cancel_scope.cancel()
    with trio.CancelScope(shield=True):
        for image in replica.images:
            await image.close()


async def until(condition: Callable[[], bool]) -> None:
    """Threads work meanwhile, and no time passes."""
    while not condition():
        await trio.lowlevel.checkpoint()


async def after(clock: MockClock, seconds: float, replica: Any) -> int:
    """So much later: how many comparisons were asked for by then."""
    clock.jump(seconds)
    await wait_all_tasks_blocked()
    return int(replica.machines[0].applied.index)


async def test_what_differs_is_repaired_an_hour_after_the_start_and_every_week(
    mock_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with trio.open_nursery() as nursery:
        replica, scrubbing = await three(nursery)
        await replica.images[1].disk().write(BLOCK, memoryview(b"x" * BLOCK))
        begun = await after(mock_clock, HOUR_S - 1, replica)
        with caplog.at_level(logging.ERROR):
            mock_clock.jump(1)
            await until(lambda: scrubbing.found == Scrubbed(2 << 20, 1, 1))
        [record] = caplog.records
        assert record.message == "disk disk, offset 0: differs on nodes 2, and was repaired"
        done = await after(mock_clock, 1, replica)
        assert done == begun + 2, "no more than the rate allows: a comparison and a repair"
        mock_clock.jump(1)
        await until(lambda: scrubbing.found == Scrubbed(SIZE, 1, 1))
        assert await after(mock_clock, 2, replica) == done + 1
        assert await after(mock_clock, WEEK_S - 3, replica) == done + 1
        mock_clock.jump(1)
        await until(lambda: scrubbing.found == Scrubbed(SIZE + (2 << 20), 1, 1))
        await closed(replica, nursery)


async def test_what_was_compared_by_another_node_is_not_compared(mock_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        replica, scrubbing = await three(nursery)
        begun = await after(mock_clock, HOUR_S / 2, replica)
        replica.machines[0].comparisons.whole_s = trio.current_time()
        assert await after(mock_clock, HOUR_S / 2, replica) == begun
        assert await after(mock_clock, WEEK_S - HOUR_S / 2 - 1, replica) == begun
        mock_clock.jump(1)
        await until(lambda: scrubbing.found.compared_bytes > 0)
        await closed(replica, nursery)


async def test_nobody_begins_while_another_node_compares(mock_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        replica, scrubbing = await three(nursery)
        begun = await after(mock_clock, HOUR_S - 1, replica)
        replica.machines[0].comparisons.latest_s = trio.current_time()
        assert await after(mock_clock, 1, replica) == begun
        mock_clock.jump(AGAIN_S)
        await until(lambda: scrubbing.found.compared_bytes > 0)
        await closed(replica, nursery)


async def test_only_who_leads_begins(mock_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        replica, scrubbing = await three(nursery, leads=False)
        begun = await after(mock_clock, WEEK_S, replica)
        replica.group.is_leader = True
        assert await after(mock_clock, 1, replica) == begun
        mock_clock.jump(HOUR_S)
        await until(lambda: scrubbing.found.compared_bytes > 0)
        await closed(replica, nursery)


async def test_a_failure_puts_it_off(mock_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    async with trio.open_nursery() as nursery:
        replica, scrubbing = await three(nursery)
        compared, replica.compared = replica.compared, failing
        with caplog.at_level(logging.WARNING):
            mock_clock.jump(HOUR_S)
            await until(lambda: bool(caplog.records))
        assert "put off: cluster: is gone" in caplog.records[0].message
        replica.compared = compared
        mock_clock.jump(AGAIN_S)
        await until(lambda: scrubbing.found.compared_bytes > 0)
        await closed(replica, nursery)


async def failing(*_: object) -> None:
    raise RefusedError("cluster", "is gone")
