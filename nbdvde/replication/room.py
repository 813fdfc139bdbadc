"""Room for writes, before they are agreed on: what is committed has to be applied, and can be refused no more.

The leader knows how much room the voters have, about. It takes writes as long as its own image and those of most voters
have enough for everything that may be under way; trims and all else always. A node whose image is full all the same
stands still (`machine`), and the others go on.
"""

import logging
from collections.abc import Callable, Iterable

import trio

from nbdvde.engine.cleaner import WORTH_IN_NEED
from nbdvde.engine.image import Image
from nbdvde.errors import NbdvdeError, NoSpaceError
from nbdvde.raft.groups import Group
from nbdvde.raft.messages import NodeId
from nbdvde.raft.node import Node

_log = logging.getLogger(__name__)
_SPARE = 8 << 20
"""Bytes that stay for what is under way besides entries: maps, checkpoints, cleaning."""
_LOOK_S = 0.5
_PAUSE_S = 2.0
"""After cleaning, which takes the time of everybody."""
_BYTES = 8


class Room:
    """That of all voters, as a leader sees it."""

    def __init__(self, image: Image, node: Node, groups: Callable[[], Iterable[Group]], kind: int) -> None:
        """`groups` are those of the image, `kind` is that of the questions between nodes."""
        self._image, self._node, self._groups, self._kind = image, node, groups, kind
        self._others: dict[NodeId, int] = {}
        self._cleaning = trio.Lock()
        self._again = 0.0
        """When cleaning may win something again."""

    async def answer(self, node: NodeId, question: bytes) -> bytes:
        """How much this node has: whoever asks leads."""
        if not self._fits(self._image.spare_bytes, 0):
            await self._clean()
        return max(0, self._image.spare_bytes).to_bytes(_BYTES, "little")

    async def watch(self) -> None:
        """Ask the other voters, again and again while this node leads."""
        while True:
            await trio.sleep(_LOOK_S)
            led = [group.core.members.voters for group in self._groups() if group.is_leader]
            async with trio.open_nursery() as nursery:
                for node in frozenset().union(*led) - {self._node.number}:
                    nursery.start_soon(self._ask, node)

    async def _ask(self, node: NodeId) -> None:
        try:
            answer = await self._node.peer(node).request(self._kind, b"")
        except NbdvdeError:
            self._others.pop(node, None)  # who cannot be reached does not count either way
        else:
            self._others[node] = int.from_bytes(answer, "little")

    async def admit(self, group: Group, size: int) -> None:
        """Let an entry of so many bytes be proposed. Raises NoSpaceError."""
        if not self._fits(self._image.spare_bytes, size):
            await self._clean()
            if not self._fits(self._image.spare_bytes, size):
                raise NoSpaceError("image", "is full on the node that leads", "trim or delete data")
        voters = group.core.members.voters
        full = [node for node, spare in self._others.items() if node in voters and not self._fits(spare, size)]
        if 2 * (len(voters) - len(full)) <= len(voters):
            raise NoSpaceError("image", f"is full on nodes {', '.join(map(str, sorted(full)))}", "trim or delete data")

    def _fits(self, spare: int, size: int) -> bool:
        offices = [office for group in self._groups() if (office := group.core.office)]
        return spare >= _SPARE + size + sum(office.uncommitted_bytes for office in offices)

    async def _clean(self) -> None:
        """Win space back, once for all who need it now or in the next seconds."""
        async with self._cleaning:
            if trio.current_time() < self._again:
                return
            try:
                await self._image.clean(WORTH_IN_NEED)
            except NbdvdeError as error:
                _log.warning("%s: %s", self._image.path, error)
            self._again = trio.current_time() + _PAUSE_S
