"""Machines, a network and groups, in simulated time: a seed decides everything, in any process the same."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, TypeAlias, TypeVar

from nbdvde.raft.core import Role
from nbdvde.raft.messages import NodeId
from tests.sim.faults import TICK, Faults, Plan
from tests.sim.group import Group
from tests.sim.members import Machine, Member
from tests.sim.network import Network

Handler: TypeAlias = Callable[[Any, Any], None]
T = TypeVar("T")
_MACHINES = 3


class World:
    """All there is."""

    def __init__(self, seed: int, plan: Plan) -> None:
        self.random = Random(seed)
        self.faults, self.settings = plan.faults, plan.settings
        self.network = Network(self.random, plan.faults)
        self.machines: dict[NodeId, Machine] = {}
        self.groups: list[Group] = []
        self.counts: dict[str, int] = {}
        self.now = 0
        """In units."""
        self._acknowledged = 0
        """In groups that are no more."""
        self.clients_rest = False
        """Whether nobody writes or reads any more."""
        self._pace, self._pause = plan.pace * TICK, 3 * TICK * plan.settings.quiet
        """Units between two things that clients do on the average, and that they sometimes do nothing."""
        self._slots: dict[int, list[tuple[Handler, Any, Any]]] = {}
        """What happens when."""
        for _ in range(max(plan.voters, _MACHINES)):
            self.new_machine()
        self.new_group(list(self.machines.values())[: plan.voters])
        self.at(1, self._client, None)

    # Time and chance

    def at(self, when: int, handler: Handler, first: Any, second: Any = None) -> None:
        """Have something happen."""
        slot = self._slots.get(when)
        if slot is None:
            self._slots[when] = [(handler, first, second)]
        else:
            slot.append((handler, first, second))

    def later(self, units: int, handler: Handler, first: Any, second: Any = None) -> None:
        """Have something happen after some time."""
        self.at(self.now + units, handler, first, second)

    def run(self, until: int) -> None:
        """Let time pass."""
        slots = self._slots
        while self.now < until:
            self.now += 1
            for handler, first, second in slots.pop(self.now, ()):
                handler(first, second)

    def draw(self, low: int, high: int) -> int:
        """A number, both ends included."""
        return low + int(self.random.random() * (high - low + 1))

    def choice(self, things: Sequence[T]) -> T:
        """One of them."""
        return things[int(self.random.random() * len(things))]

    def note(self, what: str, times: int = 1) -> None:
        """Count."""
        self.counts[what] = self.counts.get(what, 0) + times

    def mend(self) -> None:
        """From now on the network and the disks work well, and clients are in a hurry."""
        self.faults = self.network.faults = Faults()
        self.network.cut.clear()
        self.network.clogged.clear()
        self._pace, self._pause = TICK, 0

    # Machines

    def new_machine(self) -> Machine:
        """One more, with an empty disk."""
        machine = Machine(len(self.machines) + 1, self.choice(self.faults.periods))
        self.machines[machine.number] = machine
        if self.faults.older and self.random.random() < self.faults.older:
            self.network.older.add(machine.number)
        self.start(machine)
        return machine

    def start(self, machine: Machine, _: None = None) -> None:
        """Bring a machine up."""
        if machine.up or machine.dead:
            return
        machine.up, machine.life, machine.failing = True, machine.life + 1, False
        self.later(1 + int(self.random.random() * machine.period), self._tick, machine, machine.life)
        for group in self.groups:
            if member := group.members.get(machine.number):
                group.start(member)

    def crash(self, machine: Machine, *, back: bool = True) -> list[Member]:
        """End a machine in the middle of what it does; answers the members on it."""
        if not machine.up:
            return []
        machine.up, machine.life = False, machine.life + 1
        members = [group.members[machine.number] for group in self.groups if machine.number in group.members]
        torn = self.faults.torn > 0 and self.random.random() < self.faults.torn
        for member in members:
            member.disk.crash(self.random, torn=torn and self.may_damage(machine))
            member.stop()
        if back:
            self.later(1 + int(self.random.random() * TICK * self.faults.downtime), self.start, machine)
        return members

    def _tick(self, machine: Machine, life: int) -> None:
        if machine.life != life:
            return
        self.later(machine.period, self._tick, machine, life)
        for group in self.groups:
            member = group.members.get(machine.number)
            if member and member.core:
                member.core.tick()
                if member.seen.leads or member.core.role is not Role.FOLLOWER:  # who waits has nothing to say
                    group.drive(member)

    def sync_units(self, machine: Machine) -> int:
        """How long a sync takes, from now on."""
        most = self.faults.sync + machine.slow
        took = int(self.random.random() * (most + 1)) if most else 0
        return max(took, machine.full - self.now)

    def may_damage(self, machine: Machine) -> bool:
        """Whether every group could go on without it, as far as what others lost is not replaced yet.

        A copy of an entry that is lost counts until its member is whole again or belongs to the group no more: so no
        majority of the copies of an entry is ever lost.
        """
        return all(group.could_lose(machine.number) for group in self.groups)

    # Groups, and their clients

    def new_group(self, machines: Sequence[Machine]) -> None:
        """One more."""
        self.groups.append(Group(self, machines))

    def remove_group(self, group: Group) -> None:
        """One fewer."""
        self._acknowledged += group.history.acknowledged
        self.groups.remove(group)
        group.remove()

    def _client(self, _: None, __: None) -> None:
        if self.clients_rest:
            return
        gap = 1 + int(self.random.random() * 2 * self._pace)
        if self._pause and self.random.random() < 0.1:
            gap += self._pause
        self.later(gap, self._client, None)
        group = self.choice(self.groups)
        if self.random.random() < 0.5:
            group.write()
        else:
            group.read()

    @property
    def acknowledged(self) -> int:
        """Writes of all groups that ever were, each of a block."""
        return self._acknowledged + sum(group.history.acknowledged for group in self.groups)
