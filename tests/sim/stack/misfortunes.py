"""What goes wrong in a run: a seed chooses a few kinds, and when."""

from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

from nbdvde.errors import NbdvdeError
from nbdvde.raft.messages import NodeId
from nbdvde.replication.replica import Replica
from nbdvde.replication.ticket import Ticket
from tests.sim.stack.device import ROOM, Disks
from tests.sim.stack.images import joined
from tests.sim.stack.life import Life
from tests.sim.stack.world import World

_KINDS_MAX = 4
_PATIENCE_S = 8.0


class Misfortunes:
    """Those of a run."""

    def __init__(self, world: World) -> None:
        self._world, self._random, self._net = world, world.random, world.net
        network: list[Callable[[], Awaitable[None]]] = [
            self._partition, self._one_way, self._distance, self._clients_cut, self._isolated,
        ]  # fmt: skip
        machines: list[Callable[[], Awaitable[None]]] = [
            self._crash, self._power, self._stop, self._slow_disk, self._full_image, self._full_log,
            self._failing_disk, self._transfer, self._away, self._replace,
        ]  # fmt: skip
        some = self._random.randint(0, _KINDS_MAX - 1)
        self._kinds = [self._random.choice(network), *self._random.sample([*network, *machines], some)]
        self._replacing = False

    async def run(self, until_s: float) -> None:
        """Go on until then, one after the other, or two at a time."""
        async with trio.open_nursery() as nursery:
            while trio.current_time() < until_s:
                await self._wait(0.3, 3)
                if self._world.has_groups and self._random.random() < 0.6:
                    await self._hold()
                kind = self._random.choice(self._kinds)
                name = kind.__name__.strip("_")
                self._world.counts[name] += 1
                if any(life.replica.assembly.holding for life in self._world.serving):
                    self._world.counts[f"{name} during a hold"] += 1
                self._world.note(kind.__name__)
                nursery.start_soon(kind)
                await self._wait(0, 3)
        self.mend()

    def mend(self) -> None:
        """Nothing fails any more; machines that are off stay so."""
        self._net.mend()
        self._net.latency_s = 0.001
        for life in self._world.lives.values():
            life.slow_s = 0.0
            life.disks.device.limit = life.disks.folder.limit = ROOM
            life.disks.faults.clear()

    def _one(self) -> Life | None:
        return self._world.any_life()

    async def _hold(self) -> None:
        """Wait for all groups to be on their way to stand still, if that comes soon."""
        with trio.move_on_after(2):
            await self._world.watch.held.wait()
            await self._wait(0, self._random.choice((0.002, 0.02)))

    async def _wait(self, least_s: float, most_s: float) -> None:
        await trio.sleep(self._random.uniform(least_s, most_s))

    async def _off(self, life: Life, least_s: float, most_s: float) -> None:
        self._world.switch_off(life, loud=self._random.random() < 0.5)
        await self._wait(least_s, most_s)
        if life.node in self._world.disks:
            await self._world.switch_on(life.node)

    async def _crash(self) -> None:
        if life := self._one():
            await self._off(life, 0.1, 4)

    async def _power(self) -> None:
        async with trio.open_nursery() as nursery:
            for life in list(self._world.lives.values()):
                nursery.start_soon(self._off, life, 0.1, 1)

    async def _stop(self) -> None:
        if life := self._one():
            await self._world.shut_down(life)
            await self._wait(0.1, 2)
            if life.node in self._world.disks:
                await self._world.switch_on(life.node)

    async def _away(self) -> None:
        """So long that the log of the others begins later."""
        if life := self._one():
            await self._off(life, 8, 15)

    async def _partition(self) -> None:
        names = sorted(self._world.lives)
        if names:
            one = self._random.choice(names)
            self._net.shut |= {pair for other in names for pair in ((one, other), (other, one)) if one != other}
            await self._wait(0.5, 5)
            self._net.mend()

    async def _isolated(self) -> None:
        """Clients reach a node that does not reach the others: what they ask it for waits there."""
        used = [life for life in self._world.serving if set(life.callers) - set(self._world.lives)]
        if used:
            one = self._random.choice(used).name
            for other in sorted(set(self._world.lives) - {one}):
                self._net.shut |= {(one, other), (other, one)}
            await self._wait(2, 9)
            self._net.mend()

    async def _one_way(self) -> None:
        names = sorted(self._world.lives)
        if len(names) > 1:
            one, *others = self._random.sample(names, self._random.randint(2, len(names)))
            deaf = self._random.random() < 0.5
            self._net.shut |= {(other, one) if deaf else (one, other) for other in others}
            await self._wait(0.5, 5)
            self._net.mend()

    async def _clients_cut(self) -> None:
        """What clients say arrives late, when they have gone elsewhere; or they hear nothing."""
        if life := self._one():
            mute = self._random.random() < 0.7
            for caller in life.callers:
                if caller not in self._world.lives:
                    self._net.shut.add((caller, life.name) if mute else (life.name, caller))
            await self._wait(2, 9)
            self._net.mend()

    async def _distance(self) -> None:
        self._net.latency_s = self._random.choice((0.01, 0.05, 0.2))
        await self._wait(1, 5)
        self._net.latency_s = 0.001

    async def _slow_disk(self) -> None:
        if life := self._one():
            life.slow_s = self._random.choice((0.01, 0.1, 0.6))
            await self._wait(1, 5)
            life.slow_s = 0.0

    async def _full_image(self) -> None:
        lives = self._world.serving
        for life in self._random.sample(lives, self._random.randint(0, len(lives))):
            device = life.disks.device
            device.limit = len(device.image) + self._random.choice((0, 100_000, (8 << 20) + 100_000))
        await self._wait(1, 5)
        for life in self._world.lives.values():
            life.disks.device.limit = ROOM

    async def _full_log(self) -> None:
        if life := self._one():
            life.disks.folder.limit = 0
            await self._wait(1, 5)
            life.disks.folder.limit = ROOM

    async def _failing_disk(self) -> None:
        """A sync fails: the node ends."""
        life = self._one()
        if life is None:
            return
        life.may_fail = True
        life.disks.faults["sync"] = self._random.randint(0, 5)
        with trio.move_on_after(6):
            await life.over.wait()
        if self._world.lives.get(life.name) is life:
            await self._off(life, 0.1, 2)

    async def _transfer(self) -> None:
        if life := self._one():

            async def move(replica: Replica) -> None:
                voters = sorted(replica.group.core.members.voters)
                await replica.roster.transfer(self._random.choice([0, *voters]))

            with trio.move_on_after(_PATIENCE_S), suppress(NbdvdeError):
                await life.ask(move)

    # Members

    async def _replace(self) -> None:
        """A machine leaves for good, and a new one comes."""
        if self._replacing:
            return
        self._replacing = True
        life = self._one()
        if life and await self._leave(life):
            if self._world.lives.get(life.name) is life:
                self._world.switch_off(life, loud=True)
            self._world.disks.pop(life.node, None)
            await self._join()
        self._replacing = False

    async def _leave(self, leaving: Life) -> bool:
        """Whether it is sure that it has."""
        leaving.may_fail = True  # it ends when it is told
        for _ in range(5):
            asked = self._one()
            if asked and asked is not leaving:

                async def dismiss(replica: Replica, node: NodeId = leaving.node) -> None:
                    await replica.roster.dismiss(node)

                with trio.move_on_after(_PATIENCE_S), suppress(NbdvdeError):
                    await asked.ask(dismiss)
                    return True
            await trio.sleep(1)
        return False

    async def _join(self) -> None:
        ticket = None
        while ticket is None:
            if asked := self._one():
                with trio.move_on_after(_PATIENCE_S), suppress(NbdvdeError):
                    ticket = await asked.ask(self._invite)
            await trio.sleep(1)
        node = ticket.identity.node
        image = await joined(ticket)
        self._world.disks[node] = Disks.made(image)
        await self._world.switch_on(node)

    async def _invite(self, replica: Replica) -> Ticket:
        return await self._world.invite(replica)
