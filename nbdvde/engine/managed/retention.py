"""The one place that keeps what is under retention from being given up together with its disk."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nbdvde import moment
from nbdvde.engine.managed.area import Area
from nbdvde.engine.managed.regions import Regions
from nbdvde.engine.managed.worm import Worm
from nbdvde.engine.volume import Volume
from nbdvde.errors import DamageError, RefusedError


@asynccontextmanager
async def giving_up(regions: Regions, disk: Volume) -> AsyncIterator[None]:
    """Around whatever gives up something of a disk, and what follows: no region of it is made or gets longer meanwhile.

    Raises RefusedError while it has a WORM region that must not go, or that cannot be read: DamageError in a cluster.
    """
    area, worm = await _found(regions, disk)
    async with area.unchanged():
        if area.find(Worm.FORM) and (worm is None or worm.gone):
            raise RefusedError(f"disk {disk.name}", "was given a WORM region just now", "ask how long it is retained")
        if worm is not None and not worm.gone:
            worm.refuse_if_retained()
        yield
    await regions.forget_deleted()


async def _found(regions: Regions, disk: Volume) -> tuple[Area, Worm | None]:
    """The regions of a disk, and its WORM region, if it has one."""
    try:
        area = await regions.area(disk)
        return area, await regions.get(Worm, disk) if area.find(Worm.FORM) else None
    except DamageError as damage:
        if moment.entry() is not None:  # others may be able to tell, and all have to come to the same
            raise
        why = f"what it retains cannot be read: {damage.message}"
        raise RefusedError(f"disk {disk.name}", why, "run nbdvde check") from None
