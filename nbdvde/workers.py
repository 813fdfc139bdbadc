"""The only place with threads."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Generic, ParamSpec, TypeVar, cast

import outcome
import trio

P = ParamSpec("P")
T = TypeVar("T")
A = TypeVar("A")

_CORES = min(4, os.cpu_count() or 1)
Lock = threading.Lock
"""For what two worker threads must not do at once."""

_pool = ThreadPoolExecutor(max_workers=max(1, _CORES - 1), thread_name_prefix="nbdvde")


class _Threads:
    """Threads that take jobs from one queue; a new one is started while none is idle, up to a limit.

    A hop to a thread and back takes 35 µs, through trio.to_thread 56 and two more rounds of the event loop:
    much of a small write that waits to be durable.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._started, self._busy = limit, 0, 0
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()

    def submit(self, job: Callable[[], None]) -> None:
        """Have a thread call `job`, which must not raise. Called on the event loop's thread only."""
        self._busy += 1
        if self._started < min(self._busy, self._limit):
            self._started += 1
            threading.Thread(target=self._work, daemon=True, name=f"nbdvde-{self._started}").start()
        self._jobs.put(job)

    def done(self) -> None:
        """A job has ended. Called on the event loop's thread."""
        self._busy -= 1

    def _work(self) -> None:
        while True:
            self._jobs.get()()


_threads = _Threads(16)


async def run(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a blocking function in a thread. A cancelled caller still waits for it to end."""
    task, token = trio.lowlevel.current_task(), trio.lowlevel.current_trio_token()

    def job() -> None:
        result = outcome.capture(function, *args, **kwargs)
        token.run_sync_soon(_resume, task, result)

    _threads.submit(job)
    return cast(T, await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED))


def _resume(task: trio.lowlevel.Task, result: outcome.Outcome[object]) -> None:
    _threads.done()
    trio.lowlevel.reschedule(task, result)


def parallel(function: Callable[[Sequence[A]], list[T]], items: Sequence[A]) -> list[T]:
    """`function(items)`, the items cut in one slice for each core; call it from a worker thread, which takes part."""
    size = -(-len(items) // _CORES) or 1
    slices = [items[start : start + size] for start in range(0, len(items), size)]
    others = [_pool.submit(function, part) for part in slices[1:]]
    results = function(slices[0]) if slices else []
    for other in others:
        results += other.result()
    return results


class PerThread(Generic[T]):
    """An object for each thread that asks, made when it first does."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make, self._local = make, threading.local()

    def get(self) -> T:
        """This thread's own."""
        try:
            return self._local.value  # type: ignore[no-any-return]
        except AttributeError:
            self._local.value = value = self._make()
            return value
