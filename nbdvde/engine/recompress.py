"""Recompression: segments are written anew under their slots, all of their extents at a higher level.

Small extents are tried with the dictionaries that commits use, but for those of the region that holds them.

Slots, units and blocks stay what they are, so no map and no reference changes, and nothing of a segment is left out:
whatever else happens to it meanwhile is none of this module's business. A segment of which a sample gains little is
passed over; so what was recompressed before costs four extents.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from nbdvde import workers
from nbdvde.engine.checkpointer import Checkpointer
from nbdvde.engine.cleaner import Cleaner
from nbdvde.engine.compact import Kept
from nbdvde.engine.dictionaries import Dictionaries
from nbdvde.engine.extent import Compressor, Decoder
from nbdvde.engine.layout import KIND_COMPACT, SLOT_SHIFT, UNIT_SHIFT, Kind, unpack_index
from nbdvde.engine.lbamap import LEAF_SHIFT
from nbdvde.engine.pace import Pace, Progress
from nbdvde.engine.segments import Segments, State
from nbdvde.engine.status import entries_of, leaves_in
from nbdvde.engine.volume import Volume
from nbdvde.engine.writer import Writer
from nbdvde.errors import DamageError

LEVEL = 12
"""Of mixed system files level 1 leaves 42 %, level 12 is 7.3 % shorter at 18 MB/s a core, 19 is 8.4 % at 4 MB/s."""
WORTH = 0.02
"""Part of a segment, and of the sample before, that must be gained."""
_SAMPLE = 4
"""Extents that are tried before all are."""
_BATCH_BYTES = 512 << 10
"""Sealed bytes between two points where the work may be ended: a tenth of a second."""
_ROUND_BYTES = 256 << 20
"""Segments replaced before a checkpoint frees what they leave: this much is lost when the process is killed."""


class _Extent(NamedTuple):
    unit: int
    position: int
    length: int
    blocks: int


@dataclass(slots=True)
class Recompressed:
    """What was done so far."""

    segments: int = 0
    saved_bytes: int = 0


class Recompression:
    """Recompresses an image once."""

    def __init__(
        self, segments: Segments, checkpointer: Checkpointer, cleaner: Cleaner, pace: Pace,
        release: Callable[[], Awaitable[None]], dictionaries: Dictionaries, compressor: Callable[[], Compressor],
        decoder: Callable[[], Decoder],
    ) -> None:  # fmt: skip
        """`release` frees what was replaced; `compressor` and `decoder` make one for each thread."""
        self._segments, self._checkpointer, self._cleaner, self._pace = segments, checkpointer, cleaner, pace
        self._release, self._dictionaries = release, dictionaries
        self._choice = dictionaries.thorough()
        self._own: frozenset[int] = frozenset()
        self._compressors, self._decoders = workers.PerThread(compressor), workers.PerThread(decoder)
        self.done = Recompressed()

    async def run(self, writer: Writer, region: Volume | None, progress: Progress) -> None:
        """Recompress what gains by it; `region` is where the dictionaries lie, if there are any.

        Raises NoSpaceError, PoisonedError; ends cleanly when cancelled.
        """
        states = left_segments(self._segments, writer)
        await self._release()  # from here on no recovery reads those as log, and no commit is under way in them
        try:
            self._own = await _units_of(region) if region else frozenset()
        except DamageError:  # what must not need a dictionary is not known
            self._choice = None
        done = replaced = 0
        total = sum(state.used for state in states)
        for state in sorted(states, key=lambda state: state.segment.offset):
            progress(done, total)
            done += state.used
            if await self._recompress(writer, state):
                replaced += state.segment.length
            if replaced >= min(_ROUND_BYTES, self._segments.space.room // 4):
                await self._release()
                replaced = 0
        progress(total, total)
        await self._release()

    async def _recompress(self, writer: Writer, state: State) -> bool:
        """Replace a segment, if that makes it shorter and it is still in use."""
        with self._checkpointer.reading():
            if self._segments.states.get(state.segment.slot) is not state or not state.live:
                return False
            if not self._dictionaries.allow(self._choice):
                self._choice = self._dictionaries.thorough()
            try:
                kept = await self._packed(state)
            except DamageError:  # reading reports it, and `check`
                return False
            if kept is None:
                return False
            # A dictionary that was removed meanwhile was not seen to be needed here.
            may = partial(self._dictionaries.allow, self._choice)
            saved = await self._cleaner.substitute(writer, state, kept, state.blocks, may)
        self.done.segments += saved > 0
        self.done.saved_bytes += saved
        return saved > 0

    async def _packed(self, state: State) -> list[Kept] | None:
        """All extents of a segment, None when it does not get shorter by enough. Raises DamageError."""
        index = await workers.run(self._segments.index, state)
        extents = [_Extent(unit, *unpack_index(entry)) for unit, entry in enumerate(index) if entry]
        sample = extents[:: -(-len(extents) // _SAMPLE)]
        gain = _saved(sample, await workers.run(self._pack, state, sample))
        if gain < WORTH and state.used + WORTH * state.segment.length > state.segment.length:
            return None
        kept: list[Kept] = []
        for batch in _batches(extents):
            kept += await workers.run(self._pack, state, batch)
            await self._pace.spend(sum(extent.length for extent in batch))
        left = sum(len(extent.plain) for extent in kept)
        return kept if left < state.segment.length * (1 - WORTH) else None

    def _pack(self, state: State, extents: Sequence[_Extent]) -> list[Kept]:
        """Extents as they are, or recompressed where that is shorter and gives the same again."""
        if self._pace.gentle:
            return [self._pack_one(state, extent) for extent in extents]
        return workers.parallel(lambda part: [self._pack_one(state, extent) for extent in part], extents)

    def _pack_one(self, state: State, extent: _Extent) -> Kept:
        unit, position, length, blocks = extent
        sealed = self._segments.read(state.segment.offset + position, length)
        plain = state.sealer.open(unit, Kind.EXTENT, sealed, blocks=blocks)
        decoder = self._decoders.get()
        frames = decoder.frames(plain, blocks)
        is_own = state.segment.slot << SLOT_SHIFT - UNIT_SHIFT | unit in self._own
        [packed] = self._compressors.get().encode([frames], None if is_own else self._choice)
        if len(packed) < len(plain) and decoder.frames(packed, blocks) == frames:
            plain = packed
        return Kept(unit, blocks, blocks, plain)


def left_segments(segments: Segments, writer: Writer) -> list[State]:
    """The segments with blocks in use that the log has left: nothing is appended to them."""
    open_sequence = writer.log.state.segment.sequence  # another thread appends there
    return [
        state
        for state in segments.states.values()
        if state.holds_blocks and state.linked and state.live
        if state.kind == KIND_COMPACT or state.segment.sequence < open_sequence
    ]


async def _units_of(region: Volume) -> frozenset[int]:
    """Slot and unit of each extent that a volume has, as in its map entries, but for what is being written."""
    units: set[int] = set()
    last = region.map.blocks >> LEAF_SHIFT
    numbers = await leaves_in(region, 0, last)
    while numbers:
        for number in numbers:
            entries = await entries_of(region, number << LEAF_SHIFT, number + 1 << LEAF_SHIFT)
            units.update((entries >> UNIT_SHIFT).tolist())
        numbers = await leaves_in(region, numbers[-1] + 1, last)
    return frozenset(units)


def _saved(extents: Sequence[_Extent], kept: Sequence[Kept]) -> float:
    """Part by which extents got shorter."""
    return 1 - sum(len(extent.plain) for extent in kept) / sum(extent.length for extent in extents)


def _batches(extents: Sequence[_Extent]) -> list[list[_Extent]]:
    """The extents in parts of about the same size."""
    batches: list[list[_Extent]] = []
    room = 0
    for extent in extents:
        if room <= 0:
            batches.append([])
            room = _BATCH_BYTES
        batches[-1].append(extent)
        room -= extent.length
    return batches
