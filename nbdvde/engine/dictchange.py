"""Changing the dictionaries of an open image: each change of table and contents is one transaction of their region."""

import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress

import trio

from nbdvde import workers
from nbdvde.engine.checkpointer import Checkpointer
from nbdvde.engine.cleaner import Cleaner
from nbdvde.engine.dictionaries import CONTENT_AT, FORM, REGION_BYTES, Dictionaries, Entry, Table
from nbdvde.engine.dictusers import Progress, Users, count_users
from nbdvde.engine.layout import BLOCK, DICTIONARIES, STATE_OPEN
from nbdvde.engine.mark import Tree
from nbdvde.engine.report import ClassReport
from nbdvde.engine.segments import Segments
from nbdvde.engine.training import Trained
from nbdvde.engine.volumes import Volumes
from nbdvde.engine.writer import Writer
from nbdvde.errors import DamageError, NoSpaceError, RefusedError

Keep = Callable[[Trained], Awaitable[int | str]]
"""Registers a dictionary, and answers its slot, or why it does not."""


async def train_each(classes: Iterator[Trained], keep: Keep) -> list[ClassReport]:
    """Train for one class after the other, and have `keep` register what pays. May be cancelled in between."""
    reports = []
    while trained := await workers.run(lambda: next(classes, None)):
        await trio.lowlevel.checkpoint()
        reports.append(class_report(trained, trained.why_not or await keep(trained)))
    return reports


def class_report(trained: Trained, kept: int | str | None) -> ClassReport:
    """What came of a class; `kept`: the slot of its dictionary, or why there is none."""
    saved = 1 - trained.trained_bytes / trained.plain_bytes if trained.plain_bytes else 0.0
    slot, note = (None, kept) if isinstance(kept, str) else (kept, "")
    without, with_it = (_ratio(trained.raw_bytes, size) for size in (trained.plain_bytes, trained.trained_bytes))
    return ClassReport(trained.name, trained.samples, without, with_it, round(saved, 4), slot, note)


def _ratio(raw: int, compressed: int) -> float:
    return round(raw / compressed, 3) if compressed else 0.0


class DictionaryChanges:
    """Registers, replaces and removes. All may raise UsageError, RefusedError, NoSpaceError, PoisonedError."""

    def __init__(
        self, dictionaries: Dictionaries, segments: Segments, volumes: Volumes, checkpointer: Checkpointer,
        cleaner: Cleaner,
    ) -> None:  # fmt: skip
        self._dictionaries, self._segments, self._volumes = dictionaries, segments, volumes
        self._checkpointer, self._cleaner = checkpointer, cleaner
        self._changing = trio.Lock()

    async def register(self, writer: Writer, content: bytes, samples: int, slot: int | None = None) -> Entry:
        """Put a dictionary into a free slot, the first one if none is named. New extents use it if that pays."""
        async with self._changing:
            table = self._table()
            slot = table.free_slot(slot)
            return await self._put(writer, table.adding(slot, content, samples, time.time_ns()), slot, content)

    async def replace(
        self, writer: Writer, slot: int, content: bytes, samples: int, progress: Progress
    ) -> Entry:  # fmt: skip
        """Put another dictionary in the place of one, which is kept as long as anything that is stored needs it."""
        async with self._changing:
            table = self._table()
            table.get(slot)
            entry = await self._put(writer, table.adding(slot, content, samples, time.time_ns()), slot, content)
            # What cannot be read may need any of them, and what is kept in vain can go next time.
            with suppress(DamageError, NoSpaceError):
                await self._drop_unneeded(writer, self._table(), await self._users(writer, progress))
            return entry

    async def remove(self, writer: Writer, slot: int, progress: Progress) -> None:
        """Take a dictionary away that no extent in use needs. `progress` gets segments looked at, and all."""
        async with self._changing:
            table, dictionaries = self._table(), self._dictionaries
            entry = table.get(slot)
            # From now on no extent can begin to need it.
            dictionaries.use(number for number in dictionaries.used if number != entry.number)
            try:
                users = await self._users(writer, progress)
                if needing := users.get(entry.number, Users()).used:
                    hint = "delete or overwrite what they hold, or train a better one with nbdvde dict replace"
                    raise RefusedError(f"dictionary {slot}", f"{needing} extents need it", hint)
                table = table.freeing(slot)
                await self._drop_unneeded(writer, table, users)
            finally:
                dictionaries.take(dictionaries.table, {})

    async def _drop_unneeded(self, writer: Writer, table: Table, users: Mapping[int, Users]) -> None:
        """Make a table durable without what is kept and no stored extent needs."""
        gone = [entry for entry in table.kept if entry.number not in users]
        holes = [(entry.offset, entry.offset + entry.blocks) for entry in gone]
        table = table.dropping(entry.number for entry in gone)
        await self._store(writer, table, {}, holes)
        self._dictionaries.take(table, {})

    async def _users(self, writer: Writer, progress: Progress) -> dict[int, Users]:
        """Who needs what, of everything that was written up to now."""
        checkpointer = self._checkpointer
        async with self._cleaner.lock:
            await writer.flush()
            cut = await checkpointer.run(writer, STATE_OPEN)
            with checkpointer.reading():
                trees = [Tree(volume.volume, volume.height, volume.root) for volume in cut.catalogue]
                extent_blocks = cut.superblock.extent_bytes // BLOCK
                return await workers.run(count_users, self._segments, trees, cut.entries, extent_blocks, progress)

    def _table(self) -> Table:
        if self._dictionaries.damaged:
            raise DamageError("dictionaries", self._dictionaries.damaged, "nbdvde check --salvage makes a sound image")
        return self._dictionaries.table

    async def _put(self, writer: Writer, table: Table, slot: int, content: bytes) -> Entry:
        entry = table.get(slot)
        if not self._checkpointer.superblock.incompatible & DICTIONARIES:
            await self._checkpointer.run(writer, STATE_OPEN, both=True, features=DICTIONARIES)
        pages = (content[at : at + BLOCK].ljust(BLOCK, b"\0") for at in range(0, len(content), BLOCK))
        await self._store(writer, table, dict(enumerate(pages, entry.offset)), ())
        self._dictionaries.take(table, {entry.number: content})
        return entry

    async def _store(
        self, writer: Writer, table: Table, contents: Mapping[int, bytes], holes: Sequence[tuple[int, int]]
    ) -> None:
        """Make a table durable, with the blocks of contents that are new, and holes for those that went."""
        records = table.pack()
        assert len(records) <= CONTENT_AT, "there is room for all records"
        volume = await self._volumes.region(FORM, REGION_BYTES)
        self._dictionaries.volume = volume.number
        with trio.CancelScope(shield=True):  # what is stored but not taken over would be overwritten by the next
            await volume.write_together({**dict(enumerate(records)), **contents}, holes)
            await writer.flush()
