"""Which open images are replicated, and by what."""

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from nbdvde.engine.image import Image
from nbdvde.errors import RefusedError

if TYPE_CHECKING:
    from nbdvde.replication.replica import Replica

_replicas: "WeakKeyDictionary[Image, Replica]" = WeakKeyDictionary()


def register(image: Image, replica: "Replica") -> None:
    """An image is replicated from now on, until it is closed."""
    _replicas[image] = replica
    image.regions.alone = False


def replica_of(image: Image) -> "Replica | None":
    """What replicates an image, if anything does."""
    return _replicas.get(image)


def refuse_if_replicated(image: Image, what: str) -> None:
    """Raise RefusedError for a change that would be made on one node only."""
    if image in _replicas:
        raise RefusedError(what, "cannot be done on a replicated image", "see docs/raft.md")
