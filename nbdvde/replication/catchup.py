"""Making an image what that of another node is: what differs is found by hashes, and only that travels.

The other node goes on meanwhile. What it is asked first is up to which entry it has applied; what it tells of blocks
afterwards may be newer. That does no harm: the entries from there on are applied to what was copied, and nobody reads
before that. Only a change of the catalogue in between would; then the whole begins again, and finds little to do.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

import msgspec
import zstandard

from nbdvde import workers
from nbdvde.disk import BLOCK, Disk
from nbdvde.engine.catalogue import SEPARATOR
from nbdvde.engine.image import Image
from nbdvde.errors import DamageError, NetworkError, RefusedError
from nbdvde.replication.compare import (
    CHUNK,
    HASH_BYTES,
    NOTHING,
    Hasher,
    chunks_of,
    is_stored,
    length_of,
    read_chunk,
)
from nbdvde.replication.notes import Note

_log = logging.getLogger(__name__)
_CHUNKS = 256
"""Whose hashes are asked for at a time."""
_TRIES = 8
"""When the catalogue changes all the time."""


class SnapshotState(msgspec.Struct, frozen=True, array_like=True):
    """A snapshot of a disk."""

    name: str
    size: int
    created_ns: int


class DiskState(msgspec.Struct, frozen=True, array_like=True):
    """A disk, and its snapshots from the oldest on."""

    name: str
    size: int
    snapshots: list[SnapshotState]


class ImageState(msgspec.Struct, frozen=True, array_like=True):
    """How far an image is, and what there is in it."""

    note: Note
    disks: list[DiskState]


class AskChunks(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Hashes of chunks of a disk or snapshot."""

    label: str
    first: int
    count: int


class AskBlocks(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Hashes of the blocks of a chunk."""

    label: str
    chunk: int


class AskData(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """What some blocks of a chunk hold, compressed."""

    label: str
    chunk: int
    blocks: bytes
    """Numbers within the chunk, a byte each."""


class AskState(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """The `ImageState`."""

    group: str


class AskCompared(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """What the node found when it applied an entry that compares."""

    index: int


Question: TypeAlias = AskChunks | AskBlocks | AskData | AskState | AskCompared
Ask: TypeAlias = Callable[[bytes], Awaitable[bytes]]


class Giver:
    """Answers those who have to catch up."""

    def __init__(
        self, image: Image, key: bytes, note: Callable[[str], Note], compared: Callable[[int], Awaitable[bytes]]
    ) -> None:
        self._image, self._hasher, self._note, self._compared = image, Hasher(key), note, compared

    async def answer(self, question: bytes) -> bytes:
        """Answer a question. Raises NbdvdeError."""
        try:
            asked: Question = msgspec.msgpack.decode(question, type=Question)
        except msgspec.MsgspecError as error:
            raise NetworkError("catching up", f"a question is malformed: {error}") from None
        match asked:
            case AskState(group=group):
                if self._note(group).incomplete:
                    raise RefusedError(self._image.path, "is itself taking over a state", "ask another node")
                return msgspec.msgpack.encode(self._state(group))
            case AskChunks(label=label, first=first, count=count):
                disk = self._image.disk(label)
                stop = min(first + min(count, _CHUNKS), chunks_of(disk.size))
                return b"".join([await self._hasher.chunk(disk, number) for number in range(first, stop)])
            case AskBlocks(label=label, chunk=chunk):
                return await self._hasher.blocks(self._image.disk(label), chunk)
            case AskData(label=label, chunk=chunk, blocks=blocks):
                data = await read_chunk(self._image.disk(label), chunk)
                return await workers.run(_packed, data, blocks)
            case AskCompared(index=index):
                return await self._compared(index)

    def _state(self, group: str) -> ImageState:
        volumes = self._image.volumes
        disks = [
            DiskState(d.name, d.size, [SnapshotState(m.name, m.size, m.created_ns) for m in volumes.snapshots(d)])
            for d in volumes.disks
        ]
        return ImageState(self._note(group), disks)


def unpacked(answer: bytes) -> bytes:
    """What answers `AskData`. Raises DamageError."""
    try:
        return zstandard.ZstdDecompressor().decompress(answer, max_output_size=CHUNK)
    except zstandard.ZstdError as error:
        raise DamageError("catching up", f"an answer is malformed: {error}") from None


def _packed(data: bytes, blocks: bytes) -> bytes:
    chosen = b"".join(data[block * BLOCK : (block + 1) * BLOCK] for block in blocks)
    return zstandard.ZstdCompressor(level=1).compress(chosen)


class Taker:
    """Catches up from one other node."""

    def __init__(self, image: Image, key: bytes, group: str, ask: Ask) -> None:
        self._image, self._hasher, self._group, self._ask_raw = image, Hasher(key), group, ask
        self.received = 0
        """Bytes of answers."""
        self.compared = self.copied = 0
        """Blocks."""

    async def run(self) -> Note:
        """Take over everything; answers how far the image is then. Raises NbdvdeError; nothing may be read then."""
        for _ in range(_TRIES):
            state = await self._state()
            await self._take(state)
            if (await self._state()).disks == state.disks:
                return state.note
        raise NetworkError("catching up", "disks or snapshots change all the time", "it is tried again")

    async def _state(self) -> ImageState:
        return msgspec.msgpack.decode(await self._ask(AskState(self._group)), type=ImageState)

    async def _ask(self, question: Question) -> bytes:
        answer = await self._ask_raw(msgspec.msgpack.encode(question))
        self.received += len(answer)
        return answer

    async def _take(self, state: ImageState) -> None:
        """Have the same disks with the same snapshots, and in them the same."""
        volumes = self._image.volumes
        for disk in state.disks:
            if volumes.find(disk.name) is None:
                await volumes.create(disk.name, disk.size)
            await self._take_disk(disk)
        wanted = {disk.name for disk in state.disks}
        for gone in [disk for disk in volumes.disks if disk.name not in wanted]:
            for snapshot in list(volumes.snapshots(gone)):
                await volumes.delete(f"{gone.name}{SEPARATOR}{snapshot.name}")
            await volumes.delete(gone.name)

    async def _take_disk(self, wanted: DiskState) -> None:
        volumes = self._image.volumes
        disk = volumes.get(wanted.name)
        there = {SnapshotState(m.name, m.size, m.created_ns) for m in volumes.snapshots(disk)}
        for gone in there - set(wanted.snapshots):
            await volumes.delete(f"{disk.name}{SEPARATOR}{gone.name}")
        for snapshot in wanted.snapshots:
            if snapshot not in there:
                label = f"{disk.name}{SEPARATOR}{snapshot.name}"
                await self._fill(disk, label, snapshot.size)
                await volumes.snapshot(disk.name, snapshot.name, created_ns=snapshot.created_ns)
        await self._fill(disk, disk.name, wanted.size)

    async def _fill(self, disk: Disk, label: str, size: int) -> None:
        """Have a disk hold what another one, or a snapshot, holds on the other node."""
        if disk.size != size:
            await self._image.volumes.resize(disk.name, size, discard=True)
        for first in range(0, chunks_of(size), _CHUNKS):
            hashes = await self._ask(AskChunks(label, first, _CHUNKS))
            for at in range(0, len(hashes), HASH_BYTES):
                await self._fill_chunk(disk, label, first + at // HASH_BYTES, hashes[at : at + HASH_BYTES])

    async def _fill_chunk(self, disk: Disk, label: str, number: int, wanted: bytes) -> None:
        start, length = number * CHUNK, length_of(disk, number)
        stored = await is_stored(disk, number)
        if wanted == NOTHING:
            if stored:
                await disk.trim(start, min(CHUNK, disk.size - start))
        elif not stored:
            await self._copy(disk, label, number, bytes(range(length // BLOCK)))
        elif await self._hasher.chunk(disk, number) != wanted:
            self.compared += length // BLOCK
            theirs = await self._ask(AskBlocks(label, number))
            ours = await self._hasher.blocks(disk, number)
            await self._copy(disk, label, number, _differing(ours, theirs))

    async def _copy(self, disk: Disk, label: str, number: int, blocks: bytes) -> None:
        """Copy some blocks of a chunk; those that are zero become holes."""
        packed = await self._ask(AskData(label, number, blocks))
        data = unpacked(packed)
        self.copied += len(blocks)
        for at, stop in _runs(blocks):
            offset = number * CHUNK + blocks[at] * BLOCK
            piece = memoryview(data)[at * BLOCK : stop * BLOCK][: disk.size - offset]
            if piece.nbytes and bytes(piece).count(0) == piece.nbytes:
                await disk.trim(offset, piece.nbytes)
            elif piece.nbytes:
                await disk.write(offset, piece, owned=True)


def _differing(ours: bytes, theirs: bytes) -> bytes:
    pairs = zip(range(0, len(theirs), HASH_BYTES), range(len(theirs) // HASH_BYTES), strict=True)
    return bytes(block for at, block in pairs if ours[at : at + HASH_BYTES] != theirs[at : at + HASH_BYTES])


def _runs(blocks: bytes) -> Sequence[tuple[int, int]]:
    """(start, stop) within `blocks` of numbers that follow each other."""
    runs: list[tuple[int, int]] = []
    start = 0
    for at in range(1, len(blocks) + 1):
        if at == len(blocks) or blocks[at] != blocks[at - 1] + 1:
            runs.append((start, at))
            start = at
    return runs
