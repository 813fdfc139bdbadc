"""A group on this node: its core, and all that is done on its behalf.

Everything but waiting happens in `drive`, which the node calls when something has come: what the core asks for is done
in the order that `Ready` gives. What is committed is durable already and is handed on at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import trio

from nbdvde.errors import DamageError, RefusedError
from nbdvde.raft import quorum
from nbdvde.raft.applier import CONTAINED, Applier
from nbdvde.raft.core import Core, Ready
from nbdvde.raft.machine import Machine
from nbdvde.raft.messages import Append, Entry, HardState, Members, Message, NodeId, Snapshot
from nbdvde.raft.settings import Settings
from nbdvde.raft.store import LogStore, write
from nbdvde.raft.upkeep import HasRoom, Helper, Upkeep
from nbdvde.raft.waiting import Barriers, GroupEnded, LeadershipLost, Proposals, Wait


class Host(Helper, Protocol):
    """What a group needs of its node."""

    def touch(self, group: "Group") -> None:
        """Drive it soon."""

    def say(self, group: str, message: Message) -> bool:
        """Send a message; False when it is lost."""


@dataclass(frozen=True, slots=True)
class Status:
    """What a group looks like from here."""

    name: str
    role: str
    term: int
    leader: NodeId
    members: Members
    commit: int
    applied: int
    last: int
    """Index of the newest entry."""
    log_bytes: int
    matches: dict[NodeId, int]
    """Of a leader: up to where the others have everything."""
    elections: int
    """How often this node asked for votes."""
    mute: bool
    quiet: bool


class Group:
    """One group."""

    def __init__(
        self,
        name: str,
        node: NodeId,
        store: LogStore,
        machine: Machine,
        host: Host,
        settings: Settings,
        random: Callable[[int, int], int],
        *,
        compact_bytes: int,
        has_room: HasRoom,
    ) -> None:
        self.name, self._host, self._store = name, host, store
        self.core = Core(node, store, store.hard, settings, random, machine.applied.index)
        self._proposals = Proposals(name, self.core)
        self._barriers = Barriers(self.core, random(1, 1 << 62))
        self._applier = Applier(machine, self._applied, self._on_taken)
        touch = partial(host.touch, self)
        self.upkeep = Upkeep(name, self.core, store, self._applier, host, touch, compact_bytes, has_room)
        self._taken: Snapshot | None = None
        """The state that was taken over, until the core knows of it."""
        self._busy = False
        """While something is being made durable that the core has to be told of first."""
        self._backlog = 0
        """Bytes of entries that came since then."""
        self._seen = self._now()
        self._news = trio.Event()
        self.watchers: list[Callable[[Group], None]] = []
        """Called when there is another leader or term, or none."""
        self._nursery: trio.Nursery | None = None
        self._scope, self._over = trio.CancelScope(), trio.Event()
        """Of `run`."""
        self._ended: RefusedError | None = None

    # What the owner asks

    @property
    def is_leader(self) -> bool:
        """Whether this node leads, as far as it knows."""
        return self.core.is_leader

    @property
    def leader(self) -> NodeId:
        """Who does, as far as it knows; 0: nobody."""
        return self.core.leader

    async def propose(self, data: bytes) -> object:
        """Have an entry appended, committed and applied; the result of that.

        Raises NotLeaderError (it is not appended), LeadershipLost (it may be), or what applying it gave.
        """
        return await self._waited(Wait(data), self._proposals.add)

    async def read_barrier(self) -> None:
        """Return when the state here has everything that anybody knew to be done when this was called.

        While there is no leader, or it cannot be reached, it waits.
        """
        await self._waited(Wait(), self._barriers.add)

    async def changeable(self) -> None:
        """Wait until the members can be changed, or another node leads."""
        while self.is_leader and not self.core.may_change():
            await self.news()

    async def change_members(self, members: Members) -> None:
        """Have other members; return when that is over. Raises NotLeaderError, RefusedError.

        Raises LeadershipLost when the next leader has to bring it to its end, if it was begun.
        """
        core = self.core
        wait = self._proposals.watch(core.change_members(members))
        await self._waited(wait, lambda _: None)
        while core.members.outgoing or core.log.members_index > core.commit:
            if not self.is_leader:
                raise LeadershipLost(self.name)
            await self.news()

    async def transfer(self, node: NodeId) -> None:
        """Have another voter lead; return when this node does not. Raises NotLeaderError, RefusedError."""
        self.core.transfer(node)
        self._host.touch(self)
        while (office := self.core.office) and office.transferee == node:
            await self.news()
        if self.core.office and self.core.node != node:
            raise RefusedError(f"node {node}", f"did not take over raft group {self.name}", "see nbdvde cluster status")

    async def hand_over(self) -> None:
        """Have the voter lead who has most, if this node does; return when it does. Raises as `transfer`."""
        office = self.core.office
        others = [(progress.match, node) for node, progress in office.followers.items()] if office else []
        voters = [(match, node) for match, node in others if node in self.core.members.voters]
        if voters:
            await self.transfer(max(voters)[1])
            while self.leader in (0, self.core.node):
                await self.news()

    def wake(self) -> None:
        """Expect signs of life of the leader again: somebody waits for it."""
        self.core.wake()
        self._host.touch(self)

    async def news(self) -> None:
        """Wait until something has happened. Raises GroupEnded."""
        if not self._ended:
            await self._news.wait()
        if self._ended:
            raise self._ended

    def status(self) -> Status:
        """For a display."""
        core = self.core
        followers = core.office.followers if core.office else {}
        return Status(
            self.name, core.role.value, core.term, core.leader, core.members, core.commit, core.applied,
            core.log.last_index, self._store.size, {node: progress.match for node, progress in followers.items()},
            core.elections, core.mute, core.quiet,
        )  # fmt: skip

    async def _waited(self, wait: Wait, add: Callable[[Wait], None]) -> object:
        if self._ended:
            raise self._ended
        add(wait)
        self._host.touch(self)
        try:
            return await wait.result()
        except trio.Cancelled:
            self._proposals.forget(wait)
            raise

    # What the node does with it

    async def run(self) -> None:
        """Apply what is committed, until `end` or cancelled."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    self.upkeep.begin(nursery)
                    if quorum.agree(self.core.members.quorums, {self.core.node}):
                        self.core.campaign()  # there is nobody to wait for
                    self._host.touch(self)
                    try:
                        await self._applier.run()
                    finally:
                        self._nursery = None  # messages still come while its tasks end, and begin nothing
                        self.upkeep.end()
        finally:
            self._ended = GroupEnded(f"raft group {self.name}", "is not here any more")
            self._proposals.end(self._ended)
            self._barriers.end(self._ended)
            self._news.set()
            self._over.set()

    async def end(self) -> None:
        """Have `run` come to its end, which has begun or is about to."""
        self._scope.cancel()
        await self._over.wait()

    def tick(self) -> None:
        """A unit of time has passed."""
        self.core.tick()
        self._barriers.tick()

    def step(self, message: Message) -> None:
        """A message came. More entries than anybody may send without an answer are dropped."""
        if isinstance(message.body, Append):
            if self._backlog > 4 * self.core.settings.window_bytes:
                return
            self._backlog += sum(entry.size for entry in message.body.entries)
        self.core.step(message)

    def lost(self, node: NodeId) -> None:
        """What was said to a member may not have arrived."""
        if node in self.core.members:
            self.core.unreachable(node)
            self.core.install_failed(node)
            self.core.suspect(node)

    @property
    def sleeps(self) -> bool:
        """Whether it needs no ticks."""
        return self.core.quiet and not self._barriers.pending

    def drive(self) -> None:
        """Do what the core asks for, as far as the log is not busy; nothing before it runs."""
        if self._nursery is None:
            return
        if not self._busy:  # what comes meanwhile goes in one message then
            self._proposals.propose()
        self._barriers.ask()
        while not self._busy:
            if self._taken:
                self._take_over(self._taken)
            elif ready := self.core.ready():
                self._do(ready)
            else:
                break
        if not self._busy:
            self._backlog = 0
        self._observe()
        self.upkeep.fetch()
        self._news.set()
        self._news = trio.Event()

    def _do(self, ready: Ready) -> None:
        core = self.core
        self._say(ready.now)
        if ready.install:
            self._applier.install(*ready.install)
        if ready.committed:
            self._applier.hand(ready.committed)
        self._barriers.settled(ready.reads)
        if ready.hard or ready.entries:
            write(self._store, ready.hard, ready.entries)
            self._busy = True
            self._host.then(partial(self._written, ready))
        else:
            core.done(ready)
            self._say(ready.after)

    def _written(self, ready: Ready) -> None:
        """What had to be durable is."""
        self._busy = False
        self.core.done(ready)
        self._say(ready.after)
        self._host.touch(self)

    def _say(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if not self._host.say(self.name, message):
                self.core.unreachable(message.receiver)

    def _observe(self) -> None:
        now, before = self._now(), self._seen
        if now != before:
            self._seen = now
            if before.leads:
                self._proposals.lost()
            for watcher in self.watchers:
                watcher(self)

    def _now(self) -> "_Seen":
        return _Seen(self.core.term, self.core.leader, self.core.is_leader)

    # What the applier did

    def _applied(self, entries: Sequence[Entry], results: Sequence[object]) -> None:
        self.core.applied_to(entries[-1].index)
        lost = LeadershipLost(self.name)
        self._proposals.applied(entries, [lost if result is CONTAINED else result for result in results])
        self._barriers.applied()
        self.upkeep.grown()
        self._host.touch(self)

    def _on_taken(self, snapshot: Snapshot) -> None:
        self._taken = snapshot
        self._host.touch(self)

    def _take_over(self, snapshot: Snapshot) -> None:
        """The state is another one now; the log follows, unless it has caught up meanwhile."""
        self._taken = None
        if self.core.wants(snapshot):
            self._store.reset(snapshot)
            self.core.installed(snapshot)
            self._proposals.lost()
            self._busy = True  # until it is durable nothing is acknowledged
            self._host.then(self._took_over)
        else:
            self.core.overtaken(snapshot)
            self._barriers.applied()

    def _took_over(self) -> None:
        self._busy = False
        self._barriers.applied()
        self._host.touch(self)


class _Seen(NamedTuple):
    """What watchers are told of."""

    term: int
    leader: NodeId
    leads: bool


def reconcile(name: str, store: LogStore, state: Snapshot) -> None:
    """At the start: have a log go with the state that is there. Raises DamageError when it cannot.

    A state that was taken over just before a crash may be newer than its log; all that is older is in it then.
    """
    if state.index < store.snapshot.index:
        why = f"ends with entry {state.index}, its log begins behind {store.snapshot.index}"
        raise DamageError(f"state of raft group {name}", why, "have the node join again as a new one")
    if state.index > store.last_index or store.term(state.index) != state.term:
        store.reset(state)
        know_term(store, state)


def know_term(store: LogStore, state: Snapshot) -> None:
    """Have a node take no part in terms before that in which a state was agreed on that it holds."""
    if store.hard.term < state.term and not store.unsure:
        store.save(HardState(state.term, 0, state.index))
