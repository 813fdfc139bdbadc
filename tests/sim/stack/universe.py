"""What a seed decides: threads, chance, clocks, the order of tasks; and all places where machines touch the world."""

import os
import random
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import trio
import trio._core._run as scheduler

from nbdvde import moment, workers
from nbdvde.engine import access, log, writer
from nbdvde.engine.managed import worm
from nbdvde.raft.filelog import FileLog, Sizes
from nbdvde.raft.node import Node
from nbdvde.replication import disk, routing, running
from tests.crash import stepping

if TYPE_CHECKING:
    from tests.sim.stack.life import Life

SEGMENT_BYTES = 64 << 10
STRIPE = 16 << 10
"""Bytes: so few that requests have to do with two."""
SIZES = Sizes(segment_bytes=256 << 10, memory_bytes=16 << 10)
"""Of a log: so little memory that entries have to be loaded."""
CURRENT: ContextVar["Life"] = ContextVar("life")
"""The machine whose program is running."""


async def _listening(address: object) -> None:
    await trio.lowlevel.checkpoint()


async def _run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if life := CURRENT.get(None):
        return await life.work(partial(function, *args, **kwargs))
    return function(*args, **kwargs)


def _inline(function: Callable[[Any], Any], items: Any) -> Any:
    return function(items)


def _now_ns() -> int:
    return 1_700_000_000_000_000_000 + int(trio.current_time() * 1e9)


@contextmanager
def deterministic(seed: int) -> Iterator[random.Random]:
    """Have everything inside follow from a seed; what draws for it."""
    chance = random.Random(seed)
    clock = types.SimpleNamespace(monotonic_ns=_now_ns, time_ns=_now_ns)
    scheduler._r.seed(seed)
    changes: list[tuple[object, str, object]] = [
        (workers, "run", _run),
        (workers.Patience, "begin", staticmethod(_run)),
        (workers, "parallel", _inline),
        (workers, "Lock", stepping._Lock),
        (os, "urandom", chance.randbytes),
        (os, "statvfs", lambda path: CURRENT.get().disks.device.statvfs()),
        (log, "time", clock),
        (access, "time", clock),
        (moment, "time", clock),
        (worm, "monotonic_ns", _now_ns),
        (scheduler, "_ALLOW_DETERMINISTIC_SCHEDULING", True),
        (writer, "COMMIT_BYTES", 24 << 10),
        (routing, "STRIPE", STRIPE),
        (disk, "STRIPE", STRIPE),
        (disk, "_WRITE_MAX", STRIPE),
        (access, "open_file", lambda path, *, write: CURRENT.get().disks.device),
        (access, "open_storage", partial(access.open_storage, checkpoint_bytes=256 << 10)),
        (running, "random", types.SimpleNamespace(SystemRandom=lambda: chance)),
        (running, "_ELECTION_TICKS", 5),
        (running, "_QUIET_TICKS", 15),
        (running, "_has_room", lambda plan, size: CURRENT.get().disks.spare_log_bytes > size),
        (running, "open_listener", _listening),
        (running, "TlsNetwork", lambda files, listener, places: files(places)),
        (running, "DiskDirectory", lambda path: CURRENT.get().disks.folder),
        (running, "Node", partial(Node, in_thread=_run)),
        (running, "FileLog", lambda directory: FileLog(directory, SIZES, chance.randbytes)),
    ]
    with _all(changes):
        yield chance


@contextmanager
def _all(changes: list[tuple[object, str, object]]) -> Iterator[None]:
    patches = [mock.patch.object(*change) for change in changes]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in reversed(patches):
            patch.stop()
