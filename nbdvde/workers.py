"""The only place with threads."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, ParamSpec, TypeVar

import trio

P = ParamSpec("P")
T = TypeVar("T")
A = TypeVar("A")

_CORES = min(4, os.cpu_count() or 1)
Lock = threading.Lock
"""For what two worker threads must not do at once."""

_pool = ThreadPoolExecutor(max_workers=max(1, _CORES - 1), thread_name_prefix="nbdvde")


async def run(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a blocking function in a thread. A cancelled caller still waits for it to end."""
    return await trio.to_thread.run_sync(lambda: function(*args, **kwargs))


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
