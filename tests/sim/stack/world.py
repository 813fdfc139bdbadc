"""Three machines, a network, clients and an administrator: everything of a run but what goes wrong."""

from collections import Counter
from contextlib import suppress
from random import Random

import trio

from nbdvde.errors import UsageError
from nbdvde.raft.messages import NodeId
from nbdvde.replication.notes import Identity
from nbdvde.replication.replica import Replica
from nbdvde.replication.ticket import Ticket
from tests.sim.stack.appenders import Appender
from tests.sim.stack.comparing import compare, settled
from tests.sim.stack.device import Disks
from tests.sim.stack.dividers import Divider
from tests.sim.stack.history import Disk, History, Violation
from tests.sim.stack.images import FIRST, SIZE, blank, place_of
from tests.sim.stack.keepers import Keeper
from tests.sim.stack.life import Life
from tests.sim.stack.regions import Regions, append_through
from tests.sim.stack.rulers import Ruler
from tests.sim.stack.users import User, write_through
from tests.sim.stack.watching import Watch
from tests.sim.stack.wires import Net

_RECOVERY_S = 90.0
"""Of virtual time, in which everything works again when nothing fails any more."""


class World:
    """See above."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.net = Net(random)
        self.history = History()
        self.history.disks["disk"] = Disk("disk", SIZE)
        self.counts: Counter[str] = Counter()
        self.watch = Watch(self.counts)
        self.has_groups = random.random() < 0.5
        """Whether there are several groups, not always the same."""
        self.regions = Regions(self.history, random) if random.random() < 0.4 else None
        self.trace: list[str] = []
        self.resting = False
        self.lives: dict[str, Life] = {}
        """Of machines that are on, by their names."""
        self.disks: dict[NodeId, Disks] = {}
        """Of machines that are off."""
        self.nursery: trio.Nursery

    def note(self, line: str) -> None:
        """Something happened."""
        self.trace.append(f"{trio.current_time():.4f} {line}")

    def any_life(self) -> Life | None:
        """A machine that is on."""
        return self.random.choice(self.serving) if self.serving else None

    @property
    def serving(self) -> list[Life]:
        """Those that are on and know who they are."""
        return [life for life in self.lives.values() if life.is_serving]

    @property
    def members(self) -> list[Life]:
        """Those that have not left."""
        return [life for life in self.lives.values() if not life.has_left]

    def welcome(self, user: User) -> None:
        """A client begins."""
        self.nursery.start_soon(user.run)

    # Machines

    async def switch_on(self, node: NodeId) -> None:
        """Raises Violation when it ends at once."""
        life = Life(node, self.disks.pop(node), self.net, self.lives, self.random)
        self.lives[life.name] = life
        self.note(f"{life.name} is switched on")
        self.nursery.start_soon(self._live, life)

    async def _live(self, life: Life) -> None:
        await life.run()
        self.counts["taken over"] += life.has_caught_up
        if life.failure:
            raise life.failure

    def switch_off(self, life: Life, *, loud: bool) -> None:
        """At once."""
        self.note(f"{life.name} is switched off")
        self.disks[life.node] = life.kill(loud=loud)
        del self.lives[life.name]

    async def shut_down(self, life: Life) -> None:
        """In order."""
        self.note(f"{life.name} shuts down")
        life.stop()
        await life.over.wait()
        if self.lives.get(life.name) is life:
            self.switch_off(life, loud=True)

    async def invite(self, replica: Replica) -> Ticket:
        """Let a new machine join: as `cluster invite` does."""
        number = max(replica.machine.nodes, default=0) + 1
        node = await replica.roster.invite(place_of(number))
        identity = Identity(replica.identity.cluster, node, replica.identity.key)
        return Ticket(identity, {**replica.machine.nodes, node: place_of(node)})

    # The run

    async def begin(self) -> None:
        """Switch everything on."""
        for node in FIRST:
            self.disks[node] = Disks.made(blank(node))
            await self.switch_on(node)
        main = self.history.disks["disk"]
        for name, rival in (("anna", False), ("rita", True)):
            self.welcome(User(self, name, main, rival=rival))
        self.nursery.start_soon(Ruler(self).run)
        if self.has_groups:
            self.nursery.start_soon(Divider(self).run)
        if self.regions:
            self.nursery.start_soon(Keeper(self, self.regions).run)
            for name in ("ada", "ralph"):
                self.nursery.start_soon(Appender(self, self.regions, name).run)

    async def rest(self) -> None:
        """Nothing fails any more: everything has to go on, and all nodes get the same. Raises Violation."""
        for node in list(self.disks):
            await self.switch_on(node)
        with trio.move_on_after(_RECOVERY_S) as patience:
            for life in list(self.lives.values()):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_until_it_leaves, life, nursery.cancel_scope)
                    await self._work_through(life)
                    nursery.cancel_scope.cancel()
            self.resting = True
            self.history.check(compare(await settled(self.members)))
            if self.regions:
                await self._check(self.regions)
        if patience.cancelled_caught:
            raise Violation(f"it does not recover: {self._states()}")
        self.counts["taken over"] += sum(life.has_caught_up for life in self.members)

    async def _work_through(self, life: Life) -> None:
        """Clients of a machine get everything done."""
        for disk in [disk for disk in self.history.disks.values() if not disk.doomed]:
            await write_through(self, life, disk)
        if self.regions:
            await append_through(self.regions, life)

    async def _check(self, regions: Regions) -> None:
        life = self.random.choice(self.serving)
        if regions.has_stream:
            await regions.read_stream(life)
        if regions.has_worm:
            with suppress(*([UsageError] if regions.may_end else [])):
                await regions.read_worm(life)
        for journal in (regions.stream, regions.worm):
            journal.check()
            self.counts[f"appended to {journal.name}s"] += journal.acknowledged
            self.counts[f"read from {journal.name}s"] += journal.read

    def _states(self) -> list[str]:
        return [
            f"{life.name}: {_state(life.replica)}" if life.is_serving else life.name for life in self.lives.values()
        ]


async def _until_it_leaves(life: Life, scope: trio.CancelScope) -> None:
    """Somebody had it leave, and may not have heard that it did."""
    await life.over.wait()
    if life.has_left:
        scope.cancel()


def _state(replica: Replica) -> str:
    assembly = replica.assembly
    groups = [lane.group.status() for lane in replica.lanes.values()]
    return f"{groups} {replica.problem} hold {assembly.holding}, settled {assembly.settled}, idle {assembly.idle}"
