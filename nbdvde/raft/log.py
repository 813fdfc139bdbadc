"""The log as the core sees it: what the store has and what it has not yet, and who belongs to the group when."""

from collections.abc import Sequence

from nbdvde.raft.messages import Entry, EntryKind, Members, NodeId, Snapshot
from nbdvde.raft.store import LogStore


class Log:
    """Entries from the one behind the snapshot on.

    The newest are in memory from `_offset` on until the store has them.
    """

    def __init__(self, store: LogStore) -> None:
        self._store = store
        self._fresh: list[Entry] = []
        self._offset = store.last_index + 1
        self.persisted = store.last_index
        """Of what is durable, the last index that agrees with the log."""
        self._members = [(store.snapshot.index, store.snapshot.members)]
        """(index, members from there on), ascending."""
        for entry in store.members():
            self._note_members(entry)

    @property
    def first_index(self) -> int:
        """Of the oldest entry that is there, or will be the next one."""
        return self._store.first_index

    @property
    def last_index(self) -> int:
        """Of the newest entry."""
        return self._offset + len(self._fresh) - 1

    @property
    def last_term(self) -> int:
        """Of the newest entry."""
        return self.term(self.last_index) or 0

    @property
    def members(self) -> Members:
        """The newest ones, committed or not (4.1)."""
        return self._members[-1][1]

    @property
    def members_index(self) -> int:
        """Of the entry that made them so."""
        return self._members[-1][0]

    def members_at(self, index: int) -> Members:
        """Those that the entries up to an index have made."""
        return next(members for at, members in reversed(self._members) if at <= index)

    def may_decide(self, node: NodeId, commit: int) -> bool:
        """Whether a node is a voter of the members that are committed, or of newer ones.

        Who is removed by an entry that is not committed may be the only one who has it, and can be elected (4.2.2).
        """
        for at, members in reversed(self._members):
            if members.votes(node):
                return True
            if at <= commit:
                break
        return False

    def term(self, index: int) -> int | None:
        """Of an entry, None when the log does not have it any more or yet."""
        if index >= self._offset:
            return self._fresh[index - self._offset].term if index <= self.last_index else None
        snapshot = self._store.snapshot
        if index == snapshot.index:
            return snapshot.term
        return self._store.term(index) if self.first_index <= index else None

    def slice(self, start: int, stop: int, max_bytes: int) -> Sequence[Entry]:
        """Entries from `start` on, before `stop`, so many bytes of them and one at least."""
        entries: list[Entry] = []
        if start < self._offset:
            entries += self._store.get_range(start, min(stop, self._offset), max_bytes)
            max_bytes -= sum(entry.size for entry in entries)
            if start + len(entries) < self._offset:
                return entries
        for entry in self._fresh[max(0, start - self._offset) : stop - self._offset]:
            max_bytes -= entry.size
            if max_bytes < 0 and entries:
                break
            entries.append(entry)
        return entries

    def append(self, entries: Sequence[Entry]) -> None:
        """Put entries behind the newest one."""
        for entry in entries:
            assert entry.index == self.last_index + 1, "they follow each other"
            self._fresh.append(entry)
            self._note_members(entry)

    def merge(self, entries: Sequence[Entry], commit: int) -> None:
        """Put entries where they belong; what contradicts them goes. Nothing up to `commit` does."""
        for at, entry in enumerate(entries):
            if self.term(entry.index) != entry.term:
                if entry.index <= self.last_index:
                    assert entry.index > commit, "what is committed never changes"
                    self._truncate(entry.index)
                self.append(entries[at:])
                return

    def unwritten(self) -> Sequence[Entry]:
        """Entries that the store does not have; the first one replaces what it has from there on."""
        return tuple(self._fresh)

    def stored(self, last: Entry) -> None:
        """The store has durably what `unwritten` answered, up to this entry, unless it was replaced since then."""
        if self.term(last.index) == last.term:
            self.persisted = max(self.persisted, last.index)
            del self._fresh[: last.index + 1 - self._offset]
            self._offset = max(self._offset, last.index + 1)

    def restored(self, snapshot: Snapshot) -> None:
        """The store has taken over a state, and nothing behind it."""
        self._fresh, self._offset, self.persisted = [], snapshot.index + 1, snapshot.index
        self._members = [(snapshot.index, snapshot.members)]

    def compacted(self) -> None:
        """The store has forgotten entries."""
        base = self._store.snapshot.index
        older = [pair for pair in self._members if pair[0] <= base]
        self._members = older[-1:] + [pair for pair in self._members if pair[0] > base]

    def forget(self, index: int) -> None:
        """An entry goes, and all behind it, here and in the store."""
        self._truncate(index)
        self._store.truncate_from(index)

    def agreement(self, index: int, term: int) -> tuple[int, int]:
        """(index, term) of the last entry at or before an index with a term of at most `term`."""
        index = min(index, self.last_index)
        while (found := self.term(index)) is not None and found > term:
            index -= 1
        return index, self.term(index) or 0

    def _truncate(self, index: int) -> None:
        if index >= self._offset:
            del self._fresh[index - self._offset :]
        else:
            self._fresh, self._offset = [], index
        self.persisted = min(self.persisted, index - 1)
        while len(self._members) > 1 and self._members[-1][0] >= index:
            self._members.pop()

    def _note_members(self, entry: Entry) -> None:
        if entry.kind == EntryKind.MEMBERS:
            self._members.append((entry.index, Members.unpack(entry.data)))
