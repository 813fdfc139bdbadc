"""Parts of maps that were found sound, so that a check looks once at what snapshots and clones share."""

from collections.abc import Collection

import numpy as np

from nbdvde.engine.layout import UnitRef
from nbdvde.engine.versions import FANOUT


class Known:
    """Blocks mapped below leaves and nodes that are sound, by level and reference: some 150 bytes for each."""

    def __init__(self, *, several: bool) -> None:
        """Nothing is kept unless there are `several` volumes."""
        self.several = several
        self.counts: dict[bytes, int] = {}


class Walk:
    """A walk over the map of one volume, of which leaves in memory (`changed`) stand for those in the image."""

    def __init__(self, known: Known, changed: Collection[int]) -> None:
        self._known, self._changed = known, np.array(sorted(changed), np.int64)
        self._met: list[tuple[bytes, int, int]] = []
        """Key, first leaf and leaf behind the last one of what is looked at."""
        self._counts: dict[int, int] = {}
        """Mapped blocks by the first leaf that has them, or of a part that was skipped."""
        self.mapped = 0
        """Blocks that the volume maps."""

    def skips(self, ref: UnitRef, level: int, index: int) -> bool:
        """Whether a leaf (level 0) or node need not be looked at, nor anything below; notes it if it has to."""
        if not self._known.several:
            return False
        first, stop = index * FANOUT**level, (index + 1) * FANOUT**level
        if np.searchsorted(self._changed, first) != np.searchsorted(self._changed, stop):
            return False
        key = ref.pack() + bytes([level])  # all of it: a unit is sound only where, and as what, it was read
        if key not in self._known.counts:
            self._met.append((key, first, stop))
            return False
        self.count(first, self._known.counts[key])
        return True

    def count(self, number: int, mapped: int) -> None:
        """A leaf maps so many blocks."""
        self.mapped += mapped
        if self._known.several:
            self._counts[number] = mapped

    def keep(self) -> None:
        """All that was met is sound."""
        numbers = np.array(sorted(self._counts), np.int64)
        before = np.concatenate([[0], np.cumsum([self._counts[number] for number in numbers.tolist()])])
        spans = np.array([(first, stop) for _, first, stop in self._met], np.int64).reshape(-1, 2)
        sums = before[np.searchsorted(numbers, spans[:, 1])] - before[np.searchsorted(numbers, spans[:, 0])]
        self._known.counts.update(zip((key for key, _, _ in self._met), sums.tolist(), strict=True))
