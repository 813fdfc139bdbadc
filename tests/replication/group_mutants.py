"""Deliberate faults of what several groups, and a state of another node, have to do with each other.

`found_by` names the module of tests that must notice a fault.
"""

from tests.crash.mutants import Edit, Mutant


def mutant(name: str, where: str, old: str, new: str, found_by: str) -> Mutant:
    """A fault of one edit."""
    return Mutant(name, (Edit(where, old, new, "nbdvde.replication"),), found_by)


def of_holds(name: str, where: str, old: str, new: str) -> Mutant:
    return mutant(name, where, old, new, "test_holds")


def of_arranging(name: str, where: str, old: str, new: str) -> Mutant:
    return mutant(name, where, old, new, "test_arranging")


def of_states(name: str, where: str, old: str, new: str) -> Mutant:
    return mutant(name, where, old, new, "test_taking_over")


HOLDS = [
    of_holds("who stands still is asked again", "holds:Holds._hold", " if lane.machine.held < hold", ""),
    of_holds("who has no part is asked to stand still", "replica:Replica._sharing", "y.sharing", "y.others"),
    of_holds("who has no part has to stand still", "assembly:Assembly.are_held", "self.sharing", "self.others"),
    of_holds("who never heard of a hold is not told", "holds:Holds.watch", "await self._hold(seen)", "pass"),
    of_holds(
        "who has no leader is waited for",
        "holds:Holds.watch",
        "trio.move_on_after(_HOLD_S), suppress(NbdvdeError)",
        "suppress(NbdvdeError)",
    ),
    of_holds(
        "who lost its leader is waited for",
        "holds:Holds.watch",
        "trio.move_on_after(_HOLD_S), suppress(NbdvdeError)",
        "trio.move_on_after(_HOLD_S)",
    ),
]

ARRANGING = [
    of_arranging(
        "groups promise before they are kept",
        "replica:Replica._follow",
        "await self.assembly.kept()",
        "await trio.lowlevel.checkpoint()",
    ),
    of_arranging(
        "groups that came meanwhile promise before they are kept",
        "replica:Replica._follow",
        "dict(self.assembly.machines)",
        "self.assembly.machines",
    ),
    of_arranging("a full image ends its node", "assembly:Assembly.kept", "await trio.sleep(_AGAIN_S)", "raise"),
    of_arranging(
        "a group that ended meanwhile is looked for",
        "replica:Replica._follow",
        "self._add(group, machine)",
        "self._add(group, self.assembly.machines[name])",
    ),
    of_arranging(
        "whatever is gone did nothing",
        "replica:Replica._follow",
        "gone=name in self.assembly.retired",
        "gone=True",
    ),
    of_arranging(
        "nobody knows what a group that is gone did", "assembly:Assembly.retire", "self.retired.add(name)", "pass"
    ),
    of_arranging("who reads does not ask who has it", "replica:Replica.barrier", "{DEFAULT, *(", "{*("),
    of_arranging(
        "who reads everything asks one group", "replica:Replica.barrier", "else routing.groups", "else (DEFAULT,)"
    ),
    of_arranging(
        "who reads of a group that ends fails",
        "replica:Replica.barrier",
        "await self._moved(routing.version)",
        "raise",
    ),
    of_arranging(
        "who is let in may have lost the disk",
        "replica:Replica.attach",
        "await self._fence(disk, epoch)\n"
        "            if self.machine.epochs.get(disk, (0, 0))[0] == epoch:  # nobody has taken it over already\n",
        "if self.machine.epochs.get(disk, (0, 0))[0] == epoch:\n                await self._fence(disk, epoch)\n",
    ),
    of_arranging(
        "a node tells how far it is before that is kept",
        "retiring:Retiring._answer",
        "await self._assembly.durable()",
        "await trio.lowlevel.checkpoint()",
    ),
    of_arranging(
        "groups keep whom nobody had them forget",
        "roster:Roster._unfinished",
        "sorted({*theirs} ^ {*members})",
        "sorted({*members} - {*theirs})",
    ),
    of_arranging(
        "groups lack whom nobody had them take in",
        "roster:Roster._unfinished",
        "sorted({*theirs} ^ {*members})",
        "sorted({*theirs} - {*members})",
    ),
    of_arranging(
        "who does not lead any more goes by its log",
        "roster:Roster._do",
        "if not group.is_leader:",
        "if False:",
    ),
    of_arranging(
        "who does not know that another one leads goes by its log",
        "roster:Roster._do",
        "if (node in self._main.applied.members) != (asked.action == _Action.INVITE):",
        "if False:",
    ),
    of_arranging(
        "groups are overlooked that this node does not know yet",
        "roster:Roster._do",
        "await lane.barrier()",
        "pass",
    ),
    of_arranging(
        "who was removed is not told",
        "roster:Roster._unfinished",
        "not has_left and self._node.is_connected(node)",
        "False",
    ),
]

STATES = [
    of_states(
        "what was read while a state was taken over is told",
        "disk:ReplicatedDisk.read",
        "if taken == self._ways.taken:",
        "if True:",
    ),
    of_states(
        "what was stored while a state was taken over is told",
        "disk:ReplicatedDisk.status",
        "if taken == self._ways.taken:",
        "if True:",
    ),
    of_states("half of a state is read", "replica:Replica.barrier", "await self.assembly.whole()", "pass"),
    of_states(
        "what comes behind a state is not waited for",
        "replica:Replica.barrier",
        " and taken == self.assembly.taken",
        "",
    ),
    of_states("states are not counted", "assembly:Assembly._break_off", "self.taken += 1", "pass"),
    of_states(
        "who reads only waits until a state is whole",
        "assembly:Assembly.whole",
        "await self.turn(lambda: True)",
        "while self.incomplete or self._paused:\n        await self._news.wait()",
    ),
    of_states(
        "half a state stays until somebody reads",
        "replica:Replica.start",
        "assembly.whole, self._room.watch",
        "self._room.watch",
    ),
    of_states(
        "only the leader has a state to give",
        "replica:Replica.fetch",
        "self._sources(source)",
        "[source or self.group.leader]",
    ),
    of_states(
        "only who offers a state is asked for it",
        "replica:Replica.fetch",
        "self._sources(source)",
        "[source] if source else self._sources(0)",
    ),
    of_states(
        "who offers a state is not asked first",
        "replica:Replica.fetch",
        "self._sources(source)",
        "self._sources(0)",
    ),
    of_states(
        "who offers a state has to be a member",
        "replica:Replica._sources",
        "known.union([first] if first else [])",
        "known",
    ),
    of_states(
        "the leader is not asked first",
        "replica:Replica._sources",
        "node != first, node != self.group.leader",
        "node != first",
    ),
    of_states(
        "a disk that went back is overlooked",
        "catchup:Taker.run",
        "(again.disks, again.changing) == (state.disks, state.changing)",
        "again.disks == state.disks",
    ),
    of_states("who changes its disks gives a state", "giving:Giver.answer", "if self._changing() % 2:", "if False:"),
    of_states(
        "the beginning of a change of disks is not told",
        "machine:ImageMachine._call",
        "assembly.changing += call.concerns_all\n    try:",
        "try:",
    ),
    of_states(
        "the end of a change of disks is not told",
        "machine:ImageMachine._call",
        "finally:\n        assembly.changing += call.concerns_all",
        "finally:\n        pass",
    ),
    mutant(
        "what was done elsewhere is done",
        "changes:GroupMachine._apply",
        "return _unknown_of(operation)",
        "return None",
        "test_machine",
    ),
    mutant(
        "nobody knows what became of what says nothing", "changes:_unknown_of", "return None", "pass", "test_machine"
    ),
    mutant(
        "comparisons outlive the table",
        "assembly:Assembly.arrange",
        "machine.comparisons.forget()",
        "pass",
        "test_groups",
    ),
]

GROUPS = HOLDS + ARRANGING + STATES
