"""Three machines, a network, clients and an administrator: everything of a run but what goes wrong."""

from collections import Counter
from collections.abc import Mapping
from random import Random

import trio

from nbdvde.engine.catalogue import SEPARATOR
from nbdvde.engine.image import Image
from nbdvde.raft.messages import NodeId
from nbdvde.replication.compare import joined
from nbdvde.replication.notes import Identity
from nbdvde.replication.replica import Replica
from nbdvde.replication.ticket import Ticket
from tests.sim.stack.device import Disks
from tests.sim.stack.history import BLOCK, Disk, History, Violation
from tests.sim.stack.images import FIRST, SIZE, blank, place_of
from tests.sim.stack.life import ELECTION_S, Life
from tests.sim.stack.rulers import Ruler
from tests.sim.stack.users import USED, User, contents_of, write_through
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
        self.nursery.start_soon(self.net.run)
        for node in FIRST:
            self.disks[node] = Disks.made(blank(node))
            await self.switch_on(node)
        main = self.history.disks["disk"]
        for name, rival in (("anna", False), ("rita", True)):
            self.welcome(User(self, name, main, rival=rival))
        self.nursery.start_soon(Ruler(self).run)

    async def rest(self) -> None:
        """Nothing fails any more: everything has to go on, and all nodes get the same. Raises Violation."""
        for node in list(self.disks):
            await self.switch_on(node)
        with trio.move_on_after(_RECOVERY_S) as patience:
            for life in list(self.lives.values()):
                for disk in [disk for disk in self.history.disks.values() if not disk.doomed]:
                    await write_through(self, life, disk)
            self.resting = True
            await self._agree()
        if patience.cancelled_caught:
            raise Violation(f"it does not recover: {self._states()}")
        await self._compare()
        self.counts["taken over"] += sum(life.has_caught_up for life in self.lives.values())

    def _states(self) -> list[str]:
        return [
            f"{life.name}: {life.replica.group.status()} {life.replica.machine.stuck}" if life.is_serving else life.name
            for life in self.lives.values()
        ]

    async def _agree(self) -> None:
        while True:
            replicas = [life.replica for life in self.lives.values()]
            positions = {(r.machine.applied.index, r.group.core.log.last_index) for r in replicas}
            if len(positions) == 1 and len(set(positions.pop())) == 1:
                return
            await trio.sleep(ELECTION_S)

    async def _compare(self) -> None:
        """All images hold the same, and it is what clients were told."""
        lives = list(self.lives.values())
        found = [await life.ask(lambda replica: _everything(replica.image)) for life in lives]
        notes = [life.replica.machine.note for life in lives]
        for life, (catalogue, contents), note in zip(lives, found, notes, strict=True):
            if (catalogue, contents) != found[0]:
                raise Violation(f"{life.name} holds {catalogue}, {lives[0].name} {found[0][0]}")
            if (note.applied, note.epochs, note.nodes) != (notes[0].applied, notes[0].epochs, notes[0].nodes):
                raise Violation(f"{life.name} notes {note}, {lives[0].name} {notes[0]}")
        self.history.check(found[0][1])


async def _everything(image: Image) -> tuple[list[tuple[str, int, int]], Mapping[str, Mapping[int, int]]]:
    """(name, size, time) of all disks and snapshots, and what their blocks hold."""
    volumes = image.volumes
    catalogue = [(disk.name, disk.size, 0) for disk in volumes.disks]
    catalogue += [
        (f"{disk.name}{SEPARATOR}{snapshot.name}", snapshot.size, snapshot.created_ns)
        for disk in volumes.disks
        for snapshot in volumes.snapshots(disk)
    ]
    return sorted(catalogue), {label: await _content(image, label) for label, _, _ in catalogue}


async def _content(image: Image, label: str) -> Mapping[int, int]:
    volume = image.disk(label)
    blocks = [block for block in USED if block < volume.size // BLOCK]
    return contents_of({block: joined(await volume.read(block * BLOCK, BLOCK)) for block in blocks})
