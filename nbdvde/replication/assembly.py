"""The groups of an image on one node, as far as they have to do with each other.

What concerns the whole image - a snapshot, a new size, another table of slots - is an entry of `default`. Where there
are several groups it is done under a hold: `default` begins it and numbers it, an entry with that number goes to each
other group, and there everything stands still, on every node, until `default` has done what the hold is for or given it
up. So all nodes do it between the same entries of every group.

A state that is taken over from another node is that of all groups at once.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeAlias

import msgspec
import trio

from nbdvde.engine.image import Image
from nbdvde.errors import NbdvdeError, NetworkError, NoSpaceError
from nbdvde.raft.messages import Members, NodeId, Snapshot
from nbdvde.raft.placement import Table
from nbdvde.replication.changes import GroupMachine
from nbdvde.replication.machine import Execute, ImageMachine
from nbdvde.replication.notes import Note, Notes, Place
from nbdvde.replication.routing import Routing
from nbdvde.replication.sealing import Sealer

_log = logging.getLogger(__name__)
DEFAULT = "default"
_AGAIN_S = 0.5
"""Between two tries to take over a state."""
_NEW = 1
"""Index of what the image held when a group came: no log has that entry, so whoever joins takes over the state."""

Fetch: TypeAlias = Callable[[NodeId, Mapping[str, int], Callable[[], Awaitable[None]]], Awaitable[Mapping[str, Note]]]
"""Make the image what that of another node is, of the leader if it is node 0; answers how far that is, by group.

It has to be at least as far as these indexes, or nothing is done. The call comes before anything is changed.
"""


class Listener(Protocol):
    """Who is told of what the groups agreed on."""

    def attached(self, disk: str, epoch: int, node: NodeId) -> None:
        """Clients of a node, of none if that is 0, use a disk from now on, and nobody else."""

    def placed(self, nodes: Mapping[NodeId, Place]) -> None:
        """Which nodes there are, and where."""

    def arranged(self) -> None:
        """There are other groups."""

    async def step_back(self) -> None:
        """Nothing will be applied here for a while: others had better lead."""


class Assembly:
    """See above."""

    def __init__(self, image: Image, notes: Notes, sealer: Sealer, listener: Listener, fetch: Fetch) -> None:
        self.image, self.notes, self.sealer, self.listener = image, notes, sealer, listener
        self._fetch = fetch
        self.machines: dict[str, GroupMachine] = {}
        self.routing = Routing(Table.of([DEFAULT]))
        self.holding = self.settled = 0
        """Numbers of the hold under way, 0 for none, and of the last that is over."""
        self.incomplete = False
        """The state of another node is being taken over, or was in part: what the image holds is nothing yet."""
        self.taken = 0
        """How often that has begun."""
        self.changing = 0
        """Counts beginnings and ends of what changes the catalogue: odd while something does."""
        self.retired: set[str] = set()
        """Groups that came to their end because they had no part of the disks any more."""
        self._paused = False
        self._taking = trio.Lock()
        self._news = trio.Event()
        image.before_commit.append(self._note_nowait)

    def open(self, notes: Mapping[str, Note], execute: Execute) -> None:
        """Begin with what the image noted."""
        for name, note in notes.items():
            self.machines[name] = ImageMachine(self, note, execute) if name == DEFAULT else GroupMachine(self, note)

    # Notes

    def _note_nowait(self) -> None:
        self.notes.put_nowait(self.all())

    def all(self) -> list[Note]:
        """Those of all groups."""
        return [machine.note for machine in self.machines.values()]

    async def note(self) -> None:
        """Have every commit from now on say how far all groups are. Raises NoSpaceError, PoisonedError."""
        await self.notes.put(self.all)

    async def durable(self) -> None:
        """Have everything so far outlast a crash without the logs. Raises NoSpaceError, PoisonedError."""
        await self.note()
        await self.image.flush()

    async def kept(self) -> None:
        """The same, waiting for space. Raises PoisonedError."""
        while True:
            try:
                await self.durable()
            except NoSpaceError:
                await trio.sleep(_AGAIN_S)
            else:
                return

    def close(self) -> None:
        """Note nothing any more."""
        self.image.before_commit.remove(self._note_nowait)

    # Standing still

    def applied(self) -> None:
        """A group has applied an entry."""
        if self._paused:
            self.tell()

    def tell(self) -> None:
        """Whoever waits may look again."""
        self._news.set()
        self._news = trio.Event()

    async def turn(self, may_go_on: Callable[[], bool]) -> None:
        """Wait until no state is being taken over and `may_go_on`."""
        while self.incomplete or self._paused or not may_go_on():
            if self.incomplete and not self._taking.locked():
                await self._complete()
            else:
                await self._news.wait()

    async def whole(self) -> None:
        """Wait until what the image holds is one state; see to it that it becomes one."""
        await self.turn(lambda: True)

    @property
    def others(self) -> Sequence[GroupMachine]:
        """The machines of all groups but `default`."""
        return [machine for name, machine in self.machines.items() if name != DEFAULT]

    @property
    def sharing(self) -> Sequence[GroupMachine]:
        """Those of them that have a part of the disks: nothing that others agree on does anything."""
        return [machine for machine in self.others if machine.name in self.routing.groups]

    def are_held(self, hold: int) -> bool:
        """Whether all groups that matter stand still for a hold.

        Not those that have no part any more: the other nodes may have ended them already.
        """
        return all(machine.held >= hold for machine in self.sharing)

    def begin(self, hold: int) -> int:
        """Begin a hold, unless there is one; its number, or 0."""
        if self.holding:
            return 0
        self.holding = hold
        return hold

    def settle(self, hold: int) -> None:
        """A hold is over, if it is this one; the groups go on when they are told."""
        if hold and self.holding == hold:
            self.holding, self.settled = 0, hold

    # Groups

    def arrange(self, names: Iterable[str], members: Members) -> None:
        """Have other groups share the disks. None of the new ones may begin before that is durable.

        Those that have no part any more go on until all nodes know: what they have agreed on may be on its way.
        """
        names = {DEFAULT, *names}
        epochs = dict(self.machines[DEFAULT].epochs)
        for name in sorted(names - {*self.machines}):
            self.machines[name] = GroupMachine(self, Note(name, Snapshot(_NEW, 0, members), epochs))
        self.routing = Routing(self.routing.table.spread(names))
        for machine in self.machines.values():  # what one compared another one writes now
            machine.comparisons.forget()

    @property
    def idle(self) -> list[str]:
        """The groups that have no part of the disks any more."""
        return sorted({*self.machines} - {*self.routing.groups})

    def retire(self, names: Iterable[str]) -> None:
        """Forget groups that have no part of the disks."""
        for name in sorted({*names} & {*self.idle}):
            del self.machines[name]
            self.retired.add(name)

    # Another node's state

    async def take_over(self, source: NodeId, group: str, snapshot: Snapshot) -> Snapshot:
        """Have the state of another node, which has to be at least as new in one group; how new it is there.

        Raises NbdvdeError: it has not worked then.
        """
        async with self._taking:
            if not self._has(group, snapshot.index):  # by the state that came for another group
                await self._take_over(source, {group: snapshot.index})
            if group not in self.machines:
                raise NetworkError(f"raft group {group}", "is gone")
            return self.machines[group].applied

    async def renew(self) -> None:
        """Take over what another node has instead of what is damaged here, if one can be reached."""
        async with self._taking:
            try:
                await self._take_over(0, {})
            except NbdvdeError as error:
                _log.warning("nothing is taken over instead of what is damaged: %s", error)

    def _has(self, group: str, index: int) -> bool:
        machine = self.machines.get(group)
        return not self.incomplete and machine is not None and machine.applied.index >= index

    async def _complete(self) -> None:
        """Take over a state from whoever leads now, whose source failed in the middle, or this node."""
        try:
            async with self._taking:
                try:
                    await self._take_over(0, {})
                except NbdvdeError as error:
                    _log.warning("replication stands still: %s", error)
                    await trio.sleep(_AGAIN_S)
        finally:
            self.tell()  # it is up to somebody else if this one waits no longer

    async def _take_over(self, source: NodeId, wanted: Mapping[str, int]) -> None:
        await self.listener.step_back()
        self._paused = True
        try:
            while any(machine.busy for machine in self.machines.values()):
                await self._news.wait()
            have = {name: machine.applied.index for name, machine in self.machines.items()}
            for name, index in wanted.items():
                have[name] = max(index, have.get(name, 0))
            notes = await self._fetch(source, have, self._break_off)
            await self._become(notes)
        finally:
            self._paused = False
            self.tell()

    async def _break_off(self) -> None:
        """What the image holds is nothing from now on, until all is taken over."""
        self.incomplete = True
        self.taken += 1
        await self.durable()

    async def _become(self, notes: Mapping[str, Note]) -> None:
        """The image holds what others noted this about."""
        for name in sorted({*self.machines} - {*notes}):
            del self.machines[name]
        for name, note in notes.items():
            if name in self.machines:
                self.machines[name].take(msgspec.structs.replace(note, begun=self.machines[name].begun))
            else:
                self.machines[name] = GroupMachine(self, msgspec.structs.replace(note, begun=False))
        self.incomplete = False
        main = notes[DEFAULT]
        for disk, (epoch, node) in main.epochs.items():
            self.listener.attached(disk, epoch, node)
        self.listener.placed(main.nodes)
        self.listener.arranged()
        await self.durable()
