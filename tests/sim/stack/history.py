"""What clients and administrators asked for, and what they were told: all that has to fit together in the end."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from nbdvde.raft.messages import NodeId
from tests.sim.stack.register import Op, explained, span

BLOCK = 4096


class Violation(AssertionError):
    """Something happened that must not."""


@dataclass(eq=False, slots=True)
class Session:
    """Clients of a node use a disk."""

    node: NodeId
    granted: float = math.inf
    """When the first of them was let in."""
    ended: bool = False
    """Whether the server ended its connection: it knows then that requests of it may be on their way."""


@dataclass(eq=False, slots=True)
class Snapshot:
    """One that was asked for."""

    label: str
    begun: int
    ended: float = math.inf
    sure: bool = False
    """Whether it was taken."""
    doomed: bool = False
    """Whether it was to be deleted: it may be there or not."""
    used: bool = False
    """Whether something became what it holds."""


@dataclass(eq=False)
class Disk:
    """A disk from its making to its end."""

    name: str
    blocks: int
    """As it is known to be: it may be longer."""
    origin: Snapshot | None = None
    """What it began as."""
    doomed: bool = False
    ops: dict[int, list[Op]] = field(default_factory=dict)
    open: dict[Op, Session] = field(default_factory=dict)
    """Changes that were not answered, and may be fenced."""
    snapshots: list[Snapshot] = field(default_factory=list)
    rollbacks: list[tuple[Snapshot, Op]] = field(default_factory=list)
    """To what, and an operation like that on each block."""


class History:
    """Of a run."""

    def __init__(self) -> None:
        self.now = self.value = 0
        self.disks: dict[str, Disk] = {}
        self.gone: list[Disk] = []
        self.acknowledged = self.reads = self.fenced = 0

    def moment(self) -> int:
        """The next one."""
        self.now += 1
        return self.now

    def fresh(self) -> int:
        """What was never written before."""
        self.value += 1
        return self.value

    # Clients

    def begin(self, disk: Disk, session: Session | None, values: Mapping[int, int]) -> list[Op]:
        """Blocks are to be changed."""
        begun, ops = self.moment(), []
        for block, value in values.items():
            op = Op(value, begun)
            disk.ops.setdefault(block, []).append(op)
            if session:
                disk.open[op] = session
            ops.append(op)
        return ops

    def done(self, disk: Disk, ops: Iterable[Op]) -> None:
        """They are changed."""
        ended = self.moment()
        for op in ops:
            op.ended, op.sure = min(op.ended, ended), True
            disk.open.pop(op, None)
            self.acknowledged += 1

    def refused(self, disk: Disk, ops: Iterable[Op]) -> None:
        """They are not, and will not be."""
        for op in ops:
            disk.open.pop(op, None)
            for found in disk.ops.values():
                if op in found:
                    found.remove(op)

    def given_up(self, disk: Disk, ops: Iterable[Op]) -> None:
        """They are changed or not, and will not be from now on."""
        ended = self.moment()
        for op in ops:
            op.ended = min(op.ended, ended)
            disk.open.pop(op, None)

    def read(self, disk: Disk, begun: int, values: Mapping[int, int]) -> None:
        """What blocks held between `begun` and now."""
        ended = self.moment()
        for block, value in values.items():
            disk.ops.setdefault(block, []).append(Op(value, begun, ended, is_read=True, sure=True))
            self.reads += 1

    def fence(self, disk: Disk, begun: int, node: NodeId) -> None:
        """Nothing of who used the disk before `begun` takes effect from now on, unless at this node and still there.

        0: wherever it was.
        """
        now = self.moment()
        for op, session in list(disk.open.items()):
            if (session.node != node or session.ended) and session.granted < begun:
                op.ended = min(op.ended, now)
                del disk.open[op]
                self.fenced += 1

    # The end

    def check(self, contents: Mapping[str, Mapping[int, int]]) -> None:
        """Raise Violation unless all of it can be explained; `contents` is what disks and snapshots hold now."""
        for disk in self.disks.values():
            if disk.doomed and disk.name not in contents:
                continue
            if disk.name not in contents:
                raise Violation(f"disk {disk.name} is gone")
            self._check(disk, contents)

    def _check(self, disk: Disk, contents: Mapping[str, Mapping[int, int]]) -> None:
        for snapshot in disk.snapshots:
            if snapshot.sure and not snapshot.doomed and snapshot.label not in contents:
                raise Violation(f"snapshot {snapshot.label} is gone")
        begun = self.moment()
        self.read(disk, begun, contents[disk.name])
        origin = contents[disk.origin.label] if disk.origin else {}
        for block, ops in disk.ops.items():
            every = [*ops, *_of_snapshots(disk, block, contents)]
            if not explained(every, origin.get(block, 0)):
                raise Violation(f"block {block} of {disk.name}: {_told(every)}")
        for snapshot in disk.snapshots:
            _check_cut(disk, snapshot, contents)


def _check_cut(disk: Disk, snapshot: Snapshot, contents: Mapping[str, Mapping[int, int]]) -> None:
    """A snapshot holds what all blocks held at one moment."""
    origin = contents[disk.origin.label] if disk.origin else {}
    earliest, latest = float(snapshot.begun), snapshot.ended
    for block, value in contents.get(snapshot.label, {}).items():
        every = [*disk.ops.get(block, ()), *_of_rollbacks(disk, block, contents)]
        begun, ended = span(every, value, origin.get(block, 0))
        earliest, latest = max(earliest, begun), min(latest, ended)
    if earliest > latest:
        raise Violation(f"{snapshot.label} holds what there was in {earliest} and what was gone in {latest}")


def _of_snapshots(disk: Disk, block: int, contents: Mapping[str, Mapping[int, int]]) -> Iterable[Op]:
    for snapshot in disk.snapshots:
        if block in (held := contents.get(snapshot.label, {})):
            yield Op(held[block], snapshot.begun, snapshot.ended, is_read=True, sure=True)
    yield from _of_rollbacks(disk, block, contents)


def _of_rollbacks(disk: Disk, block: int, contents: Mapping[str, Mapping[int, int]]) -> Iterable[Op]:
    for snapshot, op in disk.rollbacks:
        if snapshot.label in contents:
            yield Op(contents[snapshot.label].get(block, 0), op.begun, op.ended, sure=op.sure)


def _told(ops: Iterable[Op]) -> str:
    return "; ".join(
        f"{'read' if op.is_read else 'wrote' if op.sure else 'may have written'} {op.value} in {op.begun}-{op.ended}"
        for op in sorted(ops, key=lambda op: op.begun)
    )
