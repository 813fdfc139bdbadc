"""What of an image can be asked for besides the exports it was opened for: its other disks, snapshots and regions."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import islice

from nbdvde.disk import Disk
from nbdvde.engine.catalogue import SEPARATOR, Member
from nbdvde.engine.managed.exported import SEPARATOR as REGION_SEPARATOR
from nbdvde.engine.managed.exported import RegionDisks
from nbdvde.engine.volumes import Volumes
from nbdvde.exports import Export
from nbdvde.protocol.constants import MAX_STRING
from nbdvde.protocol.messages import ExportInfo

LISTED = 256
"""Snapshots, and other disks, of an export that clients are told of unasked; whoever knows the names of older ones may
use them all the same."""
_REGION = "management region"


class Inventory:
    """The kin (`exports.Kin`) of an export that shows a disk of an image: EXPORT@SNAPSHOT, EXPORT/REGION, and DISK.

    All are looked for when a client asks, so that nothing has to follow the image. They inherit the export's rules.
    """

    def __init__(
        self, volumes: Volumes, regions: RegionDisks, *, whole: bool, shown: Callable[[str], Disk] | None = None,
        up_to_date: Callable[[Disk], Disk] = lambda disk: disk,
    ) -> None:  # fmt: skip
        """With `whole` the image's other disks belong to it as well; `shown` answers what clients use of a disk.

        `up_to_date` does so for regions, and for the same one always the same.
        """
        self._volumes, self._regions, self._whole = volumes, regions, whole
        self._shown, self._up_to_date = shown or volumes.get, up_to_date

    def find(self, export: Export, name: str) -> Export | None:
        """See `Kin`."""
        return self._region(export, name) or self._volume(export, name)

    def _region(self, export: Export, name: str) -> Export | None:
        base, _, region = name.rpartition(REGION_SEPARATOR)
        shown = export if base == export.name else self._other(export, base)
        member = self._disk_of(shown) if shown else None
        disk = self._regions.find(member.number, region) if member else None
        if disk is None:
            return None
        return Export(name, self._up_to_date(disk), export.read_only, _REGION, export.access, base=export)

    def _volume(self, export: Export, name: str) -> Export | None:
        base, at, snapshot = name.rpartition(SEPARATOR)
        if not at:
            return self._other(export, name)
        shown = export if base == export.name else self._other(export, base)
        if shown is None:
            return None
        label = f"{shown.disk.name}{SEPARATOR}{snapshot}"
        member = self._volumes.find(label)
        if member is None:
            return None
        return Export(name, self._volumes.get(label), True, _told(member), export.access, base=export)

    def disks(self, export: Export) -> Iterator[str]:
        """Names of the other disks."""
        if self._whole:
            yield from (disk.name for disk in self._volumes.disks if disk.name != export.disk.name)

    def listing(self, export: Export) -> Iterator[ExportInfo]:
        """See `Kin`: the oldest other disks, and the newest snapshots."""
        shown = {}
        if member := self._disk_of(export):
            shown[member.number] = export.name
        for name in islice(self.disks(export), LISTED):
            disk = self._volumes.get(name)
            shown[disk.number] = name
            yield ExportInfo(name, disk.size, export.read_only or disk.read_only)
        for number, base in shown.items():
            for region, held in ((region, self._up_to_date(disk)) for region, disk in self._regions.of(number)):
                name = f"{base}{REGION_SEPARATOR}{region}"
                if len(name.encode()) <= MAX_STRING:
                    yield ExportInfo(name, held.size, export.read_only or held.read_only, _REGION, held.contexts)
        names = ((f"{shown[m.parent]}{SEPARATOR}{m.name}", m) for m in reversed(self._volumes) if m.parent in shown)
        for name, member in islice(names, LISTED):
            if len(name.encode()) <= MAX_STRING:
                yield ExportInfo(name, member.size, True, _told(member))

    def _disk_of(self, export: Export) -> Member | None:
        """What the catalogue says of the disk of an export, unless it is a snapshot, or is gone."""
        member = self._volumes.find(export.disk.name)
        return member if member and not member.parent else None

    def _other(self, export: Export, name: str) -> Export | None:
        member = self._volumes.find(name) if self._whole and SEPARATOR not in name else None
        if member is None or name == export.disk.name:
            return None
        return Export(name, self._shown(name), export.read_only, "", export.access, base=export)


def _told(member: Member) -> str:
    taken = datetime.fromtimestamp(member.created_ns / 1e9, UTC)
    return f"snapshot of {taken:%Y-%m-%d %H:%M:%SZ}"
