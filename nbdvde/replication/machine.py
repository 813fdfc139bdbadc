"""What the group `default` does besides: who uses a disk, the catalogue, the nodes, and what all stand still for."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias

from nbdvde.errors import InUseError, NbdvdeError, PoisonedError, RefusedError
from nbdvde.raft.messages import NodeId
from nbdvde.raft.placement import SLOTS, Table
from nbdvde.replication.changes import GroupMachine, Result, moved
from nbdvde.replication.notes import Note, Place
from nbdvde.replication.operations import (
    Arrange,
    Attach,
    Begin,
    Call,
    Dismiss,
    Enrol,
    GiveUp,
    Operation,
    Release,
    Retire,
)
from nbdvde.replication.routing import Routing

if TYPE_CHECKING:
    from nbdvde.replication.assembly import Assembly

_DISKS_MAX = 512
"""With an epoch, in a cluster: more would not fit into a note."""

Execute: TypeAlias = Callable[["ImageMachine", Call], Awaitable[bytes]]


class ImageMachine(GroupMachine):
    """The state machine of `default`."""

    def __init__(self, assembly: "Assembly", note: Note, execute: Execute) -> None:
        self._execute = execute
        super().__init__(assembly, note)

    def take(self, note: Note) -> None:
        super().take(note)
        self.held = 0
        assembly = self._assembly
        self.nodes = dict(note.nodes)
        assembly.holding, assembly.settled, assembly.incomplete = note.holding, note.settled, note.incomplete
        assembly.routing = Routing(Table.unpack(note.table) if note.table else Table.of([self.name]))

    @property
    def note(self) -> Note:
        assembly = self._assembly
        return Note(
            self.name, self.applied, self.epochs, self.nodes, assembly.incomplete, self.begun,
            assembly.routing.noted, assembly.holding, assembly.settled, self.ahead,
        )  # fmt: skip

    def may_do(self, operation: Operation | None) -> bool:
        match operation:
            case Call(hold=hold) | Arrange(hold=hold) if hold and hold == self._assembly.holding:
                return self._assembly.are_held(hold)
        return True

    async def do(self, index: int, operation: Operation) -> object:
        assembly = self._assembly
        match operation:
            case Attach(disk=disk, node=node):
                if disk not in self.epochs and len(self.epochs) >= _DISKS_MAX:
                    return RefusedError(f"disk {disk}", f"is one of more than {_DISKS_MAX} in use", "delete some")
                self.epochs[disk] = index, node
                assembly.listener.attached(disk, index, node)
                return index
            case Release(disk=disk, epoch=epoch):
                if self.epochs.get(disk, (0, 0))[0] == epoch:
                    self.epochs[disk] = epoch, 0
                return None
            case Enrol(address=address, name=name):
                return self._enrol(Place(address, name))
            case Dismiss(node=node):
                self.nodes[node] = Place("", "")
                assembly.listener.placed(self.nodes)
                return None
            case Begin():
                return assembly.begin(index)
            case GiveUp(hold=hold):
                assembly.settle(hold)
                return None
            case Arrange() as arrange:
                return self._arrange(arrange)
            case Retire(groups=groups):
                assembly.retire(groups)
                return None
            case Call() as call:
                return await self._call(call)
        return await super().do(index, operation)

    async def done(self, operation: Operation | None) -> None:
        """What can be done only once is noted at once: nothing that comes later is in the image without that."""
        match operation:
            case Call():
                await self._surely(self._assembly.note)
                self._assembly.tell()
            case Arrange() | Retire():
                await self._surely(self._assembly.durable)
                self._assembly.listener.arranged()
                self._assembly.tell()
            case GiveUp():
                self._assembly.tell()

    def _enrol(self, place: Place) -> Result:
        """A new number each time: nobody may speak for one who has promised anything."""
        for node, other in self.nodes.items():
            if other.address == place.address:  # groups may count on it, or somebody have a ticket
                why = f"is that of node {node}"
                return RefusedError(f"address {place.address}", why, f"have node {node} leave first, then invite it")
        number = max(self.nodes, default=0) + 1
        self.nodes[number] = place
        self._assembly.listener.placed(self.nodes)
        return number

    def _arrange(self, arrange: Arrange) -> Result:
        assembly = self._assembly
        if arrange.hold != assembly.holding:
            return _given_up("groups of the cluster")
        assembly.settle(arrange.hold)
        if len({*assembly.machines, *arrange.groups}) >= SLOTS:
            return RefusedError("cluster", f"cannot have more than {SLOTS - 1} groups", "remove some")
        if self.applied.members.outgoing:
            return RefusedError("cluster", "is changing its nodes", "try again")
        assembly.arrange(arrange.groups, self.applied.members)
        return None

    async def _call(self, call: Call) -> Result:
        assembly = self._assembly
        if call.hold and call.hold != assembly.holding:
            return _given_up(call.path)
        if not call.hold and call.concerns_all and not assembly.routing.alone:
            return moved(call.path)
        for machine in assembly.machines.values():
            machine.comparisons.forget()
        assembly.changing += call.concerns_all
        try:
            await self._surely(assembly.note)
            result: Result = await self._surely(lambda: self._execute(self, call))
        except PoisonedError:
            raise
        except NbdvdeError as error:  # the same on all nodes
            result = error
        finally:
            assembly.changing += call.concerns_all
        assembly.settle(call.hold)  # it is done: what could not be, for damage, is tried again under the same hold
        return result

    # During a call

    def renew(self, disk: str) -> None:
        """A disk comes: what was meant for an older one of that name comes to nothing."""
        self._attach_everywhere(disk, 0)

    def forget(self, disk: str) -> None:
        """A disk has gone."""
        for machine in self._assembly.machines.values():
            machine.epochs.pop(disk, None)

    def _attach_everywhere(self, disk: str, node: NodeId) -> None:
        """All groups stand still."""
        for machine in self._assembly.machines.values():
            machine.epochs[disk] = self.applied.index + 1, node

    @asynccontextmanager
    async def unused(self, disk: str, *, force: bool) -> AsyncIterator[None]:
        """Have no client use a disk meanwhile; unless `force`, only when none does. Raises InUseError."""
        if self.epochs.get(disk, (0, 0))[1]:
            if not force:
                raise InUseError(f"disk {disk}", "clients use it", "disconnect them, or use --force")
            self._attach_everywhere(disk, 0)
            self._assembly.listener.attached(disk, self.applied.index + 1, 0)
        yield


def _given_up(what: str) -> RefusedError:
    return RefusedError(what, "took too long to begin on all groups", "try again")
