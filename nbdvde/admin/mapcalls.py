"""The map of a disk: what it is made of, place by place."""

from weakref import WeakKeyDictionary

import msgspec
import trio

from nbdvde.admin.calls import Call, Nothing
from nbdvde.disk import BLOCK
from nbdvde.engine.diskmap import Drawing, Part
from nbdvde.engine.image import Image
from nbdvde.engine.volume import Volume
from nbdvde.errors import UsageError

CELLS, CELLS_MAX = 4096, 512 * 512
_PAUSE = 20
"""Times as long as drawing takes: so long a map that anybody may ask for is shown again."""
_PAUSE_MIN_S = 10.0


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


class _Latest:
    """The map of the first disk that was shown last, and until when it is shown again."""

    def __init__(self) -> None:
        self.lock = trio.Lock()
        self.until_s = 0.0
        self.change: tuple[int, ...] = ()
        """Of the image, when it was drawn."""
        self.map: DiskMap | None = None


_LATEST: WeakKeyDictionary[Image, _Latest] = WeakKeyDictionary()


async def latest(image: Image, _: Nothing) -> DiskMap:
    """What the first disk is made of: blocks of each kind by place, some seconds ago."""
    known = _LATEST.setdefault(image, _Latest())
    async with known.lock:
        begun_s = trio.current_time()
        if known.map is None or (begun_s >= known.until_s and image.change != known.change):
            await image.flush()
            change = image.change  # what is written from now on is not in it, perhaps
            known.map = await draw(image, MapRequest())
            known.change = change
            ended_s = trio.current_time()
            known.until_s = ended_s + max(_PAUSE_MIN_S, _PAUSE * (ended_s - begun_s))
        return known.map


LATEST = Call("map", Nothing, DiskMap, latest, changes=False)
DRAW = Call("map/draw", MapRequest, DiskMap, draw, changes=False)
CALLS = (LATEST, DRAW)
