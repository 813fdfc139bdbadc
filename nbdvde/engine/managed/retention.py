"""The one place that keeps what is under retention from being given up together with its disk."""

from nbdvde.engine.managed.regions import Regions
from nbdvde.engine.managed.worm import Worm
from nbdvde.engine.volume import Volume
from nbdvde.errors import DamageError, RefusedError


async def refuse_if_retained(regions: Regions, disk: Volume) -> None:
    """Raise RefusedError while a disk has a WORM region that must not go, or that cannot be read."""
    try:
        area = await regions.area(disk)
        if area.find(Worm.FORM):
            (await regions.get(Worm, disk)).refuse_if_retained()
    except DamageError as damage:
        why = f"what it retains cannot be read: {damage.message}"
        raise RefusedError(f"disk {disk.name}", why, "run nbdvde check") from None
