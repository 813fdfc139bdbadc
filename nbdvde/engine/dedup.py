"""Which blocks are stored already: an index of fingerprints that never takes more than its memory.

A fingerprint is 16 bytes of a keyed BLAKE3. A *place* says where a stored block lies: container, unit and block; a
container is what its owner numbered, a log segment. Two tables, filled until the memory is used up:

* recent: whole fingerprints with their places, of what was written or looked at lately, in two generations. What is
  found here is confirmed.
* hooks: 8 bytes of a fingerprint, the slot whose list of fingerprints has it, and the chunk of the list. When they get
  too many, those of slots no longer in use go, then every second one: which fingerprints are hooks follows from their
  value alone, so that a run of duplicates meets one sooner or later, and the list that it leads to has the neighbours.

Both are numpy arrays with open addressing, asked and changed for many blocks at a time.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from nbdvde.engine.layout import SLOT_SHIFT, UNIT_SHIFT

Prints: TypeAlias = npt.NDArray[np.uint64]
"""Fingerprints, shape (n, 2): the first column is the key of both tables."""
Places: TypeAlias = npt.NDArray[np.uint64]
"""container << 32 | unit << 8 | block; 0 for none."""
Slots: TypeAlias = npt.NDArray[np.uint32]
Chunks: TypeAlias = npt.NDArray[np.uint32]
"""slot << 8 | chunk; 0 for none."""
Found: TypeAlias = npt.NDArray[np.int64]
Mask: TypeAlias = npt.NDArray[np.bool_]
Values: TypeAlias = npt.NDArray[Any]
"""A column of a table."""

PRINT_BYTES = 16
CONTAINER_SHIFT, PLACE_UNIT_SHIFT = 32, 8
SAME_BATCH = (1 << 32) - 1
"""The container of what is only being stored: its units are the places in the batch."""
CHUNK_BITS, CHUNK_PRINTS = 8, 256
"""A chunk is so many fingerprints of a list, which has at most 256 of them."""
_NEAR = 2
"""Units that a run may go on: the next extent, behind the record of the next group."""
_LOAD = 0.75
_FIRST_CAPACITY = 1024
_HOOK_BYTES, _RECENT_BYTES = 12, 24
_AHEAD = np.arange(16)
"""Places that a search looks at together: one that goes on by one at a time takes as many rounds as the longest of its
ways, 0.90 µs a key for 512 that are not there (at two thirds of the load); so it is 0.27."""
_SLICE = 1 << 16
"""Keys entered at a time when a table is filled again."""


def parse_prints(data: bytes | bytearray) -> Prints:
    """Fingerprints from the bytes of a list."""
    return np.frombuffer(data, np.uint64).reshape(-1, 2)


def chunks_of(slot: int, first: int, count: int) -> Chunks:
    """The chunks of `count` fingerprints from number `first` on in the list of a slot."""
    return (slot << CHUNK_BITS | np.arange(first, first + count) // CHUNK_PRINTS).astype(np.uint32)


def blocks_of(index: npt.NDArray[np.uint64]) -> tuple[Found, Found]:
    """Unit, and number in it, of each block of a segment, in the order of its list, from the entries of its index."""
    blocks = (index >> np.uint64(48)).astype(np.int64)
    units = np.repeat(np.arange(len(index)), blocks)
    return units, np.arange(len(units)) - np.repeat(np.cumsum(blocks) - blocks, blocks)


def map_entries(places: Places, slots: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Map entries of places, whose containers lie in these slots."""
    units = places >> np.uint64(PLACE_UNIT_SHIFT) & np.uint64(0xFFFFFF)
    entries: npt.NDArray[np.uint64] = slots << np.uint64(SLOT_SHIFT) | units << np.uint64(UNIT_SHIFT)
    return entries | places & np.uint64(0xFF)


class _Table:
    """Keys (never 0) with one column of values or two; linear probing. It grows up to `capacity_max`."""

    def __init__(self, capacity_max: int, *columns: type[np.unsignedinteger]) -> None:
        self._capacity_max, self._types = max(capacity_max, 16), columns
        self.count = 0
        """Keys, or a few more: equal ones that are entered together count each."""
        self._allocate(min(_FIRST_CAPACITY, self._capacity_max))

    def _allocate(self, capacity: int) -> None:
        self.keys = np.zeros(capacity, np.uint64)
        self.columns: list[Values] = [np.zeros(capacity, column) for column in self._types]

    def _homes(self, keys: npt.NDArray[np.uint64]) -> Found:
        return ((keys >> np.uint64(32)) * np.uint64(len(self.keys)) >> np.uint64(32)).astype(np.int64)

    def find(self, keys: npt.NDArray[np.uint64]) -> Found:
        """Where each key lies, -1 for those that do not."""
        at = self._homes(keys)
        there = self._seek(keys, at)
        at[(there != keys) | (there == 0)] = -1
        return at

    def _seek(self, keys: npt.NDArray[np.uint64], at: Found) -> npt.NDArray[np.uint64]:
        """Move each of the places on to the first one that has its key, or none; answers what is there."""
        there = self.keys[at]
        left = np.flatnonzero((there != keys) & (there != 0))
        while len(left):
            seen = self.keys.take(at[left, None] + _AHEAD, mode="wrap")
            steps = ((seen == keys[left, None]) | (seen == 0)).argmax(axis=1)
            there[left] = seen[np.arange(len(left)), steps]
            at[left] = (at[left] + np.where(steps, steps, len(_AHEAD) - 1)) % len(self.keys)
            left = left[steps == 0]
        return there

    def has_room(self, more: int) -> bool:
        """Whether so many keys fit; grows if need be."""
        capacity = len(self.keys)
        while self.count + more > capacity * _LOAD and capacity < self._capacity_max:
            capacity = min(4 * capacity, self._capacity_max)
        if capacity > len(self.keys):
            keys, columns = self._content(self.keys != 0)
            self._allocate(0)
            self._allocate(capacity)
            self._fill(keys, columns)
        return self.count + more <= capacity * _LOAD

    def keep(self, wanted: Callable[[npt.NDArray[np.uint64], Values], Mask]) -> None:
        """Forget all but what is wanted, by keys and first column."""
        keys, columns = self._content(wanted(self.keys, self.columns[0]) & (self.keys != 0))
        self.keys[:] = 0
        self._fill(keys, columns)

    def _content(self, chosen: Mask) -> tuple[npt.NDArray[np.uint64], list[Values]]:
        return self.keys[chosen], [column[chosen] for column in self.columns]

    def _fill(self, keys: npt.NDArray[np.uint64], columns: list[Values]) -> None:
        self.count = 0
        for start in range(0, len(keys), _SLICE):
            part = slice(start, start + _SLICE)
            self.insert(keys[part], *(column[part] for column in columns))

    def insert(self, keys: npt.NDArray[np.uint64], *values: Values) -> None:
        """Enter keys, for which there must be room; the last one of equal ones counts."""
        at = self._homes(keys)
        while len(keys):
            free = self._seek(keys, at) == 0
            self.keys[at] = keys
            settled = self.keys[at] == keys
            self.count += int(np.count_nonzero(free & settled))
            for column, value in zip(self.columns, values, strict=True):
                column[at] = value  # those that are not settled share a place with one that comes later, and is
            left = np.flatnonzero(~settled)
            keys, at, values = keys[left], at[left], tuple(value[left] for value in values)


class Index:
    """Fingerprints within `memory` bytes. `in_use` tells of slots whether they still are."""

    def __init__(self, memory: int, in_use: Callable[[Slots], Mask], mask: int = 3) -> None:
        # The rest is for the moment in which a table is filled again from a copy of its content.
        self._hooks = _Table(memory * 2 // 5 // _HOOK_BYTES, np.uint32)
        self._recent_capacity = memory // 8 // _RECENT_BYTES
        self.batch = min(4096, max(16, int(self._recent_capacity * _LOAD) // 3))
        """Blocks to ask for at a time, so that all of them are recent together."""
        self._young, self._old = self._generation(), self._generation()
        self._in_use = in_use
        self.mask = mask
        """Bits that are zero in the first column of a fingerprint that is a hook."""
        self.generation = 2
        """Number of the younger generation of what is recent."""

    def _generation(self) -> _Table:
        return _Table(self._recent_capacity, np.uint64, np.uint64)

    def find(self, prints: Prints) -> Places:
        """Where the blocks lie whose fingerprints are recent."""
        keys = np.ascontiguousarray(prints[:, 0])
        places = np.zeros(len(keys), np.uint64)
        for table in (self._young, self._old):
            missing = np.flatnonzero(places == 0)
            at = table.find(keys[missing])
            second, place = table.columns
            good = (at >= 0) & (second[at] == prints[missing, 1])
            places[missing[good]] = place[at[good]]
        return places

    def chunks(self, prints: Prints) -> Chunks:
        """The chunks of lists that have fingerprints, as far as those are hooks; 0 for the others."""
        chunks = np.zeros(len(prints), np.uint32)
        sampled = np.flatnonzero(self._sampled(prints[:, 0]))
        at = self._hooks.find(prints[sampled, 0])
        chunks[sampled[at >= 0]] = self._hooks.columns[0][at[at >= 0]]
        return chunks

    def remember(self, prints: Prints, places: Places) -> None:
        """Have the blocks of a container among what is recent. The older half is forgotten when there is no room."""
        chosen = prints[:, 0] != 0
        prints, places = prints[chosen], places[chosen]
        step = max(1, int(self._recent_capacity * _LOAD) // 2)
        for start in range(0, len(prints), step):
            part = prints[start : start + step]
            if not self._young.has_room(len(part)):
                self._old, self._young = self._young, self._generation()
                self.generation += 1
                self._young.has_room(len(part))
            self._young.insert(part[:, 0], part[:, 1], places[start : start + step])

    def hook(self, prints: Prints, chunks: Chunks) -> None:
        """Have fingerprints, those that are hooks, lead to the chunks of lists that have them."""
        sampled = np.flatnonzero(self._sampled(prints[:, 0]))
        while not self._hooks.has_room(len(sampled)):
            self._thin()
            sampled = sampled[self._sampled(prints[sampled, 0])]
        self._hooks.insert(prints[sampled, 0], chunks[sampled])

    def _sampled(self, keys: npt.NDArray[np.uint64]) -> Mask:
        sampled: Mask = (keys & np.uint64(self.mask) == 0) & (keys != 0)
        return sampled

    def _thin(self) -> None:
        """Make room: forget the hooks of slots not in use, and if that is less than a quarter, every second one."""
        before = self._hooks.count
        self._hooks.keep(lambda _, chunks: self._in_use(chunks >> np.uint32(CHUNK_BITS)))
        if self._hooks.count >= before * 3 // 4:
            self.mask = self.mask << 1 | 1
            self._hooks.keep(lambda keys, _: self._sampled(keys))

    @property
    def memory(self) -> int:
        """Bytes of the tables."""
        tables = (self._hooks, self._young, self._old)
        return sum(array.nbytes for table in tables for array in (table.keys, *table.columns))

    def containers(self) -> npt.NDArray[np.uint64]:
        """Numbers of the containers of which something is recent."""
        places = np.concatenate([table.columns[1][table.keys != 0] for table in (self._young, self._old)])
        return np.unique(places >> np.uint64(CONTAINER_SHIFT))

    def check(self) -> None:
        """Assert every invariant."""
        for table in (self._hooks, self._young, self._old):
            used = np.flatnonzero(table.keys)
            assert table.count >= len(used), "the count is right"
            assert table.count < len(table.keys), "a search ends"
            assert (table.find(table.keys[used]) == used).all(), "every key is found where it lies"
        assert self._sampled(self._hooks.keys[self._hooks.keys != 0]).all(), "no hook but those of the sample"


def within_batch(prints: Prints, places: Places) -> None:
    """Point those blocks of a batch without a place that equal an earlier one at that (`SAME_BATCH`)."""
    unknown = np.flatnonzero((places == 0) & (prints[:, 0] != 0))
    ordered = np.sort(prints[unknown, 0])
    if not (ordered[1:] == ordered[:-1]).any():
        return
    _, first, number = np.unique(prints[unknown, 0], return_index=True, return_inverse=True)
    original = first[number]
    equal = (original != np.arange(len(unknown))) & (prints[unknown, 1] == prints[unknown[original], 1])
    origin = unknown[original[equal]].astype(np.uint64)
    places[unknown[equal]] = np.uint64(SAME_BATCH << CONTAINER_SHIFT) | origin << np.uint64(PLACE_UNIT_SHIFT)


def worth_sharing(blocks: npt.NDArray[np.int64], places: Places, shortest: int) -> Mask:
    """Which blocks of a batch, ascending, become references: reading them must not jump about.

    A chain is consecutive blocks whose places follow each other. All of a chain of at least `shortest` is taken; so
    are consecutive blocks in several chains that are as long as that on average.
    """
    hit = places != 0
    joined = (np.diff(blocks) == 1) & hit[1:] & hit[:-1]
    units = places >> np.uint64(PLACE_UNIT_SHIFT)
    near = joined & (units[1:] - units[:-1] <= _NEAR)  # unsigned: backwards is far
    chain = np.concatenate([[0], np.cumsum(~near)])
    stretch = np.concatenate([[0], np.cumsum(~joined)])
    chains = np.bincount(stretch[1:], joined & ~near, minlength=int(stretch[-1]) + 1) + 1
    long = np.bincount(chain)[chain] >= shortest
    on_average = np.bincount(stretch)[stretch] >= shortest * chains[stretch]
    shared: Mask = hit & (long | on_average)
    return shared
