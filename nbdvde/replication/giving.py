"""What a node tells others that have to catch up."""

from collections.abc import Awaitable, Callable

import msgspec
import zstandard

from nbdvde import workers
from nbdvde.disk import BLOCK
from nbdvde.engine.image import Image
from nbdvde.errors import NetworkError, RefusedError
from nbdvde.replication.compare import Hasher, chunks_of, read_chunk
from nbdvde.replication.notes import Note
from nbdvde.replication.questions import (
    CHUNKS_ASKED,
    AskBlocks,
    AskChunks,
    AskCompared,
    AskData,
    AskRest,
    AskState,
    AskWatch,
    DiskState,
    ImageState,
    Question,
    SnapshotState,
)
from nbdvde.replication.regioncopy import RegionGiver, found, regions_of


class Giver:
    """Answers those who have to catch up."""

    def __init__(
        self, image: Image, key: bytes, notes: Callable[[], list[Note]],
        compared: Callable[[str, int], Awaitable[bytes]], changing: Callable[[], int] = lambda: 0,
    ) -> None:  # fmt: skip
        self._image, self._hasher, self._notes, self._compared = image, Hasher(key), notes, compared
        self._changing = changing
        """Odd while something changes the catalogue, another number each time."""
        self._regions = RegionGiver(image)

    async def answer(self, question: bytes) -> bytes:
        """Answer a question. Raises NbdvdeError."""
        try:
            asked: Question = msgspec.msgpack.decode(question, type=Question)
        except msgspec.MsgspecError as error:
            raise NetworkError("catching up", f"a question is malformed: {error}") from None
        match asked:
            case AskState():
                if any(note.incomplete for note in self._notes()):
                    raise RefusedError(self._image.path, "is itself taking over a state", "ask another node")
                if self._changing() % 2:
                    raise RefusedError(self._image.path, "is changing its disks just now", "ask again")
                return msgspec.msgpack.encode(await self._state())
            case AskChunks(label=label, first=first, count=count):
                disk = await found(self._image, label)
                stop = min(first + min(count, CHUNKS_ASKED), chunks_of(disk.size))
                return b"".join([await self._hasher.chunk(disk, number) for number in range(first, stop)])
            case AskBlocks(label=label, chunk=chunk):
                return await self._hasher.blocks(await found(self._image, label), chunk)
            case AskData(label=label, chunk=chunk, blocks=blocks):
                data = await read_chunk(await found(self._image, label), chunk)
                return await workers.run(_packed, data, blocks)
            case AskWatch(disk=disk):
                return msgspec.msgpack.encode(await self._regions.watch(disk))
            case AskRest(watch=watch):
                return msgspec.msgpack.encode(await self._regions.rest(watch))
            case AskCompared(group=group, index=index):
                return await self._compared(group, index)

    async def _state(self) -> ImageState:
        notes, changing, volumes = self._notes(), self._changing(), self._image.volumes
        disks = []
        for disk in list(volumes.disks):
            snapshots = [SnapshotState(m.name, m.size, m.created_ns) for m in volumes.snapshots(disk)]
            disks.append(DiskState(disk.name, disk.size, snapshots, await regions_of(self._image, disk)))
        return ImageState(notes, disks, changing)


def _packed(data: bytes, blocks: bytes) -> bytes:
    chosen = b"".join(data[block * BLOCK : (block + 1) * BLOCK] for block in blocks)
    return zstandard.ZstdCompressor(level=1).compress(chosen)
