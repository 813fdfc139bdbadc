"""Re-packing: blocks that lie about in many small pieces are stored again in the order of their addresses.

Only blocks that one disk uses, at one address: what a snapshot shares would be stored twice, and what is a duplicate
would be one no more. Where a region of a disk needs more than `SCATTERED` times as many extents as it could, reading
it in order opens each of them for a few blocks.
"""

from dataclasses import dataclass, field

import numpy as np

from nbdvde import workers
from nbdvde.disk import BLOCK, Piece
from nbdvde.engine.checkpointer import Checkpointer
from nbdvde.engine.dedup import Mask
from nbdvde.engine.layout import SLOT_SHIFT, UNIT_SHIFT
from nbdvde.engine.lbamap import LEAF_BLOCKS
from nbdvde.engine.pace import Pace, Progress
from nbdvde.engine.pieces import flatten, page_of
from nbdvde.engine.reader import Reader, Want
from nbdvde.engine.revision import Revision
from nbdvde.engine.segments import State
from nbdvde.engine.uses import ONCE, Uses
from nbdvde.engine.versions import Entries
from nbdvde.engine.volume import Volume
from nbdvde.engine.walk import Walk
from nbdvde.engine.writer import Writer
from nbdvde.errors import DamageError

SCATTERED = 3
_REGION_EXTENTS = 4
"""Extents that the blocks of a region would fill."""
_BATCH_BLOCKS = 256
"""Blocks that are moved in one go: a group of the log."""


@dataclass(slots=True)
class _Batch:
    """Blocks, ascending, and where they were seen."""

    blocks: list[int] = field(default_factory=list)
    old: list[int] = field(default_factory=list)

    def take(self, count: int) -> "_Batch":
        """The first ones, which it then has no more."""
        taken = _Batch(self.blocks[:count], self.old[:count])
        self.blocks, self.old = self.blocks[count:], self.old[count:]
        return taken

    def runs(self) -> list[tuple[int, int]]:
        """(first entry, blocks) of what follows each other in one extent, in order."""
        entries = np.array(self.old, np.uint64)
        starts = np.concatenate([[0], np.flatnonzero(np.diff(entries) != 1) + 1])
        counts = np.diff([*starts.tolist(), len(entries)]).tolist()
        return list(zip(entries[starts].tolist(), counts, strict=True))


class Repacking:
    """Re-packs disks of an image once."""

    def __init__(
        self, reader: Reader, checkpointer: Checkpointer, uses: Uses, extent_blocks: int, pace: Pace
    ) -> None:  # fmt: skip
        self._reader, self._checkpointer, self._uses = reader, checkpointer, uses
        self._extent_blocks, self._pace = extent_blocks, pace
        self.blocks = 0
        """Moved so far."""

    async def run(self, writer: Writer, disk: Volume, progress: Progress) -> None:
        """Re-pack one disk. Raises NoSpaceError, PoisonedError; ends cleanly when cancelled."""
        walk, batch = Walk(disk), _Batch()
        while leaf := await walk.leaf():
            first, entries = leaf
            movable = self._uses.of(entries) == ONCE
            chosen = np.flatnonzero(scattered(entries, movable, self._extent_blocks))
            batch.blocks += (chosen + first).tolist()
            batch.old += entries[chosen].tolist()
            while len(batch.blocks) >= _BATCH_BLOCKS:
                await self._move(writer, disk, batch.take(_BATCH_BLOCKS))
            progress(walk.done, walk.last + 1)
        if batch.blocks:
            await self._move(writer, disk, batch)

    async def _move(self, writer: Writer, disk: Volume, batch: "_Batch") -> None:
        try:
            revision = await self._read(disk, batch)
            moved = await writer.revise(revision) if revision else 0
        except DamageError:  # reading reports it
            return
        self.blocks += moved
        await self._pace.spend(2 * moved * BLOCK)

    async def _read(self, disk: Volume, batch: "_Batch") -> Revision | None:
        """What the blocks hold: read where they were seen, and never from the write buffer."""
        states: dict[int, State] = {}
        pieces: list[list[Piece]] = []
        wants = []
        for entry, length in batch.runs():
            state = disk.segments.states.get(entry >> SLOT_SHIFT)
            if state is None:
                return None  # all of this was overwritten meanwhile, or some; the rest can wait for the next time
            states[entry >> SLOT_SHIFT] = state
            wants.append(Want(len(pieces), entry, length, state))
            pieces.append([])
        with self._checkpointer.reading():
            await workers.run(self._reader.fill, pieces, wants)
        whole = b"".join(map(page_of, flatten(pieces)))
        pages = [whole[at : at + BLOCK] for at in range(0, len(whole), BLOCK)]
        return Revision(disk, batch.blocks, batch.old, states, pages)


def scattered(entries: Entries, movable: Mask, extent_blocks: int) -> Mask:
    """Which of the movable blocks of a leaf lie in too many extents, region by region."""
    region = min(LEAF_BLOCKS, _REGION_EXTENTS * extent_blocks)
    regions = -(-LEAF_BLOCKS // region)
    units = np.zeros(regions * region, np.uint64)
    units[:LEAF_BLOCKS] = np.where(movable, entries >> np.uint64(UNIT_SHIFT), np.uint64(0))
    ordered = np.sort(units.reshape(regions, region), axis=1)
    extents = np.count_nonzero(np.diff(ordered, axis=1, prepend=np.uint64(0)), axis=1)
    needed = -(-np.count_nonzero(ordered, axis=1) // extent_blocks)
    chosen: Mask = (np.repeat(extents > SCATTERED * needed, region) & (units != 0))[:LEAF_BLOCKS]
    return chosen
