"""The subject keys of an open image: made on demand, destroyed for good; see docs/decisions/0025."""

import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import trio

from nbdvde import workers
from nbdvde.engine.checkpointer import NO_SPACE, Checkpointer
from nbdvde.engine.layout import BLOCK, SUBJECT_KEYS
from nbdvde.engine.recovery import Loaded
from nbdvde.engine.subjectkeys import BLOCKS_MAX, NO_ERASURE, Erasure, Head
from nbdvde.engine.subjectstore import SubjectStore
from nbdvde.engine.writer import Writer
from nbdvde.errors import DamageError, NoSpaceError

T = TypeVar("T")
_BLOCKS = 16
"""Pages of a range at first: 1152 subjects."""


class Subjects:
    """Keys by the number of a disk and the UUID of a subject."""

    def __init__(
        self, loaded: Loaded, checkpointer: Checkpointer, writer: Callable[[], Writer],
        enable: Callable[[int], Awaitable[None]], finish: Callable[[int], Awaitable[None]],
        disks: Callable[[], set[int]], *, read_only: bool,
    ) -> None:  # fmt: skip
        """`writer` raises RefusedError when the image is read-only; `enable` sets an incompatible feature bit.

        `finish` has the region of a disk hold the record of its last erasure; `disks` answers their numbers.
        """
        self._finish, self._disks = finish, disks
        self._loaded, self._checkpointer, self._writer, self._enable = loaded, checkpointer, writer, enable
        self.read_only = read_only
        self._changing = trio.Lock()
        self._store = self._over(loaded.subjects) if loaded.subjects else None
        self._read = False

    def _over(self, head: Head) -> SubjectStore:
        storage, master = self._loaded.storage, self._loaded.keyring.master
        return SubjectStore(storage, master, head, self._sync, os.urandom)

    def _sync(self) -> None:
        self._writer().log.sync_storage()

    def settle(self, head: Head) -> None:
        """Finish what a crash interrupted; before anything else is written. Blocks; raises OSError."""
        storage, master = self._loaded.storage, self._loaded.keyring.master
        SubjectStore(storage, master, head, storage.sync, os.urandom).settle()

    @property
    def erasure(self) -> Erasure:
        """The last one; its region may not have its record yet."""
        return self._store.head.erasure if self._store else NO_ERASURE

    async def find(self, disk: int, subject: bytes) -> bytes | None:
        """The key of a subject, if it has one. Raises DamageError."""
        async with self._changing:
            return (await self._open()).find(disk, subject)

    async def create(self) -> None:
        """Have a place for keys. Raises NoSpaceError, PoisonedError, RefusedError."""
        async with self._changing:
            if self._store is None:
                await self._make()

    async def add(self, disk: int, subject: bytes) -> bytes:
        """Make a key for a subject that has none; durable. Raises NoSpaceError, PoisonedError, DamageError."""
        async with self._changing:
            store = await self._open()
            if store.full:
                await self._grow(store)
            return await self._write(partial(store.add, disk, subject))

    async def erase(self, erasure: Erasure, subject: bytes) -> None:
        """Destroy the key of a subject, and those of disks that are gone; durable.

        Raises PoisonedError; whether it was destroyed is only known then when the image is opened again.
        """
        if (before := self.erasure.disk) not in (0, erasure.disk):
            await self._finish(before)
        async with self._changing:
            store = await self._open()
            await self._write(partial(store.erase, erasure, subject, self._disks()))

    async def forget_disks(self) -> None:
        """Destroy the keys of disks that are gone; durable. Raises PoisonedError, DamageError."""
        if self._store is None:
            return
        async with self._changing:
            store, left = await self._open(), self._disks()
            if store.disks - left:
                await self._write(partial(store.keep, left))

    async def _open(self) -> SubjectStore:
        if self._store is None:
            hint = "restore the image from a backup"
            raise DamageError("subject keys", "both copies are damaged, or there are none", hint)
        if not self._read:
            await workers.run(self._store.load)
            self._read = True
        return self._store

    async def _make(self) -> None:
        """Only when the heads are durable they are announced: a crash before that leaves nothing."""
        offsets = await self._allocate(_BLOCKS)
        store = self._over(Head(self._loaded.superblock.uuid, 0, offsets, _BLOCKS, b""))
        await self._write(store.create)
        await self._enable(SUBJECT_KEYS)
        self._store, self._read = store, True

    async def _grow(self, store: SubjectStore) -> None:
        blocks, old = store.head.blocks * 2, store.head.ranges
        if blocks > BLOCKS_MAX:
            raise NoSpaceError("subject keys", "there is no room for more subjects", "use another image")
        offsets = await self._allocate(blocks)
        await self._write(partial(store.move, offsets, blocks))
        for offset, length in old:
            self._loaded.segments.release_range(offset, length)

    async def _allocate(self, blocks: int) -> tuple[int, int]:
        segments, length = self._loaded.segments, blocks * BLOCK
        a = segments.take_range(length)
        try:
            b = segments.take_range(length)
        except NoSpaceError:
            segments.release_range(a, length)
            raise
        try:
            for offset in (a, b):
                await workers.run(self._loaded.storage.allocate, offset, length)
        except OSError as error:
            segments.release_range(a, length)
            segments.release_range(b, length)
            if error.errno in NO_SPACE:
                raise NoSpaceError("image", "has no room for subject keys", "free space on the host") from None
            self._writer().log.poison(f"reserving space failed: {error.strerror}")
        return a, b

    async def _write(self, work: Callable[[], T]) -> T:
        """Change the file, to the end; no check of it is begun meanwhile."""
        writer = self._writer()
        async with self._checkpointer.lock:
            writer.refuse_if_poisoned()
            try:
                return await workers.run(work)  # which does not end before its time, whatever happens to the caller
            except OSError as error:
                writer.log.poison(f"writing subject keys failed: {error.strerror}")
                raise
