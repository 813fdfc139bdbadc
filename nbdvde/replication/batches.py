"""Changes on their way into a group: those that come while others are under way share an entry."""

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import trio

from nbdvde.disk import Done
from nbdvde.errors import DetachedError, NbdvdeError
from nbdvde.replication.operations import CHANGES_MAX, NAMES_MAX, Change

_UNDER_WAY = 3
"""Entries at a time of a disk: while one is sent and synced the next ones fill."""
_BYTES = 1 << 20
"""Of changes in an entry, about."""


@dataclass(eq=False, slots=True)
class _Waiting:
    change: Change
    done: Done | None

    def end(self, failure: Exception | None) -> None:
        """It is made, or refused; said for the first time this counts."""
        done, self.done = self.done, None
        if done:
            done(failure)


class Batches:
    """Those of one disk on one node. Entries are proposed by tasks in `nursery`."""

    def __init__(
        self, nursery: trio.Nursery, propose: Callable[[Sequence[Change]], Awaitable[Sequence[NbdvdeError | None]]]
    ) -> None:
        """`propose` has an entry applied, and answers for each change why it was refused, if so."""
        self._nursery, self._propose = nursery, propose
        self._queue: deque[_Waiting] = deque()
        self._under_way = 0
        self._ended: DetachedError | None = None

    def begin(self, change: Change, done: Done) -> None:
        """Have a change made: `done` is called, here or later, when it is durable and seen by every later read."""
        if self._ended:
            done(self._ended)
            return
        self._queue.append(_Waiting(change, done))
        if self._under_way < _UNDER_WAY:
            self._under_way += 1
            self._nursery.start_soon(self._work)

    async def put(self, change: Change) -> None:
        """As `begin`, waiting for the end. Raises what it was refused with.

        Cancelled, it may be made all the same.
        """
        over = trio.Event()
        failures: list[Exception | None] = []

        def done(failure: Exception | None) -> None:
            failures.append(failure)
            over.set()

        self.begin(change, done)
        await over.wait()
        if failure := failures[0]:
            raise failure

    async def _work(self) -> None:
        try:
            while self._queue:
                await self._send(self._take())
        finally:
            self._under_way -= 1

    def _take(self) -> list[_Waiting]:
        taken = list[_Waiting]()
        size = 0
        disks, table = set[str](), self._queue[0].change.table
        while self._queue and len(taken) < CHANGES_MAX and len(disks) < NAMES_MAX and (not taken or size < _BYTES):
            if self._queue[0].change.table != table:
                break
            taken.append(self._queue.popleft())
            disks.add(taken[-1].change.disk)
            size += len(taken[-1].change.data)
        return taken

    async def _send(self, batch: Sequence[_Waiting]) -> None:
        try:
            for waiting, failure in zip(batch, await self._propose([w.change for w in batch]), strict=True):
                waiting.end(failure)
        except Exception as error:  # noqa: BLE001 - whoever waits is told
            for waiting in batch:
                waiting.end(error)
        finally:
            for waiting in batch:
                waiting.end(unknown())

    def end(self, why: DetachedError) -> None:
        """Nothing is proposed any more: that is what anybody who waits, or comes, is told."""
        self._ended = why
        while self._queue:
            self._queue.popleft().end(why)


def unknown() -> DetachedError:
    """Nobody here knows what becomes of a request."""
    return DetachedError("cluster", "lost its leader in the middle of a request", "connect again")
