"""Making an image part of a cluster: the first of a new one, or one more."""

import os

from nbdvde.engine.image import Image
from nbdvde.errors import RefusedError
from nbdvde.raft.messages import Members, Snapshot
from nbdvde.replication.notes import Identity, Note, Notes, Place
from nbdvde.replication.replica import GROUP
from nbdvde.replication.sealing import KEY_BYTES
from nbdvde.replication.ticket import Ticket

_FIRST = 1


async def found(image: Image, place: Place) -> Identity:
    """Make a cluster of one node with what the image holds. Raises RefusedError, NbdvdeError."""
    identity = Identity(os.urandom(16), _FIRST, os.urandom(KEY_BYTES))
    await _belong(image, identity, Note(GROUP, Snapshot(0, 0, Members(frozenset({_FIRST}))), {}, {_FIRST: place}))
    return identity


async def join(image: Image, ticket: Ticket) -> Identity:
    """Let the image become what those of a cluster are. Raises RefusedError when it holds anything, NbdvdeError."""
    if any(disk.map.mapped for disk in image.volumes.disks):
        raise RefusedError(image.path, "holds data, which would be replaced", "make a new image for the cluster")
    await _belong(image, ticket.identity, Note(GROUP, Snapshot(), {}, ticket.nodes))
    return ticket.identity


async def refuse_if_member(image: Image) -> None:
    """Raise RefusedError for an image of a cluster that is to be changed without it."""
    if not image.read_only and await Notes.load(image) is not None:
        raise RefusedError(image.path, "belongs to a cluster", "serve it with a [cluster] table and ask the server")


async def _belong(image: Image, identity: Identity, note: Note) -> None:
    await Notes.make(image, identity)
    notes = await Notes.load(image)
    assert notes is not None, "they were made just now"
    await notes.put(note)
    await image.flush()
