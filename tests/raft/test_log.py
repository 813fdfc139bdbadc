"""The log as the core sees it: stored entries, new ones behind them, and members by index."""

from nbdvde.raft.log import Log
from nbdvde.raft.messages import Entry, EntryKind, Snapshot
from nbdvde.raft.store import MemoryStore, write
from tests.raft.party import entry, members

ALL = 1 << 30


def _log(stored: int, fresh: int) -> tuple[Log, MemoryStore]:
    """Entries of term 1; the last ones are not stored."""
    store = MemoryStore(Snapshot(0, 0, members({1})))
    store.append([entry(1, index) for index in range(1, stored + 1)])
    log = Log(store)
    log.append([entry(1, index) for index in range(stored + 1, stored + fresh + 1)])
    return log, store


def _store(log: Log, store: MemoryStore) -> None:
    entries = log.unwritten()
    write(store, None, entries)
    log.stored(entries[-1])


def _terms(log: Log) -> list[int | None]:
    return [log.term(index) for index in range(1, log.last_index + 1)]


def test_entries_that_come_while_others_are_written_are_written_next() -> None:
    log, store = _log(2, 2)
    writing = log.unwritten()
    log.append([entry(1, 5), entry(1, 6)])
    write(store, None, writing)
    log.stored(writing[-1])
    assert log.persisted == 4
    assert [found.index for found in log.unwritten()] == [5, 6]
    _store(log, store)
    assert (log.persisted, store.last_index, log.unwritten()) == (6, 6, ())


def test_what_is_replaced_leaves_what_is_before_it_to_be_written() -> None:
    log, store = _log(2, 3)
    log.merge([entry(2, 4)], 0)
    assert [(found.term, found.index) for found in log.unwritten()] == [(1, 3), (2, 4)]
    _store(log, store)
    log.merge([entry(3, 2)], 0)
    assert [(found.term, found.index) for found in log.unwritten()] == [(3, 2)]
    assert log.persisted == 1
    _store(log, store)
    assert _terms(log) == [1, 3]


def test_slices_go_from_stored_entries_to_new_ones_within_their_bytes() -> None:
    log, _ = _log(3, 3)
    size = entry(1, 1).size
    for start in range(1, 7):
        for count in range(1, 7):
            found = log.slice(start, 7, count * size)
            assert [one.index for one in found] == list(range(start, min(7, start + count)))
    assert [one.index for one in log.slice(2, 5, ALL)] == [2, 3, 4]
    assert [one.index for one in log.slice(2, 5, 0)] == [2], "one at least"


def test_what_may_agree_is_the_last_entry_of_no_later_term() -> None:
    store = MemoryStore(Snapshot(0, 0, members({1})))
    store.append([entry(term, index) for index, term in enumerate((1, 1, 3, 3, 5), 1)])
    log = Log(store)
    assert [log.agreement(9, term) for term in range(7)] == [
        (0, 0), (2, 1), (2, 1), (4, 3), (4, 3), (5, 5), (5, 5),
    ]  # fmt: skip
    assert log.agreement(3, 5) == (3, 3)
    assert log.agreement(1, 5) == (1, 1)


def test_members_by_index() -> None:
    log, store = _log(1, 0)
    for index, voters in ((2, {1, 2}), (4, {1, 2, 3})):
        log.append([Entry(1, index, EntryKind.MEMBERS, members(voters).pack()), entry(1, index + 1)])
    _store(log, store)

    def seen() -> list[set[int]]:
        return [set(log.members_at(index).voters) for index in range(log.first_index - 1, 6)]

    assert seen() == [{1}, {1}, {1, 2}, {1, 2}, {1, 2, 3}, {1, 2, 3}]
    for base in (2, 3):
        store.compact_to(Snapshot(base, 1, log.members_at(base)))
        log.compacted()
        assert seen() == [{1, 2}] * (4 - base) + [{1, 2, 3}] * 2
    assert Log(store).members == members({1, 2, 3})
    log.merge([entry(2, 4)], 3)
    assert log.members == members({1, 2})
    assert log.members_index == 2
