"""Random work on a log, and what it should hold: for the crash tests and their mutants."""

from dataclasses import dataclass
from random import Random

from nbdvde.raft.filelog import FileLog, Sizes
from nbdvde.raft.messages import Entry, EntryKind, HardState, Members, Snapshot
from nbdvde.raft.store import LogStore, MemoryStore
from tests.raft.simdisk import Mark, SimDirectory

SIZES = Sizes(segment_bytes=1 << 17, memory_bytes=1 << 14)
MEMBERS = Members(frozenset({1, 2, 3}))
START = Snapshot(0, 0, MEMBERS)
NAMES = ("a", "b", "default")


@dataclass(frozen=True)
class Group:
    """What a group holds."""

    hard: HardState
    snapshot: Snapshot
    identities: tuple[tuple[int, int], ...]
    """(index, term) of every entry."""
    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, store: LogStore) -> "Group":
        """What a log holds; of a damaged entry, or one that is not in memory, nothing is read."""
        indexes = range(store.first_index, store.last_index + 1)
        damaged = {index for part in store.damaged for index in part}
        return cls(
            store.hard, store.snapshot, tuple((index, store.term(index)) for index in indexes),
            tuple(store.get(index) for index in indexes if index not in damaged),
        )  # fmt: skip

    def is_like(self, other: "Group") -> bool:
        """Whether they differ at most in entries whose data is lost."""
        return (self.hard, self.snapshot, self.identities) == (other.hard, other.snapshot, other.identities)


World = dict[str, Group]


def copy_of(group: Group) -> MemoryStore:
    """A log in memory that holds the same."""
    store = MemoryStore(group.snapshot)
    store.hard = group.hard
    store.append(group.entries)
    return store


class Workload:
    """A log and its model, after the same random steps. Marks in the record are numbers of `worlds`."""

    def __init__(self, seed: int, directory: SimDirectory, world: World | None = None) -> None:
        self.random = Random(seed)
        self.directory = directory
        self.log = FileLog(directory, SIZES, self.random.randbytes)
        self.model = {name: copy_of(group) for name, group in (world or {}).items()}
        self.worlds: list[World] = [self.world()]
        """What the model held after every record."""
        self._acknowledged = 0
        self._term = 1 + max((store.last_term for store in self.model.values()), default=0)
        """An index never gets another entry in the same term."""

    def world(self) -> World:
        """What the model holds."""
        return {name: Group.of(store) for name, store in self.model.items()}

    def run(self, rounds: int) -> None:
        """Change something, and make it durable, so many times."""
        for _ in range(rounds):
            for _ in range(self.random.randint(1, 4)):
                self._step()
            self.sync()

    def sync(self) -> None:
        """Make everything durable."""
        newest = len(self.worlds) - 1
        self.directory.events.append(Mark(self._acknowledged, newest))
        if work := self.log.take():
            work()
        self._acknowledged = newest
        self.directory.events.append(Mark(newest, newest))

    def _note(self) -> None:
        self.worlds.append(self.world())

    def _step(self) -> None:
        random, name = self.random, self.random.choice(NAMES)
        if name not in self.model:
            self.model[name] = MemoryStore(START)
            self.log.create(name, START)
            self._note()
            return
        model = self.model[name]
        real = self.log.group(name)
        assert real is not None
        match random.randrange(16):
            case 0 | 1:
                commit = random.randint(model.hard.commit, max(model.hard.commit, model.last_index))
                hard = HardState(model.hard.term + random.randint(0, 2), random.randint(0, 3), commit)
                for store in (model, real):
                    store.save(hard)
            case 2 if model.last_index > (committed := max(model.snapshot.index, model.hard.commit)):
                index = random.randint(committed + 1, model.last_index)
                for store in (model, real):
                    store.truncate_from(index)
                self._term += 1
            case 3 | 4 if model.last_index >= model.first_index:
                index = random.randint(model.first_index, model.last_index)
                snapshot = Snapshot(index, model.term(index), MEMBERS)
                for store in (model, real):
                    store.compact_to(snapshot)
            case 5 if random.random() < 0.3:
                snapshot = Snapshot(model.last_index + random.randint(1, 9), self._term, MEMBERS)
                for store in (model, real):
                    store.reset(snapshot)
            case 6 if random.random() < 0.4:
                del self.model[name]
                self.log.remove(name)
            case _:
                for entry in self._entries(model):
                    for store in (model, real):
                        store.append([entry])
                    self._note()
        self._note()

    def _entries(self, model: MemoryStore) -> list[Entry]:
        random = self.random
        self._term += random.random() < 0.2
        term = self._term
        first = model.last_index + 1
        entries = []
        for index in range(first, first + random.randint(1, 5)):
            kind = random.choice((EntryKind.NORMAL,) * 6 + (EntryKind.EMPTY, EntryKind.MEMBERS))
            data = random.randbytes(random.choice((0, 9, 100, 700, 5000)))
            entries.append(Entry(term, index, kind, MEMBERS.pack() if kind == EntryKind.MEMBERS else data))
        return entries
