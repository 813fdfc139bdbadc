"""What every log of a group does, whatever keeps it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdvde.errors import UsageError
from nbdvde.raft.directory import DiskDirectory
from nbdvde.raft.filelog import FileLog, Sizes
from nbdvde.raft.messages import Entry, EntryKind, HardState, Members, Snapshot
from nbdvde.raft.store import LogStore, MemoryLog, NodeLog, write

MEMBERS = Members(frozenset({1, 2, 3}))
SIZES = Sizes(segment_bytes=1 << 18, memory_bytes=1 << 16)
START = Snapshot(0, 0, MEMBERS)


def entries(first: int, count: int, term: int = 1, size: int = 100) -> list[Entry]:
    return [Entry(term, index, EntryKind.NORMAL, bytes([index % 256]) * size) for index in range(first, first + count)]


def all_of(store: LogStore, max_bytes: int = 1 << 30) -> list[Entry]:
    return list(store.get_range(store.first_index, store.last_index + 1, max_bytes))


@pytest.fixture(params=["memory", "files"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[NodeLog]:
    log: NodeLog = MemoryLog() if request.param == "memory" else FileLog(DiskDirectory(tmp_path), SIZES)
    yield log
    if work := log.take():
        work()
    log.close()


@pytest.fixture
def store(log: NodeLog) -> LogStore:
    return log.create("default", START)


def test_a_new_log_is_empty(store: LogStore) -> None:
    assert (store.first_index, store.last_index, store.last_term, store.size) == (1, 0, 0, 0)
    assert store.snapshot == START
    assert store.hard == HardState()
    assert not store.damaged
    assert not store.unsure


def test_entries_are_found_by_index(store: LogStore) -> None:
    store.append(entries(1, 5))
    store.append(entries(6, 3, term=4))
    assert (store.first_index, store.last_index, store.last_term) == (1, 8, 4)
    assert all_of(store) == entries(1, 5) + entries(6, 3, term=4)
    assert store.get(6) == entries(6, 1, term=4)[0]
    assert [store.term(index) for index in range(9)] == [0, 1, 1, 1, 1, 1, 4, 4, 4]
    assert store.size == 8 * 124


def test_a_range_is_as_long_as_it_may_be_and_one_entry_at_least(store: LogStore) -> None:
    store.append(entries(1, 9))
    assert list(store.get_range(2, 5, 1 << 20)) == entries(2, 3)
    assert list(store.get_range(2, 9, 124 * 2)) == entries(2, 2)
    assert list(store.get_range(2, 9, 124 * 3 - 1)) == entries(2, 2)
    assert list(store.get_range(2, 9, 1)) == entries(2, 1)


def test_newer_entries_replace_older_ones(store: LogStore) -> None:
    store.append(entries(1, 9))
    write(store, HardState(2, 1, 3), entries(4, 2, term=2))
    assert all_of(store) == entries(1, 3) + entries(4, 2, term=2)
    assert store.hard == HardState(2, 1, 3)
    store.truncate_from(1)
    assert (store.last_index, store.last_term, store.size) == (0, 0, 0)


def test_what_the_state_holds_is_forgotten(store: LogStore) -> None:
    store.append(entries(1, 9))
    snapshot = Snapshot(4, 1, MEMBERS)
    store.compact_to(snapshot)
    assert (store.first_index, store.last_index, store.snapshot) == (5, 9, snapshot)
    assert all_of(store) == entries(5, 5)
    assert store.term(4) == 1
    store.compact_to(Snapshot(9, 1, MEMBERS))
    assert (store.first_index, store.last_index, store.last_term, store.size) == (10, 9, 1, 0)


def test_a_state_from_elsewhere_replaces_everything(store: LogStore) -> None:
    store.append(entries(1, 9))
    store.reset(Snapshot(50, 3, MEMBERS))
    assert (store.first_index, store.last_index, store.last_term, store.size) == (51, 50, 3, 0)
    store.append(entries(51, 1, term=3))
    assert all_of(store) == entries(51, 1, term=3)


def test_changes_of_members_are_known_apart(store: LogStore) -> None:
    changes = [Entry(1, index, EntryKind.MEMBERS, Members(frozenset({index})).pack()) for index in (2, 4, 6)]
    for change in changes:
        store.append([*entries(change.index - 1, 1), change])
    assert list(store.members()) == changes
    store.truncate_from(6)
    store.compact_to(Snapshot(3, 1, MEMBERS))
    assert list(store.members()) == changes[1:2]


def test_what_is_not_damaged_is_not_mended(store: LogStore) -> None:
    store.append(entries(1, 2))
    store.mend([Entry(1, 1, EntryKind.NORMAL, b"other")])
    assert all_of(store) == entries(1, 2)


def test_settling_saves(store: LogStore) -> None:
    store.settle(HardState(7))
    assert store.hard == HardState(7)


def test_groups_come_and_go(log: NodeLog) -> None:
    assert log.groups() == []
    second = log.create("b", START)
    first = log.create("a", Snapshot(3, 1, MEMBERS))
    assert log.groups() == ["a", "b"]
    assert log.group("a") is first
    assert log.group("b") is second
    with pytest.raises(UsageError, match="exists already"):
        log.create("a", START)
    log.remove("a")
    assert log.groups() == ["b"]
    assert log.group("a") is None
    with pytest.raises(UsageError, match="does not exist"):
        log.remove("a")
    assert log.create("a", START).last_index == 0
