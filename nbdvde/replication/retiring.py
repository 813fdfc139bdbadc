"""Ending groups that have no part of the disks any more, when no node needs what the others have of them.

A node may be far behind: before it comes to the entry by which a group lost its part, it needs all that the group
agreed on before, from the other members of the group.
"""

from contextlib import suppress

import trio

from nbdvde.errors import NbdvdeError
from nbdvde.raft.messages import NodeId
from nbdvde.raft.node import Node
from nbdvde.replication.assembly import Assembly
from nbdvde.replication.lane import Lane
from nbdvde.replication.operations import Retire

APPLIED = 5
"""Kind of the question between nodes how far `default` is applied."""
_INDEX_BYTES = 8
_LOOK_S = 0.5
_PATIENCE_S = 2.0
"""For an answer."""


class Retiring:
    """What the leader of `default` does about them."""

    def __init__(self, assembly: Assembly, main: Lane, node: Node) -> None:
        """`main` is that of `default`."""
        self._assembly, self._main, self._node = assembly, main, node
        node.mesh.handle(APPLIED, self._answer)

    async def _answer(self, node: NodeId, question: bytes) -> bytes:
        applied = self._applied
        await self._assembly.durable()  # it must not need again what comes before
        return applied.to_bytes(_INDEX_BYTES, "little")

    @property
    def _applied(self) -> int:
        return self._main.machine.applied.index

    async def watch(self) -> None:
        """For ever."""
        while True:
            await trio.sleep(_LOOK_S)
            idle = self._assembly.idle
            if idle and self._main.group.is_leader and await self._all_know(self._applied):
                with suppress(NbdvdeError):  # it is tried again
                    await self._main.propose(Retire(tuple(idle)))

    async def _all_know(self, index: int) -> bool:
        """Whether all nodes have applied what is up to an index in `default`."""
        others = [node for node in self._main.group.core.members if node != self._node.number]
        with trio.move_on_after(_PATIENCE_S), suppress(NbdvdeError):
            for node in others:
                answer = await self._node.peer(node).request(APPLIED, b"")
                if int.from_bytes(answer, "little") < index:
                    return False
            return True
        return False
