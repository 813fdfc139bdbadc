"""What goes wrong in a world, kind by kind, within what the protocol has to survive."""

from collections.abc import Callable

from nbdvde.errors import RefusedError
from nbdvde.raft.messages import Members, NodeId, Snapshot
from tests.sim.faults import KINDS, TICK
from tests.sim.group import Group
from tests.sim.members import Machine, Member
from tests.sim.world import World

_MACHINES = 7
"""No more of them live at once."""
_GROUPS = 3


class Misfortunes:
    """They come by chance, each kind as often as the world's faults say, until `over`."""

    def __init__(self, world: World) -> None:
        self.world, self.random = world, world.random.random
        self.over = False
        self._kinds: dict[str, Callable[[], bool]] = {
            "crash": self._crash,
            "power": self._power,
            "partition": self._partition,
            "deaf": self._deaf,
            "clog": self._clog,
            "slow disk": self._slow_disk,
            "full disk": self._full_disk,
            "failing disk": self._failing_disk,
            "rot": self._rot,
            "misdirected": self._misdirected,
            "wipe": self._wipe,
            "transfer": self._transfer,
            "change": self._change,
            "group": self._group,
            "upgrade": self._upgrade,
        }
        assert tuple(self._kinds) == KINDS, "each has what does it"
        for kind in KINDS:
            if kind in world.faults.every:
                self._await(kind)

    def _await(self, kind: str) -> None:
        mean = self.world.faults.every[kind] * TICK
        self.world.later(1 + int(self.random() * 2 * mean), self._strike, kind)

    def _strike(self, kind: str, _: None) -> None:
        if not self.over:
            if self._kinds[kind]():
                self.world.note(kind)
            self._await(kind)

    def heal(self) -> None:
        """From now on nothing fails, and everybody is up."""
        world = self.world
        self.over = True
        world.mend()
        for machine in world.machines.values():
            machine.slow = machine.full = 0
            machine.failing = False
            world.start(machine)

    # Machines

    def _up(self) -> list[Machine]:
        return [machine for machine in self.world.machines.values() if machine.up]

    def _one(self) -> Machine | None:
        """Often one that leads."""
        group = self.world.choice(self.world.groups)
        leaders = [member.machine for member in group.members.values() if member.core and member.core.is_leader]
        if leaders and self.random() < 0.4:
            return self.world.choice(leaders)
        up = self._up()
        return self.world.choice(up) if up else None

    def _crash(self) -> bool:
        """In the middle of a sync, if there is one."""
        machine = self._one()
        if machine:
            self.world.crash(machine)
        return machine is not None

    def _power(self) -> bool:
        """All at once."""
        for machine in self._up():
            self.world.crash(machine)
        return True

    def _slow_disk(self) -> bool:
        machine = self.world.choice(list(self.world.machines.values()))
        machine.slow = 0 if machine.slow else 30
        return machine.slow > 0

    def _full_disk(self) -> bool:
        machine = self.world.choice(list(self.world.machines.values()))
        machine.full = self.world.now + int(self.random() * 80 * TICK)
        return True

    def _failing_disk(self) -> bool:
        """A sync fails: the node stops, and starts anew with what is there."""
        if machine := self._one():
            machine.failing = True
        return machine is not None

    def _upgrade(self) -> bool:
        """A node of an older version starts anew as one of the newest."""
        older = [machine for machine in self._up() if machine.number in self.world.network.older]
        if not older:
            return False
        machine = self.world.choice(older)
        self.world.crash(machine)
        self.world.network.older.discard(machine.number)
        return True

    # The network

    def _numbers(self) -> list[NodeId]:
        return [machine.number for machine in self.world.machines.values() if not machine.dead]

    def _part(self) -> tuple[set[NodeId], set[NodeId]]:
        """Some of the machines, often a leader alone, and the others."""
        numbers = self._numbers()
        leader = self._one()
        some = {number for number in numbers if self.random() < 0.5}
        if leader and self.random() < 0.5:
            some = {leader.number}
        return some, set(numbers) - some

    def _partition(self) -> bool:
        """In two, or mended again."""
        cut = self.world.network.cut
        if cut:
            cut.clear()
            return False
        some, others = self._part()
        if others and self.random() < 0.4:  # only a link, often of a leader: a third one hears both
            others = {self.world.choice(sorted(others))}
            some = set(sorted(some)[:1])
        cut.update((one, other) for one in some for other in others)
        cut.update((other, one) for one in some for other in others)
        return True

    def _deaf(self) -> bool:
        """One side hears the other, and is not heard; or mended again."""
        cut = self.world.network.cut
        if cut:
            cut.clear()
            return False
        some, others = self._part()
        if self.random() < 0.5:
            some, others = others, some
        cut.update((one, other) for one in some for other in others)
        return True

    def _clog(self) -> bool:
        """A link delivers nothing for a while, and then everything."""
        numbers = self._numbers()
        link = self.world.choice(numbers), self.world.choice(numbers)
        self.world.network.clogged[link] = self.world.now + int(self.random() * 40 * TICK)
        return link[0] != link[1]

    # Disks

    def _rot(self) -> bool:
        """An entry of a node cannot be read any more, which is noticed when it starts."""
        return self._damage(1)

    def _misdirected(self) -> bool:
        """A write went where another entry is: neither can be read."""
        return self._damage(2)

    def _damage(self, count: int) -> bool:
        machine = self._one()
        if machine is None or not self.world.may_damage(machine):
            return False
        members = self.world.crash(machine)
        return sum([self._damage_one(member, count) for member in members[:1]]) > 0

    def _damage_one(self, member: Member, count: int) -> int:
        store = member.disk.durable
        width = store.last_index - store.snapshot.index
        near = min(width, 6) if self.random() < 0.5 else width  # often what was written last
        return member.disk.damage(store.last_index - int(self.random() * near) for _ in range(count))

    def _wipe(self) -> bool:
        """A disk is replaced by an empty one: the machine is another member from then on."""
        machine = self._one()
        alive = len(self._numbers())
        if machine is None or alive > _MACHINES or not self.world.may_damage(machine):
            return False
        self.world.crash(machine, back=False)
        machine.dead = True
        self.world.new_machine()
        return True

    # Groups

    def _led(self) -> tuple[Group, Member] | None:
        group = self.world.choice(self.world.groups)
        leaders = [member for member in group.members.values() if member.core and member.core.is_leader]
        return (group, self.world.choice(leaders)) if leaders else None

    def _transfer(self) -> bool:
        if (led := self._led()) is None or (core := led[1].core) is None:
            return False
        try:
            core.transfer(self.world.choice(sorted(core.members.voters)))
        except RefusedError:
            return False
        led[0].drive(led[1])
        return True

    def _change(self) -> bool:
        if (led := self._led()) is None or (core := led[1].core) is None:
            return False
        group, member = led
        target = self._target(group, core.members)
        for number in target:
            if number not in group.members:
                group.join(self.world.machines[number], Snapshot())
        try:
            core.change_members(target)
        except RefusedError:
            return False
        group.drive(member)
        return True

    def _target(self, group: Group, members: Members) -> Members:
        """Who may belong to a group: first of all nobody whose disk is lost."""
        world = self.world
        alive = {machine.number for machine in world.machines.values() if not machine.dead}
        voters, learners = members.voters & alive, members.learners & alive
        new = sorted(alive - voters - learners)
        dice = self.random()
        if voters != members.voters:
            return Members(voters | set(new[-1:]), learners - set(new[-1:]))
        if learners and dice < 0.4:
            one = world.choice(sorted(learners))
            return Members(voters | {one}, learners - {one})
        if new and dice < 0.7:
            return Members(voters, learners | {world.choice(new)})
        if group.weak:
            return members
        if dice < 0.8 and len(voters) > 2:
            return Members(voters - {world.choice(sorted(voters))}, learners)
        some = {number for number in sorted(alive) if self.random() < 0.5} or voters
        return Members(frozenset(some), frozenset(sorted(alive - some)[:1]))

    def _group(self) -> bool:
        """One more group, or one fewer."""
        world = self.world
        if len(world.groups) < _GROUPS and self.random() < 0.6:
            numbers = self._numbers()
            world.new_group([world.machines[number] for number in numbers[-3:]])
            return True
        if len(world.groups) == 1:
            return False
        world.remove_group(world.choice(world.groups[1:]))
        return True
