"""The two copies of the key area in an image file."""

from collections.abc import Callable

from nbdvde.engine import keys
from nbdvde.engine.keys import KeyArea
from nbdvde.engine.layout import KEY_AREA_BYTES, KEY_AREAS
from nbdvde.engine.reading import read_copy
from nbdvde.engine.storage import Storage


def load_key_area(storage: Storage) -> KeyArea:
    """The newer sound copy."""
    return keys.choose(*(read_copy(storage, offset, KEY_AREA_BYTES) for offset in KEY_AREAS))


def store_key_area(storage: Storage, area: KeyArea, sync: Callable[[], None]) -> None:
    """Write both copies, one after the other, so that one is whole at any time."""
    for offset in KEY_AREAS:
        storage.write(offset, [area.to_bytes()])
        sync()


def change_key_area(
    storage: Storage, change: Callable[[KeyArea], KeyArea], sync: Callable[[], None]
) -> KeyArea:  # fmt: skip
    """Replace the key area by what `change` makes of it; answers the new one. Blocks."""
    area = change(load_key_area(storage))
    store_key_area(storage, area, sync)
    return area
