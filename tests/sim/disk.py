"""A disk below a member: what is not synced may be lost in part, and what was there may be found damaged.

The fault model: a crash in the middle of a sync leaves any first part of the entries, whole or with the last one torn,
and the hard state or not, independently. Damage is noticed, as the records carry checksums, and leaves the identity
(term, index) of an entry, as those are kept twice. A disk that says that it has synced and has not is out of the model.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from random import Random

from nbdvde.raft.messages import Entry, EntryKind, HardState, Snapshot
from nbdvde.raft.store import Load, MemoryStore, write


class HoledStore(MemoryStore):
    """A log of which some entries are damaged: of those no more than term and index is known.

    With `at_hand` only so many of the newest entries are in memory, and what was loaded last.
    """

    def __init__(self, snapshot: Snapshot, at_hand: int = 0) -> None:
        super().__init__(snapshot)
        self.holes: set[int] = set()
        self.torn: set[int] = set()
        """Of those: what a crash left half, so that it never was durable."""
        self._at_hand, self._loaded = at_hand, 1 << 62
        """The second: index from which on entries were loaded."""
        self._missed: tuple[int, int, int] | None = None

    def get_range(self, start: int, stop: int, max_bytes: int) -> Sequence[Entry]:
        if self._at_hand and start <= self.last_index - self._at_hand and start < self._loaded:
            self._missed = start, stop, max_bytes
            return ()
        if self.holes:
            stop = min([stop, *(hole for hole in self.holes if hole >= start)])
        return super().get_range(start, stop, max_bytes) if start < stop else ()

    def missed(self) -> tuple[int, int, int] | None:
        missed, self._missed = self._missed, None
        return missed

    def load(self, start: int, stop: int, max_bytes: int) -> Load:
        return lambda: partial(setattr, self, "_loaded", start)

    def members(self) -> Sequence[Entry]:
        return [entry for entry in super().members() if entry.index not in self.holes]

    def truncate_from(self, index: int) -> None:
        super().truncate_from(index)
        self._keep(range(index))

    def compact_to(self, snapshot: Snapshot) -> None:
        super().compact_to(snapshot)
        self._keep(range(snapshot.index + 1, self.last_index + 1))

    def reset(self, snapshot: Snapshot) -> None:
        super().reset(snapshot)
        self._keep(range(0))

    def _keep(self, indexes: range) -> None:
        if self.holes:
            self.holes = {hole for hole in self.holes if hole in indexes}
            self.torn &= self.holes

    def holds(self, index: int, term: int) -> bool:
        """Whether an entry is there, or in the state that stands for it, or was before it rotted."""
        if index in self.torn:
            return False
        return index <= self.snapshot.index or (index <= self.last_index and self.term(index) == term)

    def copy(self) -> "HoledStore":
        """The same once more."""
        other = HoledStore(self.snapshot, self._at_hand)
        other.hard, other.holes, other.torn = self.hard, set(self.holes), set(self.torn)
        other._entries, other._members, other.size = self._entries.copy(), self._members.copy(), self.size
        return other


class Disk:
    """One of one member of a group."""

    def __init__(self, start: Snapshot, at_hand: int) -> None:
        self.store = HoledStore(start, at_hand)
        """As the member sees it."""
        self.durable = HoledStore(start, at_hand)
        """As a crash leaves it."""
        self._unsynced: tuple[HardState | None, Sequence[Entry]] = None, ()

    def change(self, hard: HardState | None, entries: Sequence[Entry]) -> None:
        """Write what a `Ready` asks for; a sync follows before the next one."""
        write(self.store, hard, entries)
        self._unsynced = hard, entries

    def sync(self) -> None:
        """Make durable what was written."""
        write(self.durable, *self._unsynced)
        self._unsynced = None, ()

    def compact_to(self, snapshot: Snapshot) -> None:
        """Forget entries, durably."""
        for store in (self.store, self.durable):
            store.compact_to(snapshot)

    def take_over(self, snapshot: Snapshot) -> None:
        """A state from elsewhere stands for the log; what follows it stays where the log agrees."""
        for store in (self.store, self.durable):
            if store.first_index <= snapshot.index <= store.last_index and store.term(snapshot.index) == snapshot.term:
                store.compact_to(snapshot)
            else:
                store.reset(snapshot)

    def crash(self, random: Random, *, torn: bool) -> None:
        """What was not synced is there in part; with `torn` the last entry of that part may be damaged."""
        hard, entries = self._unsynced
        self._unsynced = None, ()
        if hard or entries:
            part = entries[: int(random.random() * (len(entries) + 1))]
            write(self.durable, hard if random.random() < 0.5 else None, part)
            if torn and part:
                self.durable.holes.add(part[-1].index)
                self.durable.torn.add(part[-1].index)
            elif entries and not part and random.random() < 0.3:
                self.durable.truncate_from(max(entries[0].index, self.durable.first_index))
        self.store = self.durable.copy()

    def damage(self, indexes: Iterable[int]) -> int:
        """Entries of a member that is down cannot be read any more; answers of how many there were."""
        there = {index for index in indexes if self.durable.first_index <= index <= self.durable.last_index}
        self.durable.holes |= there
        self.store.holes |= there
        return len(there)

    def repair(self, others: HoledStore) -> bool:
        """Take damaged entries from another log; whether members are among them."""
        mended = {
            hole
            for hole in self.store.holes
            if others.first_index <= hole <= others.last_index
            and hole not in others.holes
            and others.term(hole) == self.store.term(hole)
        }
        for store in (self.store, self.durable):
            store.holes -= mended
            store.torn -= mended
        return any(self.store.get(index).kind == EntryKind.MEMBERS for index in sorted(mended))
