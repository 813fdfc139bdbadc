"""Which nodes take part in the groups of an image: asked for on any node, done by those that lead."""

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from enum import IntEnum
from functools import partial
from typing import cast

import msgspec
import trio

from nbdvde.errors import DetachedError, MovedError, NbdvdeError, NetworkError, RefusedError
from nbdvde.raft.core import NotLeaderError
from nbdvde.raft.groups import Group
from nbdvde.raft.messages import Members, NodeId
from nbdvde.raft.node import Node
from nbdvde.replication.assembly import DEFAULT, Assembly
from nbdvde.replication.lane import Lane
from nbdvde.replication.machine import ImageMachine
from nbdvde.replication.notes import Place
from nbdvde.replication.operations import Dismiss, Enrol
from nbdvde.replication.together import together

_log = logging.getLogger(__name__)
CONTROL = 3
"""Kind of the question between nodes that has a leader do something."""
LEFT = 6
"""Kind of the question that tells a node that it belongs to the cluster no more."""
_GOODBYE_S = 2.0
"""For that: a node may be gone already."""
_LOOK_S = 0.5
"""Between two looks at whether a learner has caught up."""
_PATIENCE_S = 10.0
"""For what others did not end; then it is looked at again."""
_CLOSE = 4096
"""Entries that a learner may be behind to become a voter."""


_GONE = Place("", "")
"""Of a node that has left."""


class _Action(IntEnum):
    """What only the leader can do."""

    INVITE, DISMISS, TRANSFER = 1, 2, 3


class _Ask(msgspec.Struct, frozen=True, array_like=True):
    action: _Action
    node: NodeId
    group: str


class Roster:
    """That of an image. Who belongs to `default` belongs to it; whoever leads that has the other groups follow."""

    def __init__(
        self, assembly: Assembly, node: Node, lane: Callable[[str], Awaitable[Lane]], left: Callable[[], None]
    ) -> None:
        """`lane` waits for that of a group; it raises MovedError when there is no such group.

        `left` is called when this node belongs to the cluster no more.
        """
        self._assembly, self._node, self._lane, self._left = assembly, node, lane, left
        node.mesh.handle(CONTROL, self._on_ask)
        node.mesh.handle(LEFT, self._on_left)
        node.told_to_go = left

    async def invite(self, place: Place) -> NodeId:
        """Let a node join, which is only told what happens until it has everything; its number. Raises NbdvdeError.

        Whoever had its address and is no member, as after `cluster recover`, is sent away before.
        """
        main = await self._lane(DEFAULT)
        await main.barrier()
        for node, known in [*self._main.nodes.items()]:
            if known.address == place.address and node not in self._main.applied.members:
                await self.dismiss(node)
        number = cast(NodeId, await main.propose(Enrol(place.address, place.name)))
        await self._ask(_Ask(_Action.INVITE, number, DEFAULT))
        return number

    async def dismiss(self, node: NodeId) -> None:
        """Have a node belong to the cluster no more. Raises NbdvdeError."""
        if not self._main.nodes.get(node, _GONE).address and node not in self._main.applied.members:
            raise RefusedError(f"node {node}", "does not exist", "see nbdvde cluster status")
        try:
            await self._ask(_Ask(_Action.DISMISS, node, DEFAULT))
        except DetachedError:
            if node != self._node.number:  # who leaves is not told: its connections end
                raise

    async def transfer(self, node: NodeId) -> None:
        """Have another node lead; 0 for whichever has most. Raises NbdvdeError."""
        await self._in_all(_Action.TRANSFER, node)
        await self._ask(_Ask(_Action.TRANSFER, node, DEFAULT))

    @property
    def _main(self) -> ImageMachine:
        return cast(ImageMachine, self._assembly.machines[DEFAULT])

    async def _in_all(self, action: _Action, node: NodeId) -> None:
        """In all groups but `default`; those that come later begin with the members of that."""
        for name in [machine.name for machine in self._assembly.others]:
            try:
                await self._ask(_Ask(action, node, name))
            except NbdvdeError:
                if name in self._assembly.routing.groups:  # or it is gone, or about to be
                    raise

    async def _ask(self, asked: _Ask) -> None:
        """Have the leader of a group do something. Waits while there is none. Raises NbdvdeError."""
        lane = await self._lane(asked.group)
        question = msgspec.msgpack.encode(asked)
        await lane.at_leader(
            partial(self._do, lane, asked), lambda node: self._node.peer(node).request(CONTROL, question)
        )

    async def _on_ask(self, node: NodeId, data: bytes) -> bytes:
        try:
            asked = msgspec.msgpack.decode(data, type=_Ask)
        except msgspec.MsgspecError as error:
            raise NetworkError("cluster", f"a question is malformed: {error}") from None
        if asked.group not in self._assembly.machines:
            raise NotLeaderError(f"raft group {asked.group}", "is not here", "ask the leader")
        await self._do(await self._lane(asked.group), asked)
        return b""

    async def _on_left(self, node: NodeId, data: bytes) -> bytes:
        """Who says so belongs to the cluster, and has had it agreed on."""
        self._left()
        return b""

    async def _do(self, lane: Lane, asked: _Ask) -> None:
        group, node = lane.group, asked.node
        if asked.action == _Action.TRANSFER:
            await (group.transfer(node) if node else group.hand_over())
            return
        await group.changeable()  # a leader that is new has nothing committed yet
        if not group.is_leader:
            raise NotLeaderError(f"raft group {lane.name}", "has another leader", "ask that")
        if lane.name == DEFAULT:
            self._refuse_if_unsafe(asked)
        await self._change(group, asked)
        if lane.name == DEFAULT:
            await lane.barrier()
            if (node in self._main.applied.members) != (asked.action == _Action.INVITE):  # another leads, unheard
                raise NotLeaderError(f"raft group {lane.name}", "has another leader", "ask that")
            await self._have_others_follow(asked)

    async def _change(self, group: Group, asked: _Ask) -> None:
        node, members = asked.node, group.core.members
        match asked.action:
            case _Action.INVITE if node not in members:
                await group.change_members(Members(members.voters, members.learners | {node}))
            case _Action.DISMISS if members.voters == {node}:
                raise RefusedError(f"node {node}", "is the only one", "delete the image instead")
            case _Action.DISMISS if node == self._node.number:
                await group.hand_over()
                raise NotLeaderError(f"node {node}", "has handed over", "ask the leader")
            case _Action.DISMISS if node in members:
                await group.change_members(Members(members.voters - {node}, members.learners - {node}))

    def _refuse_if_unsafe(self, asked: _Ask) -> None:
        """While nothing is changed yet. Raises RefusedError."""
        node = asked.node
        if asked.action == _Action.INVITE and self._main.nodes.get(node) == _GONE:
            raise RefusedError(f"node {node}", "has left", "invite it again: it gets another number")
        for machine in self._assembly.others if asked.action == _Action.DISMISS else ():
            if machine.applied.members.voters == {node}:
                why = f"alone has a vote in raft group {machine.name}"
                raise RefusedError(f"node {node}", why, "wait until another one has everything")

    async def _have_others_follow(self, asked: _Ask) -> None:
        try:
            await self._in_all(asked.action, asked.node)
        except RefusedError as error:
            why = f"is being changed, and not in all groups yet: {error.message}"
            raise RefusedError(f"node {asked.node}", why, "that goes on: see nbdvde cluster status") from error
        if asked.action == _Action.DISMISS:
            await self._say_goodbye(asked.node)

    async def _say_goodbye(self, node: NodeId) -> None:
        """To a node that no group has any more."""
        with trio.move_on_after(_GOODBYE_S), suppress(NbdvdeError):
            await self._node.peer(node).request(LEFT, b"")
        await (await self._lane(DEFAULT)).propose(Dismiss(node))

    # By itself

    async def watch(self) -> None:
        """Make voters of learners that have everything, in groups that this node leads; for ever."""
        while True:
            await trio.sleep(_LOOK_S)
            for name in [*self._assembly.machines]:
                with suppress(MovedError):
                    await _promote((await self._lane(name)).group)

    async def follow_up(self) -> None:
        """End what others began and nobody ended, while this node leads `default`; for ever."""
        main = await self._lane(DEFAULT)
        while True:
            await trio.sleep(_LOOK_S)
            await together([partial(self._try, asked) for asked in self._unfinished(main.group)])

    async def _try(self, asked: _Ask) -> None:
        with trio.move_on_after(_PATIENCE_S), suppress(NbdvdeError):
            await self._ask(asked)

    def _unfinished(self, main: Group) -> Iterator[_Ask]:
        """Where other groups do not have the nodes that `default` has, and nodes that have left and do not know it.

        Who is connected and no member has left: nobody gets a ticket before it is one.
        """
        members, machines = main.core.members, self._assembly.others
        if not main.is_leader or not main.core.may_change() or members.outgoing:
            return
        for machine in machines:
            theirs = machine.applied.members
            if theirs == members or theirs.outgoing:
                continue
            for node in sorted({*theirs} ^ {*members}):
                yield _Ask(_Action.INVITE if node in members else _Action.DISMISS, node, machine.name)
        for node, place in self._main.nodes.items():
            is_member, has_left = node in members, place == _GONE
            if has_left if is_member else not has_left and self._node.is_connected(node):
                yield _Ask(_Action.DISMISS, node, DEFAULT)


async def _promote(group: Group) -> None:
    """Make a voter of a learner: one that has answered to the entry that made it one is there."""
    core = group.core
    office = core.office
    for node in sorted(core.members.learners if office else ()):
        progress = office.followers.get(node) if office else None
        if progress and progress.match >= max(core.log.members_index, core.log.last_index - _CLOSE):
            members = core.members
            try:
                await group.change_members(Members(members.voters | {node}, members.learners - {node}))
            except RefusedError as error:
                _log.debug("node %d is not a voter yet: %s", node, error)
            return
