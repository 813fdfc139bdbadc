"""Images and what replicates them."""

import gc
from types import SimpleNamespace
from typing import Any
from weakref import ref

from nbdvde.replication.registry import register, replica_of


class Image:
    def __init__(self) -> None:
        self.regions = SimpleNamespace(alone=True)


class Replica:
    def __init__(self, image: Image) -> None:
        self.image = image


def test_an_image_that_is_closed_does_not_stay_in_memory() -> None:
    image: Any = Image()
    replica: Any = Replica(image)
    register(image, replica)
    assert replica_of(image) is replica
    left = ref(image), ref(replica)
    del image, replica
    gc.collect()
    assert [found() for found in left] == [None, None]
