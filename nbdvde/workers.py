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


def parallel(function: Callable[[A], T], items: Sequence[A]) -> list[T]:
    """`[function(item) for item in items]` on all cores; call it from a worker thread.

    One slice for each core, the first in the calling thread: handing single items over costs 20 µs each.
    """
    size = -(-len(items) // _CORES)
    slices = [items[start : start + size] for start in range(0, len(items), size)]
    others = [_pool.submit(_each, function, part) for part in slices[1:]]
    results = _each(function, slices[0]) if slices else []
    for other in others:
        results += other.result()
    return results


def _each(function: Callable[[A], T], items: Sequence[A]) -> list[T]:
    return [function(item) for item in items]


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
