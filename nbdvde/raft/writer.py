"""Making the logs of all groups durable: one task, one write and one sync for everything that came meanwhile."""

import logging
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import trio

from nbdvde.errors import NoSpaceError
from nbdvde.raft.store import NodeLog, Work

_log = logging.getLogger(__name__)
_PAUSE_S = 1.0
"""Before it is tried again when the host was full."""

InThread: TypeAlias = Callable[[Work], Awaitable[None]]
"""Does work that blocks, apart from the event loop."""


class Writer:
    """The only one who takes work of a node's log."""

    def __init__(self, log: NodeLog, in_thread: InThread, after: Callable[[], None]) -> None:
        """`after` is called whenever some were told that their changes are durable."""
        self._log, self._in_thread, self._after = log, in_thread, after
        self._waiting: list[Callable[[], None]] = []
        self._news = trio.Event()

    def then(self, call: Callable[[], None]) -> None:
        """Call a function when all changes so far are durable."""
        self._waiting.append(call)
        self._news.set()

    async def durable(self) -> None:
        """Wait until all changes so far are durable."""
        done = trio.Event()
        self.then(done.set)
        await done.wait()

    async def run(self) -> None:
        """For ever. Raises PoisonedError once a write or a sync has failed."""
        while True:
            if not self._waiting:
                self._news = trio.Event()
                await self._news.wait()
            waiting, self._waiting = self._waiting, []
            await self._write()
            for call in waiting:
                call()
            self._after()

    async def _write(self) -> None:
        work = self._log.take()
        if work is None:
            await trio.lowlevel.checkpoint()
        while work is not None:
            try:
                await self._in_thread(work)
                return
            except NoSpaceError as error:
                _log.warning("%s: nothing is acknowledged until there is space", error.message)
                await trio.sleep(_PAUSE_S)
                work = self._log.take()
