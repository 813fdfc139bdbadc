"""Which management regions the disks of an image have."""

import msgspec

from nbdvde.admin.calls import Call, Nothing
from nbdvde.disk import BLOCK
from nbdvde.engine.image import Image


class RegionInfo(msgspec.Struct, frozen=True):
    """A region. Bytes."""

    disk: str
    type: str
    """Four characters."""
    size: int
    """That it may use."""
    metadata: int
    """Of header and records."""


class RegionList(msgspec.Struct, frozen=True):
    """All regions."""

    regions: list[RegionInfo]


async def list_regions(image: Image, _: Nothing) -> RegionList:
    """The management regions of each disk."""
    found = []
    for disk in image.volumes.disks:
        area = await image.regions.area(disk)
        found += [RegionInfo(disk.name, slot.name, slot.blocks * BLOCK, slot.used * BLOCK) for slot in area.directory]
    return RegionList(found)


REGIONS = Call("regions", Nothing, RegionList, list_regions, changes=False)
