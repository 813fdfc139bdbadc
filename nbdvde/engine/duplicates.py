"""Duplicates in what a commit writes: which blocks become references, and to what.

Only runs are shared (`dedup.worth_sharing`). No reference leads into a segment that is being cleaned, or has nothing
alive: a checkpoint may have left that one out already. One that was cleaned has no fingerprints of what it lost. One
that has something alive stays, as no checkpoint is cut between this choice and the counting of the references: both
happen under the commit lock.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from nbdvde import workers
from nbdvde.disk import Buffer
from nbdvde.engine.buffer import Generation
from nbdvde.engine.catalogue import Catalogue
from nbdvde.engine.dedup import (
    CHUNK_BITS,
    CHUNK_PRINTS,
    CONTAINER_SHIFT,
    PLACE_UNIT_SHIFT,
    PRINT_BYTES,
    SAME_BATCH,
    Chunks,
    Index,
    Mask,
    Places,
    Prints,
    Slots,
    blocks_of,
    chunks_of,
    map_entries,
    parse_prints,
    within_batch,
    worth_sharing,
)
from nbdvde.engine.fresh import Fresh
from nbdvde.engine.segments import Segments, State
from nbdvde.engine.versions import Entries
from nbdvde.errors import DamageError

MEMORY = 256 << 20
"""Default limit of the index: all fingerprints of 30 GiB of unique data, one in 32 of 1 TiB."""
SHORTEST = 2
"""Blocks of a run that is worth sharing."""
LIST_BYTES = 1 << 20
"""Fingerprints kept of a segment at most, 65,536; and never more than a sixteenth of its length."""
_LIVE_MAX = 1 << 31
"""References into one segment: they are counted in 32 bits."""
_CONTAINERS = 4096
_LOADS = 4
"""Chunks of lists that a part of a commit may load, and one more for each of `_BLOCKS_A_LOAD` blocks."""
_BLOCKS_A_LOAD = 64


@dataclass(frozen=True, slots=True)
class Split:
    """What a transaction writes, in blocks to store and blocks that are stored already."""

    unique: Sequence[int]
    shared: Sequence[int]
    prints: bytes
    """Fingerprints of the unique ones; empty when the volume takes no part."""
    is_shared: Mask
    """For each block of the transaction."""
    entries: npt.NDArray[np.uint64]
    """Map entries of the shared ones, except for those with an origin."""
    origins: npt.NDArray[np.int64]
    """Which one of the unique blocks a shared one equals, -1 for what was stored before."""

    def references(self, start: int, stop: int, stored: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
        """Items of a record for the shared blocks from number `start` to `stop`. `stored`: entries of the unique."""
        entries = self._entries(stored)[start:stop]
        blocks = np.array(self.shared[start:stop], np.int64)
        breaks = np.flatnonzero((np.diff(blocks) != 1) | (np.diff(entries) != 1)) + 1
        starts = [0, *breaks.tolist()]
        counts = np.diff([*starts, len(blocks)]).tolist()
        return tuple(zip(blocks[starts].tolist(), entries[starts].tolist(), counts, strict=True))

    def all_entries(self, stored: Sequence[int]) -> Sequence[int]:
        """Map entries of every block of the transaction, in order."""
        if not self.shared:
            return stored
        entries = np.empty(len(self.is_shared), np.uint64)
        entries[~self.is_shared] = stored
        entries[self.is_shared] = self._entries(stored)
        return entries.tolist()

    def _entries(self, stored: Sequence[int]) -> npt.NDArray[np.uint64]:
        entries = self.entries.copy()
        within = self.origins >= 0
        if within.any():
            entries[within] = np.array(stored, np.uint64)[self.origins[within]]
        return entries


def nothing_shared(blocks: Sequence[int], prints: bytes = b"") -> Split:
    """A transaction in which every block is stored."""
    none = np.zeros(0, np.int64)
    return Split(blocks, (), prints, np.zeros(len(blocks), np.bool_), none.astype(np.uint64), none)


def references_to(blocks: Sequence[int], entries: Sequence[int]) -> Split:
    """A transaction of references alone; the blocks ascend."""
    count = len(blocks)
    return Split((), blocks, b"", np.ones(count, np.bool_), np.array(entries, np.uint64), np.full(count, -1, np.int64))


class Duplicates:
    """The fingerprints of an open image, in `memory` bytes."""

    def __init__(self, segments: Segments, catalogue: Catalogue, memory: int) -> None:
        self._segments, self._catalogue = segments, catalogue
        self._keys: dict[int, bytes] = {}
        """Of the dedup domains."""
        self._index = Index(memory, self._in_use)
        self._lock = workers.Lock()
        """For the index; never held while something is read."""
        self._list_bytes = min(LIST_BYTES, segments.segment_bytes // 16)
        self._numbers: dict[State, int] = {}
        self._states: dict[int, State] = {}
        """Containers by number, as they are called in places; a segment that replaces another gets its own."""
        self._loaded: dict[tuple[int, int], int] = {}
        """Generation of the index in which a chunk of the list of a container was loaded."""
        self._next_number = 1
        self._fresh = Fresh(self._index)

    # What a transaction asks

    def split(self, volume: int, written: Generation, blocks: Sequence[int], *, load: bool) -> Split:
        """Choose what is shared of the blocks (ascending) of a transaction. Without `load` nothing is read."""
        domain = self._catalogue.members[volume].domain
        if not domain:
            return nothing_shared(blocks)
        numbers = np.array(blocks, np.int64)
        beside = np.diff(numbers) == 1
        # A block on its own is no part of a run, now or later: it is not worth hashing.
        asked = np.flatnonzero(np.concatenate([[False], beside]) | np.concatenate([beside, [False]]))
        if len(blocks) < SHORTEST or not len(asked):
            return nothing_shared(blocks)
        if len(asked) < len(blocks):
            prints = np.zeros((len(blocks), 2), np.uint64)
            prints[asked] = self._prints(domain, written, numbers[asked].tolist())
        else:
            prints = self._prints(domain, written, blocks)
        places = self._places(prints[asked], load)
        within_batch(prints[asked], places)
        if not places.any():
            return nothing_shared(blocks, prints.tobytes())
        chosen = worth_sharing(numbers[asked], places, SHORTEST)
        return (
            self._split(numbers, prints, asked, chosen, places)
            if chosen.any()
            else nothing_shared(blocks, prints.tobytes())
        )

    def stored(self, volume: int, written: Generation, blocks: Sequence[int]) -> Split:
        """All of the blocks are to be stored, with their fingerprints, whether they are stored already or not."""
        domain = self._catalogue.members[volume].domain
        return nothing_shared(blocks, self._prints(domain, written, blocks).tobytes() if domain else b"")

    def _prints(self, domain: int, written: Generation, blocks: Sequence[int]) -> Prints:
        return self.prints(domain, [written.blocks[block] for block in blocks])

    def _key(self, domain: int) -> bytes:
        if domain not in self._keys:
            self._keys[domain] = self._segments.keyring.dedup_key(domain)
        return self._keys[domain]

    def _split(
        self, blocks: npt.NDArray[np.int64], prints: Prints, asked: npt.NDArray[np.intp], chosen: Mask, places: Places
    ) -> Split:
        is_shared = np.zeros(len(blocks), np.bool_)
        is_shared[asked[chosen]] = True
        places = places[chosen]
        containers = places >> np.uint64(CONTAINER_SHIFT)
        within = containers == SAME_BATCH
        origins = np.full(len(places), -1, np.int64)
        unique_before = np.cumsum(~is_shared) - 1
        origin = (places[within] & np.uint64(0xFFFFFFFF)) >> np.uint64(PLACE_UNIT_SHIFT)
        origins[within] = unique_before[asked[origin.astype(np.intp)]]
        known, number = np.unique(containers[~within], return_inverse=True)
        slots = np.array([self._states[container].segment.slot for container in known.tolist()], np.uint64)
        entries = np.zeros(len(places), np.uint64)
        if len(known):
            entries[~within] = map_entries(places[~within], slots[number])
        unique, shared = blocks[~is_shared].tolist(), blocks[is_shared].tolist()
        return Split(unique, shared, prints[~is_shared].tobytes(), is_shared, entries, origins)

    def _places(self, prints: Prints, load: bool) -> Places:
        """Where blocks lie that are stored, in segments that may be referred to."""
        step = self._index.batch
        places = [self._find(prints[start : start + step], load) for start in range(0, len(prints), step)]
        return np.concatenate(places)

    def _find(self, prints: Prints, load: bool) -> Places:
        with self._lock:
            places = self._only_referable(self._index.find(prints))
            missing = np.flatnonzero(places == 0)
            places[missing] = self._only_referable(self._fresh.find(prints[missing]))
            missing = missing[places[missing] == 0]
            chunks = self._index.chunks(prints[missing]) if load else np.zeros(0, np.uint32)
        if chunks.any() and self._load_chunks(chunks, _LOADS + len(prints) // _BLOCKS_A_LOAD):
            with self._lock:
                places[missing] = self._only_referable(self._index.find(prints[missing]))
        return places

    def _only_referable(self, places: Places) -> Places:
        """Without those that no reference may lead to."""
        if not places.any():
            return places
        containers = places >> np.uint64(CONTAINER_SHIFT)
        for container in np.unique(containers).tolist():
            if container and not self.may_refer_to(self._states.get(container)):
                places[containers == container] = 0
        return places

    def may_refer_to(self, state: State | None) -> bool:
        """Whether references may be made to what is in a segment; the commit lock is held until they are counted."""
        return (
            state is not None
            and self._segments.states.get(state.segment.slot) is state
            and state.holds_blocks
            and state.linked
            and not state.victim
            and not state.suspect
            and 0 < state.live < _LIVE_MAX
        )

    # Lists

    def _load_chunks(self, chunks: Chunks, limit: int) -> bool:
        """Have chunks of lists among what is recent, those asked for most; whether there was any."""
        found, counts = np.unique(chunks[chunks != 0], return_counts=True)
        wanted = found[np.argsort(-counts, kind="stable")][:limit]
        loaded = [self._load_chunk(chunk >> CHUNK_BITS, chunk & 0xFF) for chunk in wanted.tolist()]
        return any(loaded)

    def _load_chunk(self, slot: int, chunk: int) -> bool:
        state = self._segments.states.get(slot)
        if state is None or not self.may_refer_to(state):
            return False
        number = self._number(state)
        if self._loaded.get((number, chunk), 0) >= self._index.generation - 1:
            return False
        prints = parse_prints(self._segments.prints(state))
        beside = self._index.batch // 4
        start, stop = max(0, chunk * CHUNK_PRINTS - beside), (chunk + 1) * CHUNK_PRINTS + beside
        try:
            units = np.array(self._segments.index(state), np.uint64)
        except DamageError:  # a checkpoint may just have moved it; and reading reports what is damaged
            return False
        places = _places_of(units)[: len(prints)] | np.uint64(number << CONTAINER_SHIFT)
        with self._lock:
            self._index.remember(prints[: len(places)][start:stop], places[start:stop])
            if len(self._loaded) >= _CONTAINERS:
                self._loaded.clear()
            for known in range(-(-start // CHUNK_PRINTS), min(stop, len(places) + CHUNK_PRINTS) // CHUNK_PRINTS):
                self._loaded[number, known] = self._index.generation
        return True

    def listed(self, state: State) -> tuple[Entries, Prints]:
        """Map entries of all blocks of a closed segment, and their fingerprints, 0 where there is none.

        Blocks. Raises DamageError.
        """
        places = _places_of(np.array(self._segments.index(state), np.uint64))
        prints = np.zeros((len(places), 2), np.uint64)
        known = parse_prints(self._segments.prints(state))[: len(places)]
        prints[: len(known)] = known
        return map_entries(places, np.full(len(places), state.segment.slot, np.uint64)), prints

    def prints(self, domain: int, pages: Sequence[Buffer]) -> Prints:
        """Fingerprints of blocks."""
        return parse_prints(_hashed(self._key(domain), pages))

    def hook_list(self, state: State) -> None:
        """Have a stored list found by its fingerprints; blocks."""
        prints = parse_prints(self._segments.prints(state))
        with self._lock:
            self._index.hook(prints, chunks_of(state.segment.slot, 0, len(prints)))

    def _in_use(self, slots: Slots) -> Mask:
        states = self._segments.states
        found, number = np.unique(slots, return_inverse=True)
        known = [(state := states.get(slot)) is not None and not state.victim for slot in found.tolist()]
        return np.array(known, np.bool_)[number]

    # What was stored

    def learn(self, state: State, first: int, extent_blocks: int, blocks: int, prints: bytes) -> None:
        """Blocks were stored in extents from unit `first` on, each with `extent_blocks` but the last."""
        known = prints or bytes(PRINT_BYTES * blocks)
        number_in_list = len(state.prints) // PRINT_BYTES
        state.prints += known[: max(0, self._list_bytes - len(state.prints))]
        if not prints:
            return
        places = _places_in(self._number(state), first, extent_blocks, blocks)
        listed = min(blocks, self._list_bytes // PRINT_BYTES - number_in_list)
        self._fresh.add(prints, places, state.segment.slot, number_in_list, listed)
        if self._fresh.is_due:
            with self._lock:
                self._fresh.enter()

    def _number(self, state: State) -> int:
        """The number of a segment as a container."""
        number = self._numbers.get(state)
        if number is None:
            if len(self._numbers) >= _CONTAINERS:
                self._forget_containers()
            number, self._next_number = self._next_number, self._next_number + 1
            self._numbers[state], self._states[number] = number, state
        return number

    def _forget_containers(self) -> None:
        recent = set(self._index.containers().tolist()) | self._fresh.containers()
        self._states = {number: state for number, state in self._states.items() if number in recent}
        self._numbers = {state: number for number, state in self._states.items()}


def _places_in(container: int, first: int, extent_blocks: int, blocks: int) -> Places:
    """Places of blocks in extents from unit `first` on, each with `extent_blocks` but the last."""
    units, within = np.divmod(np.arange(blocks), extent_blocks)
    return (container << CONTAINER_SHIFT | units + first << PLACE_UNIT_SHIFT | within).astype(np.uint64)


def _places_of(index: npt.NDArray[np.uint64]) -> Places:
    """Places, without the container, of the blocks of a segment in order."""
    units, within = blocks_of(index)
    return (units << PLACE_UNIT_SHIFT | within).astype(np.uint64)


def _hashed(key: bytes, pages: Sequence[Buffer]) -> bytes:
    """Fingerprints, one behind the other.

    In one thread: with two, which take turns every 4 KiB, writes of 1 MiB come at 229 MiB/s instead of 321 (fio beside
    the server on two processors).
    """
    hasher, digests = blake3(key=key), []
    for page in pages:
        digests.append(hasher.update(page).digest(PRINT_BYTES))
        hasher.reset()  # a new one for each page takes a fifth longer
    return b"".join(digests)
