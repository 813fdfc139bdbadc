"""Images as machines have them in the beginning."""

from functools import cache

import trio

from nbdvde.engine.access import format_storage, open_storage
from nbdvde.raft.messages import Members, NodeId, Snapshot
from nbdvde.replication import membership
from nbdvde.replication.assembly import DEFAULT
from nbdvde.replication.notes import Identity, Note, Notes, Place
from nbdvde.replication.ticket import Ticket
from tests.crash.recording import RecordingStorage
from tests.crash.session import KEY
from tests.sim.stack.clock import Clock
from tests.sim.stack.history import BLOCK
from tests.sim.stack.life import machine_of
from tests.sim.stack.universe import SEGMENT_BYTES, deterministic

FIRST = (1, 2, 3)
SIZE = 640
"""Blocks of a disk."""
CLUSTER, CLUSTER_KEY = b"c" * 16, b"k" * 32


def place_of(node: NodeId) -> Place:
    """Where a node is."""
    return Place(f"{machine_of(node)}:7000", machine_of(node))


@cache
def blank(node: NodeId) -> bytes:
    """A new image; of the nodes that there are from the beginning, one of the cluster."""
    storage = RecordingStorage()
    with deterministic(node):
        trio.run(_make, storage, node, clock=Clock())
    return bytes(storage.image)


async def _make(storage: RecordingStorage, node: NodeId) -> None:
    format_storage(storage, SIZE * BLOCK, KEY, segment_bytes=SEGMENT_BYTES)
    if node in FIRST:
        image = await open_storage(storage, KEY)
        await Notes.make(image, Identity(CLUSTER, node, CLUSTER_KEY))
        notes = await Notes.load(image)
        assert notes
        start = Snapshot(1, 0, Members(frozenset(FIRST)))
        note = Note(DEFAULT, start, {}, {node: place_of(node) for node in FIRST})
        await notes.put(lambda: [note])
        await image.close()


async def joined(ticket: Ticket) -> bytes:
    """A new image that joins a cluster."""
    storage = RecordingStorage(blank(0))
    image = await open_storage(storage, KEY)
    await membership.join(image, ticket)
    await image.close()
    return bytes(storage.image)
