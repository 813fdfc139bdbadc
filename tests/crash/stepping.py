"""Deterministic concurrency: worker threads that run one storage operation at a time, when a seed says so.

`nbdvde.workers.run` starts real threads. Here only one thread runs at any time: the event loop's, or that of
one job, which stops before its next storage operation. Between two steps of a job other tasks take turns, so
commits, checkpoints and requests interleave in many ways, and the same way again for the same seed.
"""

import itertools
import os
import random
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import trio

from nbdvde import workers
from nbdvde.engine import access, log, writer

_current = threading.local()


class _Job:
    """A function in a thread that waits for its turn."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()

    def _main(self) -> None:
        _current.job = self
        self._turn.acquire()
        try:
            self.result = self._function()
        except BaseException as error:
            self.error = error
        self.done = True
        self._back.release()

    def step(self) -> None:
        """Let the job run to its next storage operation, or its end."""
        self._turn.release()
        self._back.acquire()
        if self.done:
            self._thread.join()

    def pause(self) -> None:
        self._back.release()
        self._turn.acquire()


def pause() -> None:
    """Called before each storage operation: lets others run when this is a job."""
    job = getattr(_current, "job", None)
    if job is not None:
        job.pause()


class _Lock:
    """A lock between jobs: who waits for it lets others run."""

    def __init__(self) -> None:
        self._held = False

    def __enter__(self) -> None:
        while self._held:
            pause()
        self._held = True

    def __exit__(self, *exception: object) -> None:
        self._held = False


def _stepped(rng: random.Random) -> Callable[..., Any]:
    async def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        await trio.lowlevel.checkpoint_if_cancelled()
        job = _Job(lambda: function(*args, **kwargs))
        while not job.done:
            for _ in range(rng.choice((0, 0, 1, 2, 5))):
                await trio.lowlevel.cancel_shielded_checkpoint()
            job.step()
        await trio.lowlevel.cancel_shielded_checkpoint()
        if job.error is not None:
            raise job.error
        return job.result

    return run


def _inline(function: Callable[[Any], Any], items: Any) -> Any:
    return function(items)


@contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """Seeded threads, scheduling, random bytes and clocks, for everything inside."""
    rng = random.Random(f"stepping {seed}")
    ticks = itertools.count(1_700_000_000_000_000_000, 1000)
    clock = types.SimpleNamespace(monotonic_ns=ticks.__next__, time_ns=ticks.__next__)
    core = trio._core._run  # the switch that hypothesis uses for the same purpose
    core._r.seed(seed)
    run = _stepped(rng)
    with (
        mock.patch.object(workers, "run", run),
        mock.patch.object(workers.Patience, "begin", staticmethod(run)),
        mock.patch.object(workers, "parallel", _inline),
        mock.patch.object(workers, "Lock", _Lock),
        mock.patch.object(os, "urandom", rng.randbytes),
        mock.patch.object(log, "time", clock),
        mock.patch.object(access, "time", clock),
        mock.patch.object(core, "_ALLOW_DETERMINISTIC_SCHEDULING", True),
        mock.patch.object(writer, "COMMIT_BYTES", 24 << 10),
    ):
        yield
