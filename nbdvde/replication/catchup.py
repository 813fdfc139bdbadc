"""Making an image what that of another node is: what differs is found by hashes, and only that travels.

The other node goes on meanwhile. What it is asked first is up to which entry it has applied; what it tells of blocks
afterwards may be newer. That does no harm: the entries from there on are applied to what was copied, and nobody reads
before that. Only a change of the catalogue in between would; then the whole begins again, and finds little to do.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext

import msgspec
import trio
import zstandard

from nbdvde.disk import BLOCK, Disk
from nbdvde.engine.catalogue import SEPARATOR
from nbdvde.engine.image import Image
from nbdvde.engine.managed.exported import load_exported
from nbdvde.engine.pace import Pace
from nbdvde.engine.volume import Volume
from nbdvde.errors import DamageError, NetworkError
from nbdvde.replication.compare import CHUNK, HASH_BYTES, NOTHING, Hasher, chunks_of, is_stored, length_of
from nbdvde.replication.notes import Note
from nbdvde.replication.questions import (
    CHUNKS_ASKED,
    Ask,
    AskBlocks,
    AskChunks,
    AskData,
    AskState,
    DiskState,
    ImageState,
    Question,
    SnapshotState,
)
from nbdvde.replication.regiontaker import RegionTaker

_TRIES = 8
"""When the catalogue changes all the time."""
_TOGETHER = 8
"""Parts of a disk that are compared and copied at a time: who answers need not wait for who asks, nor the other way."""


def unpacked(answer: bytes) -> bytes:
    """What answers `AskData`. Raises DamageError."""
    try:
        return zstandard.ZstdDecompressor().decompress(answer, max_output_size=CHUNK)
    except zstandard.ZstdError as error:
        raise DamageError("catching up", f"an answer is malformed: {error}") from None


class Taker:
    """Catches up from one other node."""

    def __init__(self, image: Image, key: bytes, ask: Ask, *, rate: int | None = None) -> None:
        """Takes `rate` bytes a second at most."""
        self._image, self._hasher, self._ask_raw = image, Hasher(key), ask
        self._pace = Pace(rate)
        self.received = 0
        """Bytes of answers."""
        self.compared = self.copied = 0
        """Blocks."""

    async def run(self, have: Mapping[str, int], begin: Callable[[], Awaitable[None]]) -> Mapping[str, Note]:
        """Take over everything; answers how far the image is then, by group.

        `have` are indexes, by group, that the other node must have applied; `begin` comes before anything is changed.
        Raises NbdvdeError; nothing may be read then, unless it was before `begin`.
        """
        volumes = self._image.volumes
        async with self._unguarded():
            for _ in range(_TRIES):
                state = await self._state()
                notes = {note.group: note for note in state.notes}
                if any(name in notes and notes[name].applied.index < index for name, index in have.items()):
                    raise NetworkError("catching up", "the other node is not as far as this one", "it is tried again")
                await begin()
                await self._take(state)
                again = await self._state()
                if (again.disks, again.changing) == (state.disks, state.changing):
                    await load_exported(self._image.path, volumes, self._image.regions)
                    return {name: _ahead(note, again.notes) for name, note in notes.items()}
        raise NetworkError("catching up", "disks or snapshots change all the time", "it is tried again")

    @asynccontextmanager
    async def _unguarded(self) -> AsyncIterator[None]:
        """Whether something may be given up was decided by all when it was."""
        volumes = self._image.volumes
        guard = volumes.guard
        volumes.guard = lambda disk: nullcontext()
        try:
            yield
        finally:
            volumes.guard = guard
            await self._image.regions.forget_deleted()

    async def _state(self) -> ImageState:
        return msgspec.msgpack.decode(await self.ask(AskState()), type=ImageState)

    async def ask(self, question: Question) -> bytes:
        """Have a question answered. Raises NbdvdeError."""
        answer = await self._ask_raw(msgspec.msgpack.encode(question))
        self.received += len(answer)
        await self._pace.spend(len(answer))
        return answer

    async def _take(self, state: ImageState) -> None:
        """Have the same disks with the same snapshots and regions, and in them the same."""
        volumes = self._image.volumes
        for disk in state.disks:
            if volumes.find(disk.name) is None:
                await volumes.create(disk.name, disk.size)
            await self._take_disk(disk)
            await RegionTaker(self._image, self).take(volumes.get(disk.name), disk.regions)
        wanted = {disk.name for disk in state.disks}
        for gone in [disk for disk in volumes.disks if disk.name not in wanted]:
            for snapshot in list(volumes.snapshots(gone)):
                await volumes.delete(f"{gone.name}{SEPARATOR}{snapshot.name}")
            await volumes.delete(gone.name)

    async def _take_disk(self, wanted: DiskState) -> None:
        volumes = self._image.volumes
        disk = volumes.get(wanted.name)
        there = [SnapshotState(m.name, m.size, m.created_ns) for m in volumes.snapshots(disk)]
        for gone in [snapshot for snapshot in there if snapshot not in wanted.snapshots]:
            await volumes.delete(f"{disk.name}{SEPARATOR}{gone.name}")
        for snapshot in wanted.snapshots:
            if snapshot not in there:
                label = f"{disk.name}{SEPARATOR}{snapshot.name}"
                await self._resized(disk, snapshot.size)
                await self.fill(disk, label)
                await volumes.snapshot(disk.name, snapshot.name, created_ns=snapshot.created_ns)
        await self._resized(disk, wanted.size)
        await self.fill(disk, disk.name)

    async def _resized(self, disk: Volume, size: int) -> None:
        if disk.size != size:
            await self._image.volumes.resize(disk.name, size, discard=True)

    async def fill(self, disk: Disk, label: str) -> None:
        """Have a disk hold what another one, or a snapshot, of the same size holds on the other node."""
        chunks = chunks_of(disk.size)
        await self._together(
            disk, label, (range(at, min(at + CHUNKS_ASKED, chunks)) for at in range(0, chunks, CHUNKS_ASKED))
        )

    async def fill_chunks(self, disk: Disk, label: str, chunks: Sequence[int]) -> None:
        """The same for some chunks only."""
        await self._together(disk, label, (range(chunk, chunk + 1) for chunk in chunks))

    async def _together(self, disk: Disk, label: str, parts: Iterable[range]) -> None:
        """Some parts at a time; the first failure ends all."""
        failures: list[Exception] = []
        turns = trio.Semaphore(_TOGETHER)

        async def work(part: range) -> None:
            try:
                await self._fill_part(disk, label, part)
            except Exception as error:  # noqa: BLE001 - whoever waits is told of the first one, not of a group
                failures.append(error)
                nursery.cancel_scope.cancel()
            finally:
                turns.release()

        async with trio.open_nursery() as nursery:
            for part in parts:
                await turns.acquire()
                nursery.start_soon(work, part)
        if failures:
            raise failures[0]

    async def _fill_part(self, disk: Disk, label: str, chunks: range) -> None:
        hashes = await self.ask(AskChunks(label, chunks.start, len(chunks)))
        for number, at in zip(chunks, range(0, len(hashes), HASH_BYTES), strict=False):
            await self._fill_chunk(disk, label, number, hashes[at : at + HASH_BYTES])

    async def _fill_chunk(self, disk: Disk, label: str, number: int, wanted: bytes) -> None:
        start, length = number * CHUNK, length_of(disk, number)
        stored = await is_stored(disk, number)
        if wanted == NOTHING:
            if stored:
                await disk.trim(start, min(CHUNK, disk.size - start))
        elif not stored:
            await self._copy(disk, label, number, bytes(range(length // BLOCK)))
        elif blocks := await self._differing(disk, label, number, wanted):
            await self._copy(disk, label, number, blocks)

    async def _differing(self, disk: Disk, label: str, number: int, wanted: bytes) -> bytes:
        """Blocks of a chunk that are not the same here; all of it if what is here cannot be read."""
        try:
            if await self._hasher.chunk(disk, number) == wanted:
                return b""
            ours = await self._hasher.blocks(disk, number)
        except DamageError:
            return bytes(range(length_of(disk, number) // BLOCK))
        self.compared += len(ours) // HASH_BYTES
        return _differing(ours, await self.ask(AskBlocks(label, number)))

    async def _copy(self, disk: Disk, label: str, number: int, blocks: bytes) -> None:
        """Copy some blocks of a chunk; those that are zero become holes."""
        data = unpacked(await self.ask(AskData(label, number, blocks)))
        self.copied += len(blocks)
        for at, stop in _runs(blocks):
            offset = number * CHUNK + blocks[at] * BLOCK
            piece = memoryview(data)[at * BLOCK : stop * BLOCK][: disk.size - offset]
            if piece.nbytes and bytes(piece).count(0) == piece.nbytes:
                await disk.trim(offset, piece.nbytes)
            elif piece.nbytes:
                await disk.write(offset, piece, owned=True)


def _ahead(note: Note, later: Iterable[Note]) -> Note:
    """How far a group was when copying began, and up to which entry what was copied may be newer."""
    now = [other.applied.index for other in later if other.group == note.group]  # none: it has come to its end
    ahead = max(note.ahead, *now, 0)
    return note if ahead <= note.applied.index else msgspec.structs.replace(note, ahead=ahead)


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
