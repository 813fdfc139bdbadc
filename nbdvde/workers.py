"""The only place with threads."""

import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import count
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

    @property
    def busy(self) -> bool:
        """Whether any job has not ended yet."""
        return self._busy > 0

    def _work(self) -> None:
        while True:
            self._jobs.get()()


_threads = _Threads(16)


def busy() -> bool:
    """Whether a thread works at something just now, so that the event loop had better not look for work."""
    return _threads.busy


async def run(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a blocking function in a thread. A cancelled caller still waits for it to end."""
    return await _Call(partial(function, *args, **kwargs)).result()


class _Call(Generic[T]):
    """A function that a thread is calling, and what it answered."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._token = trio.lowlevel.current_trio_token()
        self._ended, self._taken = threading.Lock(), threading.Lock()
        self._ended.acquire()
        _threads.submit(self._call)

    def _call(self) -> None:
        self._outcome: outcome.Outcome[T] = outcome.capture(self._function)
        self._ended.release()
        if not self._taken.acquire(blocking=False):
            self._token.run_sync_soon(self._resume)

    def _resume(self) -> None:
        trio.lowlevel.reschedule(self._task, self._outcome)

    def ends_in(self, seconds: float) -> bool:
        """Hold up the event loop until the call has ended, or for so long."""
        return self._ended.acquire(timeout=seconds)

    async def result(self) -> T:
        """Wait until the call has ended; what it answered or raised."""
        self._task = trio.lowlevel.current_task()
        try:
            if self._taken.acquire(blocking=False):
                return cast(T, await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED))
            return self._outcome.unwrap()
        finally:
            _threads.done()


class Patience:
    """Waits for a thread without giving way to the event loop: a moment only, and while calls tend to end in it.

    For a time when nobody else is being served (docs/decisions/0010-a-lone-flush.md).
    """

    _CREDIT_MAX, _CREDIT_OF_A_MISS = 32, 8
    """A hit earns one, a call not waited for one as well: slow calls cost a moment in nine."""

    def __init__(self, moment_s: float = 0.0003) -> None:
        self._moment_s, self.credit = moment_s, 0

    def begin(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        """Have a thread call `function`. What comes back is awaited for the result, and must be."""
        return self._end(_Call(partial(function, *args, **kwargs)))

    async def _end(self, call: _Call[T]) -> T:
        if self.credit <= 0:
            self.credit += 1
        elif call.ends_in(self._moment_s):
            self.credit = min(self.credit + 1, self._CREDIT_MAX)
        else:
            self.credit -= self._CREDIT_OF_A_MISS
        return await call.result()


def parallel(function: Callable[[Sequence[A]], list[T]], items: Sequence[A]) -> list[T]:
    """`function(items)`, the items cut in one slice for each core; call it from a worker thread, which takes part."""
    size = -(-len(items) // _CORES) or 1
    slices = [items[start : start + size] for start in range(0, len(items), size)]
    others = [_pool.submit(function, part) for part in slices[1:]]
    results = function(slices[0]) if slices else []
    for other in others:
        results += other.result()
    return results


class Ahead(Generic[A, T]):
    """`function` of each of some items, which a thread goes through in order, and whoever wants to have a result."""

    def __init__(self, function: Callable[[A], T], items: Sequence[A]) -> None:
        self._function, self._items = function, items
        self._results: list[Future[T]] = [Future() for _ in items]
        self._numbers = count()
        _pool.submit(self._work)

    def _work(self) -> None:
        while self._step():
            pass

    def _step(self) -> bool:
        number = next(self._numbers)
        if number >= len(self._items):
            return False
        try:
            self._results[number].set_result(self._function(self._items[number]))
        except BaseException as error:  # noqa: BLE001 - for the one who wants the result
            self._results[number].set_exception(error)
        return True

    def get(self, number: int) -> T:
        """Result of an item. Works at what comes next, as long as it is not there and nobody has begun with it."""
        result = self._results[number]
        while not result.done() and self._step():
            pass
        return result.result()

    def abandon(self) -> None:
        """Begin with nothing more: no result is wanted."""
        self._numbers = count(len(self._items))


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
