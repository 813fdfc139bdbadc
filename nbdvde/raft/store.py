"""Where a group keeps its log and what it must not forget."""

from collections.abc import Sequence
from typing import Protocol

from nbdvde.raft.messages import Entry, EntryKind, HardState, Snapshot


class LogStore(Protocol):
    """The log of one group. Changes are durable, all or those made first, once `sync` has returned after them."""

    @property
    def hard(self) -> HardState:
        """What `save` was told last."""

    @property
    def snapshot(self) -> Snapshot:
        """What stands for the entries before `first_index`."""

    @property
    def first_index(self) -> int:
        """Of the oldest entry that is there, or will be the next one."""

    @property
    def last_index(self) -> int:
        """Of the newest entry; `first_index - 1` without any."""

    @property
    def last_term(self) -> int:
        """Of the newest entry, or of the snapshot without any."""

    def term(self, index: int) -> int:
        """Of an entry from `first_index` to `last_index`, or of the snapshot."""

    def get(self, index: int) -> Entry:
        """An entry from `first_index` to `last_index`."""

    def get_range(self, start: int, stop: int, max_bytes: int) -> Sequence[Entry]:
        """Entries from `start` on, before `stop`, so many bytes of them and one at least."""

    def members(self) -> Sequence[Entry]:
        """The entries that change who belongs to the group, oldest first."""

    def append(self, entries: Sequence[Entry]) -> None:
        """Put entries behind the newest one."""

    def truncate_from(self, index: int) -> None:
        """Forget an entry and all behind it."""

    def compact_to(self, snapshot: Snapshot) -> None:
        """Forget everything up to an entry, which the state holds durably."""

    def reset(self, snapshot: Snapshot) -> None:
        """Forget everything: a state was taken over from elsewhere."""

    def save(self, hard: HardState) -> None:
        """Keep this in place of what was kept before."""

    def sync(self) -> None:
        """Make all changes durable."""


class MemoryStore:
    """A log in memory, for tests and for groups that may forget."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.hard = HardState()
        self.snapshot = snapshot
        self._entries: list[Entry] = []
        self._members: list[Entry] = []

    @property
    def first_index(self) -> int:
        return self.snapshot.index + 1

    @property
    def last_index(self) -> int:
        return self.snapshot.index + len(self._entries)

    @property
    def last_term(self) -> int:
        return self.term(self.last_index)

    def term(self, index: int) -> int:
        at = index - self.snapshot.index
        return self._entries[at - 1].term if at else self.snapshot.term

    def get(self, index: int) -> Entry:
        return self._entries[index - self.first_index]

    def get_range(self, start: int, stop: int, max_bytes: int) -> Sequence[Entry]:
        base = self.first_index
        found: list[Entry] = []
        for entry in self._entries[start - base : stop - base]:
            max_bytes -= entry.size
            if found and max_bytes < 0:
                break
            found.append(entry)
        return found

    def members(self) -> Sequence[Entry]:
        return self._members

    def append(self, entries: Sequence[Entry]) -> None:
        assert not entries or entries[0].index == self.last_index + 1, "they follow what is there"
        self._entries += entries
        self._members += [entry for entry in entries if entry.kind == EntryKind.MEMBERS]

    def truncate_from(self, index: int) -> None:
        del self._entries[index - self.first_index :]
        self._members = [entry for entry in self._members if entry.index < index]

    def compact_to(self, snapshot: Snapshot) -> None:
        del self._entries[: snapshot.index - self.snapshot.index]
        self._members = [entry for entry in self._members if entry.index > snapshot.index]
        self.snapshot = snapshot

    def reset(self, snapshot: Snapshot) -> None:
        self._entries, self._members, self.snapshot = [], [], snapshot

    def save(self, hard: HardState) -> None:
        self.hard = hard

    def sync(self) -> None: ...


def write(store: LogStore, hard: HardState | None, entries: Sequence[Entry]) -> None:
    """Put into a store what a `Ready` asks for; not durable yet."""
    if entries:
        if entries[0].index <= store.last_index:
            store.truncate_from(entries[0].index)
        store.append(entries)
    if hard:
        store.save(hard)
