"""An open image: one write buffer budget, group commit, checkpoints, and the disks on top.

A commit freezes what was written so far on every disk, appends it to the log in a worker thread and then
changes the maps. FLUSH waits for a commit that covers it and for the sync behind it; whoever flushes first
commits for all who wait. Commits and checkpoints that no request asked for run as system tasks of trio, so
that an open image needs no nursery around it; they end before `close` does.
"""

import errno
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import msgspec
import trio

from nbdvde import workers
from nbdvde.engine.buffer import Generation
from nbdvde.engine.cache import FrameCache
from nbdvde.engine.changes import apply
from nbdvde.engine.check import Progress, check_storage
from nbdvde.engine.checkpoint import Plan, Result, VolumePlan, meta_sizes, root_bytes, write
from nbdvde.engine.describe import clear_info, file_bytes
from nbdvde.engine.keys import KeyArea
from nbdvde.engine.keystore import change_key_area, load_key_area
from nbdvde.engine.layout import (
    BLOCK,
    ENCRYPTION_NONE,
    KIND_LOG,
    KIND_META,
    STATE_CLEAN,
    STATE_OPEN,
    STATISTICS,
    LogPoint,
    Segment,
)
from nbdvde.engine.lbamap import LbaMap
from nbdvde.engine.log import Change, LogWriter
from nbdvde.engine.reader import Reader
from nbdvde.engine.recovery import Loaded, empty_segment
from nbdvde.engine.report import CheckReport, DiskInfo, ImageInfo
from nbdvde.engine.segments import State
from nbdvde.engine.volume import Volume
from nbdvde.errors import NbdvdeError, NoSpaceError, PoisonedError, RefusedError, UsageError

CACHE_BYTES = 64 << 20
BUFFER_BYTES = 32 << 20
LEAVES_MAX = 16384
"""Leaves in memory: 64 MiB map 32 GiB of scattered data."""
DIRTY_LEAVES_MAX = 8192
CHECKPOINT_LOG_BYTES = 512 << 20
"""Log between checkpoints: replaying it takes about a second, rewriting the leaves costs 6 % of it at most."""
COMMIT_BYTES = 2 << 20
"""Buffered bytes that start a commit nobody waits for."""


class Image:
    """An open image. Made by `nbdvde.open_image`."""

    def __init__(
        self, loaded: Loaded, *, path: str, read_only: bool, cache_bytes: int = CACHE_BYTES, buffer_bytes: int = BUFFER_BYTES,
        checkpoint_log_bytes: int = CHECKPOINT_LOG_BYTES,
    ) -> None:  # fmt: skip
        self._loaded, self.path, self.read_only = loaded, path, read_only
        self.superblock, self.segments = loaded.superblock, loaded.segments
        self._mac_key = loaded.keyring.superblock_key()
        self._reader = Reader(self.segments, FrameCache(cache_bytes))
        self.volumes = [Volume(self, v.volume, v.name, v.size, v.map, self._reader) for v in loaded.volumes.values()]
        self._buffer_bytes = buffer_bytes
        self._checkpoint_log_bytes = checkpoint_log_bytes
        self._log: LogWriter | None = None
        self._admitted = 0
        """Bytes in the write buffer, those of a commit in flight included."""
        self._waiting = 0
        self._admission = trio.Lock()
        self._committed = trio.Event()
        """Set, and replaced, whenever a commit has ended."""
        self._commit_lock = trio.Lock()
        self._checkpoint_lock = trio.Lock()
        self._preparing = trio.Lock()
        self._background = 0
        self._idle = trio.Event()
        self._generation = 0
        self._durable = 0
        self._unsynced = False
        self._stored_at_checkpoint = 0
        self._root: Segment = loaded.superblock.root
        self._removed: list[tuple[int, Segment]] = []
        self._checkpoints = 0
        self._readers: Counter[int] = Counter()
        self._closed = False

    # Disks and facts

    @property
    def disks(self) -> list[str]:
        """Names of the disks."""
        return [volume.name for volume in self.volumes]

    def disk(self, name: str | None = None) -> Volume:
        """A disk by name, the first one without. Raises UsageError."""
        for volume in self.volumes:
            if name in (None, volume.name):
                return volume
        raise UsageError(f"disk {name}", "does not exist in this image", f"it has {', '.join(self.disks)}")

    @property
    def statistics(self) -> dict[str, int]:
        """Counters since the image was made (layout.STATISTICS)."""
        counters = self._log.counters if self._log else None
        return {
            name: base + (getattr(counters, name) if counters else 0)
            for name, base in zip(STATISTICS, self._loaded.statistics, strict=True)
        }

    @property
    def cache(self) -> FrameCache:
        """The cache of decoded frames."""
        return self._reader.cache

    @property
    def poisoned(self) -> str | None:
        """Why nothing is written any more, if so."""
        return self._log.poisoned if self._log else None

    # Life

    async def start(self) -> None:
        """Make the recovered state durable and open a new log segment. Only then is anything answered."""
        if self.read_only:
            return
        state = await self._allocate(KIND_LOG)
        self.superblock = replace(self.superblock, epoch=self.superblock.epoch + 1)
        self._log = LogWriter(
            self.segments.storage, state, sequence=self._loaded.sequence, chain=self._loaded.chain,
            epoch=self.superblock.epoch, level=self.superblock.compression,
            extent_blocks=self.superblock.extent_bytes // BLOCK,
        )  # fmt: skip
        await self._checkpoint(STATE_OPEN, both=True)

    async def close(self) -> None:
        """Flush, checkpoint, and mark the image clean. Raises what kept that from happening."""
        if self._closed:
            return
        self._closed = True
        with trio.CancelScope(shield=True):
            try:
                if self._log is not None:
                    await self._stop(self._log)
            finally:
                self.segments.storage.close()

    async def _stop(self, log: LogWriter) -> None:
        while self._background:
            self._idle = trio.Event()
            await self._idle.wait()
        await self.flush()
        while log.ready:
            self._abandon(log.ready.pop())
        if tail := self.segments.shrink(log.state, log.state.used):
            self.segments.release(tail)
        await self._checkpoint(STATE_CLEAN, both=True)
        await workers.run(self._give_back)

    def _give_back(self) -> None:
        storage, space = self.segments.storage, self.segments.space
        for offset, length in space.gaps():
            storage.punch(offset, length)
        if storage.size() > space.end:
            storage.truncate(space.end)

    def _abandon(self, state: State) -> None:
        self.segments.release(self.segments.remove(state.segment.slot))

    # Admission: memory and log space are reserved before a write is acknowledged

    def admit_nowait(self, payload: int) -> bool:
        """Reserve memory and log space for `payload` bytes of blocks; False when that takes waiting."""
        log = self._log
        if self._waiting or log is None or log.poisoned or not self._fits(log, payload):
            return False
        self._admitted += payload
        if self._admitted >= COMMIT_BYTES and not self._commit_lock.locked() and not self._background:
            self._spawn(self._commit_in_background)
        return True

    def withdraw(self, payload: int) -> None:
        """Give a reservation back that was not used."""
        self._admitted -= payload

    def _fits(self, log: LogWriter, payload: int) -> bool:
        total = self._admitted + payload
        return (total <= self._buffer_bytes or not self._admitted) and log.worst(total) <= log.room()

    async def admit(self, payload: int) -> None:
        """As `admit_nowait`, waiting for commits and for segments. Raises NoSpaceError, PoisonedError, RefusedError."""
        log = self._writable()
        self._waiting += 1
        try:
            async with self._admission:
                while not self._fits(log, payload):
                    await self._make_room(log, payload)
                    self._writable()
                self._admitted += payload
        finally:
            self._waiting -= 1

    async def _make_room(self, log: LogWriter, payload: int) -> None:
        if log.worst(self._admitted + payload) > log.room():
            try:
                await self._prepare(log, self._admitted + payload)
            except NoSpaceError:
                if not self._admitted:
                    raise
                await self._commit_now()
        elif self._commit_lock.locked():
            await self._committed.wait()
        else:
            await self._commit_now()

    def _writable(self) -> LogWriter:
        log = self._log
        if log is None:
            raise RefusedError("image", "is open for reading only", "open it for writing")
        if log.poisoned:
            raise PoisonedError("image", log.poisoned, "it takes no more writes: mend the device and reopen it")
        return log

    async def _prepare(self, log: LogWriter, payload: int) -> None:
        """Allocate segments until the log has room for `payload` bytes of blocks. Raises NoSpaceError."""
        with trio.CancelScope(shield=True):
            async with self._preparing:
                added: list[State] = []
                try:
                    while log.worst(payload) > log.room() + _usable(log, added):
                        added.append(await self._allocate(KIND_LOG))
                finally:
                    if added:
                        # A link may name a segment only once its space is durable.
                        await workers.run(log.sync_storage)
                        log.ready.extend(added)

    async def _allocate(self, kind: int, length: int | None = None) -> State:
        """A fresh segment with its space reserved on the host. Raises NoSpaceError."""
        state = self.segments.new(kind, length or self.segments.segment_bytes, os.urandom(32))
        try:
            await workers.run(self.segments.storage.allocate, state.segment.offset, state.segment.length)
        except OSError as error:
            self._abandon(state)
            raise NoSpaceError("image", f"cannot grow: {error.strerror}", "free space on the host") from None
        return state

    # Commits

    async def flush(self) -> None:
        """Make everything accepted so far durable. Raises PoisonedError."""
        if self._log is None:
            return
        self._writable()
        target = self._generation + any(volume.active for volume in self.volumes)
        async with self._commit_lock:
            self._writable()
            if self._durable < target or self._unsynced:
                await self._commit(sync=True)

    async def _commit_now(self) -> None:
        async with self._commit_lock:
            await self._commit(sync=False)

    async def _commit_in_background(self) -> None:
        while self._admitted >= COMMIT_BYTES:
            await self._commit_now()
            if self._log and not self._log.poisoned:
                await self._keep_ready(self._log)

    async def _keep_ready(self, log: LogWriter) -> None:
        try:
            await self._prepare(log, self._buffer_bytes)
        except NoSpaceError:
            return  # whoever writes next is told

    async def _commit(self, *, sync: bool) -> None:
        """Write what is buffered, and sync. The commit lock is held; not to be cancelled half-way."""
        log = self._writable()
        with trio.CancelScope(shield=True):
            frozen = [(volume, g) for volume in self.volumes if (g := volume.freeze())]
            payload = sum(g.payload for _, g in frozen)
            self._generation += bool(frozen)
            covers = self._generation
            try:
                for (volume, generation), change in zip(
                    frozen, await workers.run(_write, log, frozen, sync), strict=True
                ):
                    await volume.load_for(generation)
                    apply(self.segments, volume.map, change)
                    volume.thaw()
            except BaseException as error:
                # The frozen blocks stay readable; nothing is written after this.
                log.poisoned = log.poisoned or f"a commit failed: {error!r}"
                raise
            finally:
                event, self._committed = self._committed, trio.Event()
                event.set()
            self._admitted -= payload
            self._unsynced = not sync
            if sync:
                self._durable = covers
        self._maybe_checkpoint(log)

    def _maybe_checkpoint(self, log: LogWriter) -> None:
        grown = log.counters.bytes_stored - self._stored_at_checkpoint
        dirty = max(len(volume.map.dirty) for volume in self.volumes)
        due = grown >= self._checkpoint_log_bytes or dirty >= DIRTY_LEAVES_MAX
        if due and not self._checkpoint_lock.locked() and not self._closed:
            self._spawn(self._checkpoint_in_background)

    def _spawn(self, job: Callable[[], Awaitable[None]]) -> None:
        """Run a job that no request waits for."""
        self._background += 1
        trio.lowlevel.spawn_system_task(self._guard, job)

    async def _guard(self, job: Callable[[], Awaitable[None]]) -> None:
        with trio.CancelScope(shield=True):
            try:
                await job()
            except NbdvdeError:
                pass  # the image says so itself to whoever writes next
            except Exception as error:
                if self._log is not None:
                    self._log.poisoned = self._log.poisoned or f"internal error: {error!r}"
            finally:
                self._background -= 1
                if not self._background:
                    self._idle.set()

    # Checkpoints

    async def _checkpoint_in_background(self) -> None:
        if not self._checkpoint_lock.locked():
            await self._checkpoint(STATE_OPEN)

    async def checkpoint(self) -> None:
        """Write the changed part of the maps and a new superblock."""
        self._writable()
        await self._checkpoint(STATE_OPEN)

    async def _checkpoint(self, state: int, *, both: bool = False) -> None:
        log = self._writable()
        with trio.CancelScope(shield=True):
            async with self._checkpoint_lock:
                async with self._commit_lock:
                    self._writable()  # what a failed commit left behind must not get into a plan
                    plan = self._plan(log, state, both=both)
                    removed = self._remove_dead(plan)
                await self._reserve(log, plan)
                try:
                    result = await workers.run(write, self.segments, plan, self._mac_key, log.sync_storage)
                except Exception as error:
                    # What reached the disk is unknown: a sync that fails for lack of space loses data too.
                    log.poison(f"writing a checkpoint failed: {error}")
                    raise
                self._install(plan, result, removed)
                await workers.run(self._punch, self._release_old(both))

    def _plan(self, log: LogWriter, state: int, *, both: bool) -> Plan:
        clean = state == STATE_CLEAN
        point = LogPoint(empty_segment(), 0, 0, log.point.sequence, log.point.chain) if clean else log.point
        volumes = [VolumePlan(v.number, v.name, v.size, v.map.mapped, v.map, v.map.freeze()) for v in self.volumes]
        states = {slot: s for slot, s in self.segments.states.items() if s.linked}
        indexes = {
            slot: s.index.tobytes()
            for slot, s in states.items()
            if s.kind == KIND_LOG and s.index is not None and s.indexed != s.units
        }
        entries = {slot: s.entry() for slot, s in states.items()}
        meta = [
            self.segments.new(KIND_META, size, os.urandom(32))
            for size in meta_sizes(volumes, indexes, self.segments.segment_bytes)
        ]
        root_length = root_bytes(len(entries) + len(meta), len(volumes))
        return Plan(
            replace(self.superblock, state=state), point, volumes, indexes, entries, self.segments.next_sequence + 1,
            tuple(self.statistics.values()), meta, self.segments.new_root(root_length, os.urandom(32)), [], both,
        )  # fmt: skip

    def _remove_dead(self, plan: Plan) -> list[State]:
        """Leave segments out of the checkpoint in which nothing lives."""
        log_slot = plan.log.segment.slot
        dead = [
            self.segments.states[slot] for slot, entry in plan.entries.items() if entry.live == 0 and slot != log_slot
        ]
        for state in dead:
            del plan.entries[state.segment.slot]
            plan.indexes.pop(state.segment.slot, None)
            if state.index_ref:
                plan.garbage.append(state.index_ref)
        return dead

    async def _reserve(self, log: LogWriter, plan: Plan) -> None:
        """Have the host reserve the space of a checkpoint. Raises NoSpaceError; nothing is changed then."""
        try:
            for state in (*plan.meta, plan.root):
                await workers.run(self.segments.storage.allocate, state.segment.offset, state.segment.length)
        except OSError as error:
            self._undo(plan)
            if error.errno in _NO_SPACE:
                raise NoSpaceError("image", "has no room for a checkpoint", "free space on the host") from None
            log.poison(f"reserving space failed: {error.strerror}")

    def _undo(self, plan: Plan) -> None:
        for volume in plan.volumes:
            volume.map.unfreeze(volume.leaves)
        for state in plan.meta:
            self._abandon(state)
        self.segments.release(plan.root.segment)

    def _install(self, plan: Plan, result: Result, removed: list[State]) -> None:
        """Take over what a durable checkpoint wrote."""
        states = self.segments.states
        for volume, written in zip(plan.volumes, result.volumes, strict=True):
            volume.map.thaw(written.root, written.nodes)
        for slot, ref in result.indexes.items():
            states[slot].index_ref, states[slot].indexed = ref, len(plan.indexes[slot]) // 8
        for state in plan.meta:
            state.live = state.units
        for slot, units in result.garbage.items():
            states[slot].live -= units
        self._checkpoints += 1
        self._removed += [(self._checkpoints, self.segments.remove(state.segment.slot)) for state in removed]
        self._removed.append((self._checkpoints, self._root))
        for state in plan.meta:
            if not state.units:
                self._abandon(state)
        for tail in result.tails:
            self.segments.release(tail)
        self.superblock, self._root = result.superblock, plan.root.segment
        self._stored_at_checkpoint = self._log.counters.bytes_stored if self._log else 0

    def _release_old(self, both: bool) -> list[Segment]:
        """Free the space that neither superblock leads to any more, and that no reader is in."""
        oldest_reader = min(self._readers, default=self._checkpoints)
        last = min(self._checkpoints - (0 if both else 1), oldest_reader)
        free = [segment for number, segment in self._removed if number <= last]
        self._removed = [(number, segment) for number, segment in self._removed if number > last]
        for segment in free:
            if segment.slot:
                self.cache.drop_slot(segment.slot)
            self.segments.release(segment)
        return free

    def _punch(self, freed: list[Segment]) -> None:
        for segment in freed:
            self.segments.storage.punch(segment.offset, segment.length)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep the segments that are in use now until the reader is done."""
        epoch = self._checkpoints
        self._readers[epoch] += 1
        try:
            yield
        finally:
            self._readers[epoch] -= 1
            if not self._readers[epoch]:
                del self._readers[epoch]

    def bound_leaves(self, lbamap: LbaMap) -> None:
        """Keep the leaves in memory within bounds; those of a commit in flight stay."""
        if len(lbamap.leaves) > LEAVES_MAX and not self._commit_lock.locked():
            lbamap.evict(LEAVES_MAX * 7 // 8)

    # Facts and upkeep

    def info(self) -> ImageInfo:
        """What there is to know of the image."""
        info = clear_info(
            self.superblock, self.path, file_bytes(self.path), len(self.key_area.slots()) if self.encrypted else 0
        )
        disks = [DiskInfo(v.name, v.size, v.map.mapped * BLOCK, self.stored_bytes) for v in self.volumes]
        return msgspec.structs.replace(info, disks=disks, statistics=self._describe_statistics())

    def _describe_statistics(self) -> dict[str, int | float]:
        counters: dict[str, int | float] = {**self.statistics}
        saved = self.statistics["bytes_in"] - self.statistics["bytes_stored"]
        ratio = self.statistics["bytes_in"] / (self.statistics["bytes_stored"] or 1)
        return counters | {"bytes_saved": saved, "ratio": round(ratio, 3)}

    async def check(self, progress: Progress | None = None) -> CheckReport:
        """Verify everything up to now, while the image is in use."""
        if self._log is not None:
            await self.flush()
            await self.checkpoint()
        async with self._checkpoint_lock:  # nothing is freed meanwhile
            master = self._loaded.keyring.master
            return await workers.run(
                check_storage, self.segments.storage, lambda _: master, progress, replay=self._log is None
            )

    @property
    def key_area(self) -> KeyArea:
        """The key slots."""
        return load_key_area(self.segments.storage)

    async def update_keys(self, change: Callable[[KeyArea], KeyArea]) -> None:
        """Replace the key slots by what `change` makes of them."""
        self._writable()
        async with self._checkpoint_lock:
            await workers.run(change_key_area, self.segments.storage, change)

    @property
    def encrypted(self) -> bool:
        """Whether the image has a key."""
        return self.superblock.encryption != ENCRYPTION_NONE

    @property
    def stored_bytes(self) -> int:
        """Bytes of the log segments that are in use."""
        return sum(state.used for state in self.segments.states.values() if state.kind == KIND_LOG)


_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def _usable(log: LogWriter, states: list[State]) -> int:
    return sum(map(log.usable, states))


def _write(log: LogWriter, frozen: list[tuple[Volume, Generation]], sync: bool) -> list[Change]:
    changes = [log.append(volume.number, g.blocks, list(g.zeroes)) for volume, g in frozen]
    if sync:
        log.sync()
    return changes
