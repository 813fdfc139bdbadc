"""The volumes of an image, disks and snapshots of them, and the operations that change which there are.

A snapshot is a volume that is never written. Copying a volume takes over the map as it stands (`LbaMap.fork`): what
both share is not counted down when either changes, until a mark has found out what is still in use.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nbdvde.engine.layout import BLOCK, MAX_DISK_BYTES, Action, Operation, VolumeEntry
from nbdvde.engine.lbamap import LbaMap
from nbdvde.errors import DamageError, UsageError

SEPARATOR = "@"
"""Between the names of a disk and of a snapshot."""


@dataclass(slots=True, eq=False)
class Member:
    """A volume as the catalogue has it."""

    number: int
    name: str
    """Of a snapshot: within its disk."""
    size: int
    map: LbaMap
    parent: int = 0
    """Number of the disk that this is a snapshot of; 0 for a disk."""
    created_ns: int = 0

    def entry(self) -> VolumeEntry:
        """As the root of the image keeps it."""
        lbamap = self.map
        return VolumeEntry(
            self.number, self.name, self.size, lbamap.height, lbamap.mapped, lbamap.root, self.parent, self.created_ns,
            lbamap.protected,
        )  # fmt: skip


class Catalogue:
    """All volumes of an image, by number. Numbers are never used again."""

    def __init__(self, members: Iterable[Member] = (), next_number: int = 0) -> None:
        self.members = {member.number: member for member in members}
        self.next_number = max(next_number, max(self.members, default=0) + 1)

    def __iter__(self) -> Iterator[Member]:
        """By number, which is by age."""
        return iter(self.members.values())

    def disks(self) -> list[Member]:
        """Those that can be written."""
        return [member for member in self if not member.parent]

    def snapshots(self, disk: Member) -> list[Member]:
        """Of a disk, oldest first."""
        return [member for member in self if member.parent == disk.number]

    def label(self, member: Member) -> str:
        """Name in full: DISK or DISK@SNAPSHOT."""
        parent = self.members.get(member.parent)
        return f"{parent.name}{SEPARATOR}{member.name}" if parent else member.name

    def get(self, label: str) -> Member | None:
        """The volume called DISK or DISK@SNAPSHOT, if there is one."""
        disk_name, at, name = label.partition(SEPARATOR)
        disk = next((member for member in self if not member.parent and member.name == disk_name), None)
        if disk is None or not at:
            return disk
        return next((member for member in self if member.parent == disk.number and member.name == name), None)

    def find(self, label: str) -> Member:
        """As `get`. Raises UsageError."""
        member = self.get(label)
        if member is not None:
            return member
        disk_name, at, _ = label.partition(SEPARATOR)
        disk = self.get(disk_name)
        if at and disk is not None:
            names = [snapshot.name for snapshot in self.snapshots(disk)]
            raise UsageError(f"snapshot {label}", "does not exist", f"{disk_name} has {_listed(names)}")
        names = [member.name for member in self.disks()]
        raise UsageError(f"disk {disk_name}", "does not exist in this image", f"it has {_listed(names)}")

    def forget_snapshots(self, numbers: Iterable[int]) -> None:
        """Have nothing of these volumes in memory, where they are snapshots: whoever reads one loads it again."""
        for number in numbers:
            member = self.members.get(number)
            if member and member.parent:
                member.map.forget()

    # Operations, in the order of the log

    def apply(self, operation: Operation, sequence: int) -> None:
        """Do what the log says; segments from `sequence` on are not used yet.

        Pure but for RESIZE, before which leaf 0 of the disk has to be in memory. Raises DamageError.
        """
        if operation.action in (Action.CREATE, Action.SNAPSHOT, Action.CLONE):
            if operation.number in self.members or operation.number < self.next_number:
                raise _impossible(operation, "makes a volume that exists")
            self.members[operation.number] = self._made(operation, sequence)
            self.next_number = operation.number + 1
            return
        member = self._named(operation, operation.number)
        if operation.action == Action.DELETE:
            del self.members[member.number]
        elif operation.action == Action.ROLLBACK:
            source = self._named(operation, operation.source)
            member.map, member.size = source.map.fork(sequence), source.size
        elif operation.action == Action.RESIZE:
            member.size = _sound_size(operation)
            member.map.resize(-(-member.size // BLOCK))
        else:
            raise _impossible(operation, f"has the unknown action {operation.action}")

    def _made(self, operation: Operation, sequence: int) -> Member:
        if operation.action == Action.CREATE:
            size = _sound_size(operation)
            return Member(operation.number, operation.name, size, LbaMap(-(-size // BLOCK)), 0, operation.time_ns)
        source = self._named(operation, operation.source)
        parent = source.number if operation.action == Action.SNAPSHOT else 0
        lbamap = source.map.fork(sequence)
        return Member(operation.number, operation.name, source.size, lbamap, parent, operation.time_ns)

    def _named(self, operation: Operation, number: int) -> Member:
        member = self.members.get(number)
        if member is None:
            raise _impossible(operation, f"names volume {number}, which does not exist")
        return member


def _sound_size(operation: Operation) -> int:
    if not 0 < operation.size <= MAX_DISK_BYTES:
        raise _impossible(operation, "gives a disk an impossible size")
    return operation.size


def _impossible(operation: Operation, why: str) -> DamageError:
    return DamageError(f"log record of an operation on volume {operation.number}", why, "run nbdvde check")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") if names else "none"
