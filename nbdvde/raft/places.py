"""Where the entries of a group lie in the log of its node."""

from array import array
from collections import defaultdict

import numpy as np

from nbdvde.raft.records import HEADER_BYTES, PLACE_BITS


class Live:
    """How much of each segment is needed."""

    def __init__(self) -> None:
        self._bytes: defaultdict[int, int] = defaultdict(int)
        self.total = 0
        """Bytes of all entries that have a place."""

    def of(self, segment: int) -> int:
        """Bytes of entries that lie in a segment and nowhere else."""
        return self._bytes.get(segment, 0)

    def add(self, place: int, length: int) -> None:
        """An entry lies there."""
        self._bytes[place >> PLACE_BITS] += HEADER_BYTES + length
        self.total += HEADER_BYTES + length

    def drop(self, places: "array[int]", lengths: "array[int]") -> None:
        """Entries are not needed any more; those without a place never were."""
        segments = np.frombuffer(places, np.uint64) >> np.uint64(PLACE_BITS)
        numbers, inverse = np.unique(segments, return_inverse=True)
        sums = np.bincount(inverse, np.frombuffer(lengths, np.uint64) + np.uint64(HEADER_BYTES))
        for number, size in zip(numbers.tolist(), sums.tolist(), strict=True):
            if number:
                self._bytes[number] -= int(size)
                self.total -= int(size)


class Places:
    """Term, place and length of every entry, in the order of their indexes: a look-up costs the same for all."""

    def __init__(self, first: int, live: Live) -> None:
        self.first = first
        self.size = 0
        """Bytes of data of all entries."""
        self.damaged: set[int] = set()
        """Indexes of entries whose data is lost."""
        self._live = live
        self._terms, self._places, self._lengths = array("Q"), array("Q"), array("Q")

    @property
    def last(self) -> int:
        """Index of the newest entry; one before `first` without any."""
        return self.first + len(self._terms) - 1

    def term(self, index: int) -> int:
        """Of an entry."""
        return self._terms[index - self.first]

    def place(self, index: int) -> int:
        """Of an entry; 0 while it has none."""
        return self._places[index - self.first]

    def length(self, index: int) -> int:
        """Bytes of its data."""
        return self._lengths[index - self.first]

    def __len__(self) -> int:
        return len(self._terms)

    def missing(self) -> int | None:
        """The first entry without a place."""
        return self.first + self._places.index(0) if 0 in self._places else None

    def within(self, segment: int) -> list[int]:
        """Indexes of the entries in a segment."""
        places = np.frombuffer(self._places, np.uint64) >> np.uint64(PLACE_BITS)
        return [self.first + int(at) for at in np.flatnonzero(places == segment)]

    def append(self, term: int, length: int) -> None:
        """Another entry, which has no place yet."""
        self._terms.append(term)
        self._places.append(0)
        self._lengths.append(length)
        self.size += length

    def extend(self, last: int) -> None:
        """Entries of which nothing is known, up to an index."""
        for _ in range(self.last, last):
            self.append(0, 0)

    def lies(self, index: int, place: int) -> bool:
        """Whether there is an entry of that index, in that place."""
        return self.first <= index <= self.last and self.place(index) == place

    def is_sound(self, index: int) -> bool:
        """Whether the data of an entry is known to lie somewhere."""
        return self.first <= index <= self.last and self.place(index) > 0 and index not in self.damaged

    def lose(self, index: int) -> None:
        """Nobody knows whether the entries from one on are still the same, and where they lie."""
        at = min(max(0, index - self.first), len(self))
        self._live.drop(self._places[at:], self._lengths[at:])
        self._places[at:] = array("Q", bytes(8 * (len(self) - at)))

    def spoil(self, index: int) -> None:
        """The data of an entry is lost. Ignored when there is none of that index."""
        if self.first <= index <= self.last:
            self.damaged.add(index)

    def put(self, index: int, term: int, length: int, place: int) -> None:
        """An entry was written, once more or for the first time. Ignored when there is none of that index."""
        at = index - self.first
        if not 0 <= at < len(self._terms):
            return
        if self._places[at]:
            self._live.drop(self._places[at : at + 1], self._lengths[at : at + 1])
        self.size += length - self._lengths[at]
        self._terms[at], self._places[at], self._lengths[at] = term, place, length
        self._live.add(place, length)
        self.damaged.discard(index)

    def truncate(self, index: int) -> None:
        """Forget an entry and all behind it."""
        if index <= self.last:
            self._forget(slice(max(0, index - self.first), None))
            self.damaged = {known for known in self.damaged if known < index}

    def compact(self, index: int) -> None:
        """Forget everything up to an entry."""
        self._forget(slice(max(0, index + 1 - self.first)))
        self.first = index + 1
        self.damaged = {known for known in self.damaged if known > index}

    def clear(self, first: int) -> None:
        """Forget everything; the next entry will be this one."""
        self.truncate(self.first)
        self.first = first

    def _forget(self, slots: slice) -> None:
        places, lengths = self._places[slots], self._lengths[slots]
        self._live.drop(places, lengths)
        self.size -= sum(lengths)
        for column in (self._terms, self._places, self._lengths):
            del column[slots]
