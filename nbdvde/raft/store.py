"""Where groups keep their logs and what they must not forget."""

from collections.abc import Callable, Container, Sequence
from typing import Protocol, TypeAlias

from nbdvde.errors import UsageError
from nbdvde.raft.messages import Entry, EntryKind, HardState, Snapshot

Work: TypeAlias = Callable[[], None]
"""Blocks: for a thread."""
Load: TypeAlias = Callable[[], Work]
"""Blocks: for a thread. What it answers is then called on the event loop."""


class LogStore(Protocol):
    """The log of one group. Nothing here blocks, but `get`; `NodeLog.take` makes changes durable, in their order.

    An entry that is damaged keeps its index and term; its data is not handed out until `mend` has brought it back.
    While there are any, or while `unsure` is set, the node is mute in this group (`Core.mute`): it neither votes nor
    acknowledges nor asks for votes.
    """

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

    @property
    def size(self) -> int:
        """Bytes of all entries that are there."""

    @property
    def damaged(self) -> Sequence[range]:
        """Indexes of entries whose data is lost, ascending."""

    @property
    def unsure(self) -> bool:
        """Whether the newest entries or `hard` may be lost, so that what is there is older than what was promised."""

    def term(self, index: int) -> int:
        """Of an entry from `first_index` to `last_index`, or of the snapshot."""

    def get(self, index: int) -> Entry:
        """An entry from `first_index` to `last_index`; may read from the disk. Raises DamageError."""

    def get_range(self, start: int, stop: int, max_bytes: int) -> Sequence[Entry]:
        """Entries from `start` on, before `stop`, so many bytes of them and one at least.

        None of them when the first is not in memory: `missed` then tells what to `load`. Fewer when a later one is not.
        """

    def missed(self) -> tuple[int, int, int] | None:
        """What `get_range` was last asked for and did not have in memory; None once it was told."""

    def load(self, start: int, stop: int, max_bytes: int) -> Load:
        """Work after which `get_range` answers the same question, unless the entry is damaged."""

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

    def mend(self, entries: Sequence[Entry]) -> None:
        """Put damaged entries back, as a peer has them. Those that are not damaged or of another term are ignored."""

    def settle(self, hard: HardState) -> None:
        """As `save`; it holds for sure again, and so does the log: `unsure` ends."""


class NodeLog(Protocol):
    """The logs of all groups of a node. Its methods belong to the event loop; what blocks is handed out as work."""

    @property
    def unsure(self) -> bool:
        """Whether there may have been other groups, now lost. Logs that are created then are unsure as well."""

    def groups(self) -> Sequence[str]:
        """Names, in order."""

    def group(self, name: str) -> LogStore | None:
        """The log of a group, the same object as long as there is one."""

    def create(self, name: str, start: Snapshot) -> LogStore:
        """A log with nothing behind `start`. Raises UsageError when there is one of that name."""

    def remove(self, name: str) -> None:
        """Forget a group. Raises UsageError without one of that name."""

    def take(self) -> Work | None:
        """All changes so far as work that makes them durable: one write and one sync for all groups. None: no changes.

        Work is done once, before the next is taken. Raises PoisonedError, here or in the work, once a write or a sync
        has failed: nothing is tried again. The work raises NoSpaceError before anything is written when the host is
        full; the next `take` answers work for the same changes, and newer ones.
        """

    def close(self) -> None:
        """End; what was not written is lost."""


class MemoryStore:
    """A log in memory, for tests and for groups that may forget."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.hard = HardState()
        self.snapshot = snapshot
        self._entries: list[Entry] = []
        self._members: list[Entry] = []
        self.size = 0
        self.damaged: Sequence[range] = ()
        self.unsure = False

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

    def missed(self) -> tuple[int, int, int] | None:
        return None

    def load(self, start: int, stop: int, max_bytes: int) -> Load:
        return lambda: lambda: None

    def members(self) -> Sequence[Entry]:
        return self._members

    def append(self, entries: Sequence[Entry]) -> None:
        assert not entries or entries[0].index == self.last_index + 1, "they follow what is there"
        self._entries += entries
        self.size += sum(entry.size for entry in entries)
        self._members += [entry for entry in entries if entry.kind == EntryKind.MEMBERS]

    def truncate_from(self, index: int) -> None:
        self._drop(slice(index - self.first_index, None))
        self._members = [entry for entry in self._members if entry.index < index]

    def compact_to(self, snapshot: Snapshot) -> None:
        self._drop(slice(snapshot.index - self.snapshot.index))
        self._members = [entry for entry in self._members if entry.index > snapshot.index]
        self.snapshot = snapshot

    def reset(self, snapshot: Snapshot) -> None:
        self._entries, self._members, self.snapshot, self.size = [], [], snapshot, 0

    def save(self, hard: HardState) -> None:
        self.hard = hard

    def mend(self, entries: Sequence[Entry]) -> None: ...

    def settle(self, hard: HardState) -> None:
        self.hard, self.unsure = hard, False

    def _drop(self, places: slice) -> None:
        self.size -= sum(entry.size for entry in self._entries[places])
        del self._entries[places]


class MemoryLog:
    """Logs in memory, for tests and for nodes that may forget."""

    def __init__(self) -> None:
        self._groups: dict[str, MemoryStore] = {}
        self.unsure = False

    def groups(self) -> Sequence[str]:
        return sorted(self._groups)

    def group(self, name: str) -> LogStore | None:
        return self._groups.get(name)

    def create(self, name: str, start: Snapshot) -> LogStore:
        check_absent(self._groups, name)
        return self._groups.setdefault(name, MemoryStore(start))

    def remove(self, name: str) -> None:
        check_present(self._groups, name)
        del self._groups[name]

    def take(self) -> Work | None:
        return None

    def close(self) -> None: ...


def check_absent(groups: Container[str], name: str) -> None:
    """Raise UsageError when a group exists."""
    if name in groups:
        raise UsageError(f"raft group {name}", "exists already", "choose another name")


def check_present(groups: Container[str], name: str) -> None:
    """Raise UsageError when a group does not exist."""
    if name not in groups:
        raise UsageError(f"raft group {name}", "does not exist", "see nbdvde cluster status")


def write(store: LogStore, hard: HardState | None, entries: Sequence[Entry]) -> None:
    """Put into a store what a `Ready` asks for; not durable yet."""
    if entries:
        if entries[0].index <= store.last_index:
            store.truncate_from(entries[0].index)
        store.append(entries)
    if hard:
        store.save(hard)
