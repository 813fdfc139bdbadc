"""An open image: its disks, from recovery to a clean stop, and what there is to know of it."""

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from uuid import UUID

import msgspec
import trio

from nbdvde import workers
from nbdvde.engine.background import Background
from nbdvde.engine.cache import FrameCache
from nbdvde.engine.check import Progress, begin_check
from nbdvde.engine.checkpointer import LOG_BYTES, Checkpointer
from nbdvde.engine.cleaner import NOTHING, WORTH, WORTH_IN_NEED, Cleaner
from nbdvde.engine.describe import clear_info, described, file_bytes
from nbdvde.engine.dictchange import DictionaryChanges
from nbdvde.engine.dictionaries import Dictionaries
from nbdvde.engine.dictionaries import Entry as DictionaryEntry
from nbdvde.engine.diskmap import Drawing, Source, draw
from nbdvde.engine.duplicates import MEMORY as DEDUP_MEMORY
from nbdvde.engine.duplicates import Duplicates
from nbdvde.engine.gauges import DiskGauges, ImageGauges, space_gauges
from nbdvde.engine.identity import member_uuid, volume_uuid
from nbdvde.engine.keys import KeyArea
from nbdvde.engine.keystore import change_key_area, load_key_area
from nbdvde.engine.layout import (
    BLOCK,
    COMPACTED_SEGMENTS,
    ENCRYPTION_NONE,
    REGIONS,
    STATE_CLEAN,
    STATE_OPEN,
    STATISTICS,
    Segment,
    Superblock,
    TableEntry,
    VolumeEntry,
)
from nbdvde.engine.log import LogWriter
from nbdvde.engine.managed.anon import AnonTable
from nbdvde.engine.managed.regions import Regions
from nbdvde.engine.managed.retention import giving_up
from nbdvde.engine.managed.subjects import Subjects
from nbdvde.engine.measure import measure
from nbdvde.engine.optimize import Options, Workshop, optimize
from nbdvde.engine.pace import paced
from nbdvde.engine.reader import Reader
from nbdvde.engine.recovery import Loaded
from nbdvde.engine.regions.directory import CLUSTER
from nbdvde.engine.report import CheckReport, DiskInfo, ImageInfo, OptimizeReport, SnapshotInfo, SpaceReport
from nbdvde.engine.volume import Volume
from nbdvde.engine.volumes import Volumes
from nbdvde.engine.writer import Writer, allocate_first
from nbdvde.errors import NbdvdeError, NoSpaceError, RefusedError
from nbdvde.metrics import Histogram

_log = logging.getLogger(__name__)
CACHE_BYTES = 64 << 20
BUFFER_BYTES = 32 << 20
_ENOUGH = 4
"""Part of a segment that is worth another try."""
_ROUNDS = 4
"""Of cleaning that a write waits for at most: where space is tight, one joins gaps only for the next."""
_LOOK_SEGMENTS = 4
"""Segments of log after which it is asked again whether to clean."""


def _unseen(done: int, total: int) -> None:
    """Progress that nobody looks at."""


class Image:
    """An open image. Made by `nbdvde.open_image`."""

    def __init__(
        self, loaded: Loaded, *, path: str, read_only: bool, cache_bytes: int = CACHE_BYTES,
        buffer_bytes: int = BUFFER_BYTES, checkpoint_bytes: int = LOG_BYTES, dedup_memory: int | None = None,
    ) -> None:  # fmt: skip
        """`dedup_memory`: bytes, None for what the image says."""
        self._loaded, self.path, self.read_only = loaded, path, read_only
        self.segments = loaded.segments
        if capacity := loaded.superblock.capacity:
            checkpoint_bytes = min(checkpoint_bytes, capacity // 8)
            # What is buffered has space in segments that nothing else can use.
            buffer_bytes = min(buffer_bytes, max(capacity // 128, min(4 << 20, capacity // 32)))
        self._buffer_bytes = buffer_bytes
        self.segments.name = os.path.basename(path)
        self.cache = FrameCache(cache_bytes)
        self._reader = reader = Reader(self.segments, self.cache, loaded.dictionaries)
        self._background, self._cleaning = Background(self._failed), Background(self._failed)
        self._writer: Writer | None = None
        self._checkpointer = Checkpointer(
            self.segments, loaded.superblock, loaded.keyring.superblock_key(), loaded.catalogue,
            lambda: tuple(self.statistics.values()), self.cache.drop_slots, checkpoint_bytes,
        )  # fmt: skip
        self.volumes = Volumes(loaded.catalogue, self.segments, reader, self._checkpointer, read_only=read_only)
        superblock = loaded.superblock
        self._looked_at = 0
        """Bytes of log when it was last asked whether to clean."""
        self._given_up = 0
        """Of `volumes.given_up`, what was counted anew."""
        self._dedup_memory = dedup_memory or loaded.catalogue.dedup_mib << 20 or DEDUP_MEMORY
        self._duplicates = Duplicates(self.segments, loaded.catalogue, self._dedup_memory)
        self._cleaner = Cleaner(
            self.segments, self._checkpointer, self._duplicates, superblock.compression,
            superblock.extent_bytes // BLOCK, loaded.dictionaries,
        )  # fmt: skip
        self._dictionaries = DictionaryChanges(
            loaded.dictionaries, self.segments, self.volumes, self._checkpointer, self._cleaner
        )
        self._subjects = Subjects(
            loaded, self._checkpointer, self._writable, self._enable_feature, self._finish_erasure,
            lambda: {disk.number for disk in self.volumes.disks}, read_only=read_only,
        )  # fmt: skip
        self.regions = Regions(self.volumes, self.enable_regions, self._subjects)
        self.regions.alone = self.volumes.existing_region(CLUSTER) is None
        self.volumes.guard = partial(giving_up, self.regions)
        self._hooking = Background(self._failed)
        self.namespace: bytes | None = None
        """What the cluster goes by whose images all identify disks and snapshots in the same way, 16 bytes."""
        self._optimizing, self._until_closed = trio.Lock(), trio.CancelScope()
        self._closed = False

    # Life

    async def start(self) -> None:
        """Make the recovered state durable and open a new log segment. Only then is anything answered."""
        for where, what in self._loaded.flaws:
            _log.warning("%s: %s: %s", self.path, where, what)
        if self.read_only:
            return
        if self._loaded.subjects:
            await workers.run(self._subjects.settle, self._loaded.subjects)
        features = self.superblock.incompatible | COMPACTED_SEGMENTS
        superblock = replace(self.superblock, epoch=self.superblock.epoch + 1, incompatible=features)
        self._checkpointer.superblock = superblock
        if self.dictionaries.lost:  # no duplicate may be made of what needs them
            for state in self.segments.states.values():
                state.suspect = True
        log = LogWriter(
            self.segments.storage, await allocate_first(self.segments), sequence=self._loaded.sequence,
            chain=self._loaded.chain, epoch=superblock.epoch, level=superblock.compression,
            extent_blocks=superblock.extent_bytes // BLOCK, duplicates=self._duplicates,
            dictionaries=self._loaded.dictionaries,
        )  # fmt: skip
        self._writer = writer = Writer(
            self.segments,
            log,
            self.volumes.written,
            self._background,
            self._buffer_bytes,
            self._maybe_checkpoint,
            self._reclaim,
            lambda: self._checkpointer.keep_up(writer),
        )
        await self._checkpointer.run(writer, STATE_OPEN, both=True)
        self.volumes.attach(writer)
        self._hooking.start(self._hook_lists)

    async def _hook_lists(self) -> None:
        """Have duplicates found of what was stored before the image was opened, beginning with the newest."""
        states = [state for state in self.segments.states.values() if state.prints_bytes]
        for state in sorted(states, key=lambda state: state.segment.sequence, reverse=True):
            if self._closed:
                return
            with self._checkpointer.reading():
                if self.segments.states.get(state.segment.slot) is state:
                    await workers.run(self._duplicates.hook_list, state)

    async def close(self) -> None:
        """Flush, checkpoint, and mark the image clean. Raises what kept that from happening."""
        if self._closed:
            return
        self._closed = True
        self._until_closed.cancel()
        with trio.CancelScope(shield=True):
            async with self._optimizing:
                pass
            try:
                if self._writer is not None:
                    await self._stop(self._writer)
            finally:
                self.segments.storage.close()

    async def _stop(self, writer: Writer) -> None:
        self._cleaner.stop()
        await self._hooking.finish()
        await self._cleaning.finish()
        await self._background.finish()
        with suppress(NoSpaceError):  # what they note can be lost
            await self.regions.tend()
        await writer.flush()
        self.volumes.attach(None)
        log = writer.log
        while log.ready:
            self.segments.abandon(log.ready.pop())
        if tail := self.segments.shrink(log.state, log.state.used):
            self.segments.release(tail)
        await self._checkpointer.run(writer, STATE_CLEAN, both=True)
        await workers.run(self._give_back)

    def _give_back(self) -> None:
        storage, space = self.segments.storage, self.segments.space
        for offset, length in space.gaps():
            storage.punch(offset, length)
        if storage.size() > space.end:
            with suppress(OSError):  # the stop is durable already; a longer file does no harm
                storage.truncate(space.end)

    def _maybe_checkpoint(self) -> None:
        writer = self._writer
        if writer is None or self._closed:
            return
        if self._checkpointer.is_due(writer):
            self._background.start(lambda: self._checkpointer.run_if_due(writer))
        if self._cleaning:
            return
        if self.volumes.given_up > self._given_up:
            self._given_up = self.volumes.given_up
            self._cleaning.start(lambda: self._count_anew(writer))
            return
        written = writer.log.counters.bytes_stored
        if written - self._looked_at >= _LOOK_SEGMENTS * self.segments.segment_bytes:
            self._looked_at = written
            if self._cleaner.is_due():
                self._cleaning.start(lambda: self._clean(writer, WORTH, gently=True))

    async def _count_anew(self, writer: Writer) -> None:
        """What was given up is counted as in use: find out what nobody else uses, and clean if that is called for."""
        async with self._cleaner.lock:
            await self._cleaner.round(writer, NOTHING)
            await self._release(writer)
        if self._cleaner.is_due():
            await self._clean(writer, WORTH, gently=True)

    async def _clean(self, writer: Writer, worth: float, *, gently: bool = False) -> None:
        """Clean as long as there is something to gain, `gently` only as long as it is called for, and free it."""
        idle = 0
        while idle < 2 and not (self._closed and gently):  # once more: a mark shows what the counts did not
            with trio.CancelScope(shield=True):
                async with self._cleaner.lock:
                    idle = 0 if await self._cleaner.round(writer, worth, gently=gently) else idle + 1
                    await self._release(writer)
            if gently and not self._cleaner.is_due():
                return

    async def _clean_aside(self, writer: Writer, worth: float, gently: bool) -> int:
        """As `clean`, but who waits for it may be cancelled: it goes on then, and ends with the image."""
        before, ended = self._cleaner.freed, trio.Event()

        async def clean() -> None:
            try:
                await self._clean(writer, worth, gently=gently)
            finally:
                ended.set()

        self._cleaning.start(clean)
        await ended.wait()
        return self._cleaner.freed - before

    async def _release(self, writer: Writer) -> None:
        """Free what is left out of this checkpoint: no superblock leads to it when both are written."""
        await self._checkpointer.run(writer, STATE_OPEN, both=True)

    async def _reclaim(self) -> bool:
        """Free the space of dead segments, or of what is dead in others; whether that is worth another try."""
        writer, space, segment = self._writable(), self.segments.space, self.segments.segment_bytes
        room, fitted = space.room, space.fits(segment)

        def has_won() -> bool:
            """If a segment fitted before, it is the host that has no room."""
            return space.room - room >= segment // _ENOUGH or (space.fits(segment) and not fitted)

        with trio.CancelScope(shield=True):
            async with self._cleaner.lock:  # a round that has begun keeps what it replaced
                if self._checkpointer.can_reclaim() and not has_won():
                    await self._release(writer)
                idle = 0
                for _ in range(_ROUNDS):
                    if has_won() or idle == 2:  # once more: a mark shows what the counts did not
                        break
                    replaced = self._cleaner.replaced
                    await self._cleaner.round(writer, WORTH_IN_NEED)
                    await self._release(writer)
                    idle = 0 if self._cleaner.replaced > replaced else idle + 1
        return has_won()

    def _failed(self, error: Exception) -> None:
        """Work that nobody waits for went wrong. What follows from it is told to whoever writes next."""
        if isinstance(error, NbdvdeError):
            _log.warning("%s: %s", self.path, error)
            return
        _log.error("%s: unexpected failure", self.path, exc_info=error)
        if self._writer is not None:
            self._writer.log.poisoned = self._writer.log.poisoned or f"internal error: {error!r}"

    # Use

    @property
    def disks(self) -> list[str]:
        """Names of the disks."""
        return [disk.name for disk in self.volumes.disks]

    def disk(self, name: str | None = None) -> Volume:
        """A disk by name, a snapshot by DISK@NAME, the first disk without. Raises UsageError."""
        return self.volumes.get(name)

    async def flush(self) -> None:
        """Make everything accepted so far durable. Raises PoisonedError."""
        if self._writer is not None:
            await self._writer.flush()

    async def checkpoint(self) -> None:
        """Write the changed part of the maps and a new superblock. Raises NoSpaceError, PoisonedError."""
        await self._checkpointer.run(self._writable(), STATE_OPEN)

    async def clean(self, worth: float = WORTH) -> int:
        """Free what can be freed with reasonable effort; answers by how many bytes segments got shorter.

        `worth` is the part of a segment that must be garbage. Above 1 none is rewritten: what is in use is counted, and
        dead segments are freed. Raises NoSpaceError, PoisonedError.
        """
        writer, before = self._writable(), self._cleaner.freed
        await writer.flush()
        await self._clean(writer, worth)
        return self._cleaner.freed - before

    async def optimize(self, options: Options, progress: Progress) -> OptimizeReport:
        """Make it smaller, while it is in use; can be cancelled at any time.

        Raises RefusedError while somebody else does that and when the image is closed, NoSpaceError, PoisonedError.
        """
        writer, superblock = self._writable(), self.superblock
        if self._optimizing.locked():
            raise RefusedError("image", "is being optimized already", "wait for the end of that")
        async with self._optimizing:
            workshop = Workshop(
                self.segments, self._checkpointer, self._cleaner, self._duplicates, self._reader,
                self.dictionaries, self._dictionaries, self.volumes.disks, self._region_of_dictionaries,
                superblock.compression, superblock.extent_bytes // BLOCK, self.volumes.domain_of,
                lambda: self._release(writer), partial(self._clean_aside, writer), lambda: file_bytes(self.path),
            )  # fmt: skip
            with trio.CancelScope() as self._until_closed:
                return await optimize(workshop, writer, options, progress)
        raise RefusedError("image", "was closed before its end")

    def _region_of_dictionaries(self) -> Volume | None:
        number = self.dictionaries.volume
        return next((volume for volume in self.volumes.written if volume.number == number), None)

    async def check(self, progress: Progress | None = None, rate: int | None = None) -> CheckReport:
        """Verify everything up to now, while the image is in use, at `rate` bytes a second at most."""
        if self._writer is not None:
            await self.flush()
            await self.checkpoint()
        master = self._loaded.keyring.master
        storage, progress = paced(self.segments.storage, rate, progress)
        with ExitStack() as held:
            async with self._checkpointer.lock:
                held.enter_context(self._checkpointer.reading())
                check = await workers.run(
                    begin_check, storage, lambda _: master, replay=self._writer is None, damaged=self._suspect
                )
            return await workers.run(check, progress)

    def _suspect(self, segment: Segment) -> None:
        state = self.segments.states.get(segment.slot)
        if state is not None and state.segment.sequence == segment.sequence:
            state.suspect = True

    async def space(self) -> SpaceReport:
        """Where the bytes went, exactly; of an image that is open for reading only, at its last checkpoint."""
        async with self._cleaner.lock:
            volumes, entries = await self._cut()
            with self._checkpointer.reading():
                written = self.statistics["bytes_in"]
                taken = file_bytes(self.path)
                return await workers.run(measure, self.segments, self.superblock, volumes, entries, written, taken)

    async def drawing(self, disk: Volume, since: Volume | None, cells: int) -> Drawing:
        """What a disk is made of in so many cells at most, compared with a snapshot; as up to date as `space`."""
        async with self._cleaner.lock:
            volumes, entries = await self._cut()
            source = Source(self.segments, volumes, entries, self.superblock.extent_bytes // BLOCK)
            with self._checkpointer.reading():
                return await workers.run(draw, source, disk.number, since.number if since else None, cells)

    async def _cut(self) -> tuple[list[VolumeEntry], Sequence[TableEntry]]:
        """Volumes and segments of a checkpoint: one of now, if the image is open for writing."""
        if self._writer is not None:
            await self.flush()
            cut = await self._checkpointer.run(self._writer, STATE_OPEN)
            return list(cut.catalogue), cut.entries
        volumes = [member.entry(member.map.base.tree) for member in self._loaded.catalogue]
        return volumes, [state.entry() for state in self.segments.states.values()]

    def _writable(self) -> Writer:
        if self._writer is None:
            raise RefusedError("image", "is open for reading only", "open it for writing")
        return self._writer

    async def _enable_feature(self, bit: int) -> None:
        """Have no older version open the image, which would know nothing of regions or of keys of subjects."""
        if not self.superblock.incompatible & bit:
            await self._checkpointer.run(self._writable(), STATE_OPEN, both=True, features=bit)

    async def enable_regions(self) -> None:
        """Say in the image that there may be regions."""
        await self._enable_feature(REGIONS)

    @property
    def before_commit(self) -> list[Callable[[], None]]:
        """What is called when a commit begins, of an image that is open for writing (`Writer.before_commit`)."""
        return self._writable().before_commit

    async def _finish_erasure(self, number: int) -> None:
        """Have the anonymisation table of a disk hold the record of its last erasure."""
        for disk in self.volumes.disks:
            if disk.number == number:
                await self.regions.get(AnonTable, disk)

    # Dictionaries

    async def register_dictionary(self, content: bytes, samples: int, slot: int | None = None) -> DictionaryEntry:
        """See `DictionaryChanges.register`."""
        return await self._dictionaries.register(self._writable(), content, samples, slot)

    async def replace_dictionary(
        self, slot: int, content: bytes, samples: int, progress: Progress = _unseen
    ) -> DictionaryEntry:
        """See `DictionaryChanges.replace`."""
        return await self._dictionaries.replace(self._writable(), slot, content, samples, progress)

    async def remove_dictionary(self, slot: int, progress: Progress = _unseen) -> None:
        """See `DictionaryChanges.remove`."""
        await self._dictionaries.remove(self._writable(), slot, progress)

    @property
    def dictionaries(self) -> Dictionaries:
        """Those of the image."""
        return self._loaded.dictionaries

    # Keys

    @property
    def key_area(self) -> KeyArea:
        """The key slots."""
        return load_key_area(self.segments.storage)

    async def update_keys(self, change: Callable[[KeyArea], KeyArea]) -> None:
        """Replace the key slots by what `change` makes of them."""
        log = self._writable().log
        async with self._checkpointer.lock:
            try:
                await workers.run(change_key_area, self.segments.storage, change, log.sync_storage)
            except OSError as error:
                log.poison(f"writing the key area failed: {error.strerror}")

    # Facts

    @property
    def superblock(self) -> Superblock:
        """The newest one."""
        return self._checkpointer.superblock

    @property
    def change(self) -> tuple[int, ...]:
        """Another one whenever a disk was written, made, changed or deleted."""
        buffered = self._writer.buffered if self._writer else 0
        return self.statistics["commits"], buffered, self.volumes.version

    @property
    def spare_bytes(self) -> int:
        """Bytes of the file that writes may still take before anything is cleaned, as far as the host has them."""
        host, space = os.statvfs(self.path), self.segments.space
        buffered = self._writer.buffered if self._writer else 0
        return min(space.room - space.kept, host.f_bavail * host.f_frsize) - buffered

    @property
    def closed(self) -> bool:
        """Whether it is closed, or about to be."""
        return self._closed

    @property
    def poisoned(self) -> str | None:
        """Why nothing is written any more, if so."""
        return self._writer.log.poisoned if self._writer else None

    @property
    def encrypted(self) -> bool:
        """Whether the image has a key."""
        return self.superblock.encryption != ENCRYPTION_NONE

    @property
    def statistics(self) -> dict[str, int]:
        """Counters since the image was made (layout.STATISTICS)."""
        counters = self._writer.log.counters if self._writer else None
        return {
            name: base + (getattr(counters, name) if counters else 0)
            for name, base in zip(STATISTICS, self._loaded.statistics, strict=True)
        }

    @property
    def stored_bytes(self) -> int:
        """Bytes of the log segments that are in use."""
        return sum(state.used for state in self.segments.states.values() if state.holds_blocks and state.linked)

    def info(self) -> ImageInfo:
        """What there is to know of the image."""
        used = len(self.key_area.slots()) if self.encrypted else 0
        info = clear_info(self.superblock, self.path, file_bytes(self.path), used)
        stored = self.stored_bytes
        alone = stored if len(self.volumes.disks) == 1 else None
        disks = [self._described(disk, alone) for disk in self.volumes.disks]
        return msgspec.structs.replace(
            info, disks=disks, stored_bytes=stored, dedup_memory=self._dedup_memory,
            statistics=described(self.statistics), cleaning_held=self._cleaner.held,
        )  # fmt: skip

    def gauges(self) -> ImageGauges:
        """How it is doing; see `space_gauges` for what that costs."""
        space, damaged = space_gauges(self.segments, self.superblock.capacity or None)
        taken = 0
        with suppress(OSError):
            taken = file_bytes(self.path)
        disks = [
            DiskGauges(disk.name, disk.size, disk.map.mapped * BLOCK, len(self.volumes.snapshots(disk)))
            for disk in self.volumes.disks
        ]
        return ImageGauges(
            self.path, self.read_only, self.poisoned, damaged, taken, space, disks,
            described(self.statistics), self.cache.held_bytes, self.cache.hits, self.cache.misses,
            self._writer.buffered if self._writer else 0, self._cleaner.replaced, self._cleaner.freed,
            self._checkpointer.count,
        )  # fmt: skip

    @property
    def syncs(self) -> Histogram:
        """How long the host took to make things durable."""
        return self._writer.log.syncs if self._writer else Histogram()

    def _described(self, disk: Volume, stored: int | None) -> DiskInfo:
        snapshots = [
            SnapshotInfo(m.name, m.size, m.created_ns, str(self.uuid_of(m.number)))
            for m in self.volumes.snapshots(disk)
        ]
        sharing, uuid = self.volumes.shares_with(disk), str(self.uuid_of(disk.number))
        catalogue = self._loaded.catalogue
        origin = catalogue.origin(catalogue.members[disk.number])
        return DiskInfo(disk.name, disk.size, disk.map.mapped * BLOCK, stored, snapshots, sharing, origin, uuid)

    def uuid_of(self, number: int) -> UUID:
        """What identifies a disk or a snapshot, of which this is the number."""
        if self.namespace is None:
            return volume_uuid(self.superblock.uuid, number)
        catalogue = self._loaded.catalogue
        member = catalogue.members[number]
        return member_uuid(self.namespace, catalogue.label(member), member.created_ns if member.parent else 0)
