"""A node: its groups, its clock, its log and its connections, driven together.

Whatever comes marks the groups that it concerns; a pass then drives each of them once and sends what all of them say.
So proposals of many tasks become one entry batch, and signs of life of all groups one frame for each peer. A group that
is quiet is in no set that anything goes through.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec
import trio

from nbdvde import workers
from nbdvde.errors import NbdvdeError, NetworkError, RefusedError, RequestError, UsageError
from nbdvde.raft.groups import Group, know_term, reconcile
from nbdvde.raft.machine import Machine
from nbdvde.raft.messages import Body, Message, NodeId, Snapshot
from nbdvde.raft.repair import ENTRIES, STATE, Wanted
from nbdvde.raft.settings import Settings
from nbdvde.raft.store import Load, LogStore, NodeLog, Work
from nbdvde.raft.transport import Identity, Mesh, Network, Peer, Timing
from nbdvde.raft.upkeep import HasRoom
from nbdvde.raft.writer import InThread, Writer

DEFAULT_GROUP = "default"


@dataclass(frozen=True, slots=True)
class Options:
    """Of a node."""

    tick_s: float = 0.1
    """How long a tick takes; with the default settings a leader is missed after one to two seconds."""
    compact_bytes: int = 64 << 20
    """Of entries of a group that were added since its log was compacted."""
    has_room: HasRoom = lambda size: True
    """For a log of so many bytes to become longer, for nodes that take over a state meanwhile."""
    timing: Timing = field(default_factory=Timing)


class Node:
    """One node of a cluster."""

    def __init__(
        self,
        me: Identity,
        log: NodeLog,
        network: Network,
        settings: Settings,
        random: Callable[[int, int], int],
        *,
        options: Options | None = None,
        in_thread: InThread = workers.run,
    ) -> None:
        """`random(low, high)` draws a whole number, both ends included. The node owns the log."""
        self.number, self._log, self._settings, self._random = me.node, log, settings, random
        self._options = options or Options()
        self._in_thread = in_thread
        self.told_to_go: Callable[[], None] = lambda: None
        """Called when another node says that this one has left."""
        self.mesh = Mesh(me, network, self, self._options.timing, random)
        self.groups: dict[str, Group] = {}
        self._writer = Writer(log, in_thread, self._pass)
        self._awake: dict[str, Group] = {}
        self._touched: dict[str, Group] = {}
        self._news = trio.Event()
        self._due_s = math.inf
        """When the next tick is due."""
        self._nursery: trio.Nursery | None = None
        self.mesh.handle(STATE, self._on_state)
        self.mesh.handle(ENTRIES, self._on_entries)

    # What the owner asks

    def peer(self, node: NodeId) -> Peer:
        """Another node. Raises UsageError."""
        if found := self.mesh.peers.get(node):
            return found
        raise UsageError(f"node {node}", "is not known", "see nbdvde cluster status")

    def is_connected(self, node: NodeId) -> bool:
        """Whether another node can be reached."""
        peer = self.mesh.peers.get(node)
        return peer is not None and peer.connected

    def open(self, name: str, machine: Machine) -> Group:
        """A group that the log has. Raises UsageError, DamageError."""
        store = self._log.group(name)
        if store is None:
            raise UsageError(f"raft group {name}", "does not exist", "see nbdvde cluster status")
        reconcile(name, store, machine.applied)
        return self._add(name, store, machine)

    async def create(self, name: str, machine: Machine, start: Snapshot) -> Group:
        """A new group, whose state is what the machine holds; while the node runs. Raises UsageError."""
        store = self._log.create(name, start)
        know_term(store, start)
        await self._writer.durable()
        return self._add(name, store, machine)

    async def remove(self, name: str) -> None:
        """Forget a group: whoever waits for it meets an error. Raises UsageError."""
        if group := self.groups.pop(name, None):
            for groups in (self._awake, self._touched):
                groups.pop(name, None)
            await group.end()
            await self._writer.durable()  # what it waits for still needs its log
        self._log.remove(name)
        await self._writer.durable()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take part, until `stop`. Raises NetworkError, PoisonedError, or what a machine raised."""
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.mesh.run)
                self._nursery = nursery
                for group in self.groups.values():
                    nursery.start_soon(group.run)
                for task in (self._writer.run, self._drive, self._tick):
                    nursery.start_soon(task)
                task_status.started()
        except BaseExceptionGroup as errors:
            raise _single(errors) from None
        finally:
            self._nursery = None
            self._log.close()

    async def stop(self, patience_s: float = 5.0) -> None:
        """End in order: hand over what this node leads, as far as that takes no longer, then end `run`."""
        await self.hand_over(patience_s)
        if self._nursery:
            self._nursery.cancel_scope.cancel()

    async def hand_over(self, patience_s: float) -> None:
        """Have others lead what this node leads, as far as that takes no longer."""
        with trio.move_on_after(patience_s):
            async with trio.open_nursery() as nursery:
                for group in self.groups.values():
                    nursery.start_soon(_hand_over, group)

    # What groups and connections need

    def touch(self, group: Group) -> None:
        if self.groups.get(group.name) is group:  # not one that is being removed
            self._touched[group.name] = group
            self._news.set()

    def say(self, group: str, message: Message) -> bool:
        return self.mesh.say(message.receiver, group, message.body)

    def then(self, call: Callable[[], None]) -> None:
        self._writer.then(call)

    async def load(self, load: Load) -> Work:
        found: list[Work] = []
        await self._in_thread(lambda: found.append(load()))
        return found[0]

    async def ask(self, node: NodeId, kind: int, body: bytes) -> bytes:
        if peer := self.mesh.peers.get(node):
            return await peer.request(kind, body)
        raise NetworkError(f"node {node}", "is not known here")

    async def _on_state(self, node: NodeId, body: bytes) -> bytes:
        group, _ = self._wanted(body)
        return msgspec.msgpack.encode(group.upkeep.ending())

    async def _on_entries(self, node: NodeId, body: bytes) -> bytes:
        group, wanted = self._wanted(body)
        return msgspec.msgpack.encode(await group.upkeep.entries(wanted.start, wanted.stop))

    def _wanted(self, body: bytes) -> tuple[Group, Wanted]:
        try:
            wanted = msgspec.msgpack.decode(body, type=Wanted)
        except msgspec.MsgspecError as error:
            raise RequestError("question about a log", str(error).lower()) from None
        if found := self.groups.get(wanted.group):
            return found, wanted
        raise UsageError(f"raft group {wanted.group}", "is not on this node")

    def on_message(self, sender: NodeId, group: str, body: Body) -> None:
        self._catch_up()
        if found := self.groups.get(group):
            found.step(Message(sender, self.number, body))
            self._touched[group] = found

    def on_end(self) -> None:
        self._pass()

    def on_departed(self) -> None:
        self.told_to_go()

    def on_lost(self, node: NodeId) -> None:
        for group in self.groups.values():
            group.lost(node)
            self.touch(group)

    # How it goes on

    def _add(self, name: str, store: LogStore, machine: Machine) -> Group:
        group = self.groups[name] = Group(
            name, self.number, store, machine, self, self._settings, self._random,
            compact_bytes=self._options.compact_bytes, has_room=self._options.has_room,
        )  # fmt: skip
        if self._nursery:
            self._nursery.start_soon(group.run)
        return group

    def _pass(self) -> None:
        """Drive what was touched, and send what that said."""
        self._catch_up()
        touched, self._touched = self._touched, {}
        for name, group in touched.items():
            group.drive()
            if group.sleeps:
                self._awake.pop(name, None)
            else:
                self._awake[name] = group
        self.mesh.flush()

    async def _drive(self) -> None:
        while True:
            await self._news.wait()
            self._news = trio.Event()
            if self._touched:  # else a pass has come before
                self._pass()

    async def _tick(self) -> None:
        self._due_s = trio.current_time() + self._options.tick_s
        while True:
            await trio.sleep_until(self._due_s)
            self._pass_time()
            self._pass()

    def _catch_up(self) -> None:
        """A process that stood still must not count on a lease that ended meanwhile."""
        if self._settings.lease:
            self._pass_time()

    def _pass_time(self) -> None:
        """Have groups know what time it is."""
        tick_s, settings, now_s = self._options.tick_s, self._settings, trio.current_time()
        if now_s < self._due_s:
            return
        ticks = 1 + int((now_s - self._due_s) / tick_s)
        self._due_s += ticks * tick_s
        # A node that was held up must not think that all others were; but a lease goes by its clock.
        times = min(ticks, 2 * settings.election) if settings.lease else 1
        self.mesh.tick()
        self._touched |= self._awake
        for group in self._awake.values():
            for _ in range(times):
                group.tick()


async def _hand_over(group: Group) -> None:
    with suppress(RefusedError):
        await group.hand_over()


def _single(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first of the errors, if it is one for a person to read and there is none of another kind."""
    known, others = errors.split(NbdvdeError)
    if known is None or others is not None:
        return errors
    first: BaseException = known
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first
