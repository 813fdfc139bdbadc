"""Virtual time: it goes on when no task can, to the next deadline, or to the next call that somebody asked for."""

import heapq
from collections.abc import Callable
from math import inf
from typing import TypeVar

import outcome
import trio
import trio._core._run as scheduler

T = TypeVar("T")


class Clock(trio.abc.Clock):
    """See above. Calls are cheaper than tasks: what is as frequent as messages and disks is made of them."""

    def __init__(self) -> None:
        self._now, self._count = 0.0, 0
        self._calls: list[tuple[float, int, Callable[[], object]]] = []

    def start_clock(self) -> None:
        """It shows 0."""

    def current_time(self) -> float:
        return self._now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Called when no task can go on: some can afterwards, if only since `deadline` has come."""
        runnable = scheduler.GLOBAL_RUN_CONTEXT.runner.runq
        while not runnable and self._calls and self._calls[0][0] <= deadline:
            self._now, _, call = heapq.heappop(self._calls)
            call()
        if runnable:
            return 0
        if deadline == inf:  # trio tells itself something
            return deadline
        self._now = max(self._now, deadline)
        return 0

    def at(self, when: float, call: Callable[[], object]) -> None:
        """Have a function called then, which must not raise."""
        self._count += 1
        heapq.heappush(self._calls, (max(when, self._now), self._count, call))


def clock() -> Clock:
    """That of the run."""
    found = scheduler.GLOBAL_RUN_CONTEXT.runner.clock
    assert isinstance(found, Clock), "time is virtual"
    return found


async def later(job: Callable[[], T], before_s: float, after_s: float) -> T:
    """What a thread does: something is called after a while, and a while after that this goes on; never cancelled."""
    task, time = trio.lowlevel.current_task(), clock()

    def work() -> None:
        done = outcome.capture(task.context.run, job)
        time.at(time.current_time() + after_s, lambda: trio.lowlevel.reschedule(task, done))

    time.at(time.current_time() + before_s, work)
    found: T = await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
    return found
