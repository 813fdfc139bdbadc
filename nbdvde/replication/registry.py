"""Which open images are replicated, and by what."""

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, ref

from nbdvde.engine.image import Image

if TYPE_CHECKING:
    from nbdvde.replication.replica import Replica

_replicas: "WeakKeyDictionary[Image, ref[Replica]]" = WeakKeyDictionary()
"""Replicas have their images: who held them here would keep both for ever."""


def register(image: Image, replica: "Replica") -> None:
    """An image is replicated from now on, until it is closed."""
    _replicas[image] = ref(replica)
    image.regions.alone = False


def replica_of(image: Image) -> "Replica | None":
    """What replicates an image, if anything does."""
    found = _replicas.get(image)
    return None if found is None else found()
