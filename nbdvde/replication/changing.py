"""Changes as the engine makes them."""

from collections.abc import Sequence

from nbdvde.engine.volume import Volume
from nbdvde.errors import DamageError, NoSpaceError
from nbdvde.replication.operations import Action, Change


def written_together(volume: Volume, changes: Sequence[Change]) -> bool:
    """Make changes in one go if all are writes of whole blocks, and none has to wait; whether they are made."""
    size, writes = volume.size, list[tuple[int, memoryview]]()
    for change in changes:
        if change.action != Action.WRITE or change.offset + change.length > size:
            return False
        writes.append((change.offset, memoryview(change.data)))
    return volume.write_many_nowait(writes)


def made_nowait(volume: Volume, change: Change) -> bool:
    """Make a change, unless that takes waiting; whether it is made."""
    offset, length = change.offset, change.length
    try:
        match change.action:
            case Action.WRITE:
                return volume.write_nowait(offset, memoryview(change.data), owned=True)
            case Action.TRIM:
                return volume.trim_nowait(offset, length)
            case Action.ZERO:
                return volume.zero_nowait(offset, length, allocate=True)
    except (NoSpaceError, DamageError):  # it is not made: `make` meets them again
        return False


async def make(volume: Volume, change: Change) -> None:
    """Make a change. Raises NbdvdeError."""
    match change.action:
        case Action.WRITE:
            await volume.write(change.offset, memoryview(change.data), owned=True)
        case Action.TRIM:
            await volume.trim(change.offset, change.length)
        case Action.ZERO:
            await volume.zero(change.offset, change.length, allocate=True)
