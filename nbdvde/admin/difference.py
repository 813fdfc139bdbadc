"""What changed on a disk since a snapshot of it, as commands and the control socket ask for it."""

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import TypeAlias

from nbdvde.admin.messages import DiffRequest
from nbdvde.disk import Disk
from nbdvde.engine.catalogue import SEPARATOR
from nbdvde.engine.image import Image
from nbdvde.engine.status import DIRTY_BITMAP
from nbdvde.errors import UsageError

Range: TypeAlias = tuple[int, int]
"""(offset, length) in bytes."""
Ranges: TypeAlias = list[Range]
"""Ascending."""
EXTENTS = 1024
"""Looked at between two parts of an answer."""


async def difference(
    image: Image,
    request: DiffRequest,
    tell: Callable[[Ranges], Awaitable[None]],
    reading: Callable[[Disk], AbstractContextManager[None]],
) -> Range | None:
    """Tell, part by part, the ranges in which `until` holds something else than `since`. Raises NbdvdeError.

    Answers what `since` has beyond the end of `until`.

    Neither is changed or deleted while it is being read, which `reading` sees to.
    """
    disk, at, name = request.since.partition(SEPARATOR)
    if not at:
        raise UsageError(f"'{request.since}'", "does not name a snapshot", f"write it as DISK{SEPARATOR}NAME")
    until = disk if request.until is None else request.until
    if until.partition(SEPARATOR)[0] != disk:
        raise UsageError(f"'{until}'", f"is neither disk {disk} nor a snapshot of it", "compare a disk with its own")
    older, newer = image.disk(request.since), image.disk(until)
    if older is newer:
        return None
    with reading(older), reading(newer):
        await _walk(newer, DIRTY_BITMAP + name, tell)
        return (newer.size, older.size - newer.size) if older.size > newer.size else None


async def _walk(newer: Disk, context: str, tell: Callable[[Ranges], Awaitable[None]]) -> None:
    offset, size = 0, newer.size
    start = end = 0
    while offset < size:
        found: Ranges = []
        for length, changed in await newer.status(context, offset, size - offset, EXTENTS):
            if changed:
                if offset > end:
                    found += [(start, end - start)] if end > start else []
                    start = offset
                end = offset + length
            offset += length
        await tell(found)
    if end > start:
        await tell([(start, end - start)])
