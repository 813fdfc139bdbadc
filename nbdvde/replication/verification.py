"""`cluster verify`: compare all replicas, chunk by chunk, and mend what one of them holds differently."""

from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import msgspec

from nbdvde.errors import DetachedError, NbdvdeError, RefusedError
from nbdvde.raft.messages import NodeId
from nbdvde.replication.assembly import DEFAULT
from nbdvde.replication.compare import HASH_BYTES, chunks_of, read_chunk
from nbdvde.replication.comparison import CHUNKS, UNREADABLE
from nbdvde.replication.operations import Compare, Repair
from nbdvde.replication.regioncopy import directory_of, found, labels_of

if TYPE_CHECKING:
    from nbdvde.replication.replica import Replica

_TRIES = 3


class Difference(msgspec.Struct, frozen=True):
    """A chunk that is not the same everywhere."""

    disk: str
    offset: int
    nodes: list[NodeId]
    """Those that hold something else than most."""
    repaired: bool


class Verified(msgspec.Struct, frozen=True):
    """So much was compared."""

    disk: str
    done: int
    """Bytes of the disk."""
    size: int
    nodes: list[NodeId]
    """On which nodes."""
    differences: list[Difference] = []


async def verify(replica: "Replica", *, repair: bool, chunks: int = CHUNKS) -> AsyncGenerator[Verified, None]:
    """Compare every disk of all nodes that can be reached, and its regions; a line for every so many chunks.

    Regions are not mended where their directories differ: such a node has made changes that the others have not, and
    has to join anew. Raises NbdvdeError.
    """
    image, strange = replica.image, set[str]()
    for name in [label for disk in list(image.volumes.disks) for label in await labels_of(image, disk)]:
        size = (await found(image, name)).size
        for first in range(0, chunks_of(size), chunks):
            group, index, told = await _compared(replica, name, first, chunks)
            mend = repair and directory_of(name) not in {name, *strange}
            differences = [
                await _settled(replica, group, index, name, first + at, hashes, repair=mend)
                for at, hashes in enumerate(_by_chunk(told))
                if len(set(hashes.values())) > 1 or UNREADABLE in hashes.values()
            ]
            if differences and directory_of(name) == name:
                strange.add(name)
            done = min((first + chunks) << 20, size)
            yield Verified(name, done, size, sorted(told), differences)


async def _compared(replica: "Replica", disk: str, first: int, count: int) -> tuple[str, int, Mapping[NodeId, bytes]]:
    """(group, index, hashes by node)."""
    is_region = replica.image.volumes.find(disk) is None
    for _ in range(_TRIES):
        routing = replica.assembly.routing
        lane = await replica.lane(DEFAULT if is_region else routing.at(disk, first << 20))
        try:
            index, _ = cast(tuple[int, bytes], await lane.propose(Compare(disk, first, count, routing.version)))
        except DetachedError:  # it is harmless to do it twice
            continue
        return lane.name, index, await replica.compared(lane.name, index)
    raise RefusedError("cluster", "changes its leader all the time", "try again")


def _by_chunk(found: Mapping[NodeId, bytes]) -> Sequence[Mapping[NodeId, bytes]]:
    """Hashes by node, of each chunk; all nodes compared as many, or they would have different disks."""
    count = max(map(len, found.values())) // HASH_BYTES
    places = [slice(at * HASH_BYTES, (at + 1) * HASH_BYTES) for at in range(count)]
    return [{node: hashes[place] for node, hashes in found.items()} for place in places]


async def _settled(
    replica: "Replica", group: str, index: int, disk: str, chunk: int, hashes: Mapping[NodeId, bytes], *, repair: bool
) -> Difference:
    """A difference, mended if most nodes agree."""
    (most, count), *_ = Counter(found for found in hashes.values() if found != UNREADABLE).most_common() or [(b"", 0)]
    wrong = [node for node, found in hashes.items() if found != most]
    repaired = False
    if repair and 2 * count > len(hashes):
        sound = next(node for node, found in hashes.items() if found == most)
        try:
            data = await _data(replica, sound, disk, chunk)
            lane = await replica.lane(group)
            repaired = bool(await lane.propose(Repair(disk, index, chunk, data), growth=len(data)))
        except NbdvdeError:
            repaired = False
    return Difference(disk, chunk << 20, wrong, repaired)


async def _data(replica: "Replica", node: NodeId, disk: str, chunk: int) -> bytes:
    if node == replica.node.number:
        return await read_chunk(await found(replica.image, disk), chunk)
    return await replica.chunk_of(node, disk, chunk)
