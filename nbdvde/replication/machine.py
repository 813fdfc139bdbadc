"""What a group does to the image of its node: entries in their order, and where it stands.

The log of the group is the only journal. The image notes with each of its commits up to which entry it has everything
(`notes`); after a crash what follows is applied again. Changes of blocks bear that. For what does not, the entries
before it are noted first, by the commit that precedes any operation on the catalogue; regions remember themselves
which entry has changed them last.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Protocol, TypeAlias, TypeVar

import msgspec
import trio

from nbdvde.engine.image import Image
from nbdvde.errors import (
    DamageError,
    DetachedError,
    FullError,
    InUseError,
    NbdvdeError,
    NoSpaceError,
    PoisonedError,
    RefusedError,
)
from nbdvde.raft.messages import Entry, EntryKind, Members, NodeId, Snapshot
from nbdvde.replication.changing import made_nowait, make, written_together
from nbdvde.replication.comparison import Comparisons
from nbdvde.replication.notes import Note, Notes, Place
from nbdvde.replication.operations import Attach, Call, Change, Compare, Dismiss, Enrol, Release, Repair
from nbdvde.replication.regioncopy import found
from nbdvde.replication.sealing import Sealer

T = TypeVar("T")
_log = logging.getLogger(__name__)
_DISKS_MAX = 512
"""With an epoch, in a cluster: more would not fit into a note."""
_AGAIN_S = 0.5
"""Between two tries to apply what the image had no space for."""

Result: TypeAlias = "NbdvdeError | bytes | int | tuple[int, bytes] | None"
"""Of an operation: why it was refused, the answer of a call, an epoch, index and hashes, or nothing to tell."""
Execute: TypeAlias = Callable[["ImageMachine", Call], Awaitable[bytes]]
Fetch: TypeAlias = Callable[[NodeId, Snapshot], Awaitable[Note]]
"""Make the image what that of another node is, of the leader if it is node 0; answers how far that is."""


class Listener(Protocol):
    """Who is told of what a group agreed on."""

    def attached(self, disk: str, epoch: int, node: NodeId) -> None:
        """Clients of a node, of none if that is 0, use a disk from now on, and nobody else."""

    def placed(self, nodes: Mapping[NodeId, Place]) -> None:
        """Which nodes there are, and where."""


class ImageMachine:
    """The state machine (`raft.node.Machine`) of one group."""

    def __init__(
        self, image: Image, notes: Notes, group: str, sealer: Sealer, start: Note, *,
        execute: Execute, fetch: Fetch, listener: Listener,
    ) -> None:  # fmt: skip
        """`start` is what a new group begins with."""
        self._image, self._notes, self._group, self._sealer = image, notes, group, sealer
        key = notes.identity.key
        self._execute, self._fetch, self._listener = execute, fetch, listener
        self._take(notes.found.get(group) or start)
        self.comparisons = Comparisons(key)
        self.stuck = ""
        """Why nothing is applied at the moment, if so."""
        image.before_commit.append(self._note_nowait)

    def _take(self, note: Note) -> None:
        self.applied, self.incomplete = note.applied, note.incomplete
        self._begun = note.begun
        self.epochs, self.nodes = dict(note.epochs), dict(note.nodes)

    @property
    def note(self) -> Note:
        """How far it is."""
        return Note(self._group, self.applied, self.epochs, self.nodes, self.incomplete, self._begun)

    def _note_nowait(self) -> None:
        self._notes.put_nowait(self.note)

    def renew(self, disk: str) -> None:
        """A disk comes, during a call: what was meant for an older one of that name comes to nothing."""
        self.epochs[disk] = self.applied.index + 1, 0

    def forget(self, disk: str) -> None:
        """A disk has gone, during a call."""
        self.epochs.pop(disk, None)

    async def apply(self, entries: Sequence[Entry]) -> Sequence[object]:
        """See `Machine`. Raises DamageError, PoisonedError: the group cannot go on here then."""
        results: list[object] = []
        while self.incomplete:
            await self._complete()
        for entry in entries:
            if entry.index <= self.applied.index:  # it was part of a state that was taken over
                results.append(None)
                continue
            results.append(await self._apply(entry))
            members = Members.unpack(entry.data) if entry.kind == EntryKind.MEMBERS else self.applied.members
            self.applied = Snapshot(entry.index, entry.term, members)
        return results

    async def _apply(self, entry: Entry) -> object:
        if entry.kind != EntryKind.NORMAL:
            return None
        match self._sealer.open(self._group, entry.data):
            case Attach(disk=disk, node=node):
                if disk not in self.epochs and len(self.epochs) >= _DISKS_MAX:
                    return RefusedError(f"disk {disk}", f"is one of more than {_DISKS_MAX} in use", "delete some")
                self._attach(disk, entry.index, node)
                return entry.index
            case Release(disk=disk, epoch=epoch):
                if self.epochs.get(disk, (0, 0))[0] == epoch:
                    self.epochs[disk] = epoch, 0
                return None
            case Enrol(address=address, name=name):
                return self._enrol(Place(address, name))
            case Dismiss(node=node):
                self.nodes[node] = Place("", "")
                self._listener.placed(self.nodes)
                return None
            case Call() as call:
                self.comparisons.forget()
                return await self._call(call)
            case Compare() as compare:
                return await self._compare(entry.index, compare)
            case Repair() as repair:
                return await self._repair(repair)
            case changes:
                if self._written_together(changes):
                    return [None] * len(changes)
                return [await self._change(change) for change in changes]

    def _attach(self, disk: str, epoch: int, node: NodeId) -> None:
        self.epochs[disk] = epoch, node
        self._listener.attached(disk, epoch, node)

    def _enrol(self, place: Place) -> Result:
        """A new number each time: nobody may speak for one who has promised anything."""
        for node, other in self.nodes.items():
            if other.address == place.address and node in self.applied.members:
                why = f"is node {node} of the cluster"
                return RefusedError(f"address {place.address}", why, "have it leave first, then invite it")
        number = max(self.nodes, default=0) + 1
        stale = {node: Place("", "") for node, other in self.nodes.items() if other.address == place.address}
        self.nodes |= {**stale, number: place}
        self._listener.placed(self.nodes)
        return number

    async def _compare(self, index: int, compare: Compare) -> Result:
        try:
            volume = await found(self._image, compare.disk)
        except NbdvdeError as error:
            return error
        return index, await self.comparisons.compare(index, compare, volume)

    async def _repair(self, repair: Repair) -> Result:
        try:
            volume = await found(self._image, repair.disk)
        except NbdvdeError as error:
            return error
        return int(await self._surely(lambda: self.comparisons.repair(repair, volume)))

    async def _call(self, call: Call) -> Result:
        try:
            return await self._surely(lambda: self._execute(self, call))
        except PoisonedError:
            raise
        except NbdvdeError as error:  # the same on all nodes
            return error

    def _written_together(self, changes: Sequence[Change]) -> bool:
        """Make changes of one disk in one go, if they are writes that nothing stands against; whether they are made."""
        disks = {change.disk for change in changes}
        if len(disks) != 1:
            return False
        [disk] = disks
        epoch, _ = self.epochs.get(disk, (0, 0))
        if any(change.epoch < epoch for change in changes):
            return False
        try:
            if not written_together(self._image.disk(disk), changes):
                return False
        except NbdvdeError:  # each is told
            return False
        for change in changes:
            self.comparisons.touch(disk, change.offset, change.length)
        return True

    async def _change(self, change: Change) -> Result:
        if change.epoch < self.epochs.get(change.disk, (0, 0))[0]:
            return DetachedError(f"disk {change.disk}", "was taken over by another client", "connect again")
        try:
            volume = self._image.disk(change.disk)
        except NbdvdeError as error:
            return error
        if change.offset + change.length > volume.size:
            return RefusedError(f"disk {change.disk}", "has become shorter than that", "connect again")
        try:
            if not made_nowait(volume, change):
                await self._surely(lambda: make(volume, change))
        except PoisonedError:
            raise
        except NbdvdeError as error:
            return error
        self.comparisons.touch(change.disk, change.offset, change.length)
        return None

    async def _surely(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do what was agreed on, which no node can refuse for want of space or for damage of its own: it waits."""
        while True:
            try:
                done = await work()
            except FullError:
                raise
            except (NoSpaceError, DamageError) as error:
                if not self.stuck:
                    _log.error("group %s stands still: %s", self._group, error)
                self.stuck = str(error)
                await trio.sleep(_AGAIN_S)
            else:
                self.stuck = ""
                return done

    @asynccontextmanager
    async def unused(self, disk: str, *, force: bool) -> AsyncIterator[None]:
        """Have no client use a disk during a call; unless `force`, only when none does. Raises InUseError."""
        if self.epochs.get(disk, (0, 0))[1]:
            if not force:
                raise InUseError(f"disk {disk}", "clients use it", "disconnect them, or use --force")
            self._attach(disk, self.applied.index + 1, 0)
        yield

    async def durable(self) -> Snapshot:
        """See `Machine`. Raises NoSpaceError, PoisonedError."""
        note = self.note
        await self._notes.put(note)
        await self._image.flush()
        return note.applied

    async def install(self, source: NodeId, snapshot: Snapshot) -> Snapshot:
        """See `Machine`. Raises NbdvdeError."""
        await self._take_over(source, snapshot)
        return self.applied

    async def _complete(self) -> None:
        """A state was taken over in part when its source failed, or this node: take it over from whoever leads now."""
        try:
            await self._take_over(0, self.applied)
        except NbdvdeError as error:
            _log.warning("group %s stands still: %s", self._group, error)
            await trio.sleep(_AGAIN_S)

    async def _take_over(self, source: NodeId, snapshot: Snapshot) -> None:
        self.incomplete = True
        await self.durable()
        note = await self._fetch(source, snapshot)
        self._take(msgspec.structs.replace(note, begun=True, incomplete=False))
        self.comparisons.forget()
        for disk, (epoch, node) in self.epochs.items():
            self._listener.attached(disk, epoch, node)
        self._listener.placed(self.nodes)
        await self.durable()

    async def begin(self) -> None:
        """Note that the node takes part from now on; durable. Raises NoSpaceError, PoisonedError."""
        if not self._begun:
            self._begun = True
            await self.durable()

    def close(self) -> None:
        """Note nothing any more."""
        self._image.before_commit.remove(self._note_nowait)
