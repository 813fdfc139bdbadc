"""What a group does to the image of its node: entries in their order, and where it stands.

The logs of the groups are the only journal. The image notes with each of its commits up to which entries it has
everything (`notes`); after a crash what follows is applied again. Changes of blocks bear that. What does not is noted
before anything else is done; regions remember themselves which entry has changed them last.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import msgspec
import trio

from nbdvde.engine.volume import Volume
from nbdvde.errors import (
    DamageError,
    DetachedError,
    FullError,
    MovedError,
    NbdvdeError,
    NoSpaceError,
    PoisonedError,
    RefusedError,
)
from nbdvde.raft.messages import Entry, EntryKind, Members, NodeId, Snapshot
from nbdvde.replication.batches import unknown
from nbdvde.replication.changing import made_nowait, make, written_together
from nbdvde.replication.compare import chunks_of
from nbdvde.replication.comparison import Comparisons
from nbdvde.replication.notes import Note
from nbdvde.replication.operations import Action, Change, Compare, Fence, Hold, Operation, Repair
from nbdvde.replication.regioncopy import found, labels_of

if TYPE_CHECKING:
    from nbdvde.replication.assembly import Assembly

T = TypeVar("T")
_log = logging.getLogger(__name__)
_AGAIN_S = 0.5
"""Between two tries to apply what the image had no space for."""
_PATIENCE_S, _PATIENCE_MOST_S = 2.0, 3600.0
"""After which a node that cannot apply an entry for damage of its own takes over what others have; twice as long each
time that this did not help."""

Result: TypeAlias = "NbdvdeError | bytes | int | tuple[int, bytes] | None"
"""Of an operation: why it was refused, the answer of a call, an epoch, index and hashes, or nothing to tell."""


class GroupMachine:
    """The state machine (`raft.machine.Machine`) of a group."""

    def __init__(self, assembly: "Assembly", note: Note) -> None:
        self.name, self._assembly = note.group, assembly
        self.comparisons = Comparisons(assembly.notes.identity.key)
        self.stuck = ""
        """Why nothing is applied at the moment, if so."""
        self.held = 0
        """The hold that it has come to: it goes on when that is settled."""
        self.busy = False
        """While an entry is being applied."""
        self._may_give_up = False
        """Whether nothing has been noted of that yet."""
        self._patience_s = _PATIENCE_S
        self.take(note)

    def take(self, note: Note) -> None:
        """It is so far now."""
        self.applied, self.begun, self.epochs = note.applied, note.begun, dict(note.epochs)
        self.held, self.stuck, self._ahead = note.holding, "", note.ahead
        self.comparisons.forget()

    @property
    def note(self) -> Note:
        """How far it is."""
        return Note(self.name, self.applied, self.epochs, begun=self.begun, holding=self.held, ahead=self.ahead)

    @property
    def ahead(self) -> int:
        """See `Note`."""
        return self._ahead if self._ahead > self.applied.index else 0

    # Of the protocol

    async def apply(self, entries: Sequence[Entry]) -> Sequence[object]:
        """See `Machine`. Raises PoisonedError: the group cannot go on here then."""
        results = list[object]()
        for entry in entries:
            operation = await self._surely(lambda: self._opened(entry))  # noqa: B023 - it ends before the next one
            if results and not self.may_do(operation):
                break  # nobody has to wait for the others
            results.append(await self._apply(entry, operation))
        return results

    async def _apply(self, entry: Entry, operation: Operation | None) -> object:
        while self.applied.index < entry.index:
            await self._assembly.turn(lambda: self.may_do(operation) or self.applied.index >= entry.index)
            if self.applied.index < entry.index:
                try:
                    return await self._do_now(entry, operation)
                except _Damaged:
                    await self._assembly.renew()
        return _unknown_of(operation)  # it was part of a state that was taken over

    async def _opened(self, entry: Entry) -> Operation | None:
        """What it says, if it is for us. Raises DamageError."""
        if entry.kind != EntryKind.NORMAL:
            return None
        return self._assembly.sealer.open(self.name, entry.data)

    def may_do(self, operation: Operation | None) -> bool:
        """Whether it need not wait for other groups."""
        return self.held <= self._assembly.settled

    async def _do_now(self, entry: Entry, operation: Operation | None) -> object:
        self.busy = True
        try:
            self._may_give_up = True
            result = None if operation is None else await self.do(entry.index, operation)
            self._may_give_up, self._patience_s = False, _PATIENCE_S
            members = Members.unpack(entry.data) if entry.kind == EntryKind.MEMBERS else self.applied.members
            self.applied = Snapshot(entry.index, entry.term, members)
            await self.done(operation)
        finally:
            self.busy = False
            self._assembly.applied()
        return result

    async def durable(self) -> Snapshot:
        """See `Machine`. Raises NoSpaceError, PoisonedError."""
        applied = self.applied
        await self._assembly.durable()
        return applied

    async def install(self, source: NodeId, snapshot: Snapshot) -> Snapshot:
        """See `Machine`. Raises NbdvdeError."""
        return await self._assembly.take_over(source, self.name, snapshot)

    async def begin(self) -> None:
        """Note that the node takes part from now on; durable. Raises PoisonedError."""
        if not self.begun:
            self.begun = True
            await self._surely(self._assembly.durable)

    # Operations

    async def do(self, index: int, operation: Operation) -> object:
        """Do what an entry says; its result. Raises PoisonedError."""
        match operation:
            case Hold(hold=hold):
                self.held = hold
                self._assembly.tell()
                return None
            case Fence(disk=disk, epoch=epoch, node=node):
                if epoch > self.epochs.get(disk, (0, 0))[0]:
                    self.epochs[disk] = epoch, node
                return None
            case Compare() as compare:
                return await self._compare(index, compare)
            case Repair() as repair:
                return await self._repair(repair)
            case [*changes]:
                if self._written_together(changes):
                    return [None] * len(changes)
                return [await self._change(change) for change in changes]
        return RefusedError(f"raft group {self.name}", "was asked what is not its business", "see the log of the nodes")

    async def done(self, operation: Operation | None) -> None:
        """It is done, and `applied` says so."""

    async def _compare(self, index: int, compare: Compare) -> Result:
        if compare.table != self._assembly.routing.version:
            return moved(f"disk {compare.disk}")
        try:
            volume = await found(self._assembly.image, compare.disk)
        except NbdvdeError as error:
            return error
        if index <= self._ahead:  # what others held then is nowhere here
            hashes = b""
        else:
            hashes = await self.comparisons.compare(index, compare, volume)
        if compare.first + compare.count >= chunks_of(volume.size) and compare.disk == await self._last_label():
            self.comparisons.whole_s = trio.current_time()
        return index, hashes

    async def _last_label(self) -> str:
        """Of what `verify` compares."""
        image = self._assembly.image
        *_, disk = image.volumes.disks
        return (await labels_of(image, disk))[-1]

    async def _repair(self, repair: Repair) -> Result:
        try:
            volume = await found(self._assembly.image, repair.disk)
        except NbdvdeError as error:
            return error
        return int(await self._surely(lambda: self.comparisons.repair(repair, volume)))

    def _written_together(self, changes: Sequence[Change]) -> bool:
        """Make changes of one disk in one go, if they are writes that nothing stands against; whether they are made."""
        disks = {change.disk for change in changes}
        if len(disks) != 1 or changes[0].table != self._assembly.routing.version:
            return False
        [disk] = disks
        epoch, _ = self.epochs.get(disk, (0, 0))
        if any(change.epoch < epoch for change in changes):
            return False
        try:
            if not written_together(self._assembly.image.disk(disk), changes):
                return False
        except NbdvdeError:  # each is told
            return False
        for change in changes:
            self.comparisons.touch(disk, change.offset, change.length)
        return True

    async def _change(self, change: Change) -> Result:
        assembly = self._assembly
        if change.table != assembly.routing.version:
            return moved(f"disk {change.disk}")
        if change.epoch < self.epochs.get(change.disk, (0, 0))[0]:
            return DetachedError(f"disk {change.disk}", "was taken over by another client", "connect again")
        try:
            volume = assembly.image.disk(change.disk)
        except NbdvdeError as error:
            return error
        if change.offset + change.length > volume.size:
            return RefusedError(f"disk {change.disk}", "has become shorter than that", "connect again")
        try:
            if change.action != Action.WRITE or not made_nowait(volume, change):
                await self._surely(lambda: self._change_volume(volume, change))
        except PoisonedError:
            raise
        except NbdvdeError as error:
            return error
        self.comparisons.touch(change.disk, change.offset, change.length)
        return None

    async def _change_volume(self, volume: Volume, change: Change) -> None:
        if change.action == Action.WRITE:
            await make(volume, change)
            return
        for offset, length in self._assembly.routing.parts(change.disk, change.offset, change.length, self.name):
            part = msgspec.structs.replace(change, offset=offset, length=length)
            if not made_nowait(volume, part):
                await make(volume, part)

    async def _surely(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do what was agreed on, which no node can refuse for want of space or for damage of its own: it waits."""
        begun_s = trio.current_time()
        while True:
            try:
                done = await work()
            except FullError:
                raise
            except (NoSpaceError, DamageError) as error:
                if not self.stuck:
                    _log.error("group %s stands still: %s", self.name, error)
                self.stuck = str(error)
                impatient = self._may_give_up and trio.current_time() - begun_s >= self._patience_s
                if impatient and isinstance(error, DamageError):
                    self._may_give_up = False
                    self._patience_s = min(2 * self._patience_s, _PATIENCE_MOST_S)
                    raise _Damaged from error
                await trio.sleep(_AGAIN_S)
            else:
                self.stuck = ""
                return done


class _Damaged(Exception):
    """What the image of this node holds does not let an entry be applied."""


def _unknown_of(operation: Operation | None) -> object:
    """The result of an operation that was done elsewhere."""
    match operation:
        case None:
            return None
        case [*changes]:
            return [unknown() for _ in changes]
    return unknown()


def moved(what: str) -> MovedError:
    """Other groups have it."""
    return MovedError(what, "has been divided among other groups", "connect again")
