"""The regions that clients can use as disks: DISK/stream and DISK/worm."""

import logging
from collections.abc import Iterator

from nbdvde.disk import Disk
from nbdvde.engine.managed.regions import Region, Regions
from nbdvde.engine.managed.stream import Stream
from nbdvde.engine.managed.streamdisk import StreamDisk
from nbdvde.engine.managed.worm import Worm
from nbdvde.engine.managed.wormdisk import WormDisk
from nbdvde.engine.volumes import Volumes
from nbdvde.errors import DamageError

SEPARATOR = "/"
"""Between the name of a disk and that of its region."""
_STREAM, _WORM = "stream", "worm"
_KINDS: tuple[type[Region], ...] = (Stream, Worm)
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
        self._worms: dict[int, WormDisk] = {}

    def of(self, disk: int) -> Iterator[tuple[str, Disk]]:
        """(name, disk) of all that the disk with this number has."""
        found = ((region, self.find(disk, region)) for region in (_STREAM, _WORM))
        return ((region, shown) for region, shown in found if shown)

    def find(self, disk: int, region: str) -> Disk | None:
        """A region of the disk with this number, if there is one of that name."""
        if region == _STREAM:
            stream = self._regions.loaded(Stream, disk)
            return self._stream(disk, stream) if stream else None
        worm = self._regions.loaded(Worm, disk) if region == _WORM else None
        return self._worm(disk, worm) if worm else None

    def _stream(self, disk: int, stream: Stream) -> StreamDisk:
        """The stream as it is now: the same one for as long as its tail does not move."""
        known = self._streams.get(disk)
        if known is None or known.stream is not stream or known.base != stream.tail:
            known = self._streams[disk] = StreamDisk(stream)
        return known

    def _worm(self, disk: int, worm: Worm) -> WormDisk:
        known = self._worms.get(disk)
        if known is None or known.worm is not worm:
            known = self._worms[disk] = WormDisk(worm)
        return known
