"""A group of a replicated image on this node: the way to whoever leads it."""

import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import cast

import trio

from nbdvde.disk import BLOCK, Done
from nbdvde.errors import DetachedError, NbdvdeError, NetworkError
from nbdvde.raft.calls import PeerError
from nbdvde.raft.core import NotLeaderError
from nbdvde.raft.groups import Group
from nbdvde.raft.messages import NodeId
from nbdvde.raft.node import Node
from nbdvde.raft.waiting import GroupEnded, LeadershipLost
from nbdvde.replication import results
from nbdvde.replication.batches import Batches, unknown
from nbdvde.replication.changes import GroupMachine, moved
from nbdvde.replication.operations import Action, Change, Operation
from nbdvde.replication.room import Room
from nbdvde.replication.sealing import Sealer

PROPOSE = 1
"""Kind of the question between nodes that has an entry proposed."""
_HEAD = struct.Struct("<QB")
"""Of that question: bytes that the entry may take in an image, length of the name of the group, which follows."""
_UNSURE = (LeadershipLost.__name__, GroupEnded.__name__, "Exception")
"""Names of errors of the leader after which nobody knows what becomes of what it was asked."""
_PAUSE_S = 0.05
"""Between two looks for a leader."""


class Lane:
    """One of them."""

    def __init__(
        self, machine: GroupMachine, group: Group, node: Node, sealer: Sealer, room: Room, nursery: trio.Nursery
    ) -> None:
        """Tasks run in `nursery`."""
        self.machine, self.group = machine, group
        self._node, self._sealer, self._room = node, sealer, room
        self._batches = Batches(nursery, self._propose_changes), Batches(nursery, self._propose_changes)
        """Of what takes space, and of what may free some: that must go on when there is none."""
        self._ended = self._gone = False

    @property
    def name(self) -> str:
        """Of the group."""
        return self.group.name

    def end(self, *, gone: bool = False) -> None:
        """Nobody is served any more.

        Who waits is told that nobody knows, or, of a group that is `gone`, to ask another: nothing that was proposed
        behind the hold at which it stood still is done by any node.
        """
        self._ended, self._gone = True, gone
        for batches in self._batches:
            batches.end(self._over())

    def _over(self) -> DetachedError:
        return moved(f"raft group {self.name}") if self._gone else unknown()

    # What clients want

    async def put(self, change: Change) -> None:
        """Have a change made: durable, and seen by every later read. Raises what it was refused with."""
        await self._batches[change.action == Action.TRIM].put(change)

    def begin(self, change: Change, done: Done) -> None:
        """As `put`; `done` is told of the end."""
        self._batches[change.action == Action.TRIM].begin(change, done)

    async def _propose_changes(self, changes: Sequence[Change]) -> Sequence[NbdvdeError | None]:
        blocks = sum(2 + len(change.data) // BLOCK for change in changes if change.action != Action.TRIM)
        return cast(Sequence[NbdvdeError | None], await self.propose(changes, growth=blocks * BLOCK))

    async def barrier(self) -> None:
        """Wait until what is in the image is everything that was answered before this call. Raises DetachedError."""
        while True:
            try:
                await self.group.read_barrier()
            except (NotLeaderError, LeadershipLost):
                self.group.wake()
                await trio.sleep(_PAUSE_S)
            except GroupEnded as error:
                raise self._over() from error
            else:
                return

    # Entries

    async def propose(self, operation: Operation, *, growth: int = 0) -> object:
        """Have an operation done on every node; its result. Waits while there is no leader.

        Raises DetachedError when nobody knows what became of it, NoSpaceError when most nodes have no room for
        `growth` bytes more, and what it was refused with.
        """
        data = self._sealer.seal(self.name, operation)

        async def ask(leader: NodeId) -> object:
            name = self.name.encode()
            question = _HEAD.pack(growth, len(name)) + name + data
            return _result(await self._node.peer(leader).request(PROPOSE, question))

        return await self.at_leader(lambda: self._propose_here(data, growth), ask)

    async def propose_for_another(self, data: bytes, growth: int) -> bytes:
        """Another node has a client who wants something done."""
        try:
            self._sealer.open(self.name, data)  # or all would stand still when they come to it
            return results.pack(await self._propose_here(data, growth))
        except (NotLeaderError, LeadershipLost):
            raise
        except GroupEnded:
            if not self._gone:
                raise
            return results.pack(self._over())
        except NbdvdeError as error:
            return results.pack(error)

    async def _propose_here(self, data: bytes, growth: int) -> object:
        if growth:
            await self._room.admit(self.group, growth)
        return await self.group.propose(data)

    async def at_leader(
        self, do: Callable[[], Awaitable[object]], ask: Callable[[NodeId], Awaitable[object]]
    ) -> object:
        """`do` something if this node leads, or else `ask` the one that does. Waits while none does.

        Raises DetachedError when nobody knows what became of it.
        """
        while not self._ended:
            leader = self.group.leader
            try:
                if leader == self._node.number:
                    return await do()
                if leader and self._node.is_connected(leader):
                    return await ask(leader)
            except NotLeaderError:
                pass
            except LeadershipLost as error:
                raise unknown() from error
            except GroupEnded as error:
                raise self._over() from error
            except PeerError as error:
                if error.error in _UNSURE:
                    raise unknown() from error
                if error.error != NotLeaderError.__name__:
                    raise
            except NetworkError as error:
                raise unknown() from error
            self.group.wake()
            await trio.sleep(_PAUSE_S)
        raise self._over()


def unpack_question(question: bytes) -> tuple[str, int, bytes]:
    """(group, bytes that it may take in an image, entry) that another node wants proposed. Raises NetworkError."""
    try:
        growth, length = _HEAD.unpack_from(question)
        stop = _HEAD.size + length
        return str(question[_HEAD.size : stop], "utf-8"), growth, question[stop:]
    except (struct.error, ValueError) as error:
        raise NetworkError("cluster", f"a question is malformed: {error}") from None


def _result(packed: bytes) -> object:
    result = results.unpack(packed)
    if isinstance(result, NbdvdeError):
        raise result
    return result
