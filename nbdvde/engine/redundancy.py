"""Duplicates that commits did not find: of blocks written one by one, without room in the index, or before a crash.

For each dedup domain, every block in use gets its fingerprint, from the lists of the segments or from its contents. Of
equal blocks the one with the lowest map entry stays, the disks' maps get references to it instead of the others,
only in runs (`dedup.worth_sharing`). What a snapshot uses stays stored whatever is done, so it is only referred to.

Memory: `Candidates` of as many segments as fit are compared with all segments, then the next ones are. Neither
what is read nor what was marked can make a reference wrong: the writer looks at everything again (`revision`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nbdvde import workers
from nbdvde.disk import BLOCK
from nbdvde.engine.checkpointer import Checkpointer
from nbdvde.engine.dedup import CONTAINER_SHIFT, PLACE_UNIT_SHIFT, Places, Prints, worth_sharing
from nbdvde.engine.duplicates import SHORTEST, Duplicates
from nbdvde.engine.extent import Decoder
from nbdvde.engine.layout import BLOCK_MASK, KIND_COMPACT, SLOT_SHIFT, UNIT_MASK, UNIT_SHIFT, Kind
from nbdvde.engine.pace import Pace, Progress
from nbdvde.engine.revision import Revision
from nbdvde.engine.segments import Segments, State
from nbdvde.engine.uses import KEPT, NEVER, Uses
from nbdvde.engine.versions import Entries
from nbdvde.engine.volume import Volume
from nbdvde.engine.walk import Walk
from nbdvde.engine.writer import Writer
from nbdvde.errors import DamageError

MEMORY = 256 << 20
"""Bytes for what is compared at a time: 12 GiB of blocks."""
_BLOCK_BYTES = 80
"""That a candidate takes, with what sorting takes."""
_BATCH_BLOCKS = 4096
"""References made in one go."""


@dataclass(frozen=True, slots=True)
class Known:
    """The blocks of a segment that are in use, with fingerprints."""

    entries: Entries
    prints: Prints


_NOTHING = Known(np.zeros(0, np.uint64), np.zeros((0, 2), np.uint64))


class Candidates:
    """Blocks that might become references, and the best block that holds the same as far as it is known."""

    def __init__(self, known: Sequence[Known]) -> None:
        entries = np.concatenate([part.entries for part in known])
        prints = np.concatenate([part.prints for part in known])
        self._keys, first, self._group = np.unique(prints[:, 0], return_index=True, return_inverse=True)
        self._seconds = prints[first, 1]
        alike = prints[:, 1] == self._seconds[self._group]
        self._entries, self._group = entries[alike], self._group[alike]
        self._best: Entries = np.full(len(self._keys), np.iinfo(np.uint64).max, np.uint64)

    def meet(self, known: Known) -> None:
        """Take in blocks that may be referred to."""
        at = np.minimum(np.searchsorted(self._keys, known.prints[:, 0]), len(self._keys) - 1)
        equal = (self._keys[at] == known.prints[:, 0]) & (self._seconds[at] == known.prints[:, 1])
        np.minimum.at(self._best, at[equal], known.entries[equal])

    def found(self) -> tuple[Entries, Entries]:
        """(from, to), the first ascending."""
        best = self._best[self._group]
        better = best < self._entries
        order = np.argsort(self._entries[better])
        return self._entries[better][order], best[better][order]


class Redundancy:
    """Finds duplicates in a dedup domain of an image once, and makes references of them."""

    def __init__(
        self, segments: Segments, checkpointer: Checkpointer, duplicates: Duplicates, decoder: Decoder, pace: Pace,
        memory: int,
    ) -> None:  # fmt: skip
        self._segments, self._checkpointer, self._duplicates = segments, checkpointer, duplicates
        self._pace, self._blocks_max = pace, max(1, memory // _BLOCK_BYTES)
        self._decoder = decoder
        self.blocks = 0
        """That became references so far."""

    async def run(
        self, writer: Writer, domain: int, disks: Sequence[Volume], uses: Uses, progress: Progress
    ) -> None:  # fmt: skip
        """Share what the disks hold; `uses` has been told of all volumes of the domain.

        Raises NoSpaceError, PoisonedError; ends cleanly when cancelled.
        """
        open_sequence = writer.log.state.segment.sequence  # another thread appends there
        states = [
            state
            for state in self._segments.states.values()
            if state.holds_blocks and state.linked
            if state.kind == KIND_COMPACT or state.segment.sequence < open_sequence
        ]
        states.sort(key=lambda state: state.segment.slot)
        at = 0
        while at < len(states):
            begun, known, blocks = at, [], 0
            while at < len(states) and (blocks < self._blocks_max or at == begun):
                progress(at, len(states))
                movable = await self._known(domain, states[at], uses, kept=False)
                known.append(movable)
                blocks += len(movable.entries)
                at += 1
            if blocks:
                await self._share(writer, domain, disks, uses, Candidates(known), states)
        progress(1, 1)

    async def _share(
        self, writer: Writer, domain: int, disks: Sequence[Volume], uses: Uses, candidates: Candidates,
        states: Sequence[State],
    ) -> None:  # fmt: skip
        for state in states:
            if self._duplicates.may_refer_to(state):
                candidates.meet(await self._known(domain, state, uses, kept=True))
        seen = {state.segment.slot: state for state in states}
        before, after = candidates.found()
        if len(before):
            for disk in disks:
                await self._refer(writer, disk, before, after, seen)

    # Fingerprints

    async def _known(self, domain: int, state: State, uses: Uses, *, kept: bool) -> Known:
        """The fingerprints of what is in use of a segment; `kept` says whether what snapshots use is wanted."""
        with self._checkpointer.reading():
            if self._segments.states.get(state.segment.slot) is not state:
                return _NOTHING
            try:
                known, read = await workers.run(self._fingerprints, domain, state, uses, kept)
            except DamageError:  # reading reports it
                return _NOTHING
        await self._pace.spend(read)
        return known

    def _fingerprints(self, domain: int, state: State, uses: Uses, kept: bool) -> tuple[Known, int]:
        """As `_known`, with the bytes that had to be read. Blocks. Raises DamageError."""
        entries, prints = self._duplicates.listed(state)
        use = uses.of(entries)
        wanted = (use != NEVER) & ((use != KEPT) | kept)
        entries, prints = entries[wanted], prints[wanted].copy()
        missing = np.flatnonzero(prints[:, 0] == 0)
        read = 0
        units = (entries[missing] >> np.uint64(UNIT_SHIFT) & np.uint64(UNIT_MASK)).astype(np.int64)
        for unit in np.unique(units).tolist():
            at = missing[units == unit]
            pages, length = self._read(state, unit)
            blocks = (entries[at] & np.uint64(BLOCK_MASK)).tolist()
            prints[at] = self._duplicates.prints(domain, [pages[block] for block in blocks])
            read += length
        return Known(entries, prints), read

    def _read(self, state: State, unit: int) -> tuple[list[bytes], int]:
        """The blocks of an extent, and the bytes that it takes."""
        position, length, blocks = self._segments.locate(state, self._segments.index(state), unit)
        sealed = self._segments.read(state.segment.offset + position, length)
        plain = state.sealer.open(unit, Kind.EXTENT, sealed, blocks=blocks)
        whole = b"".join(self._decoder.frames(plain, blocks))
        return [whole[start : start + BLOCK] for start in range(0, len(whole), BLOCK)], length

    def _try_reading(self, units: Sequence[int], states: dict[int, State]) -> None:
        """Find out whether extents (slot and unit) are damaged: the blocks that are to refer to them may not be."""
        for key in units:
            state = states[key >> SLOT_SHIFT - UNIT_SHIFT]
            if self._segments.states.get(state.segment.slot) is state:
                try:
                    self._read(state, key & UNIT_MASK)
                except DamageError:
                    state.suspect = True

    # References

    async def _refer(
        self, writer: Writer, disk: Volume, before: Entries, after: Entries, seen: dict[int, State]
    ) -> None:  # fmt: skip
        """Have a disk refer to what lies in the entries `after` where it has `before`."""
        walk = Walk(disk)
        found = Revision(disk, [], [], seen, new=[], may_refer_to=self._duplicates.may_refer_to)
        while leaf := await walk.leaf():
            first, entries = leaf
            at = np.minimum(np.searchsorted(before, entries), len(before) - 1)
            hit = np.flatnonzero(before[at] == entries)
            if len(hit):
                hit = hit[worth_sharing(hit, _places(after[at[hit]]), SHORTEST)]
            found = replace(
                found, blocks=[*found.blocks, *(hit + first).tolist()], old=[*found.old, *entries[hit].tolist()],
                new=[*found.new, *after[at[hit]].tolist()],
            )  # fmt: skip
            if len(found.blocks) >= _BATCH_BLOCKS:
                await self._revise(writer, found)
                found = replace(found, blocks=[], old=[], new=[])
        await self._revise(writer, found)

    async def _revise(self, writer: Writer, revision: Revision) -> None:
        units = sorted({entry >> UNIT_SHIFT for entry in revision.new})
        with self._checkpointer.reading():
            await workers.run(self._try_reading, units, revision.states)
        try:
            self.blocks += await writer.revise(revision)
        except DamageError:  # reading reports it
            return


def _places(entries: Entries) -> Places:
    """Where blocks lie, as `worth_sharing` wants it: with the slot for the container."""
    slots, units = entries >> np.uint64(SLOT_SHIFT), entries >> np.uint64(UNIT_SHIFT) & np.uint64(UNIT_MASK)
    places: Places = slots << np.uint64(CONTAINER_SHIFT) | units << np.uint64(PLACE_UNIT_SHIFT)
    return places | entries & np.uint64(BLOCK_MASK)
