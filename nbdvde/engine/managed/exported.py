"""The regions that clients can use as disks: DISK/stream."""

import logging
from collections.abc import Iterator

from nbdvde.disk import Disk
from nbdvde.engine.managed.regions import Region, Regions
from nbdvde.engine.managed.stream import Stream
from nbdvde.engine.managed.streamdisk import StreamDisk
from nbdvde.engine.volumes import Volumes
from nbdvde.errors import DamageError

SEPARATOR = "/"
"""Between the name of a disk and that of its region."""
STREAM = "stream"
_NAMES = (STREAM,)
_KINDS: tuple[type[Region], ...] = (Stream,)
_log = logging.getLogger(__name__)


async def load_exported(path: str, volumes: Volumes, regions: Regions) -> None:
    """Load these regions of all disks, so that they are there when a client asks. A damaged one is none."""
    for disk in volumes.disks:
        try:
            area = await regions.area(disk)
            for kind in _KINDS:
                if area.find(kind.FORM):
                    await regions.get(kind, disk)
        except DamageError as damage:
            _log.warning("%s, disk %s: %s", path, disk.name, damage)


class RegionDisks:
    """Those of the disks of an image."""

    def __init__(self, regions: Regions) -> None:
        self._regions = regions
        self._streams: dict[int, StreamDisk] = {}

    def of(self, disk: int) -> Iterator[tuple[str, Disk]]:
        """(name, disk) of all that the disk with this number has."""
        found = ((region, self.find(disk, region)) for region in _NAMES)
        return ((region, shown) for region, shown in found if shown)

    def find(self, disk: int, region: str) -> Disk | None:
        """A region of the disk with this number, if there is one of that name."""
        stream = self._regions.loaded(Stream, disk) if region == STREAM else None
        return self._view(disk, stream) if stream else None

    def _view(self, disk: int, stream: Stream) -> StreamDisk:
        """The stream as it is now: the same one for as long as its tail does not move."""
        known = self._streams.get(disk)
        if known is None or known.stream is not stream or known.base != stream.tail:
            known = self._streams[disk] = StreamDisk(stream)
        return known
