"""Applying what is committed, apart from the driver's path: a slow state machine holds up nobody but itself."""

import logging
from collections.abc import Callable, Sequence

import trio

from nbdvde.errors import NbdvdeError
from nbdvde.raft.machine import Machine
from nbdvde.raft.messages import Entry, NodeId, Snapshot

_log = logging.getLogger(__name__)
CONTAINED = object()
"""In place of the result of an entry that was part of a state that was taken over."""


class Applier:
    """One for each group."""

    def __init__(
        self,
        machine: Machine,
        applied: Callable[[Sequence[Entry], Sequence[object]], None],
        taken: Callable[[Snapshot], None],
    ) -> None:
        """`applied` is told of entries and their results, `taken` of a state that was taken over."""
        self._machine, self._applied, self._taken = machine, applied, taken
        self._contained = machine.applied.index
        """Up to here the state has everything: of one that was taken over, entries may come again."""
        self._entries: list[Entry] = []
        self._wanted: tuple[NodeId, Snapshot] | None = None
        self._news = trio.Event()
        self._whole = trio.Lock()
        """While the state is made durable, or another is taken over."""

    def hand(self, entries: Sequence[Entry]) -> None:
        """Have entries applied."""
        self._entries += entries
        self._news.set()

    def install(self, source: NodeId, snapshot: Snapshot) -> None:
        """Have a state taken over, unless that is being done already."""
        if self._wanted is None:
            self._wanted = source, snapshot
            self._news.set()

    async def durable(self) -> Snapshot:
        """See `Machine.durable`."""
        async with self._whole:
            return await self._machine.durable()

    async def run(self) -> None:
        """For ever."""
        while True:
            if self._entries:
                entries, self._entries = self._entries, []
                await self._apply(entries)
            elif self._wanted:
                await self._install(*self._wanted)
                self._wanted = None
            else:
                self._news = trio.Event()
                await self._news.wait()

    async def _apply(self, entries: Sequence[Entry]) -> None:
        old = sum(entry.index <= self._contained for entry in entries)
        if old:
            self._applied(entries[:old], (CONTAINED,) * old)
        while old < len(entries):
            results = await self._machine.apply(entries[old:])
            done = entries[old : old + len(results)]
            assert done, "at least one is applied"
            old += len(done)
            self._contained = done[-1].index
            self._applied(done, results)

    async def _install(self, source: NodeId, snapshot: Snapshot) -> None:
        try:
            async with self._whole:
                taken = await self._machine.install(source, snapshot)
        except NbdvdeError as error:
            _log.warning("the state of node %d was not taken over: %s", source, error.message)
            return
        self._contained = taken.index
        self._taken(taken)
