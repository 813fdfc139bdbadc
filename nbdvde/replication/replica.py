"""An image that a cluster replicates, on one of its nodes: disks for clients, changes, and the members."""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from enum import IntEnum
from typing import cast

import msgspec
import trio

from nbdvde import moment
from nbdvde.disk import BLOCK, Done
from nbdvde.engine.image import Image
from nbdvde.errors import DetachedError, NbdvdeError, NetworkError, RefusedError
from nbdvde.raft.calls import PeerError
from nbdvde.raft.core import NotLeaderError
from nbdvde.raft.groups import Group
from nbdvde.raft.messages import Members, NodeId, Snapshot
from nbdvde.raft.node import Node
from nbdvde.raft.waiting import GroupEnded, LeadershipLost
from nbdvde.replication import results
from nbdvde.replication.batches import Batches, unknown
from nbdvde.replication.catchup import Taker, unpacked
from nbdvde.replication.compare import length_of
from nbdvde.replication.disk import Attachment, ReplicatedDisk
from nbdvde.replication.giving import Giver
from nbdvde.replication.machine import ImageMachine
from nbdvde.replication.notes import Identity, Note, Place
from nbdvde.replication.operations import Action, Attach, Call, Change, Dismiss, Enrol, Operation, Release
from nbdvde.replication.questions import AskCompared, AskData
from nbdvde.replication.regioncopy import found
from nbdvde.replication.room import Room
from nbdvde.replication.sealing import Sealer

_log = logging.getLogger(__name__)
GROUP = "default"
PROPOSE, CATCH_UP, CONTROL, ROOM = 1, 2, 3, 4
_GROWTH_BYTES = 8
"""Before the entry in a question that proposes it: bytes that it may take in an image."""
"""Kinds of questions between nodes."""
_UNSURE = (LeadershipLost.__name__, GroupEnded.__name__, "Exception")
"""Names of errors of the leader after which nobody knows what becomes of what it was asked."""
_PAUSE_S = 0.05
"""Between two looks for a leader."""
_LOOK_S = 0.5
"""Between two looks at whether a learner has caught up."""
_CLOSE = 4096
"""Entries that a learner may be behind to become a voter."""


class _Action(IntEnum):
    """What only the leader can do."""

    INVITE, DISMISS, TRANSFER = 1, 2, 3


class _Ask(msgspec.Struct, frozen=True, array_like=True):
    action: _Action
    node: NodeId


class Replica:
    """See above. It is the `Ways` of its disks, and the `Listener` of its machine."""

    def __init__(self, image: Image, identity: Identity, node: Node, sealer: Sealer, nursery: trio.Nursery) -> None:
        """Tasks run in `nursery`."""
        self.image, self.identity, self.node = image, identity, node
        self._sealer, self._nursery = sealer, nursery
        self._batches = Batches(nursery, self._propose_changes), Batches(nursery, self._propose_changes)
        """Of what takes space, and of what may free some: that must go on when there is none."""
        self._attachments: dict[str, Attachment] = {}
        self._attaching: dict[str, trio.Lock] = {}
        self._disks: dict[str, ReplicatedDisk] = {}
        self.machine: ImageMachine
        self.group: Group
        self.placed_changed: Callable[[Mapping[NodeId, Place]], None] = lambda nodes: None
        self._ended = False
        self.catch_up_rate: int | None = None
        """Bytes a second, at most, that are taken over."""
        self.taker: Taker | None = None
        """What is being taken over from another node, or was last."""

    async def start(self, machine: ImageMachine, group: Group) -> None:
        """Begin to serve others, and clients."""
        self.machine, self.group = machine, group
        self._room = Room(self.image, self.node, group, ROOM)
        giver = Giver(self.image, self.identity.key, lambda group: machine.note, self._compared_here)

        async def give(node: NodeId, question: bytes) -> bytes:
            return await giver.answer(question)

        self.node.mesh.handle(PROPOSE, self._on_propose)
        self.node.mesh.handle(CATCH_UP, give)
        self.node.mesh.handle(CONTROL, self._on_control)
        self.node.mesh.handle(ROOM, self._room.answer)
        self._nursery.start_soon(self._room.watch)
        self._nursery.start_soon(self._promote)

    # Disks

    def disk(self, name: str) -> ReplicatedDisk:
        """A disk as clients use it, always the same object. Raises UsageError."""
        self.image.disk(name)
        if name not in self._disks:
            self._disks[name] = ReplicatedDisk(name, lambda: self.image.disk(name), self)
        return self._disks[name]

    async def put(self, change: Change) -> None:
        await self._batches[change.action == Action.TRIM].put(change)

    def begin(self, change: Change, done: Done) -> None:
        self._batches[change.action == Action.TRIM].begin(change, done)

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        async def wait() -> None:
            await trio.sleep(seconds)
            call()

        if not self._ended:
            self._nursery.start_soon(wait)

    async def _propose_changes(self, changes: Sequence[Change]) -> Sequence[NbdvdeError | None]:
        blocks = sum(2 + len(change.data) // BLOCK for change in changes if change.action != Action.TRIM)
        return cast(Sequence[NbdvdeError | None], await self.propose(changes, growth=blocks * BLOCK))

    async def barrier(self) -> None:
        while True:
            try:
                await self.group.read_barrier()
            except (NotLeaderError, LeadershipLost):
                await trio.sleep(_PAUSE_S)
            except GroupEnded as error:
                raise unknown() from error
            else:
                return

    async def attach(self, disk: str, abort: Callable[[], None]) -> Attachment:
        async with self._attaching.setdefault(disk, trio.Lock()):
            attachment = self._attachments.get(disk)
            while attachment is None or not attachment.open:
                epoch = await self._epoch(disk)
                await self.barrier()
                if self.machine.epochs.get(disk, (0, 0))[0] == epoch:  # nobody has taken it over already
                    attachment = self._attachments[disk] = Attachment(epoch)
            attachment.join(abort)
            return attachment

    def release(self, disk: str, attachment: Attachment) -> None:
        if not self._ended:
            self._nursery.start_soon(self._release, disk, attachment)

    async def _release(self, disk: str, attachment: Attachment) -> None:
        with suppress(NbdvdeError):  # then it counts as in use until somebody else comes
            await self.propose(Release(disk, attachment.epoch))

    async def _epoch(self, disk: str) -> int:
        """Have a disk used by clients of this node from now on, and by nobody else."""
        while True:
            try:
                return cast(int, await self.propose(Attach(disk, self.node.number)))
            except DetachedError:  # it may be done twice
                await trio.sleep(_PAUSE_S)

    def attached(self, disk: str, epoch: int, node: NodeId) -> None:
        attachment = self._attachments.get(disk)
        if attachment and attachment.epoch < epoch:
            attachment.end()

    # Changes

    async def call(self, path: str, request: bytes, *, clock_ns: int = 0) -> bytes:
        """Have a change of the image made on every node; its answer. `clock_ns`: see `Call`. Raises NbdvdeError."""
        operation = Call(path, request, moment.now_ns(), moment.draw(32), clock_ns)
        return cast(bytes, await self.propose(operation))

    async def propose(self, operation: Operation, *, growth: int = 0) -> object:
        """Have an operation done on every node; its result. Waits while there is no leader.

        Raises DetachedError when nobody knows what became of it, NoSpaceError when most nodes have no room for
        `growth` bytes more, and what it was refused with.
        """
        data = self._sealer.seal(GROUP, operation)

        async def ask(leader: NodeId) -> object:
            question = growth.to_bytes(_GROWTH_BYTES, "little") + data
            return self._result(await self.node.peer(leader).request(PROPOSE, question))

        return await self._at_leader(lambda: self._propose_here(data, growth), ask)

    async def _propose_here(self, data: bytes, growth: int) -> object:
        if growth:
            await self._room.admit(growth)
        return await self.group.propose(data)

    def is_connected(self, node: NodeId) -> bool:
        """Whether another node can be reached."""
        peer = self.node.mesh.peers.get(node)
        return peer is not None and peer.connected

    async def _at_leader(
        self, do: Callable[[], Awaitable[object]], ask: Callable[[NodeId], Awaitable[object]]
    ) -> object:
        """`do` something if this node leads, or else `ask` the one that does. Waits while none does.

        Raises DetachedError when nobody knows what became of it.
        """
        while True:
            leader = self.group.leader
            try:
                if leader == self.node.number:
                    return await do()
                if leader and self.is_connected(leader):
                    return await ask(leader)
            except NotLeaderError:
                pass
            except (LeadershipLost, GroupEnded) as error:
                raise unknown() from error
            except PeerError as error:
                if error.error in _UNSURE:
                    raise unknown() from error
                if error.error != NotLeaderError.__name__:
                    raise
            except NetworkError as error:
                raise unknown() from error
            await trio.sleep(_PAUSE_S)

    @staticmethod
    def _result(packed: bytes) -> object:
        result = results.unpack(packed)
        if isinstance(result, NbdvdeError):
            raise result
        return result

    async def _on_propose(self, node: NodeId, data: bytes) -> bytes:
        """Another node has a client who wants something done."""
        try:
            growth = int.from_bytes(data[:_GROWTH_BYTES], "little")
            return results.pack(await self._propose_here(data[_GROWTH_BYTES:], growth))
        except (NotLeaderError, LeadershipLost, GroupEnded):
            raise
        except NbdvdeError as error:
            return results.pack(error)

    # Members

    async def invite(self, place: Place) -> NodeId:
        """Let a node join, which is only told what happens until it has everything; its number. Raises NbdvdeError."""
        number = cast(NodeId, await self.propose(Enrol(place.address, place.name)))
        await self._lead(_Ask(_Action.INVITE, number))
        return number

    async def dismiss(self, node: NodeId) -> None:
        """Have a node belong to the cluster no more. Raises NbdvdeError."""
        if not self.machine.nodes.get(node, Place("", "")).address:
            raise RefusedError(f"node {node}", "does not exist", "see nbdvde cluster status")
        try:
            await self._lead(_Ask(_Action.DISMISS, node))
        except DetachedError:
            if node != self.node.number:  # who leaves is not told: its connections end
                raise

    async def transfer(self, node: NodeId) -> None:
        """Have another node lead; 0 for whichever has most. Raises NbdvdeError."""
        await self._lead(_Ask(_Action.TRANSFER, node))

    async def _lead(self, asked: "_Ask") -> None:
        """Have the leader do something that only it can. Waits while there is none. Raises NbdvdeError."""
        await self._at_leader(
            lambda: self._do(asked), lambda node: self.node.peer(node).request(CONTROL, msgspec.msgpack.encode(asked))
        )

    async def _on_control(self, node: NodeId, data: bytes) -> bytes:
        await self._do(msgspec.msgpack.decode(data, type=_Ask))
        return b""

    async def _do(self, asked: "_Ask") -> None:
        group, node = self.group, asked.node
        members = group.core.members
        match asked.action:
            case _Action.INVITE if node not in members:
                await group.change_members(Members(members.voters, members.learners | {node}))
            case _Action.DISMISS if members.voters == {node}:
                raise RefusedError(f"node {node}", "is the only one", "delete the image instead")
            case _Action.DISMISS if node == self.node.number:
                await group.hand_over()
                raise NotLeaderError(f"node {node}", "has handed over", "ask the leader")
            case _Action.DISMISS:
                if node in members:
                    await group.change_members(Members(members.voters - {node}, members.learners - {node}))
                await self.propose(Dismiss(node))
            case _Action.TRANSFER:
                await (group.transfer(node) if node else group.hand_over())

    async def _promote(self) -> None:
        """Make voters of learners that have everything, while this node leads.

        One that has answered to the entry that made it one is there.
        """
        while True:
            await trio.sleep(_LOOK_S)
            core = self.group.core
            office = core.office
            if office is None:
                continue
            for node in sorted(core.members.learners):
                progress = office.followers.get(node)
                if progress and progress.match >= max(core.log.members_index, core.log.last_index - _CLOSE):
                    members = core.members
                    try:
                        await self.group.change_members(Members(members.voters | {node}, members.learners - {node}))
                    except RefusedError as error:
                        _log.debug("node %d is not a voter yet: %s", node, error)
                    break

    def placed(self, nodes: Mapping[NodeId, Place]) -> None:
        self.placed_changed(nodes)

    def end(self) -> None:
        """Nobody is served any more: who waits is told that nobody knows."""
        self._ended = True
        for batches in self._batches:
            batches.end()

    # Comparing

    async def compared(self, index: int) -> Mapping[NodeId, bytes]:
        """What the nodes that can be reached found when they applied an entry that compares. Raises NbdvdeError."""
        found = {self.node.number: await self._compared_here(index)}
        question = msgspec.msgpack.encode(AskCompared(index))

        async def ask(node: NodeId) -> None:
            try:
                found[node] = await self.node.peer(node).request(CATCH_UP, question)
            except NbdvdeError as error:
                _log.warning("node %d is not compared: %s", node, error)

        async with trio.open_nursery() as nursery:
            for node in self.group.core.members:
                if self.is_connected(node):
                    nursery.start_soon(ask, node)
        return found

    async def _compared_here(self, index: int) -> bytes:
        while self.machine.applied.index < index:
            await self.group.news()
        found = self.machine.comparisons.of(index)
        if found is None:
            raise RefusedError(f"entry {index}", "compared nothing here, or too long ago", "try again")
        return found

    async def chunk_of(self, node: NodeId, disk: str, chunk: int) -> bytes:
        """What a chunk of a disk holds on another node. Raises NbdvdeError."""
        blocks = bytes(range(length_of(await found(self.image, disk), chunk) // BLOCK))
        question = msgspec.msgpack.encode(AskData(disk, chunk, blocks))
        return unpacked(await self.node.peer(node).request(CATCH_UP, question))

    # Catching up

    async def fetch(self, source: NodeId, snapshot: Snapshot) -> Note:
        """Make the image what that of another node is (`machine.Fetch`). Raises NbdvdeError."""
        source = source or self.group.leader
        if source in (0, self.node.number):
            raise NetworkError("cluster", "has no leader to take the state from", "it is tried again")
        _log.info("taking over the state of node %d", source)

        async def ask(question: bytes) -> bytes:
            return await self.node.peer(source).request(CATCH_UP, question)

        self.taker = Taker(self.image, self.identity.key, GROUP, ask, rate=self.catch_up_rate)
        note = await self.taker.run()
        if note.applied.index < snapshot.index:
            raise NetworkError(f"node {source}", "has not applied what it offers", "it is tried again")
        _log.info("%d of %d blocks compared were copied", self.taker.copied, self.taker.compared)
        return note
