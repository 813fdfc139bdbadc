"""An image that a cluster replicates, on one of its nodes: disks for clients, changes, and the members."""

import dataclasses
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import cast

import msgspec
import trio

from nbdvde import moment
from nbdvde.disk import BLOCK, Done
from nbdvde.engine.image import Image
from nbdvde.errors import DetachedError, MovedError, NbdvdeError, NetworkError, RefusedError, UsageError
from nbdvde.moment import NO_CLOCK, RetentionClock
from nbdvde.raft.core import NotLeaderError
from nbdvde.raft.groups import Group
from nbdvde.raft.messages import NodeId
from nbdvde.raft.node import Node
from nbdvde.raft.placement import SLOTS
from nbdvde.replication.assembly import DEFAULT, Assembly
from nbdvde.replication.batches import unknown
from nbdvde.replication.catchup import Taker, unpacked
from nbdvde.replication.changes import GroupMachine
from nbdvde.replication.compare import length_of
from nbdvde.replication.disk import Attachment, ReplicatedDisk
from nbdvde.replication.giving import Giver
from nbdvde.replication.holds import Holds
from nbdvde.replication.lane import PROPOSE, Lane, unpack_question
from nbdvde.replication.machine import ImageMachine
from nbdvde.replication.notes import Identity, Note, Place
from nbdvde.replication.operations import Arrange, Attach, Call, Change, Fence, Release
from nbdvde.replication.questions import AskCompared, AskData
from nbdvde.replication.regioncopy import found
from nbdvde.replication.retiring import Retiring
from nbdvde.replication.room import Room
from nbdvde.replication.roster import Roster
from nbdvde.replication.routing import group_name
from nbdvde.replication.scrubbing import Scrubbing
from nbdvde.replication.sealing import Sealer
from nbdvde.replication.together import together

_log = logging.getLogger(__name__)
CATCH_UP, ROOM = 2, 4
"""Kinds of questions between nodes, besides those of `lane`, `roster` and `retiring`."""
_PAUSE_S = 0.05
"""Between two tries."""
_COMPARED_S = 10.0
"""That a node may be behind and be compared all the same."""
_HAND_OVER_S = 2.0
"""That takes, at most, before a state is taken over."""
_LEAVE_S = 1.0
"""That a node goes on when it has left."""


class Replica:
    """See above. It is the `Ways` of its disks, and the `Listener` of its machine."""

    def __init__(self, image: Image, identity: Identity, node: Node, sealer: Sealer, nursery: trio.Nursery) -> None:
        """Tasks run in `nursery`."""
        self.image, self.identity, self.node = image, identity, node
        self._sealer, self._nursery = sealer, nursery
        self.lanes: dict[str, Lane] = {}
        """Of the groups that this node takes part in by now."""
        self._lanes_changed, self._arranged = trio.Event(), trio.Event()
        self._room = Room(image, node, lambda: [lane.group for lane in self.lanes.values()], ROOM)
        self._attachments: dict[str, Attachment] = {}
        self._attaching: dict[str, trio.Lock] = {}
        self._disks: dict[str, ReplicatedDisk] = {}
        self.assembly: Assembly
        self.roster: Roster
        self._holds: Holds
        self.placed_changed: Callable[[Mapping[NodeId, Place]], None] = lambda nodes: None
        self._ended = False
        self.catch_up_rate: int | None = None
        """Bytes a second, at most, that are taken over."""
        self.taker: Taker | None = None
        """What is being taken over from another node, or was last."""
        self.scrubbing: Scrubbing | None = None
        """Compares replicas in the background, if that is wanted."""

    async def start(self, assembly: Assembly, groups: Mapping[str, Group]) -> None:
        """Begin to serve others, and clients; `groups` are those that the node has, `default` among them."""
        self.assembly = assembly
        for name, group in groups.items():
            self._add(group, assembly.machines[name])
            await assembly.machines[name].begin()
        self._holds = Holds(assembly, self.main, self._sharing, self._nursery)
        self.roster = Roster(assembly, self.node, self.lane, lambda: self._nursery.start_soon(self._leave))
        retiring = Retiring(assembly, self.main, self.node)
        giver = Giver(
            self.image,
            self.identity.key,
            assembly.all,
            self._compared_here,
            changing=lambda: assembly.changing + 2 * assembly.taken,
        )

        async def give(node: NodeId, question: bytes) -> bytes:
            return await giver.answer(question)

        self.node.mesh.handle(PROPOSE, self._on_propose)
        self.node.mesh.handle(CATCH_UP, give)
        self.node.mesh.handle(ROOM, self._room.answer)
        # A state that was taken over in part is completed even if there is nothing to apply and nobody reads.
        for task in (
            assembly.whole, self._room.watch, self.roster.watch, self.roster.follow_up, self._holds.watch,
            retiring.watch, self._follow,
        ):  # fmt: skip
            self._nursery.start_soon(task)
        self.arranged()

    # Groups

    @property
    def main(self) -> Lane:
        """That of `default`."""
        return self.lanes[DEFAULT]

    @property
    def group(self) -> Group:
        """`default`."""
        return self.main.group

    @property
    def incomplete(self) -> bool:
        """Whether what the image holds is nothing yet."""
        return self.assembly.incomplete

    @property
    def problem(self) -> str:
        """Why this node does not go on, if so."""
        stuck = (machine.stuck for machine in self.assembly.machines.values() if machine.stuck)
        return next(stuck, "")

    @property
    def machine(self) -> ImageMachine:
        """Of `default`."""
        return cast(ImageMachine, self.main.machine)

    def _add(self, group: Group, machine: GroupMachine) -> None:
        self.lanes[group.name] = Lane(machine, group, self.node, self._sealer, self._room, self._nursery)

    def arranged(self) -> None:
        self._arranged.set()

    async def _follow(self) -> None:
        """Take part in the groups that there are, and in no others; for ever."""
        while True:
            await self._arranged.wait()
            self._arranged = trio.Event()
            machines = dict(self.assembly.machines)
            await self.assembly.kept()  # a node must know of a group for good before it promises anything there
            for name in sorted({*self.lanes} - {*machines}):
                self.lanes.pop(name).end(gone=name in self.assembly.retired)
                await self.node.remove(name)
            for name, machine in machines.items():
                if name not in self.lanes:
                    group = await self.node.create(name, machine, machine.applied)
                    await machine.begin()
                    self._add(group, machine)
            self._lanes_changed.set()
            self._lanes_changed = trio.Event()

    async def lane(self, name: str) -> Lane:
        """That of a group, as soon as this node takes part in it. Raises MovedError when it is gone."""
        while name not in self.lanes:
            if name not in self.assembly.machines:
                raise MovedError(f"raft group {name}", "is gone", "connect again")
            await self._lanes_changed.wait()
        return self.lanes[name]

    async def _sharing(self) -> Iterable[Lane]:
        """Those of the groups but `default` that have a part of the disks."""
        return [await self.lane(machine.name) for machine in self.assembly.sharing]

    async def _in(self, groups: Iterable[str], do: Callable[[Lane], Awaitable[object]]) -> None:
        """Do something in several groups at the same time. Raises the first error."""

        async def run(name: str) -> None:
            await do(await self.lane(name))

        await together([partial(run, name) for name in groups])

    async def arrange(self, add: int, remove: Collection[str]) -> None:
        """Have so many more groups share the disks, and some no longer. Raises NbdvdeError."""
        if len(self.assembly.machines) + add >= SLOTS:
            raise UsageError(f"{add} groups", f"are more than the {SLOTS} that there can be", "add fewer")

        def operation(hold: int) -> Arrange:
            there = self.assembly.routing.groups
            for name in remove:
                if name not in there or name == DEFAULT:
                    raise UsageError(f"group {name}", "is not one that can be removed", "see nbdvde cluster status")
            new = [group_name(hold, at) for at in range(add)]
            return Arrange(hold, tuple([name for name in there if name not in remove] + new))

        await self._holds.under_hold(operation)
        await self.main.barrier()
        await self._sharing()

    # Disks

    def disk(self, name: str) -> ReplicatedDisk:
        """A disk as clients use it, always the same object. Raises UsageError."""
        self.image.disk(name)
        if name not in self._disks:
            self._disks[name] = ReplicatedDisk(name, lambda: self.image.disk(name), self)
        return self._disks[name]

    async def put(self, change: Change) -> None:
        while True:
            routing = self.assembly.routing
            sent = change if change.table == routing.version else msgspec.structs.replace(change, table=routing.version)
            groups = routing.along(change.disk, change.offset, change.length)
            try:
                await self._in(groups, lambda lane: lane.put(sent))  # noqa: B023 - it ends before the next one
            except MovedError:
                await self._moved(routing.version)
            else:
                return

    def begin(self, change: Change, done: Done) -> None:
        """Of changes that lie in one stripe."""
        routing = self.assembly.routing
        lane = self.lanes.get(routing.at(change.disk, change.offset))
        if lane is None:
            self._again(change, done)
            return

        def ended(failure: Exception | None) -> None:
            if isinstance(failure, MovedError):
                self._again(change, done)
            else:
                done(failure)

        sent = change if change.table == routing.version else msgspec.structs.replace(change, table=routing.version)
        lane.begin(sent, ended)

    def _again(self, change: Change, done: Done) -> None:
        if self._ended:
            done(unknown())
        else:
            self._nursery.start_soon(self._put_and_tell, change, done)

    async def _put_and_tell(self, change: Change, done: Done) -> None:
        try:
            await self.put(change)
        except NbdvdeError as error:
            done(error)
        else:
            done(None)

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        async def wait() -> None:
            await trio.sleep(seconds)
            call()

        if not self._ended:
            self._nursery.start_soon(wait)

    async def _moved(self, version: int) -> None:
        """Another table of slots holds than that of `version`: wait until this node knows it."""
        await self.main.barrier()
        if self.assembly.routing.version == version:
            await trio.sleep(_PAUSE_S)

    async def barrier(self, disk: str = "", offset: int = 0, length: int = 0) -> None:
        while True:
            await self.assembly.whole()
            routing, taken = self.assembly.routing, self.assembly.taken
            # `default` says who has what, and what all groups stand still for.
            groups = sorted({DEFAULT, *(routing.along(disk, offset, length) if disk else routing.groups)})
            try:
                await self._in(groups, Lane.barrier)
            except MovedError:
                await self._moved(routing.version)
            if routing is self.assembly.routing and taken == self.assembly.taken:
                return

    @property
    def taken(self) -> int:
        return self.assembly.taken

    async def attach(self, disk: str, abort: Callable[[], None]) -> Attachment:
        async with self._attaching.setdefault(disk, trio.Lock()):
            attachment = self._attachments.get(disk)
            while attachment is None or not attachment.open:
                epoch = await self._epoch(disk)
                await self.barrier()
                await self._fence(disk, epoch)
                if self.machine.epochs.get(disk, (0, 0))[0] == epoch:  # nobody has taken it over already
                    attachment = self._attachments[disk] = Attachment(epoch)
            attachment.join(abort)
            return attachment

    def release(self, disk: str, attachment: Attachment) -> None:
        if not self._ended:
            self._nursery.start_soon(self._release, disk, attachment)

    async def _release(self, disk: str, attachment: Attachment) -> None:
        with suppress(NbdvdeError):  # then it counts as in use until somebody else comes
            await self.main.propose(Release(disk, attachment.epoch))

    async def _epoch(self, disk: str) -> int:
        """Have a disk used by clients of this node from now on, and by nobody else."""
        while True:
            try:
                return cast(int, await self.main.propose(Attach(disk, self.node.number)))
            except DetachedError:  # it may be done twice
                await trio.sleep(_PAUSE_S)

    async def _fence(self, disk: str, epoch: int) -> None:
        """Have the other groups know it: those that come later begin with what `default` knows."""
        fence = Fence(disk, epoch, self.node.number)
        while True:
            try:
                await self._in([machine.name for machine in self.assembly.others], lambda lane: lane.propose(fence))
            except DetachedError:  # it may be done twice
                await trio.sleep(_PAUSE_S)
            else:
                return

    def attached(self, disk: str, epoch: int, node: NodeId) -> None:
        attachment = self._attachments.get(disk)
        if attachment and attachment.epoch < epoch:
            attachment.end()

    # Changes

    async def call(self, path: str, request: bytes, clock: RetentionClock = NO_CLOCK) -> bytes:
        """Have a change of the image made on every node; its answer. `clock`: see `Call`. Raises NbdvdeError."""
        asked = Call(path, request, moment.now_ns(), moment.draw(32), clock)
        if asked.concerns_all:
            return cast(bytes, await self._holds.call(lambda hold: dataclasses.replace(asked, hold=hold), asked.growth))
        return cast(bytes, await self.main.propose(asked, growth=asked.growth))

    async def _on_propose(self, node: NodeId, question: bytes) -> bytes:
        """Another node has a client who wants something done."""
        name, growth, data = unpack_question(question)
        if name not in self.lanes:
            raise NotLeaderError(f"raft group {name}", "is not here", "ask the leader")
        return await self.lanes[name].propose_for_another(data, growth)

    # What the groups agreed on

    async def step_back(self) -> None:
        await self.node.hand_over(_HAND_OVER_S)

    def placed(self, nodes: Mapping[NodeId, Place]) -> None:
        self.placed_changed(nodes)

    def end(self) -> None:
        """Nobody is served any more: who waits is told that nobody knows."""
        self._ended = True
        for lane in self.lanes.values():
            lane.end()

    async def _leave(self) -> None:
        """This node belongs to the cluster no more: it ends, and whoever asked for that is told before."""
        await trio.sleep(_LEAVE_S)
        why = "belongs to its cluster no more"
        raise RefusedError(f"node {self.node.number}", why, "delete its image, or have another one join instead")

    # Comparing

    async def compared(self, group: str, index: int) -> Mapping[NodeId, bytes]:
        """What the nodes that can be reached found when they applied an entry that compares. Raises NbdvdeError."""
        told: dict[NodeId, bytes] = {}
        question = msgspec.msgpack.encode(AskCompared(group, index))

        async def ask(node: NodeId) -> None:
            why: object = "it is behind"
            try:
                with trio.move_on_after(_COMPARED_S):
                    told[node] = await (
                        self._compared_here(group, index)
                        if node == self.node.number
                        else self.node.peer(node).request(CATCH_UP, question)
                    )
                    return
            except NbdvdeError as error:
                why = error
            _log.warning("node %d is not compared: %s", node, why)

        async with trio.open_nursery() as nursery:
            for node in self.group.core.members:
                if node == self.node.number or self.node.is_connected(node):
                    nursery.start_soon(ask, node)
        if not told:
            raise RefusedError("cluster", "has no node that is as far as it would be compared", "try again")
        return told

    async def _compared_here(self, group: str, index: int) -> bytes:
        lane = await self.lane(group)
        while lane.machine.applied.index < index:
            await lane.group.news()
        hashes = lane.machine.comparisons.of(index)
        if hashes is None:
            raise RefusedError(f"entry {index}", "compared nothing here, or too long ago", "try again")
        return hashes

    async def chunk_of(self, node: NodeId, disk: str, chunk: int) -> bytes:
        """What a chunk of a disk holds on another node. Raises NbdvdeError."""
        blocks = bytes(range(length_of(await found(self.image, disk), chunk) // BLOCK))
        question = msgspec.msgpack.encode(AskData(disk, chunk, blocks))
        return unpacked(await self.node.peer(node).request(CATCH_UP, question))

    # Catching up

    async def fetch(
        self, source: NodeId, have: Mapping[str, int], begin: Callable[[], Awaitable[None]]
    ) -> Mapping[str, Note]:
        """Make the image what that of another node is (`assembly.Fetch`). Raises NbdvdeError."""
        failure: NbdvdeError = NetworkError("cluster", "has nobody to take the state from", "it is tried again")
        for node in self._sources(source):
            try:
                return await self._fetch(node, have, begin)
            except NbdvdeError as error:
                failure = error
        raise failure

    def _sources(self, first: NodeId) -> list[NodeId]:
        """Nodes that can be asked: one first, which may lack what another group here has, then who leads."""
        known = {node for node in self.group.core.members if self.node.is_connected(node)}
        others = known.union([first] if first else []) - {self.node.number}
        return sorted(others, key=lambda node: (node != first, node != self.group.leader, node))

    async def _fetch(
        self, source: NodeId, have: Mapping[str, int], begin: Callable[[], Awaitable[None]]
    ) -> Mapping[str, Note]:
        _log.info("taking over the state of node %d", source)

        async def ask(question: bytes) -> bytes:
            return await self.node.peer(source).request(CATCH_UP, question)

        self.taker = Taker(self.image, self.identity.key, ask, rate=self.catch_up_rate)
        notes = await self.taker.run(have, begin)
        _log.info("%d of %d blocks compared were copied", self.taker.copied, self.taker.compared)
        return notes
