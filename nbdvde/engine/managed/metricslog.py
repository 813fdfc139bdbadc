"""The metrics log of a disk in an open image: samples are added to it, and questions asked."""

from collections.abc import Iterable, Sequence
from typing import ClassVar, Self

import trio

from nbdvde import workers
from nbdvde.engine.layout import BLOCK
from nbdvde.engine.managed.area import Area
from nbdvde.engine.regions.form import Form
from nbdvde.engine.regions.query import Answer, Extent, Question, Series, ask, extents
from nbdvde.engine.regions.samples import FORM, Sample, rows_of
from nbdvde.engine.regions.tiers import (
    CAPACITY,
    CAPACITY_MAX,
    CAPACITY_MIN,
    THRESHOLD,
    THRESHOLD_MAX,
    THRESHOLD_MIN,
    Change,
    Head,
    History,
)
from nbdvde.errors import NbdvdeError, RefusedError, UsageError

_READ_BLOCKS = 256
"""Blocks of the log that are read at a time."""


class MetricsLog:
    """All of it is in memory, as much as its capacity at most."""

    FORM: ClassVar[Form] = FORM

    def __init__(self, area: Area, history: History) -> None:
        """Use `create`, or `image.regions.get(MetricsLog, disk)`."""
        self._area = area
        self._changing = trio.Lock()
        self.history = history
        """Never changed, but replaced by another: who holds it can ask it for as long as it takes."""
        self._gone = False

    @classmethod
    async def create(cls, area: Area, capacity: int = CAPACITY, threshold: float = THRESHOLD) -> None:
        """Make one of `capacity` bytes at most; durable.

        Raises UsageError, RefusedError, NoSpaceError, PoisonedError.
        """
        if not CAPACITY_MIN <= capacity <= CAPACITY_MAX or capacity % BLOCK:
            limits = f"{CAPACITY_MIN >> 10} KiB to {CAPACITY_MAX >> 30} GiB"
            raise UsageError(f"capacity {capacity}", f"is not a multiple of {BLOCK} from {limits}")
        if not THRESHOLD_MIN <= threshold <= THRESHOLD_MAX:
            raise UsageError(f"threshold {threshold}", f"is not between {THRESHOLD_MIN} and {THRESHOLD_MAX}")
        _, change = History.create(capacity, threshold)
        await area.create(FORM, capacity // BLOCK, change.blocks, capacity // BLOCK)

    @classmethod
    async def load(cls, area: Area) -> Self:
        """That of a disk, which has one. Raises DamageError."""
        first = await area.read(FORM, 0)
        blocks = {0: first}
        for start, stop in Head.unpack(first).runs():
            for at in range(start, stop, _READ_BLOCKS):
                count = min(stop - at, _READ_BLOCKS)
                data = await area.read(FORM, at, count)
                blocks |= {at + number: data[number * BLOCK : (number + 1) * BLOCK] for number in range(count)}

        def read(start: int, count: int) -> bytes:
            return b"".join(blocks[start + number] for number in range(count))

        return cls(area, await workers.run(History.load, read))

    async def append(self, samples: Iterable[Sample]) -> None:
        """Add samples, of any metrics and times. They are durable with the next flush of anything in the image.

        Cancelled, or when an error ends it, some of them may be there, in their order. Raises UsageError before
        anything is added, NoSpaceError, RefusedError, PoisonedError.
        """
        rows = rows_of(samples)
        async with self._changing:
            if self._gone:
                raise RefusedError(f"metrics log of {self._area.disk.name}", "was deleted")
            await self._take_together()  # what an error kept from being done before
            while len(rows):
                after, change, taken = self.history.adding(rows)
                await self._write(after, change)
                rows = rows[taken:]
                await self._take_together()

    async def _take_together(self) -> None:
        """Have room in every tier."""
        while self.history.is_due and (step := await workers.run(self.history.stepped)):
            await self._write(*step)

    async def _write(self, after: History, change: Change) -> None:
        await self._area.change(FORM, change.blocks, holes=change.holes)
        self.history = after

    async def delete(self) -> None:
        """Give up the log and all it has; durable. Raises RefusedError, PoisonedError."""
        async with self._changing:
            self._gone = True  # before its blocks are those of another
            try:
                with trio.CancelScope(shield=True):
                    await self._area.remove(FORM)
            except NbdvdeError:
                self._gone = False
                raise

    async def flush(self) -> None:
        """Make every sample durable."""
        await self._area.flush()

    async def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """The answers, all from one moment."""
        history = self.history
        return await workers.run(lambda: [ask(history, question) for question in questions])

    async def series(self) -> dict[Series, Extent]:
        """What there is, by metric and aggregation."""
        return await workers.run(extents, self.history)
