"""What the management regions of a disk lie in: one volume for all of them, with their directory in its first block.

A change of several blocks, of one region or of several, is one transaction: a crash leaves all of it or nothing.
"""

import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from weakref import WeakSet

import trio

from nbdvde import moment
from nbdvde.disk import BLOCK
from nbdvde.engine.managed.subjects import Subjects
from nbdvde.engine.pieces import page_of
from nbdvde.engine.regions.directory import ENTRY, ENTRY_BLOCK, VOLUME_BYTES, WINDOW, Directory, Slot, kind_of
from nbdvde.engine.regions.directory import FORM as DIRECTORY
from nbdvde.engine.regions.form import Form
from nbdvde.engine.volume import Volume
from nbdvde.engine.volumes import Volumes
from nbdvde.errors import RefusedError, UsageError

_ENTRY = struct.Struct("<Q")
CHUNK_BLOCKS = 256
_CHUNKS_MAX = 1 << 16


class Watch:
    """Which chunks, of `CHUNK_BLOCKS` blocks of the volume, are changed."""

    def __init__(self) -> None:
        self._chunks: set[int] = set()

    def touch(self, start: int, stop: int) -> None:
        """Blocks are changed."""
        if len(self._chunks) <= _CHUNKS_MAX:
            last = (stop - 1) // CHUNK_BLOCKS
            self._chunks.update(range(start // CHUNK_BLOCKS, min(last, start // CHUNK_BLOCKS + _CHUNKS_MAX + 1) + 1))

    def taken(self) -> set[int]:
        """Those since it was asked last, but for the first one, which has the directory. Raises RefusedError."""
        if len(self._chunks) > _CHUNKS_MAX:
            raise RefusedError("regions", "are changed too much at a time", "try again")
        taken, self._chunks = self._chunks - {0}, set()
        return taken


class Area:
    """The regions of one disk. Its volume is made when the first region is."""

    def __init__(
        self, volumes: Volumes, disk: Volume, enable: Callable[[], Awaitable[None]], subjects: Subjects,
        forget: Callable[[Form], None] = lambda form: None,
    ) -> None:  # fmt: skip
        """`enable` says in the image that there may be regions; `forget` is told of those that are given up."""
        self.disk, self.subjects = disk, subjects
        self._volumes, self._enable, self._forget = volumes, enable, forget
        self._changing, self._writing = trio.Lock(), trio.Lock()
        self._watches: WeakSet[Watch] = WeakSet()
        self._volume = volumes.existing_region(DIRECTORY, disk.number)
        self.directory = Directory()
        self.entry = 0
        """Index of the last entry in the log of a cluster that changed them; changes and this are one transaction."""

    async def load(self) -> None:
        """Read the directory, as it may be somebody else's now. Raises DamageError."""
        self._volume = self._volumes.existing_region(DIRECTORY, self.disk.number)
        self.directory, self.entry = Directory(), 0
        if self._volume is not None:
            block = await self._read(0, 1)
            if block.strip(b"\0"):  # a crash may have come before it was written first
                self.directory = Directory.unpack(lambda _: block)
            block = await self._read(ENTRY_BLOCK, 1)
            if block.strip(b"\0"):
                (self.entry,) = _ENTRY.unpack_from(ENTRY.opened(block)[0])

    @property
    def volume(self) -> Volume:
        """All regions, one behind the other. There is one at least."""
        assert self._volume is not None, "there is a region"
        return self._volume

    def find(self, form: Form) -> Slot | None:
        """Where a region lies, if the disk has it."""
        return self.directory.find(form)

    def get(self, form: Form) -> Slot:
        """The same. Raises UsageError, RefusedError once the disk is deleted."""
        self._refuse_deleted()
        slot = self.find(form)
        if slot is None:
            self._refuse_snapshot()
            kind = kind_of(form.tag)
            hint = kind.command and f"make one with {kind.command}"
            raise UsageError(f"disk {self.disk.name}", f"has no {kind.name}", hint)
        return slot

    def _refuse_snapshot(self) -> None:
        member = self._volumes.find(self.disk.name)
        if member is not None and member.parent:
            raise UsageError(f"snapshot {self.disk.name}", "has no regions", "name the disk itself")

    def _refuse_deleted(self) -> None:
        if self._volumes.existing_region(DIRECTORY, self.disk.number) is not self._volume:
            raise RefusedError(f"disk {self.disk.name}", "was deleted")

    def refuse_another(self, form: Form) -> None:
        """Raise RefusedError when the disk has this region."""
        if self.find(form):
            kind = kind_of(form.tag)
            raise RefusedError(f"disk {self.disk.name}", f"has {kind.article} {kind.name} already")

    async def create(
        self, form: Form, blocks: int, written: Mapping[int, bytes], used: int, *, flags: int = 0
    ) -> None:  # fmt: skip
        """Make a region of so many blocks at most, of which `used` hold header and records; durable.

        Raises RefusedError, UsageError for a snapshot, NoSpaceError, PoisonedError.
        """
        assert used <= blocks <= WINDOW, "it fits into its window"
        self._refuse_snapshot()
        self.refuse_another(form)
        if self._volume is None:
            await self._enable()
            self._volume = await self._volumes.region(DIRECTORY, VOLUME_BYTES, self.disk.number)
        async with self._changing:
            self._refuse_deleted()
            self.refuse_another(form)
            await self._store(self.directory.adding(form, blocks, used, flags), form, written, ())
        await self.flush()

    @asynccontextmanager
    async def unchanged(self) -> AsyncIterator[None]:
        """Have the directory stay as it is meanwhile."""
        async with self._changing:
            yield

    async def change(
        self, form: Form, written: Mapping[int, bytes], *, holes: Sequence[tuple[int, int]] = (),
        used: int | None = None, flags: int | None = None,
    ) -> None:  # fmt: skip
        """Write blocks of a region, one or several from a number on, and give others up, (start, stop), all or nothing.

        `used` and `flags` are what the directory says of it from then on. Not durable yet.
        Raises NoSpaceError, PoisonedError.
        """
        slot = self.get(form)
        if used in (None, slot.used) and flags in (None, slot.flags):
            await self._write(slot, written, holes)
            return
        async with self._changing:
            after = self.directory.using(form, slot.used if used is None else used, flags)
            await self._store(after, form, written, holes)

    async def remove(self, form: Form) -> None:
        """Give a region up; durable."""
        async with self._changing:
            slot = self.get(form)
            after = self.directory.removing(form)
            await self._write_together({0: after.pack()}, [(slot.start, slot.start + slot.blocks)])
            self.directory = after
            self._forget(form)
        await self.flush()

    async def read(self, form: Form, first: int, count: int = 1) -> bytes:
        """Blocks of a region. Raises DamageError."""
        return await self._read(self.get(form).start + first, count)

    async def whole(self, form: Form, most: int) -> tuple[Callable[[int], bytes], int]:
        """What answers blocks of a region by number, all of them from memory, and how many it uses. Raises DamageError.

        More than `most` bytes are damage.
        """
        used = self.get(form).used
        if used * BLOCK > most:
            raise form.damage("is larger than it can be")
        data = await self.read(form, 0, used)
        return lambda number: data[number * BLOCK : (number + 1) * BLOCK], used

    async def flush(self) -> None:
        """Make every change durable, unless it is so in the log of a cluster."""
        if moment.entry() is None:
            await self.volume.flush()

    async def _store(
        self, after: Directory, form: Form, written: Mapping[int, bytes], holes: Sequence[tuple[int, int]]
    ) -> None:
        """Write blocks of a region together with a changed directory."""
        slot = after.find(form)
        assert slot is not None, "it is a change of this one"
        await self._write(slot, written, holes, {0: after.pack()})
        self.directory = after

    async def _write(
        self, slot: Slot, written: Mapping[int, bytes], holes: Sequence[tuple[int, int]],
        more: Mapping[int, bytes] = {},
    ) -> None:  # fmt: skip
        start = slot.start
        blocks = {start + block: page for block, page in written.items()}
        gone = [(start + first, start + stop) for first, stop in holes]
        await self._write_together({**blocks, **more}, gone)

    async def _write_together(self, blocks: Mapping[int, bytes], holes: Sequence[tuple[int, int]]) -> None:
        if self.volume.read_only:
            raise RefusedError("image", "is open for reading only", "open it for writing")
        entry = moment.entry()
        if entry is not None:
            blocks = {**blocks, ENTRY_BLOCK: ENTRY.block(_ENTRY.pack(entry), 0)}
        async with self._writing:
            await self.volume.write_together(blocks, holes)
            self.entry = self.entry if entry is None else entry
            for watch in self._watches:
                for start, data in blocks.items():
                    watch.touch(start, start + -(-len(data) // BLOCK))
                for start, stop in holes:
                    watch.touch(start, stop)

    def watch(self) -> Watch:
        """What tells, as long as somebody has it, what is changed."""
        watch = Watch()
        self._watches.add(watch)
        return watch

    @asynccontextmanager
    async def still(self) -> AsyncIterator[None]:
        """Have nothing be changed meanwhile."""
        async with self._writing:
            yield

    async def _read(self, block: int, count: int) -> bytes:
        return b"".join(map(page_of, await self.volume.read(block * BLOCK, count * BLOCK)))
