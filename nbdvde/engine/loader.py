"""Driving what has to be loaded into a map: in a thread that may block, or on the event loop."""

from collections.abc import Callable
from typing import TypeAlias

import trio

from nbdvde import workers
from nbdvde.engine.changes import Load, Loads
from nbdvde.engine.layout import LOST_SLOT
from nbdvde.engine.lbamap import LOST_LEAF, LbaMap
from nbdvde.engine.segments import Segments
from nbdvde.engine.versions import LOST_NODE
from nbdvde.errors import DamageError

Lost: TypeAlias = Callable[[Load, DamageError], bytes]
"""What to take for a damaged leaf or node; or it raises."""
_SLICES = 4
"""Slices of a long change between two turns of other tasks."""


def losing(
    disk: str, tell: Callable[[str, str], None], refuse: type[DamageError] | tuple[()]
) -> Lost:  # fmt: skip
    """Everything below a damaged leaf or node of a disk is lost, which `tell` hears: (where, what).

    Damage of the class `refuse` is raised instead, with the name of what is damaged.
    """

    def lost(load: Load, damage: DamageError) -> bytes:
        what = f"map node {load.index} of level {load.level}" if load.level else f"map leaf {load.index}"
        if isinstance(damage, refuse):
            hint = "nbdvde check tells what is lost; the rest can be read with --read-only"
            raise type(damage)(f"{what} of {disk}", damage.why, hint) from None
        if load.ref.slot != LOST_SLOT:
            tell(f"{what} of {disk}", f"{damage.why}; not all of its blocks can be read")
        return LOST_NODE if load.level else LOST_LEAF

    return lost


def drive_blocking(loads: Loads, segments: Segments, lbamap: LbaMap, lost: Lost | None = None) -> None:
    """Load what is asked for until there is no more. Without `lost` damage is raised. Raises DamageError."""
    for batch in loads:
        for load in batch:
            load.install(lbamap, _read(load, segments, lost))


async def drive(loads: Loads, segments: Segments, lbamap: LbaMap, lost: Lost | None = None) -> None:
    """As `drive_blocking`: what the page cache has at once, the rest of a batch in one job for a thread."""
    slices = 0
    for batch in loads:
        waiting = [load for load in batch if not _installed(load, segments, lbamap, lost)]
        if waiting:
            for load, data in zip(waiting, await workers.run(_read_all, waiting, segments, lost), strict=True):
                load.install(lbamap, data)
        if not batch:
            slices += 1
            if slices % _SLICES == 0:
                await trio.lowlevel.checkpoint()


def _installed(load: Load, segments: Segments, lbamap: LbaMap, lost: Lost | None) -> bool:
    try:
        data = segments.read_unit_nowait(load.ref, load.kind)
    except DamageError as damage:
        data = _instead(load, damage, lost)
    if data is not None:
        load.install(lbamap, data)
    return data is not None


def _read_all(loads: list[Load], segments: Segments, lost: Lost | None) -> list[bytes]:
    return [_read(load, segments, lost) for load in loads]


def _read(load: Load, segments: Segments, lost: Lost | None) -> bytes:
    try:
        return segments.read_unit(load.ref, load.kind)
    except DamageError as damage:
        return _instead(load, damage, lost)


def _instead(load: Load, damage: DamageError, lost: Lost | None) -> bytes:
    if lost is None:
        raise damage
    return lost(load, damage)
