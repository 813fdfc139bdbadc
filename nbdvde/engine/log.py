"""The log: groups appended to segments, each one record and the extents it places.

    group = header 48 | record | extents …          at a multiple of 4096 in its segment, and as long
    link  = the last two blocks of the segment: where its groups end and where the log goes on

One writer at a time (a worker thread), which takes its segments from `ready`. What is written becomes
durable with `sync`. An error of the device poisons the log: nothing is appended or synced after it.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from blake3 import blake3

from nbdvde import workers
from nbdvde.disk import BLOCK
from nbdvde.engine.ahead import Ahead, Packed
from nbdvde.engine.buffer import Generation
from nbdvde.engine.dedup import PRINT_BYTES
from nbdvde.engine.dictionaries import Choice, Dictionaries
from nbdvde.engine.duplicates import Duplicates, Split, nothing_shared
from nbdvde.engine.extent import FRAME_BYTES, Compressor, is_compressed
from nbdvde.engine.groups import Change, Part, enter, entries_of, frames_of, runs_of, without_zeroes, worst_group
from nbdvde.engine.layout import (
    FRAME_BLOCKS,
    GROUP_BLOCKS_MAX,
    HEADER_BYTES,
    LINK_BYTES,
    TAG_BYTES,
    Domain,
    GroupHeader,
    Kind,
    Link,
    LogPoint,
    Operation,
    Record,
)
from nbdvde.engine.segments import State, log_room
from nbdvde.engine.storage import Storage
from nbdvde.errors import PoisonedError
from nbdvde.metrics import Histogram

PARALLEL_BLOCKS = 128
"""From here on sealing is spread over threads. With 32, random 4 KiB writes with a flush each 32 were 4 % slower."""
_SMALL_GROUP = 32 << 10
_LARGE_WRITE = 256 << 10
"""From here on the device is told to begin at once: a sync of 1.5 MiB then takes 0.2 ms instead of 1.5."""
_ZEROES_AHEAD = 256 << 10
"""About forty commits of one block: what they save pays for writing it."""
_ZEROES = bytes(_ZEROES_AHEAD)


@dataclass(slots=True)
class Counters:
    """What sealing did so far; layout.STATISTICS names the fields that an image keeps."""

    extents_sealed: int = 0
    extents_compressed: int = 0
    blocks_zero: int = 0
    bytes_in: int = 0
    bytes_stored: int = 0
    seal_ns: int = 0
    commits: int = 0
    blocks_shared: int = 0


class LogWriter:
    """Appends transactions. `point` is where the next group goes."""

    def __init__(
        self, storage: Storage, state: State, *, sequence: int, chain: bytes, epoch: int, level: int,
        extent_blocks: int, duplicates: Duplicates | None = None, dictionaries: Dictionaries | None = None,
    ) -> None:  # fmt: skip
        self._duplicates, self._dictionaries = duplicates, dictionaries or Dictionaries()
        self._storage, self.state, self._epoch = storage, state, epoch
        state.linked = True
        self._extent_blocks = extent_blocks
        self._compressor = workers.PerThread(lambda: Compressor(level, self._dictionaries))
        self._unshared = True
        """Whether nothing of the last large transaction was stored already."""
        self._sequence, self._chain = sequence, chain
        self._written = self._synced = sequence
        """Groups below these numbers are written, and durable."""
        self._writing = True
        self._unwritten: list[tuple[int, list[bytes]]] = []
        """(offset in the image, buffers) of what is only sealed, in order."""
        room = log_room(state.segment) // BLOCK
        # Whole extents, and so few that little is lost at the end of a segment, where it is long enough for that.
        self._part_blocks = min(GROUP_BLOCKS_MAX, room // 4 // extent_blocks * extent_blocks or room // 2)
        self._waste = worst_group(self._part_blocks, self._part_blocks, 0) - BLOCK
        self._packs_ahead = level > 0 and not (extent_blocks % FRAME_BLOCKS or self._part_blocks % FRAME_BLOCKS)
        self.shortest = 2 * self._waste + LINK_BYTES
        """Bytes of the shortest segment that is worth going on in."""
        self.ready: deque[State] = deque()
        """Allocated, durable segments to go on in."""
        self.counters = Counters()
        self.syncs = Histogram()
        """How long they took."""
        self.poisoned: str | None = None
        self._syncing = workers.Lock()
        self._small = False
        """Whether the last group was a small one."""
        self._zeroed = 0
        """Up to here the open segment was written with zeroes ahead of the log."""

    @property
    def point(self) -> LogPoint:
        """Where the next group will lie."""
        return LogPoint(self.state.segment, self.state.used, self.state.units, self._sequence, self._chain)

    def room(self) -> int:
        """Bytes that groups can surely still take, in the open segment and the ready ones.

        At the end of each a largest group may not fit any more.
        """
        # The copy is made in one step: a worker thread may be taking a segment.
        return self.usable(self.state) + sum(map(self.usable, tuple(self.ready)))

    def usable(self, state: State) -> int:
        """Bytes of a segment that groups can surely take."""
        return max(0, log_room(state.segment) - state.used - self._waste)

    def worst(self, payload: int, transactions: int) -> int:
        """Bytes that so many bytes of whole blocks take at most in the log, in so many transactions."""
        groups = payload // (self._part_blocks * BLOCK) + 2 * transactions
        return payload + payload // 64 + groups * 2 * BLOCK

    def append(self, volume: int, written: Generation, *, write: bool = True) -> Change:
        """Seal what was written to a volume as one transaction, and write it. It is atomic, and durable after `sync`.

        Without `write` it is only sealed, which takes no I/O, and `finish` has to follow.
        """
        self._refuse_if_poisoned()
        self._writing = write
        begun = time.monotonic_ns()
        kept, zero_ranges = without_zeroes(written)
        self.counters.blocks_zero += len(written.blocks) - len(kept)
        split, ahead = self._split(volume, written, kept, load=write)
        entries = self._transaction(volume, written, split, zero_ranges, ahead)
        self.counters.commits += 1
        self.counters.bytes_in += len(kept) * BLOCK
        self.counters.seal_ns += time.monotonic_ns() - begun
        return Change(zero_ranges, kept, entries)

    def store_again(self, volume: int, written: Generation) -> Change:
        """As `append`, of blocks that a volume holds already: nothing of it becomes a reference."""
        self._refuse_if_poisoned()
        self._writing = True
        blocks = sorted(written.blocks)
        split = self._duplicates.stored(volume, written, blocks) if self._duplicates else nothing_shared(blocks)
        return Change((), blocks, self._transaction(volume, written, split, ()))

    def refer(self, volume: int, split: Split) -> Change:
        """As `append`, of references alone."""
        self._refuse_if_poisoned()
        self._writing = True
        return Change((), split.shared, self._transaction(volume, Generation(), split, ()))

    def _split(
        self, volume: int, written: Generation, blocks: Sequence[int], *, load: bool
    ) -> tuple[Split, Ahead | None]:
        """What is stored already; meanwhile all of it is compressed, unless that was in vain the last time."""
        if self._duplicates is None:
            return nothing_shared(blocks), None
        ahead = self._ahead(written, blocks) if self._unshared else None
        split = self._duplicates.split(volume, written, blocks, load=load)
        if len(blocks) >= PARALLEL_BLOCKS:
            self._unshared = not split.shared
        if ahead is not None and split.shared:
            ahead.abandon()
            ahead = None
        return split, ahead

    def _ahead(self, written: Generation, blocks: Sequence[int]) -> Ahead | None:
        """Begin to compress blocks in another thread, if they are many."""
        many = self._packs_ahead and len(blocks) >= PARALLEL_BLOCKS
        return Ahead(self._compressor, written, blocks) if many else None

    def _transaction(
        self, volume: int, written: Generation, split: Split, zeroes: Sequence[tuple[int, int, bool]],
        ahead: Ahead | None = None,
    ) -> Sequence[int]:  # fmt: skip
        """Seal and write the groups of a transaction; answers the map entries of its blocks in order."""
        stored: list[int] = []
        ahead = ahead or self._ahead(written, split.unique)
        parts = deque(self._parts(split, zeroes))
        while parts:
            part, rest = self._fitting(parts.popleft())
            parts.extendleft(rest)
            self._group(volume, written, split, part, stored, ahead, final=not parts)
        self.counters.blocks_shared += len(split.shared)
        return split.all_entries(stored)

    def operate(self, operation: Operation) -> None:
        """Append a change of the catalogue as a transaction of its own, and make everything appended durable."""
        self._refuse_if_poisoned()
        self._writing = True
        self._group(
            operation.number, Generation(), nothing_shared(()), Part(), [], None, final=True, operation=operation
        )
        self.sync()

    def _parts(self, split: Split, zeroes: Sequence[tuple[int, int, bool]]) -> Iterator[Part]:
        """Groups of a transaction, each small enough for an empty segment; the references come last."""
        size, many = self._part_blocks, self._part_blocks * 64
        unique, shared = split.unique, len(split.shared)
        yield from (Part(zeroes=zeroes[start : start + many]) for start in range(0, len(zeroes), many))
        if 0 < len(unique) + shared <= size:
            yield Part(unique, shared=(0, shared))
            return
        yield from (Part(unique[start : start + size]) for start in range(0, len(unique), size))
        yield from (Part(shared=(start, min(start + many, shared))) for start in range(0, shared, many))

    def _fitting(self, part: Part) -> tuple[Part, Sequence[Part]]:
        """What of a part the end of the open segment can still take, and the rest; all of it when that is nothing."""
        room, blocks = log_room(self.state.segment) - self.state.used, part.blocks
        if part.shared[1] or part.zeroes or self._worst_of(len(blocks)) <= room:
            return part, ()
        fitting = room // FRAME_BYTES * FRAME_BLOCKS
        while fitting and self._worst_of(fitting) > room:
            fitting -= FRAME_BLOCKS
        return (Part(blocks[:fitting]), (Part(blocks[fitting:]),)) if fitting else (part, ())

    def _worst_of(self, blocks: int) -> int:
        return worst_group(blocks, -(-blocks // self._extent_blocks), 0)

    def _group(
        self, volume: int, written: Generation, split: Split, part: Part, stored: list[int],
        ahead: Ahead | None, *, final: bool, operation: Operation | None = None,
    ) -> None:  # fmt: skip
        """Seal and write one group, and add the map entries of its blocks to `stored`."""
        size, blocks = self._extent_blocks, part.blocks
        chunks = [blocks[i : i + size] for i in range(0, len(blocks), size)]
        shared = part.shared[1] - part.shared[0]
        worst = worst_group(len(blocks), len(chunks), len(part.zeroes), shared)
        if worst > log_room(self.state.segment) - self.state.used:
            self._roll()
        state = self.state
        first = state.units
        state.units += 1 + len(chunks)
        prints = split.prints[len(stored) * PRINT_BYTES : (len(stored) + len(blocks)) * PRINT_BYTES]
        packed = ahead.take(len(stored), chunks) if ahead else None
        stored += entries_of(state.segment.slot, first + 1, chunks)
        extents = self._seal(state, first + 1, written, chunks, self._dictionaries.choice(volume), packed)
        record = Record(
            self._sequence, self._epoch, volume, final, self._chain,
            tuple((len(sealed), len(chunk)) for sealed, chunk in zip(extents, chunks, strict=True)),
            tuple(part.zeroes), tuple(runs_of(blocks)),
            split.references(*part.shared, stored) if shared else (), operation,
        ).pack()  # fmt: skip
        payload = sum(map(len, extents))
        unpadded = HEADER_BYTES + len(record) + TAG_BYTES + payload
        record = record.ljust(len(record) + -unpadded % BLOCK, b"\0")
        length = unpadded + -unpadded % BLOCK
        header = GroupHeader(first, len(chunks), len(record) + TAG_BYTES, length, self._sequence, self._synced)
        sealed = state.sealer.seal(first, Kind.RECORD, record)
        self._put(state, [
            state.sealer.seal(state.used // BLOCK, Kind.HEADER, header.pack(), domain=Domain.HEADER),
            sealed,
            *extents,
            *self._zeroes_ahead(state, length),
        ])  # fmt: skip
        enter(state, HEADER_BYTES + len(record) + TAG_BYTES, extents, chunks)
        if self._duplicates and blocks:
            self._duplicates.learn(state, first + 1, size, len(blocks), prints)
        state.used += length
        self._sequence += 1
        if self._writing:
            self._written = self._sequence
        self._chain = blake3(sealed).digest()
        self.counters.bytes_stored += length

    def _seal(
        self, state: State, first: int, written: Generation, chunks: Sequence[Sequence[int]], choice: Choice | None,
        packed: Packed | None,
    ) -> list[bytes]:  # fmt: skip
        def seal(numbers: Sequence[int], plaintexts: Sequence[bytes]) -> list[tuple[bytes, bool]]:
            return [
                (
                    state.sealer.seal(first + number, Kind.EXTENT, plain, blocks=len(chunks[number])),
                    is_compressed(plain),
                )
                for number, plain in zip(numbers, plaintexts, strict=True)
            ]

        def encode_and_seal(numbers: Sequence[int]) -> list[tuple[bytes, bool]]:
            frames = [frames_of(written, chunks[number]) for number in numbers]
            return seal(numbers, self._compressor.get().encode(frames, choice))

        numbers = range(len(chunks))
        if packed is not None:
            results = seal(numbers, self._compressor.get().assemble(*packed, choice))
        elif sum(map(len, chunks)) >= PARALLEL_BLOCKS and len(chunks) > 1:
            results = workers.parallel(encode_and_seal, numbers)
        else:
            results = encode_and_seal(numbers)
        self.counters.extents_sealed += len(chunks)
        self.counters.extents_compressed += sum(is_packed for _, is_packed in results)
        return [sealed for sealed, _ in results]

    def _zeroes_ahead(self, state: State, length: int) -> list[bytes]:
        """Zeroes to write behind a second small group in a row, so that the next ones overwrite what the host has.

        Syncing the first write to allocated space changes the host's metadata as well: 238 µs against 118 for an
        overwrite (4 KiB, ext4).
        """
        end = state.used + length
        one_of_many, self._small = self._small and length <= _SMALL_GROUP, length <= _SMALL_GROUP
        if not one_of_many or end <= self._zeroed:
            return []
        ahead = min(_ZEROES_AHEAD, log_room(state.segment) - end)
        self._zeroed = end + ahead
        return [_ZEROES[:ahead]]

    def roll(self) -> None:
        """Go on in the next ready segment, so that nothing is added to the open one any more."""
        self._refuse_if_poisoned()
        self._writing = True
        self._roll()

    def _roll(self) -> None:
        """Link the open segment to the next ready one and go on there."""
        state = self.state
        following = self.ready.popleft()
        link = Link(state.used, state.units, self._sequence, self._synced, self._chain, following.segment)
        sealed = state.sealer.seal(0, Kind.LINK, link.pack(), domain=Domain.LINK)
        self._put(state, [sealed, sealed], at=state.segment.length - LINK_BYTES)
        following.linked = True
        self.state, self._zeroed = following, 0

    def _put(self, state: State, buffers: list[bytes], at: int | None = None) -> None:
        offset = state.segment.offset + (state.used if at is None else at)
        if self._writing:
            self._write(offset, buffers)
        else:
            self._unwritten.append((offset, buffers))

    def _write(self, offset: int, buffers: list[bytes]) -> None:
        try:
            self._storage.write(offset, buffers)
            length = sum(map(len, buffers))
            if length >= _LARGE_WRITE:
                self._storage.begin_sync(offset, length)
        except OSError as error:
            self.poison(f"writing failed: {error.strerror}")

    def finish(self) -> None:
        """Write what is only sealed yet, and make everything appended durable."""
        unwritten, self._unwritten = self._unwritten, []
        for offset, buffers in unwritten:
            self._write(offset, buffers)
        self._written = self._sequence
        self.sync()

    def sync(self) -> None:
        """Make everything durable that was written. Another thread may be appending."""
        sequence = self._written
        self.sync_storage()
        self._synced = sequence

    def sync_storage(self) -> None:
        """Make everything written to the image durable.

        Syncs take turns: the host reports lost data to one of them only, and none may succeed after that one.
        """
        with self._syncing:
            self._refuse_if_poisoned()
            begun_ns = time.monotonic_ns()
            try:
                self._storage.sync()
            except OSError as error:
                self.poison(f"syncing failed: {error.strerror}")
            self.syncs.add(time.monotonic_ns() - begun_ns)

    def poison(self, why: str) -> None:
        """Refuse everything from now on, and raise."""
        self.poisoned = self.poisoned or why
        self._refuse_if_poisoned()

    def _refuse_if_poisoned(self) -> None:
        if self.poisoned:
            raise PoisonedError("image", self.poisoned, "it takes no more writes: mend the device and reopen it")
