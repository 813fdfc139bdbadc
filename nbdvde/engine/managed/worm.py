"""The WORM region of a disk: data is appended, read and verified, and given up only when its retention has ended."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from time import monotonic_ns
from typing import TYPE_CHECKING, ClassVar, Self

import trio

from nbdvde import moment, workers
from nbdvde.disk import BLOCK, Buffer
from nbdvde.engine.managed.area import Area
from nbdvde.engine.regions import worm as rules
from nbdvde.engine.regions.form import GENERATION_MAX, Form
from nbdvde.engine.regions.pages import Pages
from nbdvde.engine.regions.worm import FORM, Header, Ledger, Record, shown
from nbdvde.engine.volume import Volume
from nbdvde.errors import FullError, RefusedError, UsageError
from nbdvde.moment import RetentionClock

if TYPE_CHECKING:
    from nbdvde.engine.managed.regions import Regions

APPEND_MAX = 4 << 20
"""Bytes of one record."""
_PAGES = 256
"""Blocks that are read at a time."""


@dataclass(frozen=True, slots=True)
class _State:
    """What is written; a change makes a new one."""

    header: Header
    pages: Pages
    ledger: Ledger


class Worm:
    """Data that nobody can change, and that nobody can remove before its retention ends.

    It is retained as the retention clock shows, which goes on only while the image is open for writing.
    """

    FORM: ClassVar[Form] = FORM

    def __init__(self, area: Area, state: _State) -> None:
        self._area, self._state = area, state
        self.gone = False
        """Whether it was deleted."""
        self.moved = trio.lowlevel.ParkingLot()
        """Who waits for the mark to move, or for the end."""
        self._changing = trio.Lock()
        self._since_ns = None if area.disk.writer is None else monotonic_ns()

    @classmethod
    async def load(cls, area: Area) -> Self:
        """See `Region`. Verifies the log, not the data."""
        slot = area.get(FORM)
        held = {number: await area.read(FORM, number) for number in {0, slot.used - 1}}
        header, pages = rules.opened(held.__getitem__, slot)
        ledger = Ledger()
        for first in range(0, pages.blocks, _PAGES):
            ledger = await workers.run(_following, ledger, await _records(area, pages, first))
        ledger.agree(header)
        return cls(area, _State(header, pages, ledger))

    @classmethod
    async def create(
        cls, regions: "Regions", disk: Volume, capacity: int, retention_ns: int, now_ns: int
    ) -> Self:  # fmt: skip
        """Make the WORM region of a disk, of `capacity` blocks, retained so many nanoseconds (0: for ever); durable.

        `now_ns`: since 1970.

        Raises UsageError, RefusedError when there is one, NoSpaceError, PoisonedError.
        """
        header = Header.new(capacity, retention_ns, now_ns)
        _, stored = Ledger().taking(Record(0, header.created_ns, 0, header.rules))
        header = replace(header, records=1)
        pages, blocks = Pages(FORM, header.pack()).adding(header.pack(), [stored])
        area = await regions.area(disk)
        await area.create(FORM, header.blocks, blocks, pages.blocks, flags=pages.generation)
        return await regions.get(cls, disk)

    # Facts

    @property
    def disk(self) -> Volume:
        """The one that it belongs to."""
        return self._area.disk

    @property
    def volume(self) -> Volume:
        """What it lies in, with the other regions of the disk."""
        return self._area.volume

    @property
    def read_only(self) -> bool:
        """Whether its image is open for reading only."""
        return self._since_ns is None

    @property
    def header(self) -> Header:
        """As it was written last."""
        return self._state.header

    @property
    def appends(self) -> int:
        """How many there were."""
        return self._state.ledger.records - self._state.ledger.about_rules

    @property
    def mark(self) -> int:
        """Blocks below it are written."""
        return self.header.mark

    @property
    def clock_ns(self) -> int:
        """The retention clock. Where somebody says what it shows, that is what counts, unless it showed more."""
        if said := moment.clock():
            return self.header.clock_ns if self._concerns_another() else max(self.header.clock_ns, said.shown_ns)
        running = 0 if self._since_ns is None else monotonic_ns() - self._since_ns
        return self.header.clock_ns + max(0, running)

    @property
    def clock(self) -> RetentionClock:
        """As others are told of it."""
        return RetentionClock(self.header.created_ns, self.clock_ns)

    @property
    def left_ns(self) -> int | None:
        """How long it is still retained, 0 when that has ended, None for ever."""
        return self.header.left_ns(self.clock_ns)

    @property
    def name(self) -> str:
        """As errors call it."""
        return f"WORM region of disk {self.disk.name}"

    def refuse_if_retained(self) -> None:
        """Raise RefusedError while it must not go."""
        left = self.left_ns
        if left is None:
            raise RefusedError(self.name, "is retained for ever", "nothing can be done that would remove it")
        if left:
            why = f"is retained for {shown(left)} of its clock, which goes on while the image is open for writing"
            raise RefusedError(self.name, why, "wait for the end")

    def refuse_if_gone(self) -> None:
        """Raise RefusedError when it was deleted."""
        if self.gone:
            raise RefusedError(self.name, "was deleted")

    # Changes

    async def append(self, data: Buffer, block: int | None = None) -> Record:
        """Append up to 4 MiB at the mark, in whole blocks; answers the record of it, durable. `block`: see `put`.

        Raises UsageError, FullError, NoSpaceError when the image is full, RefusedError, PoisonedError.
        """
        record = await self.put(data, block)
        await self.flush()
        return record

    async def put(self, data: Buffer, block: int | None = None) -> Record:
        """As `append`, not durable yet; with `block` only if the mark is there (RefusedError)."""
        if not 0 < len(data) <= APPEND_MAX:
            raise UsageError("data", f"is not 1 to {APPEND_MAX} bytes long", "append it in parts")
        digest = await workers.run(lambda: sha256(data).digest())
        async with self._changing:
            self.refuse_if_gone()
            header = self.header
            if block is not None and (block != header.mark or self._concerns_another()):
                raise RefusedError(self.name, "was appended to by somebody else, or made anew")
            clock_ns = self.clock_ns
            record = Record(header.mark, header.created_ns + clock_ns, len(data), digest)
            if header.mark + record.blocks > header.capacity:
                free = (header.capacity - header.mark) * BLOCK
                raise FullError(self.name, f"is full, {free} bytes are left", "make a larger one on another disk")
            after = replace(header, mark=header.mark + record.blocks, records=header.records + 1, clock_ns=clock_ns)
            page = bytes(data).ljust(record.blocks * BLOCK, b"\0")
            await self._change(after, record, {header.log_blocks + header.mark: page})
        self.moved.unpark_all()
        return record

    async def extend(self, retention_ns: int) -> None:
        """Retain it longer, counted from its creation; 0 is for ever. Durable.

        Raises RefusedError when that would be shorter, UsageError, NoSpaceError, PoisonedError.
        """
        rules.check_retention(retention_ns)
        async with self._changing:
            self.refuse_if_gone()
            header, ledger = self.header, self._state.ledger
            now = header.retention_ns
            if now == rules.FOREVER or (retention_ns != rules.FOREVER and retention_ns < now):
                raise RefusedError(self.name, "cannot be retained for a shorter time than it is", "give a longer one")
            if ledger.about_rules >= rules.RULES_MAX:
                raise RefusedError(self.name, f"was extended {rules.RULES_MAX - 1} times, there is no room for more")
            clock_ns = self.clock_ns
            after = replace(header, retention_ns=retention_ns, records=header.records + 1, clock_ns=clock_ns)
            await self._change(after, Record(header.mark, header.created_ns + clock_ns, 0, after.rules), {})
        await self.flush()

    async def tend(self) -> None:
        """Store the clock. Raises NoSpaceError, PoisonedError."""
        async with self._changing:
            if not self.gone and self._since_ns is not None:
                await self._change(replace(self.header, clock_ns=self.clock_ns), None, {})
        await self.flush()

    async def delete(self) -> None:
        """Give it up; durable. Raises RefusedError while it is retained, PoisonedError."""
        async with self._changing:
            self.refuse_if_gone()
            self.refuse_if_retained()
            self.gone = True
            try:
                with trio.CancelScope(shield=True):
                    await self._area.remove(FORM)
            except BaseException:
                self.gone = False
                raise
        self.end()

    def end(self) -> None:
        """See `regions.Awaited`."""
        self.gone = True
        self.moved.unpark_all()

    async def flush(self) -> None:
        """Make every append durable. Raises PoisonedError."""
        await self._area.flush()

    def _concerns_another(self) -> bool:
        """Whether what is asked for was meant for a region that is gone."""
        said = moment.clock()
        return said is not None and said.created_ns != self.header.created_ns

    async def _change(self, header: Header, record: Record | None, data: dict[int, bytes]) -> None:
        """Write all of it or nothing, so that no data lies below the mark without a record."""
        state, now_ns = self._state, monotonic_ns()
        if state.pages.generation == GENERATION_MAX:
            raise FullError(self.name, "was changed as often as it can be", "make another one on another disk")
        ledger, stored = state.ledger.taking(record) if record else (state.ledger, b"")
        pages, blocks = state.pages.adding(header.pack(), [stored] if record else [])
        await self._area.change(FORM, {**blocks, **data}, used=pages.blocks, flags=pages.generation)
        self._state = _State(header, pages, ledger)
        if self._since_ns is not None:
            self._since_ns = now_ns

    # Reading

    async def read(self, block: int, count: int) -> bytes:
        """Blocks; zeroes from the mark on. Raises DamageError, RefusedError."""
        self.refuse_if_gone()
        return await self._area.read(FORM, self.header.log_blocks + block, count)

    async def records(self) -> list[Record]:
        """All appends so far, in order. Raises DamageError, RefusedError."""
        async with self._changing:
            self.refuse_if_gone()
            pages, stored = self._state.pages, list[bytes]()
            for first in range(0, pages.blocks, _PAGES):
                stored += await _records(self._area, pages, first)
        return [record for record, _ in map(rules.parse, stored) if record.length]

    async def content(self, record: Record) -> bytes:
        """What was appended, verified. Raises DamageError."""
        data = (await self.read(record.block, record.blocks))[: record.length]
        if await workers.run(lambda: sha256(data).digest()) != record.sha256:
            raise FORM.damage(f"the data at block {record.block} is not what was appended")
        return data

    async def verify(self) -> int:
        """Verify the log and all data; answers how many appends there are. Raises DamageError."""
        async with self._changing:
            self.refuse_if_gone()
            await Worm.load(self._area)
        records = await self.records()
        for record in records:
            await self.content(record)
        return len(records)


def _following(ledger: Ledger, stored: Sequence[bytes]) -> Ledger:
    for one in stored:
        ledger = ledger.following(one)
    return ledger


async def _records(area: Area, pages: Pages, first: int) -> list[bytes]:
    """The records of some blocks of a log. Raises DamageError."""
    count = min(_PAGES, pages.blocks - first)
    return await workers.run(_cut, pages, first, await area.read(FORM, first, count))


def _cut(pages: Pages, first: int, data: bytes) -> list[bytes]:
    held = {first + at // BLOCK: data[at : at + BLOCK] for at in range(0, len(data), BLOCK)}
    return [record for _, record in pages.records(held.__getitem__, rules.length, first, first + len(held))]
