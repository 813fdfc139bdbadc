"""What time it is and what chance brings, unless somebody says: replicas have to agree about both."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

from blake3 import blake3


class RetentionClock(NamedTuple):
    """What a retention clock shows somewhere."""

    created_ns: int = 0
    """Of the region that it belongs to: on another node there may be a later one."""
    shown_ns: int = 0


NO_CLOCK = RetentionClock()


@dataclass(slots=True)
class _Moment:
    time_ns: int
    seed: bytes
    clock: RetentionClock
    entry: int
    drawn: int = 0


_given: ContextVar[_Moment | None] = ContextVar("nbdvde_moment", default=None)


def now_ns() -> int:
    """Nanoseconds since 1970-01-01 UTC."""
    moment = _given.get()
    return time.time_ns() if moment is None else moment.time_ns


def draw(count: int) -> bytes:
    """So many bytes that nobody can guess."""
    moment = _given.get()
    if moment is None:
        return os.urandom(count)
    moment.drawn += 1
    return blake3(moment.drawn.to_bytes(8, "little"), key=moment.seed).digest(length=count)


def clock() -> RetentionClock | None:
    """What somebody says that a retention clock shows."""
    moment = _given.get()
    return None if moment is None else moment.clock


def entry() -> int | None:
    """Index of the entry in the log of a cluster that asks for what is done now, and makes it durable."""
    moment = _given.get()
    return None if moment is None else moment.entry


@contextmanager
def given(time_ns: int, seed: bytes, *, clock: RetentionClock, entry: int) -> Iterator[None]:
    """Have it be this time within, and chance follow from `seed`, 32 bytes; in the task that is in here only.

    `clock` is what the retention clock shows where the change was asked for, `entry` the index of the entry that says
    all that.
    """
    token = _given.set(_Moment(time_ns, seed, clock, entry))
    try:
        yield
    finally:
        _given.reset(token)
