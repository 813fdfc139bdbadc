"""The management regions of disks where images are compared and copied: each looks like a disk.

Unlike changes of blocks, one of a region must not be made again on what has it already. So what is copied of the
regions of a disk is what they are at one point of the log, which they remember (`Area.entry`): the bulk of it while
they are changed, and in the end, in one go, the rest, of which the other node has kept book.
"""

from collections import OrderedDict
from collections.abc import Sequence

import zstandard

from nbdvde import workers
from nbdvde.disk import BLOCK, Disk, Piece
from nbdvde.engine.image import Image
from nbdvde.engine.managed.area import Watch
from nbdvde.engine.regions.directory import FORM as DIRECTORY
from nbdvde.engine.regions.directory import HEAD_BLOCKS, WINDOW, Slot
from nbdvde.engine.regions.samples import FORM as METRICS
from nbdvde.engine.volume import Volume
from nbdvde.errors import RefusedError, UsageError
from nbdvde.replication.compare import CHUNK, joined
from nbdvde.replication.questions import RegionState, Rest

SEPARATOR = "/"
"""Between the name of a disk and the number of a window, in what is asked for."""
_REST_CHUNKS = 8
"""That are told of in one go: a moment in which no region of the disk is changed."""
_WATCHES = 8
WINDOW_CHUNKS = WINDOW * BLOCK // CHUNK
_HEAD = RegionState(DIRECTORY.tag, 0, HEAD_BLOCKS)
"""Directory, and what changed the regions last."""


class Window(Disk):
    """A region as a disk."""

    def __init__(self, volume: Volume, slot: RegionState) -> None:
        self.name, self.size, self.read_only = volume.name, slot.blocks * BLOCK, volume.read_only
        self._volume, self._start = volume, slot.start * BLOCK

    def read_nowait(self, offset: int, length: int) -> None:
        return None

    async def read(self, offset: int, length: int) -> Sequence[Piece]:
        return await self._volume.read(self._start + offset, length)

    def write_nowait(self, offset: int, data: memoryview, *, owned: bool) -> bool:
        return False

    async def write(self, offset: int, data: memoryview, *, owned: bool = False) -> None:
        await self._volume.write(self._start + offset, data, owned=owned)

    def zero_nowait(self, offset: int, length: int, *, allocate: bool) -> bool:
        return False

    async def zero(self, offset: int, length: int, *, allocate: bool = False) -> None:
        await self._volume.zero(self._start + offset, length, allocate=allocate)

    async def flush(self, mark: int | None = None, *, alone: bool = False) -> None:
        await self._volume.flush(mark, alone=alone)

    async def status(self, context: str, offset: int, length: int, max_extents: int) -> list[tuple[int, int]]:
        return await self._volume.status(context, self._start + offset, length, max_extents)


def _state(slot: Slot) -> RegionState:
    return RegionState(slot.type, slot.start, slot.blocks)


async def regions_of(image: Image, disk: Volume) -> list[RegionState]:
    """Those that a disk has. Raises DamageError."""
    return [_state(slot) for slot in (await image.regions.area(disk)).directory]


async def labels_of(image: Image, disk: Volume) -> list[str]:
    """What is to be compared of a disk: itself and its regions, but not what each node records of itself."""
    slots = await regions_of(image, disk)
    compared = [_HEAD, *(slot for slot in slots if slot.type != METRICS.tag)] if slots else []
    return [disk.name, *(label_of(disk.name, slot) for slot in compared)]


def directory_of(label: str) -> str:
    """What is asked for to compare the directory of a region; nothing for a disk."""
    disk, separator, _ = label.partition(SEPARATOR)
    return f"{disk}{SEPARATOR}0" if separator else ""


def label_of(disk: str, slot: RegionState) -> str:
    """How a region is asked for."""
    return f"{disk}{SEPARATOR}{slot.start // WINDOW}"


async def found(image: Image, label: str) -> Disk:
    """A disk, a snapshot, or a region of a disk. Raises UsageError when there is none, DamageError."""
    name, separator, window = label.partition(SEPARATOR)
    if not separator:
        return image.disk(name)
    volume = image.disk(name)
    slots = await regions_of(image, volume)
    for slot in [_HEAD, *slots] if slots else ():
        if str(slot.start // WINDOW) == window:
            return Window(volume_of(image, volume), slot)
    raise UsageError(f"region {label}", "does not exist")


def volume_of(image: Image, disk: Volume) -> Volume:
    """What the regions of a disk lie in; it has some."""
    volume = image.volumes.existing_region(DIRECTORY, disk.number)
    assert volume is not None, "there is a region"
    return volume


class RegionGiver:
    """Keeps book of what is changed while others copy."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._watches: OrderedDict[int, tuple[str, Watch]] = OrderedDict()
        self._number = 0

    async def watch(self, disk: str) -> int:
        """Begin with a disk; a number for it. Raises UsageError, DamageError."""
        area = await self._image.regions.area(self._image.disk(disk))
        self._number += 1
        self._watches[self._number] = disk, area.watch()
        if len(self._watches) > _WATCHES:
            self._watches.popitem(last=False)
        return self._number

    async def rest(self, number: int) -> Rest:
        """What was changed since. Raises RefusedError when that is not known any more, UsageError, DamageError."""
        if number not in self._watches:
            raise RefusedError("catching up", "took too long", "it is tried again")
        disk, watch = self._watches[number]
        area = await self._image.regions.area(self._image.disk(disk))
        local = area.find(METRICS)
        async with area.still():
            touched = sorted(watch.taken())
            if local:
                touched = [chunk for chunk in touched if chunk // WINDOW_CHUNKS != local.start // WINDOW]
            if len(touched) > _REST_CHUNKS:
                return Rest(b"", {}, touched)
            head = await _read(area.volume, 0, HEAD_BLOCKS * BLOCK) if area.directory.slots else b""
            chunks = {chunk: await _read(area.volume, chunk * CHUNK, CHUNK) for chunk in touched}
        del self._watches[number]
        return Rest(head, {chunk: await workers.run(_packed, data) for chunk, data in chunks.items()}, [])


async def _read(volume: Volume, offset: int, length: int) -> bytes:
    return joined(await volume.read(offset, length))


def _packed(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(data)
