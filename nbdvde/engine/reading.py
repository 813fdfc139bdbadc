"""Reading the file of an image: what its device refuses becomes one clear error."""

from nbdvde.engine.storage import Storage
from nbdvde.errors import UnreadableError, reason


def read(storage: Storage, offset: int, length: int, name: str = "image") -> bytes:
    """As `Storage.read`. Raises UnreadableError, with the name of the image."""
    try:
        return storage.read(offset, length)
    except OSError as error:
        raise unreadable(error, offset, name) from None


def read_copy(storage: Storage, offset: int, length: int) -> bytes:
    """One copy of what is there twice: empty when it cannot be read, so that the other copy counts."""
    try:
        return storage.read(offset, length)
    except OSError:
        return b""


def unreadable(error: OSError, offset: int, name: str) -> UnreadableError:
    """What to raise for an error of the device."""
    why = f"cannot be read at byte {offset}: {reason(error)}"
    return UnreadableError(name, why, "check the device that holds it")
