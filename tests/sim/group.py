"""A group in a simulated world: its members do what their cores say, clients write and read, and all is looked at."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nbdvde.errors import RefusedError
from nbdvde.raft.core import Core, NotLeaderError, Ready
from nbdvde.raft.messages import EntryKind, Members, Message, NodeId, Snapshot
from tests.sim.disk import Disk
from tests.sim.history import BLOCKS, History, Seen, Violation
from tests.sim.members import Machine, Member

if TYPE_CHECKING:
    from tests.sim.world import World

_CONTENTION = 24
"""Units in which clients ask two who lead."""
_REPAIR_EVERY = 12
"""Units between two tries to get damaged entries from others."""


class Group:
    """One, with its members and clients."""

    def __init__(self, world: "World", machines: Sequence[Machine]) -> None:
        self.world, self.network = world, world.network
        self.history = History()
        self.members: dict[NodeId, Member] = {}
        self.disks: dict[NodeId, Disk] = {}
        """Of all who ever were members: what a dead one promised, it did promise."""
        self.removed = False
        self._draw, self._random = world.draw, world.random.random
        self._reads: dict[int, tuple[int, int]] = {}
        """By key: what a client asked for."""
        self._asked = self._written = 0
        self._leader: NodeId = 0
        """Whom clients take for the leader."""
        self._first = Members(frozenset(machine.number for machine in machines))
        for machine in machines:
            self.join(machine, Snapshot(0, 0, self._first))

    # Members

    def join(self, machine: Machine, start: Snapshot) -> Member:
        """There is a member on a machine from now on."""
        member = self.members[machine.number] = Member(machine, start, self.world.faults.at_hand)
        self.disks[machine.number] = member.disk
        if machine.up:
            self.start(member)
        return member

    def start(self, member: Member) -> None:
        """Bring a member up with what its disk has."""
        if self.removed or member.core:
            return
        store = member.disk.store
        core = member.core = Core(member.node, store, store.hard, self.world.settings, self._draw)
        core.mute = bool(store.holes)
        member.seen = Seen(core.term, core.vote, store.snapshot.index)
        if core.mute:
            self.world.later(_REPAIR_EVERY, self._repair, member, core)
        self.drive(member)

    def remove(self) -> None:
        """The group is no more."""
        self.removed = True
        for member in self.members.values():
            member.stop()

    def drive(self, member: Member) -> None:
        """Do what a member asks for, as far as its disk is not busy."""
        core, seen = member.core, member.seen
        while core is not None:
            changed = core.commit != seen.commit or core.term != seen.term or core.vote != seen.vote
            leads = core.office is not None
            if (changed or leads != seen.leads) and self.history.look(member.node, core, seen, self.disks):
                self._contend(member, _CONTENTION)
                if member.core is not core:  # a disk failed meanwhile
                    return
            if member.syncing is not None:
                return
            ready = core.ready()
            if missed := member.disk.store.missed():
                self.world.later(1 + int(self._random() * 6), self._loaded, member, (core, missed))
            if ready is None:
                return
            self._do(member, core, ready)
            core = member.core

    def _do(self, member: Member, core: Core, ready: Ready) -> None:
        for message in ready.now:
            self._send(member, message)
        if ready.install:
            self.world.later(1 + int(self._random() * 10), self._install, member, (core, *ready.install))
        for key, index in ready.reads:
            self._read_at(member, key, index)
        if not (ready.hard or ready.entries):
            self._finish(member, core, ready)
            return
        disk = member.disk
        disk.change(ready.hard, ready.entries)
        if ready.entries:
            self.history.logged(ready.entries, disk.store.term(ready.entries[0].index - 1))
        member.syncing = ready
        if took := self.world.sync_units(member.machine):
            self.world.later(took, self._synced, member, ready)
        else:
            self._synced(member, ready, drive=False)

    def _loaded(self, member: Member, asked: tuple[Core, tuple[int, int, int]]) -> None:
        """What the log did not have in memory is there now."""
        core, missed = asked
        if member.core is core:
            member.disk.store.load(*missed)()()
            core.loaded()
            self.drive(member)

    def _synced(self, member: Member, ready: Ready, *, drive: bool = True) -> None:
        if member.syncing is not ready or not member.core:
            return
        if member.machine.failing:
            self.world.note("failed syncs")
            self.world.crash(member.machine)  # nothing is tried again
            return
        member.syncing = None
        member.disk.sync()
        self._finish(member, member.core, ready)
        if drive:
            self.drive(member)

    def _finish(self, member: Member, core: Core, ready: Ready) -> None:
        core.done(ready)
        if core.mute and not member.disk.store.holes:  # the leader has other entries there
            core.mute = False
        for message in ready.after:
            self._send(member, message)
        if ready.committed:
            member.to_apply += ready.committed
            if lag := self.world.faults.lag:
                self.world.later(1 + int(self._random() * lag), self._apply, member, core)
            else:
                self._apply(member, core)

    # States

    def _apply(self, member: Member, core: Core) -> None:
        if member.core is not core:
            return
        history, entries = self.history, member.to_apply
        member.to_apply = []
        for entry in entries:
            history.applied(member.node, entry, member.state)
            member.state = entry.index
            if write := member.proposed.pop((entry.index, entry.term), None):
                history.written(write, entry.index)
        core.applied_to(member.state)
        self._answer_waiting(member)
        compaction = self.world.faults.compaction
        if compaction and self._random() < compaction:
            self._compact(member, core)

    def _compact(self, member: Member, core: Core) -> None:
        index, store = member.state, member.disk.store
        if index > store.snapshot.index and not member.syncing:
            member.disk.compact_to(Snapshot(index, store.term(index), core.log.members_at(index)))
            member.durable = index
            core.compacted()
            self.world.note("compactions")

    def _install(self, member: Member, asked: tuple[Core, NodeId, Snapshot]) -> None:
        """Take over the state of a node, if that has it still and can be reached."""
        core, sender, snapshot = asked
        source = self.members[sender]
        if member.core is not core or source.core is None or source.state < snapshot.index:
            return
        if (sender, member.node) in self.network.cut or member.syncing:
            return
        taken = self._state_of(source, source.core)
        if core.wants(taken):
            member.disk.take_over(taken)
            member.state = member.durable = taken.index
            member.to_apply = []
            core.installed(taken)
            self.world.note("installs")
            self._answer_waiting(member)
            self.drive(member)

    def _state_of(self, member: Member, core: Core) -> Snapshot:
        term = core.log.term(member.state)
        assert term is not None, "what was applied last is known"
        return Snapshot(member.state, term, core.log.members_at(member.state))

    def _repair(self, member: Member, core: Core) -> None:
        """Have damaged entries from another member, or, where it has forgotten those, its state instead."""
        holes = member.disk.store.holes
        if member.core is not core or not holes:
            return
        self.world.later(_REPAIR_EVERY, self._repair, member, core)
        other = self.world.choice([one for one in self.members.values() if one.core and one is not member] or [member])
        if other.core is None or other is member or (other.node, member.node) in self.network.cut or member.syncing:
            return
        forgotten = other.disk.store.snapshot.index >= min(holes)
        if forgotten:
            member.disk.take_over(self._state_of(other, other.core))
            member.durable = member.disk.store.snapshot.index
        anew = member.disk.repair(other.disk.store) or forgotten
        if anew:
            member.stop()
            self.start(member)
            self.world.note("repairs by state")
        elif not member.disk.store.holes:
            core.mute = False
            self.world.note("repairs")
            self.drive(member)

    # Messages

    def _send(self, member: Member, message: Message) -> None:
        self.history.sent(message, member.disk.durable)
        network, world = self.network, self.world
        sent = network.translated_for(message) if network.older else message
        if sent:
            for at in network.arrivals(sent, world.now):
                world.at(at, self._deliver, sent)

    def _deliver(self, message: Message, _: None) -> None:
        member = self.members.get(message.receiver)
        if member and member.core:
            member.core.step(message)
            self.drive(member)

    # Clients

    def _contend(self, leader: Member, times: int) -> None:
        """Clients of two who believe that they lead: what is written by the new one is looked for at the old one."""
        core = leader.core
        others = [member for member in self.members.values() if member.core and member.core.is_leader]
        if core is None or not core.is_leader or len(others) < 2 or self.world.clients_rest:
            return
        for member in others:
            if member is not leader:
                self._read(member)
        if not times % 4:
            self._write(leader)
        if times:
            self.world.later(1, self._contend, leader, times - 1)

    def write(self) -> None:
        """A client writes through whom it takes for the leader, or through anybody."""
        if member := self._attached():
            self._write(member)

    def _write(self, member: Member) -> None:
        if member.core is None:
            return
        random, core = self._random, member.core
        datas, writes = [], []
        for _ in range(1 + int(random() * 3)):
            first = int(random() * (BLOCKS - 2))
            blocks = bytes(range(first, first + 1 + int(random() * 3)))
            self._written += 1
            datas.append(self._written.to_bytes(4, "little") + blocks)
            writes.append(self.history.write(blocks))
        try:
            last = core.propose(datas)
        except RefusedError:
            self._leader = core.leader
            return
        for at, write in enumerate(writes):
            member.proposed[last - len(writes) + 1 + at, core.term] = write
        self.drive(member)

    def read(self) -> None:
        """A client reads, through any member."""
        if member := self._attached():
            self._read(member)

    def _read(self, member: Member) -> None:
        if member.core is None:
            return
        self._asked += 1
        try:
            member.core.read(self._asked)
        except NotLeaderError:
            self._leader = 0
            return
        self._reads[self._asked] = self.history.read(int(self._random() * BLOCKS))
        self.drive(member)

    def _attached(self) -> Member | None:
        if self._random() < 0.7 and (member := self.members.get(self._leader)):
            return member
        return self.world.choice(list(self.members.values()))

    def _read_at(self, member: Member, key: int, index: int) -> None:
        if index < 0:
            self._reads.pop(key, None)
        elif index <= member.state:
            self._answer(member, key)
        else:
            member.asked.append((index, key))

    def _answer_waiting(self, member: Member) -> None:
        if member.asked:
            waiting, member.asked = member.asked, []
            for index, key in waiting:
                self._read_at(member, key, index)

    def _answer(self, member: Member, key: int) -> None:
        if read := self._reads.pop(key, None):
            self.history.answered(read, member.state)

    # What it can bear

    @property
    def weak(self) -> set[NodeId]:
        """Members that have lost something."""
        return {
            member.node for member in self.members.values() if member.machine.dead or member.disk.durable.holes
        }  # fmt: skip

    def could_lose(self, node: NodeId) -> bool:
        """Whether a minority is weak with this one too, in all sets of voters that anybody knows."""
        weak = self.weak | {node}
        return all(
            2 * len(voters & weak) < len(voters)
            for member in self.members.values()
            if not member.machine.dead
            for members in member.configurations()
            for voters in members.quorums
            if voters
        )

    # In the end

    @property
    def is_whole(self) -> bool:
        """Whether all who belong to the group are up, and have applied the same."""
        last = len(self.history.committed)
        belong = self.agreed
        return all(
            member.machine.dead
            or (member.core is not None and not member.core.mute and member.state == last == member.core.log.last_index)
            for member in self.members.values()
            if member.node in belong
        )

    @property
    def agreed(self) -> Members:
        """Who belongs to it, by what is committed."""
        for entry in reversed(self.history.committed):
            if entry.kind == EntryKind.MEMBERS:
                return Members.unpack(entry.data)
        return self._first

    def check(self) -> None:
        """Look at the end of a run: everybody has the same log."""
        logs = [member.core.log for member in self.members.values() if member.core and member.node in self.agreed]
        for log in logs:
            for entry in self.history.committed[log.first_index - 1 :]:
                if log.term(entry.index) != entry.term:
                    raise Violation(f"entry {entry.index} is not the same everywhere")
