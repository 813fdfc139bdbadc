"""The cleaner: segments that are in use in part are written anew, under their slots, without what nobody uses.

Maps name an extent by slot, unit and block, and the index of the slot says where it lies. So no map changes, and
whatever else refers to the extents (snapshots, clones, duplicates) is none of the cleaner's business. Blocks are
dead when the maps of a checkpoint that was made after the victims were chosen do not use them: from then on
nothing can begin to.
"""

import logging
import os
from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from operator import itemgetter

import numpy as np
import trio

from nbdvde import workers
from nbdvde.engine.checkpoint import Result
from nbdvde.engine.checkpointer import NO_SPACE, Checkpointer
from nbdvde.engine.compact import Kept, Survivor, Used, kept_prints, survivors, without_dead
from nbdvde.engine.dictionaries import Dictionaries
from nbdvde.engine.duplicates import Duplicates
from nbdvde.engine.extent import Compressor, Decoder
from nbdvde.engine.layout import BLOCK, KIND_COMPACT, STATE_OPEN, TAG_BYTES, Kind, UnitRef, pack_index
from nbdvde.engine.mark import Tree, Usage, mark
from nbdvde.engine.segments import Segments, State
from nbdvde.engine.writer import Writer
from nbdvde.errors import DamageError, NoSpaceError

WORTH, WORTH_IN_NEED = 0.25, 0.06
"""Part of a segment, or of a zone, that cleaning must gain, at leisure and when space is short."""
NOTHING = 2.0
"""No segment is worth as much: all is counted, and none cleaned."""
_GARBAGE_MAX = 0.5
"""Garbage among what is stored from which on the cleaner begins by itself."""
_SHORT = 128
"""So it does with a smaller part of the capacity left for writes than one in so many, reserve apart."""
_RATE = 64 << 20
"""Bytes a second that it reads in the background."""
_DEBT_S = 0.05
_CELLS_MAX = 8 << 20
"""Blocks of victims that one mark looks at: 64 MiB of memory."""
_BATCH = 32
"""Extents that are encoded at a time, in all threads."""
_log = logging.getLogger(__name__)


class Cleaner:
    """Cleans segments of an open image, a round at a time."""

    def __init__(
        self, segments: Segments, checkpointer: Checkpointer, duplicates: Duplicates, level: int, extent_blocks: int,
        dictionaries: Dictionaries | None = None,
    ) -> None:  # fmt: skip
        self._segments, self._checkpointer, self._duplicates = segments, checkpointer, duplicates
        self._extent_blocks = extent_blocks
        # Blocks that were blanked compress even in an image whose data does not.
        self._compressor = workers.PerThread(lambda: Compressor(max(level, 1)))
        self._decoder = workers.PerThread(lambda: Decoder(dictionaries))
        self.lock = trio.Lock()
        """While it is held, no segment is replaced."""
        self._damaged: set[State] = set()
        self._unknown: set[State] = set()
        """Of which it is not known what is in use."""
        self.held = ""
        """Why some segments cannot be cleaned, if so: a part of a map cannot be read, and may lead to any of them."""
        self._stopping = False
        self._debt = 0.0
        self._next_slot = 0
        """Where the next mark begins to look at what is dead."""
        self.freed = 0
        """Bytes that segments got shorter so far."""
        self.replaced = 0
        """Segments that were written anew so far, some of them only to be elsewhere."""

    def is_due(self) -> bool:
        """Whether so much is garbage, by the counts, or so little room is left, that a round is called for."""
        segments = self._segments
        stored = garbage = 0
        for state in segments.states.values():
            if state.holds_blocks and state.linked:
                stored += state.used
                garbage += state.garbage if self._is_worth_it(state, WORTH) else 0
        if garbage < 2 * segments.segment_bytes:
            return False
        return garbage > stored * _GARBAGE_MAX or segments.space.is_short(_SHORT)

    def stop(self) -> None:
        """End as soon as possible, with what is done so far."""
        self._stopping = True

    async def round(self, writer: Writer, worth: float, *, gently: bool = False) -> int:
        """Clean a round of segments; answers by how many bytes they got shorter, which two checkpoints then free.

        `worth` is the part that must be gained. The caller holds the lock, and is not cancelled. Raises NoSpaceError,
        PoisonedError.
        """
        victims = self._choose(worth, writer.log.state.segment.sequence)
        for victim in victims:
            victim.victim = True
        try:
            return await self._clean(writer, victims, gently=gently)
        finally:
            for victim in victims:
                victim.victim = False

    @staticmethod
    def _is_worth_it(state: State, worth: float) -> bool:
        return state.holds_blocks and state.linked and state.garbage >= max(BLOCK, worth * state.used)

    def _choose(self, worth: float, open_sequence: int) -> list[State]:
        """The zones with most to gain: of what the log has left, segments that lie side by side, or single ones."""
        space, cells = self._segments.space, _CELLS_MAX
        room, passed_over = space.scratch, self._damaged | self._unknown
        zones: defaultdict[int, list[State]] = defaultdict(list)
        for slot, state in self._segments.states.items():
            left = state.kind == KIND_COMPACT or state.segment.sequence < open_sequence
            if left and state.holds_blocks and state.linked and state.live and state not in passed_over:
                zones[space.zone(state.segment.offset) or -slot].append(state)
        victims: list[State] = []
        ranked = [(*self._gain(zone, worth), zone) for zone in zones.values()]
        for _, gain, zone in sorted(ranked, key=itemgetter(0, 1), reverse=True):
            room -= sum(state.used - state.garbage + BLOCK for state in zone)
            cells -= sum(state.units for state in zone) * self._extent_blocks
            if gain < worth or (victims and (room < 0 or cells < 0)):
                break
            victims += zone
        return victims

    def _gain(self, zone: Sequence[State], worth: float) -> tuple[bool, float]:
        """What part of a zone, its gaps included, is free in one piece once it is cleaned; 0 if in vain.

        Before that, whether garbage alone makes it worth it: moving what is all in use only joins gaps, if anything.
        """
        garbage, used = sum(state.garbage for state in zone), sum(state.used for state in zone)
        gaps = sum(self._segments.space.beside(state.segment.offset, state.segment.length) for state in zone)
        if garbage < BLOCK and not gaps:
            return False, 0.0
        return garbage >= worth * used, 1 - (used - garbage) / (sum(state.segment.length for state in zone) + gaps)

    async def _clean(self, writer: Writer, victims: Sequence[State], *, gently: bool) -> int:
        cut = await self._checkpointer.run(writer, STATE_OPEN)
        with self._checkpointer.reading():
            usage = Usage(self._looked_at(victims), self._extent_blocks)
            try:
                await self._count(cut, usage)
            except DamageError as damage:
                _log.warning("%s: is not cleaned: %s", self._segments.name, damage)
                return 0
            freed = 0
            for state in victims:
                if self._stopping:
                    break
                if state in self._unknown:
                    continue
                freed += await self._replace(writer, state, usage.of(state.segment.slot))
                if gently:
                    await self._pause(state.used)
        self.freed += freed
        return freed

    def _looked_at(self, victims: Sequence[State]) -> dict[int, int]:
        """Units of the victims by slot, and of as many others as one mark can look at, in turn."""
        units = {state.segment.slot: state.units for state in victims}
        cells = _CELLS_MAX - sum(units.values()) * self._extent_blocks
        slots = sorted(slot for slot, state in self._segments.states.items() if state.holds_blocks and state.linked)
        at = bisect_left(slots, self._next_slot)
        for slot in slots[at:] + slots[:at]:
            state = self._segments.states[slot]
            cells -= state.units * self._extent_blocks
            if cells < 0:
                break
            units.setdefault(slot, state.units)
            self._next_slot = slot + 1
        return units

    async def _count(self, cut: Result, usage: Usage) -> None:
        """Mark the maps of a checkpoint, and make the counts exact; what changed since stays counted.

        Where a part of a map cannot be read, counts stay as they are. They never say less than there is: the blocks
        that were found to be in use are all there are where they are as many as the count.
        """
        damages: list[DamageError] = []

        def read(ref: UnitRef, kind: int) -> bytes:
            try:
                return self._segments.read_unit(ref, kind)
            except DamageError as damage:
                damages.append(damage)
                return bytes(BLOCK)  # as if all were holes

        trees = [Tree(volume.volume, volume.height, volume.root) for volume in cut.catalogue]
        indexes = [ref for entry in cut.entries for ref in entry.refs]
        slots = max((entry.segment.slot for entry in cut.entries), default=0) + 1
        used = await workers.run(mark, trees, indexes, read, slots, usage)
        self._hold(damages)
        for entry in cut.entries:
            slot = entry.segment.slot
            state = self._segments.states.get(slot)
            if state is None or state.segment.sequence != entry.segment.sequence:
                continue
            blocks = int(np.count_nonzero(usage.of(slot))) if slot in usage else 0
            if damages and blocks != entry.live:
                self._unknown |= {state} if slot in usage else set()
                continue
            self._unknown.discard(state)
            state.live += used[slot] - entry.live
            if slot in usage:
                state.dead = max(0, entry.blocks - blocks)

    def _hold(self, damages: Sequence[DamageError]) -> None:
        """Say once that cleaning is held up."""
        held = f"what a damaged part of a map may lead to is not cleaned: {damages[0].message}" if damages else ""
        if held and not self.held:
            hint = "run nbdvde check; --salvage saves what can be read"
            _log.warning("%s: %s (%s)", self._segments.name, held, hint)
        self.held = held

    async def _replace(self, writer: Writer, old: State, used: Used) -> int:
        """Put what is in use of a segment in its place; answers by how much it is shorter."""
        if not used.any():
            return 0  # the next checkpoint leaves it out
        try:
            kept, prints = await workers.run(self._read, old, used)
        except DamageError as damage:
            return self._give_up(old, damage)
        return await self._put(writer, old, kept, prints, sum(extent.used for extent in kept))

    async def substitute(
        self, writer: Writer, old: State, kept: Sequence[Kept], blocks: int, may: Callable[[], bool]
    ) -> int:  # fmt: skip
        """Put a segment with these extents, all of another one, in its place; answers by how much it is shorter.

        Nothing happens (0) when the old one was replaced or left out meanwhile, when there is no room, and unless `may`
        answers so under the lock. `blocks` are those in the extents that hold data. Recovery must not need the old one
        as log. Raises PoisonedError.
        """
        with trio.CancelScope(shield=True):
            async with self.lock:
                if not may():
                    return 0
                prints = await workers.run(self._segments.prints, old)
                saved = await self._put(writer, old, kept, prints, blocks)
        return saved

    async def _put(self, writer: Writer, old: State, kept: Sequence[Kept], prints: bytes, blocks: int) -> int:
        """Write the successor of a segment. The checkpoint that first leads to it makes it durable before."""
        segments = self._segments
        length = -(-sum(len(extent.plain) + TAG_BYTES for extent in kept) // BLOCK) * BLOCK
        if not segments.space.leaves_checkpoints(length):
            return 0
        try:
            new = segments.successor(old, length, os.urandom(32))
            new.prints += prints
        except NoSpaceError:
            return 0
        new.blocks = blocks
        try:
            await workers.run(self._write, new, kept)
        except OSError as error:
            self._checkpointer.give_back(new.segment)
            if error.errno in NO_SPACE:
                return 0
            writer.log.poison(f"cleaning failed: {error.strerror}")
        if await self._checkpointer.replace(old, new):
            self.replaced += 1
            await workers.run(self._duplicates.hook_list, new)
            return old.segment.length - new.segment.length
        return 0

    def _give_up(self, state: State, damage: DamageError) -> int:
        self._damaged.add(state)
        _log.warning("%s: segment %d is not cleaned: %s", self._segments.name, state.segment.sequence, damage)
        return 0

    def _read(self, old: State, used: Used) -> tuple[list[Kept], bytes]:
        """What is in use of a segment, without the rest: 16 MiB at most; and the fingerprints of that."""
        kept: list[Kept] = []
        index = self._segments.index(old)
        for batch in _batches(survivors(index, used)):
            kept += workers.parallel(lambda part: self._packed(old, part), batch)
        return kept, kept_prints(self._segments.prints(old), index, used)

    def _packed(self, old: State, extents: Sequence[Survivor]) -> list[Kept]:
        plains = [
            old.sealer.open(extent.unit, Kind.EXTENT, self._sealed(old, extent), blocks=extent.blocks)
            for extent in extents
        ]
        packed = without_dead(list(zip(plains, extents, strict=True)), self._decoder.get(), self._compressor.get())
        return [
            Kept(extent.unit, extent.blocks, int(extent.used.sum()), plain)
            for extent, plain in zip(extents, packed, strict=True)
        ]

    def _sealed(self, old: State, extent: Survivor) -> bytes:
        return self._segments.read(old.segment.offset + extent.position, extent.length)

    def _write(self, new: State, kept: Sequence[Kept]) -> None:
        """Seal and write the extents of a segment."""
        storage, start = self._segments.storage, new.segment.offset
        storage.allocate(start, new.segment.length)
        new.index = array("Q", bytes(8 * new.units))
        sealed = []
        for extent in kept:
            sealed.append(new.sealer.seal(extent.unit, Kind.EXTENT, extent.plain, blocks=extent.blocks))
            new.index[extent.unit] = pack_index(new.used, len(sealed[-1]), extent.blocks)
            new.used += len(sealed[-1])
        storage.write(start, sealed)

    async def _pause(self, read: int) -> None:
        """Keep to the rate, in steps that are worth a nap; not when space is short."""
        self._debt = 0.0 if self._segments.space.is_short(_SHORT) else self._debt + read / _RATE
        if self._debt >= _DEBT_S:
            await trio.sleep(self._debt)
            self._debt = 0.0


def _batches(extents: Iterator[Survivor]) -> Iterator[list[Survivor]]:
    while batch := list(islice(extents, _BATCH)):
        yield batch
