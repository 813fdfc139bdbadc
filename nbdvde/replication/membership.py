"""Making an image part of a cluster: the first of a new one, or one more."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec

from nbdvde import workers
from nbdvde.engine.image import Image
from nbdvde.engine.regions.anon import FORM as ANONYMISATION
from nbdvde.errors import DamageError, RefusedError
from nbdvde.raft.directory import DiskDirectory
from nbdvde.raft.filelog import FileLog
from nbdvde.raft.messages import Entry, EntryKind, HardState, Members, NodeId, Snapshot
from nbdvde.raft.store import LogStore
from nbdvde.replication.assembly import DEFAULT
from nbdvde.replication.notes import Identity, Note, Notes, Place
from nbdvde.replication.sealing import KEY_BYTES
from nbdvde.replication.ticket import Ticket

_FIRST = 1
_WHAT_WAS_THERE = Snapshot(1, 0, Members(frozenset({_FIRST})))
"""What the image holds stands for an entry that no log has: who joins has to take over that state."""


async def found(image: Image, place: Place) -> Identity:
    """Make a cluster of one node with what the image holds. Raises RefusedError, NbdvdeError."""
    await _refuse_subjects(image)
    identity = Identity(os.urandom(16), _FIRST, os.urandom(KEY_BYTES), image.superblock.uuid)
    await _belong(image, identity, Note(DEFAULT, _WHAT_WAS_THERE, {}, {_FIRST: place}))
    return identity


async def join(image: Image, ticket: Ticket) -> Identity:
    """Let the image become what those of a cluster are. Raises RefusedError when it holds anything, NbdvdeError."""
    if any(disk.map.mapped for disk in image.volumes.disks):
        raise RefusedError(image.path, "holds data, which would be replaced", "make a new image for the cluster")
    await _refuse_subjects(image)
    await _belong(image, ticket.identity, Note(DEFAULT, Snapshot(), {}, ticket.nodes))
    return ticket.identity


async def _refuse_subjects(image: Image) -> None:
    """Values and keys of subjects would stay in logs when they are erased."""
    for disk in image.volumes.disks:
        if (await image.regions.area(disk)).find(ANONYMISATION):
            why = "has an anonymisation table, which cannot be replicated"
            raise RefusedError(f"disk {disk.name}", why, "leave that disk in an image of its own")


async def recover(image: Image, directory: Path) -> Identity:
    """Make a cluster of one node of what is left when a majority is lost for good; `directory` has its log.

    Everything in the log counts as committed, up to what is damaged in it. It is another cluster then: the others can
    never come back to it. Raises RefusedError, DamageError, NbdvdeError.
    """
    notes = await Notes.load(image)
    if notes is None:
        raise RefusedError(image.path, "belongs to no cluster", "see nbdvde cluster init")
    if any(note.incomplete for note in notes.found.values()):
        raise RefusedError(image.path, "was becoming what another node's is", "recover another node of the cluster")
    await workers.run(_check_logs, directory, list(notes.found.values()))
    identity = msgspec.structs.replace(notes.identity, cluster=os.urandom(16))
    await notes.rename(identity)  # first: alone it must never lead those who may be left
    await image.flush()
    await workers.run(_stand_alone, directory, notes.identity.node, list(notes.found.values()))
    return identity


def _check_logs(directory: Path, notes: Sequence[Note]) -> None:
    """Raise DamageError unless there are the logs of what a node has taken part in."""
    names: Collection[str] = ()
    if any(directory.glob("*.log")):  # or one would begin there
        log = FileLog(DiskDirectory(directory))
        names = log.groups()
        log.close()
    for note in notes:
        if note.begun and note.group not in names:
            raise DamageError(str(directory), f"there is no log of group {note.group}", "give the right --directory")


def _stand_alone(directory: Path, node: NodeId, notes: Sequence[Note]) -> None:
    """Have the log of a node say that it is the only member, and everything committed, from what the image has on."""
    log = FileLog(DiskDirectory(directory))
    try:
        for note in notes:
            _take_alone(log.group(note.group) or log.create(note.group, note.applied), node, note.applied)
        while work := log.take():
            work()
    finally:
        log.close()


def _take_alone(store: LogStore, node: NodeId, applied: Snapshot) -> None:
    if not store.snapshot.index <= applied.index <= store.last_index or store.term(applied.index) != applied.term:
        store.reset(applied)
    elif store.snapshot.index < applied.index:
        store.compact_to(applied)
    if store.damaged:
        store.truncate_from(store.damaged[0].start)
    term, index = max(store.hard.term, store.last_term) + 1, store.last_index + 1
    store.append([Entry(term, index, EntryKind.MEMBERS, Members(frozenset({node})).pack())])
    hard = HardState(term, 0, index)
    store.settle(hard) if store.unsure else store.save(hard)


async def _belong(image: Image, identity: Identity, note: Note) -> None:
    await Notes.make(image, identity)
    notes = await Notes.load(image)
    assert notes is not None, "they were made just now"
    await notes.put(lambda: [note])
    await image.flush()
