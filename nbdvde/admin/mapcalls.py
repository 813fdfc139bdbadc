"""The map of a disk: what it is made of, place by place."""

import math
from collections import OrderedDict
from typing import NamedTuple
from weakref import WeakKeyDictionary

import msgspec
import trio

from nbdvde.admin.calls import Call, OfImage
from nbdvde.disk import BLOCK
from nbdvde.engine.diskmap import Drawing, Part
from nbdvde.engine.image import Image
from nbdvde.engine.volume import Volume
from nbdvde.errors import InUseError, UsageError

CELLS, CELLS_MAX = 4096, 512 * 512
_PAUSE = 20
"""Times as long as drawing takes: so long a map that anybody may ask for is shown again."""
_PAUSE_MIN_S = 10.0
_HASTE_S = 10.0
"""For a new map rest may be owed: so many seconds of it."""
_SHOWN_MAX = 64
"""Maps that are kept, of an image."""


class MapOf(OfImage, frozen=True):
    """A disk whose map was perhaps drawn before."""

    disk: str | None = None
    """The disk, or DISK@SNAPSHOT; the first disk without."""


class MapRequest(msgspec.Struct, frozen=True):
    """What is to be drawn."""

    disk: str | None = None
    """The disk, or DISK@SNAPSHOT; the first disk without."""
    since: str | None = None
    """A snapshot, DISK@NAME or NAME of the same disk: what differs from it is `changed`."""
    cells: int = CELLS
    """At most; fewer when the disk has fewer blocks of 4096 bytes."""


class DiskMap(msgspec.Struct, frozen=True):
    """A disk in cells of the same length, but for a block: cell i of n begins at block i * blocks / n, rounded up."""

    disk: str
    size: int
    """Bytes."""
    since: str | None
    cells: int
    blocks: int
    """Of 4096 bytes, in all cells."""
    shared_known: bool
    """Whether it was looked for what is shared; in images of more than a TiB it is not."""
    bytes: dict[str, int]
    """By part: hole, zero, compressed, incompressible, shared, changed, unreadable."""
    counts: dict[str, list[int]]
    """Blocks by part and cell, without parts that there are none of, and without holes, which are the rest."""


async def draw(image: Image, asked: MapRequest) -> DiskMap:
    """What a disk is made of: blocks of each kind by place."""
    if not 1 <= asked.cells <= CELLS_MAX:
        raise UsageError(f"{asked.cells} cells", f"there can be 1 to {CELLS_MAX}")
    disk = image.disk(asked.disk)
    since = None
    if asked.since is not None:
        name = asked.since if "@" in asked.since else f"{disk.name.partition('@')[0]}@{asked.since}"
        since = image.disk(name)
    return _map(disk, since, await image.drawing(disk, since, asked.cells))


def _map(disk: Volume, since: Volume | None, drawing: Drawing) -> DiskMap:
    sums = [sum(column) * BLOCK for column in drawing.counts.T.tolist()]  # may exceed 64 bits
    parts = [part for part in Part if part and sums[part]]
    return DiskMap(
        disk.name, disk.size, since.name if since else None, len(drawing.counts), drawing.blocks, drawing.shared_known,
        {part.name.lower(): sums[part] for part in Part},
        {part.name.lower(): drawing.counts[:, part].tolist() for part in parts},
    )  # fmt: skip


class _Shown(NamedTuple):
    """The map of a disk as it was drawn last."""

    map: DiskMap
    until_s: float
    """It is shown again until then."""
    change: tuple[int, ...]
    """Of the image, when it was drawn."""


class _Latest:
    """The maps of an image that were shown last."""

    def __init__(self) -> None:
        self.lock = trio.Lock()
        self._shown: OrderedDict[int, _Shown] = OrderedDict()
        """By number of the disk or snapshot."""
        self._rested_s = 0.0
        """When all that was drawn will have been a small part of the time."""

    async def map(self, image: Image, disk: Volume) -> DiskMap:
        """That of a disk, drawn anew where that is due."""
        begun_s, known = trio.current_time(), self._shown.get(disk.number)
        if known and (begun_s < known.until_s or known.change == image.change):
            return known.map
        if self._rested_s - begun_s > _HASTE_S:
            if known:
                return known.map
            wait_s = math.ceil(self._rested_s - begun_s - _HASTE_S)
            raise InUseError(f"map of {disk.name}", "others were drawn just now", f"ask again in {wait_s} s")
        await image.flush()
        change = image.change  # what is written from now on is not in it, perhaps
        drawn = await draw(image, MapRequest(disk.name))
        ended_s = trio.current_time()
        rest_s = _PAUSE * (ended_s - begun_s)
        self._rested_s = max(self._rested_s, ended_s) + rest_s
        self._shown[disk.number] = _Shown(drawn, ended_s + max(_PAUSE_MIN_S, rest_s), change)
        self._shown.move_to_end(disk.number)
        if len(self._shown) > _SHOWN_MAX:
            self._shown.popitem(last=False)
        return drawn


_LATEST: WeakKeyDictionary[Image, _Latest] = WeakKeyDictionary()


async def latest(image: Image, asked: MapOf) -> DiskMap:
    """What a disk is made of: blocks of each kind by place, some seconds ago."""
    known = _LATEST.setdefault(image, _Latest())
    async with known.lock:
        return await known.map(image, image.disk(asked.disk))


LATEST = Call("map", MapOf, DiskMap, latest, changes=False, here=True)
DRAW = Call("map/draw", MapRequest, DiskMap, draw, changes=False)
CALLS = (LATEST, DRAW)
