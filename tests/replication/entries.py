"""Entries of a group as its leader makes them, and an image that applies them."""

import random
from collections.abc import Mapping, Sequence

import trio

from nbdvde.admin.replicated import executing
from nbdvde.engine.image import Image
from nbdvde.raft.messages import Entry, EntryKind, Members, Snapshot
from nbdvde.replication.assembly import Assembly, Fetch, Listener
from nbdvde.replication.machine import ImageMachine
from nbdvde.replication.notes import Identity, Note, Notes, Place
from nbdvde.replication.operations import Operation
from nbdvde.replication.sealing import Sealer

CLUSTER = Identity(b"c" * 16, 1, b"k" * 32)
MEMBERS = Members(frozenset({1, 2, 3}))
GROUP = "default"


class Author:
    """Makes entries, one behind the other."""

    def __init__(self, group: str = GROUP, index: int = 0) -> None:
        self._group, self.index = group, index
        self._sealer = Sealer(CLUSTER.key, random.Random(repr((1, group))).randbytes)

    def entry(self, operation: Operation) -> Entry:
        """The next one."""
        self.index += 1
        return Entry(1, self.index, EntryKind.NORMAL, self._sealer.seal(self._group, operation))

    def entries(self, operations: Sequence[Operation]) -> list[Entry]:
        """The next ones."""
        return [self.entry(operation) for operation in operations]


class Heard:
    """What a machine told."""

    def __init__(self) -> None:
        self.attachments: list[tuple[str, int, int]] = []
        self.nodes: dict[int, Place] = {}
        self.arrangements = self.steps_back = 0

    async def step_back(self) -> None:
        await trio.lowlevel.checkpoint()
        self.steps_back += 1

    def arranged(self) -> None:
        self.arrangements += 1

    def attached(self, disk: str, epoch: int, node: int) -> None:
        self.attachments.append((disk, epoch, node))

    def placed(self, nodes: Mapping[int, Place]) -> None:
        self.nodes = dict(nodes)


async def machine_of(image: Image, heard: Heard | None = None, fetch: Fetch | None = None) -> ImageMachine:
    """The machine of `default`; the image belongs to a cluster, or does from now on."""
    machine = (await assembly_of(image, heard, fetch)).machines[GROUP]
    assert isinstance(machine, ImageMachine)
    return machine


async def assembly_of(image: Image, heard: Listener | None = None, fetch: Fetch | None = None) -> Assembly:
    """Its groups."""
    notes = await Notes.load(image)
    if notes is None:
        await Notes.make(image, CLUSTER)
        notes = await Notes.load(image)
    assert notes is not None

    async def nothing(*_: object) -> Mapping[str, Note]:
        raise AssertionError("nothing is to be fetched")

    heard = Heard() if heard is None else heard
    sealer = Sealer(CLUSTER.key, random.Random(2).randbytes)
    start = {GROUP: Note(GROUP, Snapshot(0, 0, MEMBERS))}
    assembly = Assembly(image, notes, sealer, heard, fetch or nothing)
    assembly.open(notes.found or start, executing(image))
    return assembly
