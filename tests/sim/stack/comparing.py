"""What the images of all machines hold and note when a run comes to its end: it has to be the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import trio

from nbdvde.engine.catalogue import SEPARATOR
from nbdvde.engine.image import Image
from nbdvde.engine.managed.stream import Stream
from nbdvde.engine.managed.worm import Worm
from nbdvde.engine.volume import Volume
from nbdvde.replication.compare import joined
from nbdvde.replication.replica import Replica
from tests.sim.stack.history import BLOCK, Violation
from tests.sim.stack.life import ELECTION_S, Life
from tests.sim.stack.users import USED, contents_of

Contents = Mapping[str, Mapping[int, int]]
"""What blocks of disks and snapshots hold."""


@dataclass(frozen=True)
class Found:
    """On one machine."""

    name: str
    notes: Mapping[str, Any]
    catalogue: Sequence[tuple[str, int, int]]
    """(name, size, time) of all disks and snapshots."""
    contents: Contents
    regions: Sequence[Any]
    """All that those of the disks say."""


async def settled(lives: Sequence[Life]) -> Sequence[Found]:
    """What all machines hold as soon as nothing changes any more."""
    while True:
        replicas = [life.replica for life in lives]
        if all(map(_is_settled, replicas)) and len({_positions(replica) for replica in replicas}) == 1:
            before = [_notes(replica) for replica in replicas]
            found = [await _found(life, notes) for life, notes in zip(lives, before, strict=True)]
            if before == [_notes(replica) for replica in replicas]:
                return found
        await trio.sleep(ELECTION_S)


def compare(found: Sequence[Found]) -> Contents:
    """What all hold. Raises Violation."""
    first, *others = found
    for other in others:
        for what in ("notes", "catalogue", "contents", "regions"):
            if getattr(other, what) != getattr(first, what):
                raise Violation(f"{other.name} {what}: {getattr(other, what)}, {first.name}: {getattr(first, what)}")
    return first.contents


def _positions(replica: Replica) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((name, machine.applied.index) for name, machine in replica.assembly.machines.items()))


def _is_settled(replica: Replica) -> bool:
    """Whether everything is applied, and no group waits for its end or for others."""
    assembly, lanes = replica.assembly, replica.lanes
    ends = {name: lane.group.core.log.last_index for name, lane in lanes.items()}
    return ends == dict(_positions(replica)) and not assembly.idle and not assembly.holding


def _notes(replica: Replica) -> Mapping[str, Any]:
    assembly = replica.assembly
    groups = {note.group: (note.applied, note.epochs) for note in assembly.all()}
    return {**groups, "nodes": replica.machine.nodes, "table": assembly.routing.table, "settled": assembly.settled}


async def _found(life: Life, notes: Mapping[str, Any]) -> Found:
    async def look(replica: Replica) -> Found:
        image = replica.image
        catalogue = _catalogue(image)
        contents = {label: await _content(image, label) for label, _, _ in catalogue}
        regions = [await _regions(image, disk) for disk in image.volumes.disks]
        return Found(life.name, notes, catalogue, contents, sorted(regions, key=lambda told: told[0]))

    return await life.ask(look)


def _catalogue(image: Image) -> Sequence[tuple[str, int, int]]:
    volumes = image.volumes
    catalogue = [(disk.name, disk.size, 0) for disk in volumes.disks]
    catalogue += [
        (f"{disk.name}{SEPARATOR}{snapshot.name}", snapshot.size, snapshot.created_ns)
        for disk in volumes.disks
        for snapshot in volumes.snapshots(disk)
    ]
    return sorted(catalogue)


async def _content(image: Image, label: str) -> Mapping[int, int]:
    volume = image.disk(label)
    blocks = [block for block in USED if block < volume.size // BLOCK]
    return contents_of({block: joined(await volume.read(block * BLOCK, BLOCK)) for block in blocks})


async def _regions(image: Image, disk: Volume) -> tuple[Any, ...]:
    area = await image.regions.area(disk)
    found: list[Any] = [disk.name, area.directory.slots]
    if area.find(Stream.FORM):
        stream = await image.regions.get(Stream, disk)
        found += [stream.ring, await stream.read(0)]
    if area.find(Worm.FORM):
        worm = await image.regions.get(Worm, disk)
        records = await worm.records()
        found += [worm.header, records, [await worm.content(record) for record in records]]
    return tuple(found)
