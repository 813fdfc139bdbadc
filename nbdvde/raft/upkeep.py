"""What the log of a group needs now and then: entries from the disk, compaction, mending."""

import logging
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import trio

from nbdvde.errors import NoSpaceError
from nbdvde.raft.applier import Applier
from nbdvde.raft.core import Core
from nbdvde.raft.messages import Entry, NodeId, Snapshot
from nbdvde.raft.repair import REPAIR_BYTES, Ending, Repair, ending
from nbdvde.raft.store import Load, LogStore, Work

_log = logging.getLogger(__name__)
_REPAIR_S = 0.5
"""Between two tries to have a log mended."""


HasRoom: TypeAlias = Callable[[int], bool]
"""Whether a log of so many bytes may become longer."""


class Helper(Protocol):
    """What it needs of the node."""

    def then(self, call: Callable[[], None]) -> None:
        """Call a function when all changes of logs so far are durable."""

    async def load(self, load: Load) -> Work:
        """Do work that blocks."""

    async def ask(self, node: NodeId, kind: int, body: bytes) -> bytes:
        """Ask another node. Raises NetworkError."""


class Upkeep:
    """Of one group."""

    def __init__(
        self, group: str, core: Core, store: LogStore, applier: Applier, helper: Helper, touch: Callable[[], None],
        compact_bytes: int, has_room: HasRoom,
    ) -> None:  # fmt: skip
        """`touch` has the group driven; a log is compacted when so many bytes of entries were added."""
        self._group, self._core, self._store, self._applier = group, core, store, applier
        self._helper, self._touch, self._compact_bytes, self._has_room = helper, touch, compact_bytes, has_room
        core.mute = bool(store.damaged or store.unsure)
        self._compacted_bytes = 0
        """What the last compaction left."""
        self._loading = self._compacting = self._mending = False
        self._nursery: trio.Nursery | None = None

    def begin(self, nursery: trio.Nursery) -> None:
        """From now on tasks may run in `nursery`."""
        self._nursery = nursery
        if self._core.mute:
            self._begin_to_mend(nursery)

    def end(self) -> None:
        """From now on none may."""
        self._nursery = None

    # Entries from the disk

    def fetch(self) -> None:
        """Have entries read that the core asked for and did not get."""
        missed = None if self._loading else self._store.missed()
        if missed and self._nursery and not any(missed[0] in gap for gap in self._store.damaged):
            self._loading = True
            self._nursery.start_soon(self._load, *missed)

    async def _load(self, start: int, stop: int, max_bytes: int) -> None:
        (await self._helper.load(self._store.load(start, stop, max_bytes)))()
        self._loading = False
        self._core.loaded()
        self._touch()
        if self._store.damaged and self._nursery and not self._mending:
            self._core.mute = not self._core.is_leader  # who leads has promised nothing that it does not know
            self._begin_to_mend(self._nursery)

    # Compaction

    def grown(self) -> None:
        """Entries may have come."""
        if self._store.size - self._compacted_bytes > self._compact_bytes and self._nursery and not self._compacting:
            self._compacting = True
            self._nursery.start_soon(self._compact)

    async def _compact(self) -> None:
        """Have the log forget what the state holds durably, but for what followers are about to be sent."""
        self._compacting = True
        try:
            durable = await self._applier.durable()
        except NoSpaceError as error:
            _log.warning("the log is not made shorter: %s", error)
            self._compacting = False
            return
        core, store = self._core, self._store
        index = min(durable.index, core.applied, self._needed())
        if index > store.snapshot.index:
            store.compact_to(Snapshot(index, store.term(index), core.log.members_at(index)))
            core.compacted()
            self._helper.then(lambda: None)
        self._compacted_bytes, self._compacting = store.size, False

    def _needed(self) -> int:
        """Up to where followers have everything.

        Those that are far behind get the state instead. Who takes it over needs what comes behind that, however long
        it takes: or it would have to begin again, for ever. So there the log may grow as long as there is room.
        """
        office, size = self._core.office, self._store.size
        needed = [self._core.applied]
        for progress in office.followers.values() if office else ():
            if progress.installing:
                needed += [progress.installing.index] if self._has_room(size) else []
            elif progress.active and progress.streaming and size < 4 * self._compact_bytes:
                needed.append(progress.match)
        return min(needed)

    # Mending

    def _begin_to_mend(self, nursery: trio.Nursery) -> None:
        self._mending = True
        nursery.start_soon(self._mend)

    async def _mend(self) -> None:
        """Have others bring back what the log lost."""
        mute = "; this node is mute" if self._core.mute else ""
        _log.warning("raft group %s: the log is damaged%s until others have mended it", self._group, mute)
        repair = Repair(self._group, self._core, self._store, self._helper.ask)
        while not repair.is_done:
            await self._compact()  # what is in the state need not be mended
            await repair.step()
            if repair.state:
                self._applier.install(*repair.state)
            if not repair.is_done:
                await trio.sleep(_REPAIR_S)
        durable = trio.Event()
        self._helper.then(durable.set)
        await durable.wait()
        self._core.mute = self._mending = False
        _log.warning("raft group %s: the log is mended", self._group)
        self._touch()

    def ending(self) -> Ending:
        """What this node has promised, for one that has forgotten that."""
        return ending(self._core, self._store)

    async def entries(self, start: int, stop: int) -> Sequence[Entry]:
        """Entries of the log, as many from `start` on as are there and fit an answer, for a node that has lost them."""
        store = self._store
        start, stop = max(start, store.first_index), min(stop, store.last_index + 1)
        if start >= stop:
            return ()
        found = store.get_range(start, stop, REPAIR_BYTES)
        if not found and store.missed():
            (await self._helper.load(store.load(start, stop, REPAIR_BYTES)))()
            found = store.get_range(start, stop, REPAIR_BYTES)
        return found
