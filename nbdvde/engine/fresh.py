"""Fingerprints of what was stored lately: they wait here to be entered into the index, many at a time.

Entering 32 into numpy tables takes 1.5 µs each, 512 take 0.3 (dictionaries of them took 0.35, and gave them to the
index in the end all the same).
"""

import numpy as np

from nbdvde.engine.dedup import CONTAINER_SHIFT, Chunks, Index, Places, Prints, chunks_of

_FEW = 128
"""That many waiting ones, at most, are compared one by one with what is asked for."""
_MANY = 4096
"""Fingerprints that wait at most; and whose hooks are entered together: what is recent is found without."""


class Fresh:
    """Fingerprints, with the places of their blocks and with the lists that have them."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._stored: list[tuple[Prints, Places]] = []
        self._hooks: list[tuple[Prints, Chunks]] = []
        self._waiting = self._unhooked = 0

    @property
    def is_due(self) -> bool:
        """Whether there are enough to enter, asked for or not."""
        return self._waiting >= _MANY

    def settle(self) -> None:
        """Have them in the index, unless they are few."""
        if self._waiting > _FEW:
            self.enter()

    def find(self, prints: Prints) -> Places:
        """Where the blocks with these fingerprints lie, 0 for those that do not wait here."""
        found = np.zeros(len(prints), np.uint64)
        for known, places in self._stored:
            asked, at = np.nonzero((prints[:, :1] == known[:, 0]) & (prints[:, :1] != 0))
            same = prints[asked, 1] == known[at, 1]
            found[asked[same]] = places[at[same]]
        return found

    def add(self, prints: Prints, places: Places, slot: int, number: int, listed: int) -> None:
        """Blocks were stored; the first `listed` of them are in the list of a slot, from `number` on."""
        self._stored.append((prints, places))
        self._waiting += len(places)
        if listed > 0:
            self._hooks.append((prints[:listed], chunks_of(slot, number, listed)))
            self._unhooked += listed

    def enter(self) -> None:
        """Have them in the index."""
        if self._stored:
            prints, places = zip(*self._stored, strict=True)
            self._index.remember(np.concatenate(prints), np.concatenate(places))
        if self._unhooked >= _MANY:
            prints, chunks = zip(*self._hooks, strict=True)
            self._index.hook(np.concatenate(prints), np.concatenate(chunks))
            self._hooks, self._unhooked = [], 0
        self._stored, self._waiting = [], 0

    def containers(self) -> set[int]:
        """Numbers of the containers of which there is something."""
        return {place >> CONTAINER_SHIFT for _, places in self._stored for place in places.tolist()}
