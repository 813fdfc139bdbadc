"""The file log against a log in memory, whatever is done to both, and whenever the node is started again."""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nbdvde.raft.filelog import FileLog, Sizes
from nbdvde.raft.filestore import FileStore
from nbdvde.raft.messages import Entry, EntryKind, HardState, Snapshot
from nbdvde.raft.places import Live
from nbdvde.raft.store import MemoryStore
from tests.raft.simdisk import SimDirectory
from tests.raft.workload import MEMBERS, START, Group, copy_of

SIZES = Sizes(segment_bytes=1 << 15, memory_bytes=1 << 13)
names = st.sampled_from(["a", "b", "c"])


class LogMachine(RuleBasedStateMachine):
    """Does the same to both."""

    @initialize()
    def begin(self) -> None:
        self.directory = SimDirectory()
        self.log = FileLog(self.directory, SIZES, bytes)
        self.model: dict[str, MemoryStore] = {}
        self.durable: dict[str, Group] = {}
        self.term = 1

    def _both(self, name: str) -> tuple[MemoryStore, FileStore]:
        if name not in self.model:
            self.model[name] = MemoryStore(START)
            self.log.create(name, START)
        real = self.log.group(name)
        assert real
        return self.model[name], real

    @rule(name=names, sizes=st.lists(st.sampled_from([0, 10, 1000, 6000]), min_size=1, max_size=6))
    def append(self, name: str, sizes: list[int]) -> None:
        model, real = self._both(name)
        kinds = (EntryKind.NORMAL, EntryKind.MEMBERS)
        entries = [
            Entry(self.term, index, kinds[size == 10], MEMBERS.pack() if size == 10 else bytes([index % 251]) * size)
            for index, size in enumerate(sizes, model.last_index + 1)
        ]
        for store in (model, real):
            store.append(entries)

    @rule(name=names, back=st.integers(0, 5))
    def truncate(self, name: str, back: int) -> None:
        model, real = self._both(name)
        self.term += 1
        index = max(model.first_index, model.last_index - back)
        for store in (model, real):
            store.truncate_from(index)

    @rule(name=names, ahead=st.integers(0, 8))
    def compact(self, name: str, ahead: int) -> None:
        model, real = self._both(name)
        if model.last_index >= model.first_index:
            index = min(model.first_index + ahead, model.last_index)
            snapshot = Snapshot(index, model.term(index), MEMBERS)
            for store in (model, real):
                store.compact_to(snapshot)

    @rule(name=names, ahead=st.integers(1, 9))
    def take_over(self, name: str, ahead: int) -> None:
        model, real = self._both(name)
        snapshot = Snapshot(model.last_index + ahead, self.term, MEMBERS)
        for store in (model, real):
            store.reset(snapshot)

    @rule(name=names, vote=st.integers(0, 3))
    def save(self, name: str, vote: int) -> None:
        model, real = self._both(name)
        for store in (model, real):
            store.save(HardState(self.term, vote, model.snapshot.index))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        del self.model[name]
        self.log.remove(name)

    @rule()
    def sync(self) -> None:
        if work := self.log.take():
            work()
        self.durable = {name: Group.of(store) for name, store in self.model.items()}

    @rule()
    def start_again(self) -> None:
        """Without what was not made durable: nothing of it was written."""
        self.directory = SimDirectory(self.directory.content())
        self.log = FileLog(self.directory, SIZES, bytes)
        self.model = {name: copy_of(group) for name, group in self.durable.items()}
        assert not self.log.notes

    @rule(name=names, start=st.integers(0, 30), count=st.integers(1, 9), max_bytes=st.sampled_from([1, 3000, 20000]))
    def read(self, name: str, start: int, count: int, max_bytes: int) -> None:
        model, real = self._both(name)
        start += model.first_index
        stop = min(start + count, model.last_index + 1)
        if start < stop:
            if not real.get_range(start, stop, max_bytes):
                missed = real.missed()
                assert missed == (start, stop, max_bytes)
                if (work := self.log.take()) is not None:
                    work()
                    self.durable = {name: Group.of(store) for name, store in self.model.items()}
                real.load(*missed)()()
            found = real.get_range(start, stop, max_bytes)
            assert found == model.get_range(start, stop, max_bytes)[: len(found)] != []

    @invariant()
    def both_hold_the_same(self) -> None:
        if not hasattr(self, "model"):
            return
        assert self.log.groups() == sorted(self.model)
        for name, model in self.model.items():
            real = self.log.group(name)
            assert real
            assert (real.hard, real.snapshot, real.size) == (model.hard, model.snapshot, model.size)
            assert (real.first_index, real.last_index, real.last_term) == (
                model.first_index, model.last_index, model.last_term,
            )  # fmt: skip
            assert list(real.members()) == list(model.members())

    @invariant()
    def what_is_needed_of_segments_is_known(self) -> None:
        if not hasattr(self, "model"):
            return
        live = Live()
        for name in self.log.groups():
            real = self.log.group(name)
            assert real
            places = real.view.places
            for index in range(places.first, places.last + 1):
                if places.place(index):
                    live.add(places.place(index), places.length(index))
        for segment in range(max(self.directory.files) + 2):
            assert self.log._live.of(segment) == live.of(segment)
            assert not live.of(segment) or segment in self.directory.files or segment in self.log._segments


TestLogMachine = LogMachine.TestCase
TestLogMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
