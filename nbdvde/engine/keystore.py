"""The two copies of the key area in an image file."""

from collections.abc import Callable

from nbdvde.engine import keys
from nbdvde.engine.keys import KeyArea
from nbdvde.engine.layout import KEY_AREA_BYTES, KEY_AREAS
from nbdvde.engine.reading import read_copy
from nbdvde.engine.storage import Storage
from nbdvde.errors import RefusedError


def load_key_area(storage: Storage) -> KeyArea:
    """The newer sound copy. Raises DamageError, ImageError."""
    return keys.choose(*_copies(storage))


def _copies(storage: Storage) -> list[bytes]:
    return [read_copy(storage, offset, KEY_AREA_BYTES) for offset in KEY_AREAS]


def store_key_area(storage: Storage, area: KeyArea, sync: Callable[[], None], *, first: int = 0) -> None:
    """Write both copies, one after the other, so that one is whole at any time."""
    for offset in (KEY_AREAS[first], KEY_AREAS[1 - first]):
        storage.write(offset, [area.to_bytes()])
        sync()


def change_key_area(
    storage: Storage, change: Callable[[KeyArea], KeyArea], sync: Callable[[], None]
) -> KeyArea:  # fmt: skip
    """Replace the key area by what `change` makes of it; answers the new one. Blocks.

    Raises RefusedError when no key would be left. A crash may have left one copy behind the other. That one is written
    first: the other one holds the keys in use.
    """
    copies = _copies(storage)
    old = keys.choose(*copies)
    area = change(old)
    if old.slots() and not area.slots():
        raise RefusedError("key area", "would be left without a key, and all data lost", "keep one key at least")
    store_key_area(storage, area, sync, first=int(copies[0] == old.to_bytes()))
    return area
