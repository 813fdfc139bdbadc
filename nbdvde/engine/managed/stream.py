"""The stream of a disk: entries are appended behind the head and read by their positions, by many at the same time."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import trio

from nbdvde.disk import BLOCK, Buffer
from nbdvde.engine.managed.area import Area
from nbdvde.engine.regions.form import GENERATION_MAX, ROOM, Form
from nbdvde.engine.regions.stream import FORM, INCREMENT, Ring, StreamPolicy, lengths_in, with_lengths
from nbdvde.engine.volume import Volume
from nbdvde.errors import FullError, NbdvdeError, RefusedError, UsageError

if TYPE_CHECKING:
    from nbdvde.engine.managed.regions import Regions

BATCH = 1024
"""Entries in a transaction, at most: 4 MiB."""
READ = 256
"""Entries that are read at a time, by default."""


class _Batch:
    """Entries that become durable together."""

    def __init__(self) -> None:
        self.entries: list[Buffer] = []
        self.first = 0
        """Position of the first one, once it is done."""
        self.error: NbdvdeError | None = None
        self.done = trio.Event()


class Stream:
    """A ring of entries of 0 to 4096 bytes.

    Entry N is at position N for ever: it can be read until it is overwritten, or the tail is advanced beyond it. Only
    what is durable can be read. What many append at the same time becomes durable in one go.
    """

    FORM: ClassVar[Form] = FORM

    def __init__(self, area: Area, ring: Ring, generation: int) -> None:
        self._area, self._generation = area, generation
        self.ring = ring
        """As it was written last; the newest entries may not be durable yet."""
        self.head, self.tail = ring.head, ring.tail
        """Positions of the next entry, and of the oldest one: all between them are durable, and can be read."""
        self.gone = False
        """Whether it was deleted."""
        self._batch = _Batch()
        self._pending = 0
        """Entries that have a place but are not in the ring yet."""
        self._changing, self._turns = trio.Lock(), trio.Semaphore(2)
        self._room, self._news = trio.lowlevel.ParkingLot(), trio.lowlevel.ParkingLot()

    @classmethod
    async def load(cls, area: Area) -> Self:
        """See `Region`."""
        body, generation = FORM.opened(await area.read(FORM, 0))
        return cls(area, Ring.unpack(body), generation)

    @classmethod
    async def create(
        cls, regions: "Regions", disk: Volume, capacity: int, *, policy: StreamPolicy = StreamPolicy.OVERWRITE,
        increment: int = INCREMENT,
    ) -> Self:  # fmt: skip
        """Make the stream of a disk: `capacity` entries at most, in blocks allocated `increment` at a time; durable.

        Raises UsageError, RefusedError when there is one, NoSpaceError, PoisonedError.
        """
        ring = Ring.new(capacity, increment, policy)
        area = await regions.area(disk)
        await area.create(FORM, ring.blocks, {0: FORM.block(ring.pack(), 0)}, 1 + ring.length_blocks)
        return await regions.get(cls, disk)

    # Appending

    async def append(self, entry: Buffer) -> int:
        """Append an entry; answers its position once it is durable. See `append_many`."""
        return (await self.append_many((entry,)))[0]

    async def append_many(self, entries: Sequence[Buffer], *, wait: bool = True) -> list[int]:
        """Append entries in this order; answers their positions once all are durable.

        1024 at a time, or as many as the stream takes, are durable all or none. In a full stream the policy decides;
        without `wait` one that would wait rejects them.
        Who is cancelled may find all, some or none of them in the stream. Raises UsageError for an entry of more than
        4096 bytes, FullError when the stream rejects them (then it has none of them), NoSpaceError when the image is
        full, RefusedError when the stream is deleted or the image is read-only, PoisonedError.
        """
        if any(len(entry) > BLOCK for entry in entries):
            raise UsageError("entry", f"is longer than {BLOCK} bytes", "append it in parts")
        most = min(BATCH, self.ring.capacity)
        parts = [entries[at : at + most] for at in range(0, len(entries), most)]
        rejects = self.ring.policy is StreamPolicy.REJECT or (self.ring.policy is StreamPolicy.WAIT and not wait)
        left = self._reserve(len(entries)) if rejects else 0
        positions: list[int] = []
        try:
            for part in parts:
                if left:
                    left -= len(part)
                else:
                    await self._wait_for_room(len(part))
                positions += await self._join(part, most)
        finally:
            self._pending -= left
        return positions

    def _reserve(self, count: int) -> int:
        """Keep places for entries; answers how many."""
        if self.ring.entries + self._pending + count > self.ring.capacity:
            why = f"is full, with {self.ring.entries} of {self.ring.capacity} entries"
            served = ", or serve the image to wait" if self.ring.policy is StreamPolicy.WAIT else ""
            raise FullError(self._name, why, f"advance its tail behind what was read{served}")
        self._pending += count
        return count

    async def wait_for_room(self, count: int) -> None:
        """Wait until so many entries, as many as there can be at most, can be appended. Raises RefusedError."""
        self.refuse_if_gone()
        while self.ring.entries + self._pending + count > self.ring.capacity:
            await self._room.park()
            self.refuse_if_gone()

    async def _wait_for_room(self, count: int) -> None:
        self.refuse_if_gone()
        if self.ring.policy is StreamPolicy.WAIT:
            await self.wait_for_room(count)
        self._pending += count

    async def _join(self, part: Sequence[Buffer], most: int) -> range:
        """Have entries appended with what others append now. Whoever comes first does it for all."""
        if len(self._batch.entries) + len(part) > most:
            self._batch = _Batch()
        batch = self._batch
        at = len(batch.entries)
        batch.entries.extend(part)
        if at:
            await batch.done.wait()
        else:
            with trio.CancelScope(shield=True):
                await self._settle(batch)
        if batch.error:
            raise type(batch.error)(*batch.error.args)
        return range(batch.first + at, batch.first + at + len(part))

    async def _settle(self, batch: _Batch) -> None:
        """Write a batch and make it durable. The next one can be written while this one is synced."""
        try:
            async with self._turns:
                await self._write(batch)
                await self._area.flush()
            self.head = max(self.head, batch.first + len(batch.entries))
            self._news.unpark_all()
        except NbdvdeError as error:
            batch.error = error
        except BaseException as error:
            batch.error = NbdvdeError(self._name, f"internal error: {error!r}")
            raise
        finally:
            batch.done.set()

    async def _write(self, batch: _Batch) -> None:
        async with self._changing:
            if self._batch is batch:
                self._batch = _Batch()
            try:
                self.refuse_if_gone()
                batch.first = self.ring.head
                await self._append(batch.entries)
            finally:
                self._pending -= len(batch.entries)
                self._room.unpark_all()

    async def _append(self, entries: Sequence[Buffer]) -> None:
        before = self.ring
        after = before.appending(len(entries))
        lengths = list(map(len, entries))
        written: dict[int, bytes] = {}
        for block, index, first, count in after.length_runs(before.head, after.head):
            body = written.get(block) or await self._lengths(block)
            at = first - before.head
            written[block] = with_lengths(body, index, lengths[at : at + count])
        blocks = {block: FORM.block(body, self._next) for block, body in written.items()}
        blocks |= self._placed(after, before.head, entries)
        await self._change(after, blocks)

    def _placed(self, ring: Ring, first: int, entries: Sequence[Buffer]) -> Iterator[tuple[int, bytes]]:
        """(first block, contents) of where entries go."""
        at = 0
        for block, count in ring.runs(first, first + len(entries)):
            pages = (e if len(e) == BLOCK else bytes(e).ljust(BLOCK, b"\0") for e in entries[at : at + count])
            yield block, b"".join(pages)
            at += count

    # Reading

    async def try_read(self, position: int) -> bytes | None:
        """The entry at a position; None when it is not there any more, or not yet. Raises as `read`."""
        found = await self.read(position, 1)
        return found[0][1] if found and found[0][0] == position else None

    async def read(self, start: int, count: int = READ) -> list[tuple[int, bytes]]:
        """(position, entry) from a position on, or from the oldest one that there is, `count` at most.

        Raises DamageError, RefusedError when the stream is deleted.
        """
        first = max(start, self.tail)
        stop = min(self.head, first + count)
        self.refuse_if_gone()
        if first >= stop:
            return []
        pages, lengths = await self.pages(first, stop), list[int]()
        for block, index, _, number in self.ring.length_runs(first, stop):
            lengths += lengths_in(await self._lengths(block), index, number)
        self.refuse_if_gone()
        # What was overwritten while it was read is no more.
        kept = range(max(first, self.tail), stop)
        offsets = ((position, (position - first) * BLOCK) for position in kept)
        return [(position, pages[at : at + lengths[position - first]]) for position, at in offsets]

    async def pages(self, start: int, stop: int) -> bytes:
        """The blocks of the entries from one position to another, whatever they hold by now. Raises DamageError."""
        return b"".join([await self._area.read(FORM, block, count) for block, count in self.ring.runs(start, stop)])

    async def wait(self, position: int) -> None:
        """Wait until the entry of a position is there, or was. Raises RefusedError when the stream is deleted."""
        self.refuse_if_gone()
        while self.head <= position:
            await self._news.park()
            self.refuse_if_gone()

    # Giving up

    async def advance_read_tail(self, position: int) -> None:
        """Give up the entries before a position, and the space that they take; durable. Does nothing to older ones.

        Raises UsageError beyond the head, RefusedError, NoSpaceError, PoisonedError.
        """
        async with self._changing:
            self.refuse_if_gone()
            self.refuse_beyond(position)
            if position > self.ring.tail:
                await self._advance(position)

    async def reset(self) -> None:
        """Give up all entries; positions go on, and what is allocated stays. Durable. Raises as `advance_read_tail`."""
        async with self._changing:
            self.refuse_if_gone()
            await self._advance(self.ring.head)

    async def _advance(self, position: int) -> None:
        gone = [(block, block + count) for block, count in self.ring.runs(self.ring.tail, position)]
        with trio.CancelScope(shield=True):
            await self._change(self.ring.advancing(position), {}, gone)
            await self._area.flush()
        self._room.unpark_all()

    async def delete(self) -> None:
        """Give up the stream itself; durable. Who waits for entries is refused. Raises RefusedError, PoisonedError."""
        async with self._changing:
            self.refuse_if_gone()
            self.gone = True  # before the places are those of something else
            try:
                with trio.CancelScope(shield=True):
                    await self._area.remove(FORM)
            except NbdvdeError:
                self.gone = False
                raise
            self.end()

    def end(self) -> None:
        """See `regions.Awaited`."""
        self.gone = True
        self._room.unpark_all()
        self._news.unpark_all()

    # Blocks

    @property
    def disk(self) -> Volume:
        """The one that it belongs to."""
        return self._area.disk

    @property
    def _name(self) -> str:
        return f"stream of disk {self.disk.name}"

    @property
    def _next(self) -> int:
        """The generation of what is written next; at its end it stays the same."""
        return min(self._generation + 1, GENERATION_MAX)

    def refuse_if_gone(self) -> None:
        """Raise RefusedError when it was deleted."""
        if self.gone:
            raise RefusedError(self._name, "was deleted")

    def refuse_beyond(self, position: int) -> None:
        """Raise UsageError for a position behind that of the next entry."""
        if position > self.head:
            raise UsageError(f"position {position}", f"is beyond the head of the stream, {self.head}")

    async def _lengths(self, block: int) -> bytes:
        page = await self._area.read(FORM, block)
        return FORM.opened(page)[0] if page.strip(b"\0") else bytes(ROOM)

    async def _change(self, after: Ring, blocks: dict[int, bytes], holes: Sequence[tuple[int, int]] = ()) -> None:
        """Write all of it, with the header, or nothing; not durable yet."""
        generation = self._next
        self.tail = after.tail  # before the write, so that nobody takes the new entry of a place for the old one
        try:
            await self._area.change(FORM, {0: FORM.block(after.pack(), generation), **blocks}, holes=holes)
        except BaseException:
            self.tail = self.ring.tail
            raise
        self.ring, self._generation = after, generation
