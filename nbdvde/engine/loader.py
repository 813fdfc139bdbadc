"""Driving what has to be loaded into a map: in a thread that may block, or on the event loop."""

from collections.abc import Callable
from typing import TypeAlias

import trio

from nbdvde import workers
from nbdvde.engine.changes import Load, Loads
from nbdvde.engine.lbamap import LbaMap
from nbdvde.engine.segments import Segments
from nbdvde.errors import DamageError

Lost: TypeAlias = Callable[[Load, DamageError], bytes]
_SLICES = 4
"""Slices of a long change between two turns of other tasks."""


def drive_blocking(loads: Loads, segments: Segments, lbamap: LbaMap, lost: Lost | None = None) -> None:
    """Load what is asked for until there is no more. `lost` answers what to take for a damaged leaf or node, or raises.

    Raises DamageError.
    """
    for batch in loads:
        for load in batch:
            try:
                load.install(lbamap, segments.read_unit(load.ref, load.kind))
            except DamageError as damage:
                if lost is None:
                    raise
                load.install(lbamap, lost(load, damage))


async def drive(loads: Loads, segments: Segments, lbamap: LbaMap) -> None:
    """As `drive_blocking`: what the page cache has at once, the rest of a batch in one job for a thread."""
    slices = 0
    for batch in loads:
        waiting = [load for load in batch if not _installed(load, segments, lbamap)]
        if waiting:
            for load, data in zip(waiting, await workers.run(_read, segments, waiting), strict=True):
                load.install(lbamap, data)
        if not batch:
            slices += 1
            if slices % _SLICES == 0:
                await trio.lowlevel.checkpoint()


def _installed(load: Load, segments: Segments, lbamap: LbaMap) -> bool:
    data = segments.read_unit_nowait(load.ref, load.kind)
    if data is not None:
        load.install(lbamap, data)
    return data is not None


def _read(segments: Segments, loads: list[Load]) -> list[bytes]:
    return [segments.read_unit(load.ref, load.kind) for load in loads]
