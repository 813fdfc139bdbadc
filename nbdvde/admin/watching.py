"""Work that takes long, and those who are told how far it has come."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from nbdvde.admin.http import Emit
from nbdvde.admin.messages import CopyLine, Progress
from nbdvde.engine.image import Image
from nbdvde.engine.report import CheckReport
from nbdvde.errors import NbdvdeError

PROGRESS_S = 0.1
"""Seconds between two lines of progress."""
T = TypeVar("T")


class _StoppedError(Exception):
    """Raised in the thread of a check that nobody waits for any more."""


class Meter:
    """The latest progress, set by the thread that checks."""

    def __init__(self) -> None:
        self.latest: Progress | None = None
        self.stopped = False

    def __call__(self, done: int, total: int) -> None:
        if self.stopped:
            raise _StoppedError
        self.latest = Progress(done, total)


async def check(image: Image, emit: Emit, rate: int | None = None) -> CheckReport:
    """Verify an image; a cancelled check ends at its next progress. Raises NbdvdeError."""
    return await watched(emit, lambda meter: image.check(meter, rate))


async def watched(emit: Emit, work: Callable[[Meter], Awaitable[T]]) -> T:
    """Do something that takes long, telling how far it has come. Raises NbdvdeError."""
    meter = Meter()
    result: T | NbdvdeError
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_tell, meter, emit)
        try:
            result = await work(meter)
        except NbdvdeError as error:
            result = error
        except _StoppedError:
            await trio.lowlevel.checkpoint_if_cancelled()
            raise
        nursery.cancel_scope.cancel()
    if isinstance(result, NbdvdeError):
        raise result
    return result


async def _tell(meter: Meter, emit: Emit) -> None:
    told = None
    try:
        while True:
            await trio.sleep(PROGRESS_S)
            if meter.latest != told:
                told = meter.latest
                await emit(CopyLine(progress=told))
    finally:
        meter.stopped = True
