"""Entries of a group as its leader makes them, and an image that applies them."""

import random
from collections.abc import Mapping, Sequence

from nbdvde.admin.replicated import executing
from nbdvde.engine.image import Image
from nbdvde.raft.messages import Entry, EntryKind, Members, Snapshot
from nbdvde.replication.machine import Fetch, ImageMachine
from nbdvde.replication.notes import Identity, Note, Notes, Place
from nbdvde.replication.operations import Operation
from nbdvde.replication.sealing import Sealer

CLUSTER = Identity(b"c" * 16, 1, b"k" * 32)
MEMBERS = Members(frozenset({1, 2, 3}))
GROUP = "default"


class Author:
    """Makes entries, one behind the other."""

    def __init__(self) -> None:
        self._sealer = Sealer(CLUSTER.key, random.Random(1).randbytes)
        self.index = 0

    def entry(self, operation: Operation) -> Entry:
        """The next one."""
        self.index += 1
        return Entry(1, self.index, EntryKind.NORMAL, self._sealer.seal(GROUP, operation))

    def entries(self, operations: Sequence[Operation]) -> list[Entry]:
        """The next ones."""
        return [self.entry(operation) for operation in operations]


class Heard:
    """What a machine told."""

    def __init__(self) -> None:
        self.attachments: list[tuple[str, int, int]] = []
        self.nodes: dict[int, Place] = {}

    def attached(self, disk: str, epoch: int, node: int) -> None:
        self.attachments.append((disk, epoch, node))

    def placed(self, nodes: Mapping[int, Place]) -> None:
        self.nodes = dict(nodes)


async def machine_of(image: Image, heard: Heard | None = None, fetch: Fetch | None = None) -> ImageMachine:
    """The machine of the only group; the image belongs to a cluster, or does from now on."""
    notes = await Notes.load(image)
    if notes is None:
        await Notes.make(image, CLUSTER)
        notes = await Notes.load(image)
    assert notes is not None

    async def nothing(*_: object) -> Note:
        raise AssertionError("nothing is to be fetched")

    heard = Heard() if heard is None else heard
    sealer = Sealer(CLUSTER.key, random.Random(2).randbytes)
    start = Note(GROUP, Snapshot(0, 0, MEMBERS))
    return ImageMachine(
        image, notes, GROUP, sealer, start, execute=executing(image), fetch=fetch or nothing, listener=heard
    )
