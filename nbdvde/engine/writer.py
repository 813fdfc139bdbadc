"""The way of writes into the log: admission, group commit, and segments made ready in time.

A write is admitted when the buffer has room for it and the log has allocated space for everything buffered;
only then is it acknowledged. A commit freezes what was written so far on every disk, appends it in a worker
thread and then changes the maps. FLUSH waits for a commit that covers it and for the sync behind it; whoever
flushes first commits for all who wait.
"""

import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TypeAlias

import trio

from nbdvde import workers
from nbdvde.engine.background import Background
from nbdvde.engine.buffer import Generation
from nbdvde.engine.groups import Change
from nbdvde.engine.layout import BLOCK, KIND_LOG, MIN_SEGMENT_BYTES, Operation
from nbdvde.engine.log import LogWriter
from nbdvde.engine.revision import Revision
from nbdvde.engine.segments import Segments, State
from nbdvde.engine.volume import Volume
from nbdvde.errors import NoSpaceError, PoisonedError

Frozen: TypeAlias = list[tuple[Volume, Generation]]

COMMIT_BYTES = 2 << 20
"""Buffered bytes that start a commit nobody waits for."""
_SYNC_AT_ONCE = 16 << 10
"""Up to so many buffered bytes, a flush appends and syncs in one go: the hop to a thread costs more than the next
flush could gain by appending meanwhile."""


class Writer:
    """Admits writes and commits them.

    `committed` is called after each commit, and must not wait; `reclaim` tries to free space and says whether it did;
    `keep_up` writes a checkpoint if one is due.
    """

    def __init__(
        self, segments: Segments, log: LogWriter, volumes: Sequence[Volume], background: Background,
        buffer_bytes: int, committed: Callable[[], None], reclaim: Callable[[], Awaitable[bool]],
        keep_up: Callable[[], Awaitable[None]],
    ) -> None:  # fmt: skip
        self.log = log
        self.commit_lock = trio.Lock()
        self.before_commit: list[Callable[[], None]] = []
        """Called when a commit begins; what they write without waiting is part of it."""
        self._segments, self._volumes, self._background = segments, volumes, background
        self._buffer_bytes, self._notify, self._reclaim, self._keep_up = buffer_bytes, committed, reclaim, keep_up
        self._admitted = 0
        """See `buffered`."""
        self._waiting = 0
        self._admission = trio.Lock()
        self._preparing = trio.Lock()
        self._sync_lock = trio.Lock()
        self._patience = workers.Patience()
        self._begun = self._appended = self._durable = 0
        """Numbers of the last commit that was begun, is in the log and the maps, and is synced."""

    @property
    def buffered(self) -> int:
        """Bytes in the write buffer, those of a commit in flight included."""
        return self._admitted

    # Admission

    def admit_nowait(self, payload: int, *, freeing: bool = False) -> bool:
        """Reserve memory and log space for `payload` bytes of blocks; False when that takes waiting.

        `freeing` says that they free space, and may use what is reserved for that.
        """
        if self._waiting or self.log.poisoned or not self._fits(payload, freeing=freeing):
            return False
        self._take(payload)
        return True

    async def admit(self, payload: int, *, freeing: bool = False) -> None:
        """As `admit_nowait`, waiting for commits and for segments. Raises NoSpaceError, PoisonedError."""
        self._waiting += 1
        try:
            async with self._admission:
                self.refuse_if_poisoned()
                while not self._fits(payload, freeing=freeing):
                    await self._make_room(payload, freeing=freeing)
                    self.refuse_if_poisoned()
                self._take(payload)
        finally:
            self._waiting -= 1

    def withdraw(self, payload: int) -> None:
        """Give a reservation back that was not used."""
        self._admitted -= payload

    def _take(self, payload: int) -> None:
        self._admitted += payload
        if self._admitted >= COMMIT_BYTES and not self.commit_lock.locked() and not self._background:
            self._background.start(self._commit_in_background)

    def _fits(self, payload: int, *, freeing: bool) -> bool:
        total = self._admitted + payload
        return (total <= self._buffer_bytes or not self._admitted) and self._has_space(total, freeing=freeing)

    def _has_space(self, total: int, *, freeing: bool) -> bool:
        return self._worst(total) <= self.log.room() and (freeing or not self._segments.space.in_reserve)

    def _worst(self, payload: int) -> int:
        """Bytes of log that buffered data takes at most: in a commit under way and the next one, of each disk."""
        return self.log.worst(payload, 2 * max(1, len(self._volumes)))

    async def _make_room(self, payload: int, *, freeing: bool) -> None:
        if not self._has_space(self._admitted + payload, freeing=freeing):
            try:
                await self._prepare(self._admitted + payload, freeing=freeing)
            except NoSpaceError:
                if self._admitted:
                    await self.commit()
                elif not await self._reclaim():
                    await self._prepare(self._admitted + payload, freeing=freeing, short=True)
            return
        async with holding(self.commit_lock):
            if not self._fits(payload, freeing=freeing):
                await self._commit(sync=False)

    def refuse_if_poisoned(self) -> None:
        """Raise PoisonedError after a failure of the device."""
        if self.log.poisoned:
            raise PoisonedError("image", self.log.poisoned, "it takes no more writes: mend the device and reopen it")

    # Segments

    async def _prepare(self, payload: int, *, freeing: bool = False, short: bool = False) -> None:
        """Allocate segments, or `short` ones, until the log has room for `payload` bytes of blocks.

        Raises NoSpaceError.
        """
        log = self.log
        if not freeing and self._segments.space.in_reserve:
            raise NoSpaceError("image", "its capacity is used up", "trim or delete data")
        with trio.CancelScope(shield=True):
            async with self._preparing:
                added: list[State] = []
                try:
                    while self._worst(payload) > log.room() + sum(map(log.usable, added)):
                        added.append(await self._allocate(freeing=freeing, short=short))
                finally:
                    if added:
                        # A link may name a segment only once its space is durable.
                        await workers.run(log.sync_storage)
                        log.ready.extend(added)

    async def _allocate(self, *, freeing: bool, short: bool) -> State:
        """A log segment, if `short` then a shorter one if there is no room for a whole one."""
        length = self._segments.segment_bytes
        while True:
            try:
                return await allocate(self._segments, length, reserved=freeing)
            except NoSpaceError:
                length = length // 2 // BLOCK * BLOCK
                if not short or length < self.log.shortest:
                    raise

    async def roll(self) -> None:
        """Have the log leave the open segment, if it holds anything and there is space. Raises PoisonedError."""
        log = self.log
        async with holding(self.commit_lock):
            self.refuse_if_poisoned()
            if not log.state.units:
                return
            with trio.CancelScope(shield=True):
                with suppress(NoSpaceError):
                    async with self._preparing:
                        added = await allocate(self._segments, self._segments.segment_bytes, reserved=False)
                        await workers.run(log.sync_storage)
                        log.ready.append(added)
                # What is admitted has to fit without the rest of the open one.
                if log.ready and log.room() - log.usable(log.state) >= self._worst(self._admitted):
                    await workers.run(log.roll)

    # Commits

    def mark(self) -> int:
        """Number of the commit that has, or will have, the last write accepted so far."""
        return self._begun + any(volume.active for volume in self._volumes)

    def flush_nowait(self, mark: int) -> bool:
        """Whether everything up to `mark` is durable already."""
        return self._durable >= mark and not self.log.poisoned

    async def flush(self, mark: int | None = None, *, alone: bool = False) -> None:
        """Make everything up to `mark`, or accepted so far, durable. Raises PoisonedError.

        While one flush syncs, the next one can append already.
        """
        self.refuse_if_poisoned()
        target = self.mark() if mark is None else mark
        async with holding(self.commit_lock):
            if self._appended < target:
                sync = self._admitted <= _SYNC_AT_ONCE and not self._sync_lock.locked()
                await self._commit(sync=sync, patient=alone and sync)
        async with holding(self._sync_lock):
            if self._durable < target:
                await self._sync()
        self.refuse_if_poisoned()

    async def _sync(self) -> None:
        covers = self._appended
        with trio.CancelScope(shield=True):
            await workers.run(self.log.sync)
        self._durable = max(self._durable, covers)

    async def settle(self) -> None:
        """Commit what is buffered, and write a checkpoint if one is due. Raises NoSpaceError, PoisonedError."""
        await self.commit()
        await self._keep_up()

    async def operate(self, operation: Operation, apply: Callable[[], None], *, freeing: bool = False) -> None:
        """Commit what was written before, log an operation on the catalogue, and `apply` it; durable then.

        Raises NoSpaceError (nothing has changed then) and PoisonedError.
        """
        await self.admit(BLOCK, freeing=freeing)
        try:
            async with holding(self.commit_lock):
                await self._commit(sync=False)
                with trio.CancelScope(shield=True):
                    await self._operate(operation, apply)
        finally:
            self.withdraw(BLOCK)
        self._notify()

    async def revise(self, revision: Revision) -> int:
        """Have blocks lie elsewhere, as far as nobody wrote them meanwhile; answers how many do. Not durable yet.

        Raises DamageError (nothing has changed then), NoSpaceError, PoisonedError.
        """
        if not len(revision.blocks):
            return 0
        cost, volume = revision.cost, revision.volume
        await self.admit(cost, freeing=not revision.pages)
        try:
            async with holding(self.commit_lock):
                self.refuse_if_poisoned()
                with trio.CancelScope(shield=True):
                    chosen = await revision.still() if volume in self._volumes else []
                    moved = await self._revise(revision, chosen) if chosen else 0
        finally:
            self.withdraw(cost)
        self._notify()
        return moved

    async def _revise(self, revision: Revision, chosen: Sequence[int]) -> int:
        log, volume = self.log, revision.volume
        try:
            if revision.pages:
                change = await workers.run(log.store_again, volume.number, revision.stored(chosen))
            elif split := revision.referring(chosen):
                change = await workers.run(log.refer, volume.number, split)
            else:
                return 0
            await volume.apply(change)
        except BaseException as error:
            log.poisoned = log.poisoned or f"moving blocks failed: {error!r}"
            raise
        return len(change.blocks)

    async def _operate(self, operation: Operation, apply: Callable[[], None]) -> None:
        self._begun += 1
        try:
            await workers.run(self.log.operate, operation)
            apply()
        except BaseException as error:
            self.log.poisoned = self.log.poisoned or f"an operation failed: {error!r}"
            raise
        self._appended = self._durable = self._begun

    async def commit(self) -> None:
        """Have everything accepted so far in the log and in the maps. Raises PoisonedError."""
        async with holding(self.commit_lock):
            await self._commit(sync=False)

    async def _commit_in_background(self) -> None:
        while self._admitted >= COMMIT_BYTES and any(volume.active for volume in self._volumes):
            await self.commit()
            with suppress(NoSpaceError):  # whoever writes next is told
                await self._prepare(self._buffer_bytes)

    async def _commit(self, *, sync: bool, patient: bool = False) -> None:
        """Append what is buffered, and sync in the same go. The commit lock is held; not to be cancelled half-way."""
        self.refuse_if_poisoned()
        with trio.CancelScope(shield=True):
            self._begun += 1
            for call in self.before_commit:
                call()
            frozen = [(volume, g) for volume in self._volumes if (g := volume.freeze())]
            try:
                for volume, generation in frozen:
                    await volume.prepare(generation)
                if patient:
                    await self._append_patiently(frozen)
                else:
                    await _apply(frozen, await workers.run(_append, self.log, frozen, sync))
                for volume, _ in frozen:
                    volume.thaw()
            except BaseException as error:
                # The frozen blocks stay readable; nothing is written after this.
                self.log.poisoned = self.log.poisoned or f"a commit failed: {error!r}"
                raise
            self._admitted -= sum(generation.payload for _, generation in frozen)
            self._appended = self._begun
            if sync:
                self._durable = self._begun
        self._notify()

    async def _append_patiently(self, frozen: Frozen) -> None:
        """Append and sync a small commit; only what takes I/O goes to a thread, and the maps are changed meanwhile.

        That is early, but reads are served from what is frozen, and nothing else looks at the maps during a commit.
        """
        changes = [self.log.append(volume.number, generation, write=False) for volume, generation in frozen]
        finished = self._patience.begin(self.log.finish)
        try:
            await _apply(frozen, changes)
        finally:
            await finished


class holding:  # noqa: N801 - used like a function
    """As `async with lock`, a round of the event loop faster while nobody holds it."""

    def __init__(self, lock: trio.Lock) -> None:
        self._lock = lock

    async def __aenter__(self) -> None:
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()


async def allocate_first(segments: Segments) -> State:
    """A log segment to begin with: a short one if need be, so that a full image can be opened and trimmed."""
    length = segments.segment_bytes
    while length > MIN_SEGMENT_BYTES:
        try:
            return await allocate(segments, length)
        except NoSpaceError:
            length = max(MIN_SEGMENT_BYTES, length // 8 // BLOCK * BLOCK)
    return await allocate(segments, length)


async def allocate(segments: Segments, length: int, *, reserved: bool = True) -> State:
    """A fresh log segment with its space reserved on the host, also of what writes may not use. Raises NoSpaceError."""
    state = segments.new(KIND_LOG, length, os.urandom(32), reserved=reserved)
    try:
        await workers.run(segments.storage.allocate, state.segment.offset, state.segment.length)
    except OSError as error:
        segments.abandon(state)
        raise NoSpaceError("image", f"cannot grow: {error.strerror}", "free space on the host") from None
    return state


async def _apply(frozen: Frozen, changes: Sequence[Change]) -> None:
    for (volume, _), change in zip(frozen, changes, strict=True):
        await volume.apply(change)


def _append(log: LogWriter, frozen: Frozen, sync: bool) -> list[Change]:
    changes = [log.append(volume.number, generation) for volume, generation in frozen]
    if sync:
        log.sync()
    return changes
