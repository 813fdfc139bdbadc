"""The log of one group in the log of its node."""

from collections.abc import Sequence
from typing import Protocol

from nbdvde.errors import DamageError
from nbdvde.raft.messages import Entry, HardState, Snapshot
from nbdvde.raft.recent import Cache, trim
from nbdvde.raft.records import Draft, Kind, entry_bytes, hard_draft, snapshot_draft
from nbdvde.raft.store import Load, Work
from nbdvde.raft.view import View

Wanted = Sequence[tuple[int, int, int, int]]
"""(index, term, place, length) of entries."""


class Owner(Protocol):
    """The log of the node."""

    def emit(self, draft: Draft) -> None:
        """Have a record written."""

    def keep(self, cache: Cache, entries: Sequence[Entry], *, written: bool) -> None:
        """Have entries in memory."""

    def read(self, group: int, index: int, term: int, place: int, length: int) -> Entry | None:
        """An entry from the disk, None if it is not there."""


class FileStore:
    """Implements LogStore."""

    def __init__(self, owner: Owner, number: int, view: View) -> None:
        self.number, self.view = number, view
        self._owner = owner
        self._cache: Cache = {}
        self._missed: tuple[int, int, int] | None = None

    @property
    def hard(self) -> HardState:
        return self.view.state.hard

    @property
    def snapshot(self) -> Snapshot:
        return self.view.state.snapshot

    @property
    def first_index(self) -> int:
        return self.view.places.first

    @property
    def last_index(self) -> int:
        return self.view.places.last

    @property
    def last_term(self) -> int:
        return self.view.state.last_term

    @property
    def size(self) -> int:
        return entry_bytes(0) * len(self.view.places) + self.view.places.size

    @property
    def damaged(self) -> Sequence[range]:
        ranges: list[range] = []
        for index in sorted(self.view.places.damaged):
            if ranges and ranges[-1].stop == index:
                ranges[-1] = range(ranges[-1].start, index + 1)
            else:
                ranges.append(range(index, index + 1))
        return ranges

    @property
    def unsure(self) -> bool:
        return self.view.state.unsure

    def term(self, index: int) -> int:
        return self.snapshot.term if index == self.snapshot.index else self.view.places.term(index)

    def get(self, index: int) -> Entry:
        if entry := self._cache.get(index):
            return entry
        [(_, term, place, length)] = self._wanted(index, index + 1, 0)
        entry = self._owner.read(self.number, index, term, place, length)
        if entry is None:
            raise DamageError(f"raft group {self.view.state.name}", f"entry {index} is damaged", "ask another node")
        return entry

    def get_range(self, start: int, stop: int, max_bytes: int) -> Sequence[Entry]:
        found: list[Entry] = []
        for index in range(start, min(stop, self.last_index + 1)):
            entry = self._cache.get(index)
            if entry is None:
                break
            max_bytes -= entry.size
            if found and max_bytes < 0:
                break
            found.append(entry)
        if not found and start < stop and start <= self.last_index and start not in self.view.places.damaged:
            self._missed = start, stop, max_bytes
        return found

    def missed(self) -> tuple[int, int, int] | None:
        missed, self._missed = self._missed, None
        return missed

    def load(self, start: int, stop: int, max_bytes: int) -> Load:
        found = self._wanted(max(start, self.first_index), min(stop, self.last_index + 1), max_bytes)
        wanted = [each for each in found if each[0] not in self._cache]  # those may not be written yet

        def read() -> Work:
            entries = [self._owner.read(self.number, *each) for each in wanted]
            return lambda: self.loaded(wanted, entries)

        return read

    def loaded(self, wanted: Wanted, entries: Sequence[Entry | None]) -> None:
        """What was looked for was read, or not found; some of it may not be wanted any more."""
        found: list[Entry] = []
        for (index, _, place, _), entry in zip(wanted, entries, strict=True):
            if index in self._cache or not self.view.places.lies(index, place):
                continue
            if entry is None:
                self.view.places.spoil(index)
            else:
                found.append(entry)
        self._owner.keep(self._cache, found, written=True)

    def members(self) -> Sequence[Entry]:
        return self.view.members

    def append(self, entries: Sequence[Entry]) -> None:
        assert not entries or entries[0].index == self.last_index + 1, "they follow what is there"
        for entry in entries:
            draft = Draft.of(self.number, entry)
            self.view.enter(draft)
            self._owner.emit(draft)
        self._owner.keep(self._cache, entries, written=False)

    def truncate_from(self, index: int) -> None:
        if index <= self.last_index:
            self._change(self.view.truncation(self.number, index))
            trim(self._cache, self.first_index, index - 1)

    def compact_to(self, snapshot: Snapshot) -> None:
        self._change(snapshot_draft(self.number, Kind.COMPACT, snapshot))
        trim(self._cache, self.first_index, self.last_index)

    def reset(self, snapshot: Snapshot) -> None:
        self._change(snapshot_draft(self.number, Kind.RESET, snapshot))
        self._cache.clear()

    def save(self, hard: HardState) -> None:
        if hard != self.hard:
            self._change(hard_draft(self.number, hard))

    def mend(self, entries: Sequence[Entry]) -> None:
        places = self.view.places
        for entry in entries:
            if entry.index in places.damaged and places.term(entry.index) == entry.term:
                places.damaged.discard(entry.index)
                self._owner.emit(Draft.of(self.number, entry, Kind.AGAIN))
                self._owner.keep(self._cache, [entry], written=False)

    def settle(self, hard: HardState) -> None:
        self.view.state.hard, self.view.state.unsure = hard, False
        self._owner.emit(self.view.state.draft(self.number))

    def wanted_in(self, segment: int) -> Wanted:
        """Entries that lie in a segment, but for damaged ones."""
        indexes = set(self.view.places.within(segment)) - self.view.places.damaged
        return [each for index in sorted(indexes) for each in self._wanted(index, index + 1, 0)]

    def _change(self, draft: Draft) -> None:
        self.view.change(draft)
        self._owner.emit(draft)

    def _wanted(self, start: int, stop: int, max_bytes: int) -> Wanted:
        """The first of a range, and more as far as so many bytes go."""
        places = self.view.places
        wanted: list[tuple[int, int, int, int]] = []
        for index in range(start, stop):
            length = places.length(index)
            max_bytes -= entry_bytes(length)
            if wanted and max_bytes < 0:
                break
            wanted.append((index, places.term(index), places.place(index), length))
        return wanted
