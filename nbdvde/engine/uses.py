"""How often the maps of some volumes use each block of an image: never, once, more than once, or for a snapshot."""

import numpy as np
import numpy.typing as npt

from nbdvde.engine.layout import BLOCK_MASK, SLOT_SHIFT, UNIT_MASK, UNIT_SHIFT
from nbdvde.engine.mark import Owners
from nbdvde.engine.versions import Entries
from nbdvde.errors import DamageError

NEVER, ONCE, OFTEN, KEPT = range(4)
"""KEPT: by a snapshot, whose map never changes."""


class Uses:
    """Takes a byte for each block that the extents of the segments could have."""

    def __init__(self, units: dict[int, int], blocks: int, kept_from: int) -> None:
        """`units` by slot; an extent has `blocks` blocks at most; owners from `kept_from` on are snapshots."""
        self._blocks, self._kept_from = blocks, kept_from
        slots = max(units, default=0) + 2
        sizes = np.zeros(slots, np.int64)
        for slot, count in units.items():
            sizes[slot] = count
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._uses = np.zeros(int(self._starts[-1]) * blocks, np.uint8)

    def add(self, entries: Entries, low: Owners, high: Owners) -> None:
        """Take in map entries of extents, with the lowest and the highest owner of each. Raises DamageError."""
        cells = self._cells(entries)
        if (cells < 0).any():
            raise DamageError("map", "points at what is no block of an extent", "run nbdvde check")
        kept = high >= self._kept_from
        self._uses[cells[kept]] = KEPT
        rest, counts = np.unique(cells[~kept], return_counts=True)
        often, often_counts = np.unique(cells[~kept & (low != high)], return_counts=True)
        counts[np.searchsorted(rest, often)] += often_counts
        before = self._uses[rest]
        self._uses[rest] = np.where(before == KEPT, KEPT, np.minimum(before + np.minimum(counts, OFTEN), OFTEN))

    def of(self, entries: Entries) -> npt.NDArray[np.uint8]:
        """How the blocks are used that entries name; NEVER for holes, and for what is not looked at."""
        cells = self._cells(entries)
        uses: npt.NDArray[np.uint8] = (
            np.where(cells < 0, NEVER, self._uses[np.maximum(cells, 0)])
            if len(self._uses)
            else np.zeros(len(entries), np.uint8)
        )
        return uses

    def _cells(self, entries: Entries) -> npt.NDArray[np.int64]:
        """Where each block has its byte, -1 for those that have none."""
        slots = np.minimum(entries >> np.uint64(SLOT_SHIFT), np.uint64(len(self._starts) - 2)).astype(np.int64)
        units = (entries >> np.uint64(UNIT_SHIFT) & np.uint64(UNIT_MASK)).astype(np.int64)
        blocks = (entries & np.uint64(BLOCK_MASK)).astype(np.int64)
        good = (units < self._starts[slots + 1] - self._starts[slots]) & (blocks < self._blocks)
        return np.where(good, (self._starts[slots] + units) * self._blocks + blocks, -1)
