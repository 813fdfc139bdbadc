"""The volumes of an image: disks, snapshots of them, and regions, and the operations that change which there are.

A snapshot is a volume that is never written. Copying a volume takes over the map as it stands (`LbaMap.fork`): what
both share is not counted down when either changes, until a mark has found out what is still in use.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from nbdvde.engine.layout import BLOCK, MAX_DISK_BYTES, Action, Operation, VolumeEntry
from nbdvde.engine.lbamap import LbaMap
from nbdvde.engine.versions import Version
from nbdvde.errors import DamageError, UsageError

SEPARATOR = "@"
"""Between the names of a disk and of a snapshot."""
GONE = "(deleted)"
"""In place of the name of a disk or snapshot that is there no more; none can have it."""


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
    domain: int = 0
    """Members of equal domains share what they store; 0 takes no part."""
    region: int = 0
    """Type of the region that it is (regions.form.Form.tag); 0 for disks and snapshots."""
    owner: int = 0
    """Of a region: number of the disk that it belongs to, 0 for one of the image."""
    origin: int = 0
    """Number of the disk or snapshot that a clone began as; 0 for none, and for clones of older versions."""

    def entry(self, version: Version | None = None) -> VolumeEntry:
        """As the root of the image keeps it, with another version than the map's own, which may have no root yet."""
        lbamap, version = self.map, version or self.map.base
        return VolumeEntry(
            self.number, self.name, self.size, version.height, lbamap.mapped, version.root, self.parent,
            self.created_ns, lbamap.protected, self.domain, self.region, self.owner, self.origin,
        )  # fmt: skip


class Catalogue:
    """All volumes of an image, by number. Numbers are never used again."""

    def __init__(self, members: Iterable[Member] = (), next_number: int = 0, dedup_mib: int = 0) -> None:
        self.dedup_mib = dedup_mib
        """MiB of memory that the fingerprints may take, 0 for the default."""
        self.members: dict[int, Member] = {}
        self.version = 0
        """One more whenever a volume comes or goes."""
        self.disks: list[Member] = []
        """What clients can write, oldest first."""
        self.regions: dict[tuple[int, int], Member] = {}
        """By type and owner: what the image keeps for itself, or for a disk."""
        self._snapshots: dict[int, dict[str, Member]] = {}
        """Of each disk, by its number: by name, oldest first."""
        self.sealed = 0
        """Leaves and nodes, about, of versions that no checkpoint has written yet."""
        self.next_number = next_number
        for member in sorted(members, key=lambda member: member.number):
            self._add(member)

    def __iter__(self) -> Iterator[Member]:
        """By number, which is by age."""
        return iter(self.members.values())

    def snapshots(self, disk: Member) -> Mapping[str, Member]:
        """Of a disk by name, oldest first."""
        return self._snapshots.get(disk.number, {})

    def disk_of(self, member: Member) -> Member | None:
        """The disk that a snapshot was taken of; of a disk itself."""
        return self.members.get(member.parent) if member.parent else member

    def label(self, member: Member) -> str:
        """Name in full: DISK or DISK@SNAPSHOT, or one that no disk can have."""
        if member.region:
            owner = self.members.get(member.owner)
            return f"region {member.name}" + (f" of {owner.name}" if owner else "")
        disk = self.members.get(member.parent)
        return f"{disk.name}{SEPARATOR}{member.name}" if disk else member.name

    def origin(self, member: Member) -> str | None:
        """What a clone began as: its name, or `GONE`; None for what is no clone."""
        if not member.origin:
            return None
        source = self.members.get(member.origin)
        return self.label(source) if source else GONE

    def get(self, label: str) -> Member | None:
        """The volume called DISK or DISK@SNAPSHOT, if there is one."""
        disk_name, at, name = label.partition(SEPARATOR)
        disk = next((disk for disk in self.disks if disk.name == disk_name), None)
        return self.snapshots(disk).get(name) if disk and at else disk

    def find(self, label: str) -> Member:
        """As `get`. Raises UsageError."""
        member = self.get(label)
        if member is not None:
            return member
        disk_name, at, _ = label.partition(SEPARATOR)
        disk = self.get(disk_name)
        if at and disk is not None:
            raise UsageError(f"snapshot {label}", "does not exist", f"{disk_name} has {_listed(self.snapshots(disk))}")
        names = [member.name for member in self.disks]
        raise UsageError(f"disk {disk_name or repr('')}", "does not exist in this image", f"it has {_listed(names)}")

    def _add(self, member: Member) -> None:
        self.version += 1
        self.members[member.number] = member
        self.next_number = max(self.next_number, member.number + 1)
        if member.parent:
            self._snapshots.setdefault(member.parent, {})[member.name] = member
        elif member.region:
            self.regions[member.region, member.owner] = member
        else:
            self.disks.append(member)

    def _remove(self, member: Member) -> None:
        self.version += 1
        del self.members[member.number]
        if member.parent:
            del self._snapshots[member.parent][member.name]
        elif member.region:
            del self.regions[member.region, member.owner]
        else:
            self.disks.remove(member)

    @property
    def changed(self) -> int:
        """Leaves and nodes, about, that a checkpoint would write."""
        return self.sealed + sum(len(member.map.dirty) for member in (*self.disks, *self.regions.values()))

    def seal(self) -> None:
        """Have all that changed in versions."""
        for member in self:
            self.sealed += member.map.seal()

    # Operations, in the order of the log

    def apply(self, operation: Operation, sequence: int) -> None:
        """Do what the log says; segments from `sequence` on are not used yet. Raises DamageError."""
        if operation.action in (Action.CREATE, Action.SNAPSHOT, Action.CLONE):
            if operation.number in self.members or operation.number < self.next_number:
                raise _impossible(operation, "makes a volume that exists")
            self._add(self._made(operation, sequence))
            return
        member = self._named(operation, operation.number)
        if operation.action == Action.DELETE:
            for region in [region for (_, owner), region in self.regions.items() if owner == member.number]:
                self._remove(region)
            self._remove(member)
        elif operation.action == Action.ROLLBACK:
            source = self._named(operation, operation.source)
            member.map, member.size = self._fork(source, sequence), source.size
        elif operation.action == Action.RESIZE:
            member.size = _sound_size(operation)
            member.map.resize(-(-member.size // BLOCK))
        else:
            raise _impossible(operation, f"has the unknown action {operation.action}")

    def _made(self, operation: Operation, sequence: int) -> Member:
        if operation.action == Action.CREATE:
            owner = operation.source
            if (operation.region, owner) in self.regions:
                raise _impossible(operation, "makes a region that exists")
            if owner:
                self._named(operation, owner)
            size = _sound_size(operation)
            lbamap = LbaMap(-(-size // BLOCK))
            return Member(
                operation.number, operation.name, size, lbamap, created_ns=operation.time_ns, domain=operation.domain,
                region=operation.region, owner=owner,
            )  # fmt: skip
        source = self._named(operation, operation.source)
        parent, origin = (source.number, 0) if operation.action == Action.SNAPSHOT else (0, source.number)
        lbamap = self._fork(source, sequence)
        return Member(
            operation.number, operation.name, source.size, lbamap, parent, operation.time_ns, source.domain,
            origin=origin,
        )  # fmt: skip

    def _fork(self, source: Member, sequence: int) -> LbaMap:
        self.sealed += source.map.seal()
        return source.map.fork(sequence)

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


def _listed(names: Collection[str]) -> str:
    return (", ".join(islice(names, 10)) or "none") + (f" and {len(names) - 10} more" if len(names) > 10 else "")
