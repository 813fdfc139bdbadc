"""A group as its records tell of it: what there is besides entries, and where entries lie."""

from dataclasses import dataclass, field

from nbdvde.raft.messages import Entry, EntryKind
from nbdvde.raft.places import Live, Places
from nbdvde.raft.records import Draft, Kind, State


@dataclass
class View:
    """Of one group, after a record; `state.last_index` is `places.last`."""

    state: State
    places: Places
    members: list[Entry] = field(default_factory=list)
    """The entries that change who belongs to the group, oldest first."""

    @classmethod
    def begun(cls, state: State, live: Live) -> "View":
        """As a `GROUP` record tells of it, without the places of its entries."""
        view = cls(state, Places(state.snapshot.index + 1, live))
        view.restate(state)
        return view

    def truncation(self, group: int, index: int) -> Draft:
        """The record that ends the log before an entry."""
        before = self.places.term(index - 1) if index > self.places.first else self.state.snapshot.term
        return Draft(Kind.TRUNCATE, group, before, index)

    def change(self, draft: Draft) -> None:
        """Take over a record that is not about one entry, nor `GROUP`."""
        match draft.kind:
            case Kind.TRUNCATE if draft.index < self.places.first:
                self.state.unsure = True  # records before it were lost
                return
            case Kind.TRUNCATE:
                self.places.truncate(draft.index)
                self.places.extend(draft.index - 1)
            case Kind.COMPACT:
                self.places.compact(draft.index)
            case Kind.RESET:
                self.places.clear(draft.index + 1)
        self.state.note(draft)
        self._trim()

    def doubt(self) -> None:
        """Records may follow that are lost; what is committed they have not changed (3.5, state machine safety)."""
        self.state.unsure = True
        self.places.lose(self.state.hard.commit + 1)

    def restate(self, state: State) -> None:
        """Take over everything but entries; of those that are missing, records may still say that they are gone."""
        places, first = self.places, state.snapshot.index + 1
        self.state = state
        if places.first > first:
            places.clear(first)
        places.compact(first - 1)
        places.truncate(state.last_index + 1)
        places.extend(state.last_index)
        self._trim()

    def enter(self, draft: Draft) -> None:
        """Take over the record of a new entry, which has no place yet."""
        places = self.places
        if draft.index < places.first:
            self.state.unsure = True  # records before it were lost
            return
        if draft.index != places.last + 1:
            places.truncate(draft.index)
            places.extend(draft.index - 1)
            self._trim()
        places.append(draft.term, len(draft.payload))
        self.state.note(draft)
        if draft.entry_kind == EntryKind.MEMBERS:
            self._learn(draft.entry)

    def place(self, draft: Draft, place: int, length: int) -> None:
        """The entry of a record lies there. Ignored when there is none of that index."""
        if not self.places.first <= draft.index <= self.places.last:
            return
        self.places.put(draft.index, draft.term, length, place)
        if draft.kind == Kind.AGAIN and draft.entry_kind == EntryKind.MEMBERS:
            self._learn(draft.entry)

    def _learn(self, entry: Entry) -> None:
        others = [other for other in self.members if other.index != entry.index]
        self.members = sorted([*others, entry], key=lambda other: other.index)

    def _trim(self) -> None:
        first, last = self.places.first, self.places.last
        if self.members and not (first <= self.members[0].index and self.members[-1].index <= last):
            self.members = [entry for entry in self.members if first <= entry.index <= last]
