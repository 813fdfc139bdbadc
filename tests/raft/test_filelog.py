"""The file log beyond what every log does: reading back, damage, full and failing devices, segments that go."""

import errno
from collections.abc import Iterable
from pathlib import Path
from random import Random

import pytest

from nbdvde.errors import DamageError, ImageError, InUseError, NoSpaceError, PoisonedError
from nbdvde.raft import records
from nbdvde.raft.directory import DiskDirectory
from nbdvde.raft.filelog import FileLog, Sizes
from nbdvde.raft.messages import Entry, EntryKind, HardState, Members, Snapshot
from nbdvde.raft.store import LogStore, NodeLog
from tests.raft.simdisk import Files, SimDirectory, Sync, Write
from tests.raft.test_store import MEMBERS, START, all_of, entries
from tests.raft.workload import Group

SIZES = Sizes(segment_bytes=1 << 17, memory_bytes=1 << 14)


def opened(files: Files | SimDirectory) -> FileLog:
    directory = files if isinstance(files, SimDirectory) else SimDirectory(files)
    return FileLog(directory, SIZES, Random(0).randbytes)


def the(log: NodeLog, name: str = "a") -> LogStore:
    store = log.group(name)
    assert store is not None
    return store


def sync(log: NodeLog) -> None:
    if work := log.take():
        work()


def loaded(store: LogStore, start: int, stop: int, max_bytes: int = 1 << 20) -> list[Entry]:
    found = store.get_range(start, stop, max_bytes)
    if not found and (missed := store.missed()):
        store.load(*missed)()()
        found = store.get_range(start, stop, max_bytes)
    return list(found)


def filled(count: int = 5, size: int = 100) -> SimDirectory:
    """A log with some entries in one group, each in a batch of its own."""
    directory = SimDirectory()
    log = opened(directory)
    store = log.create("a", START)
    for entry in entries(1, count, size=size):
        store.append([entry])
        store.save(HardState(3, 2, entry.index - 1))
        sync(log)
    return directory


def altered(files: Files, what: bytes) -> Files:
    """Each piece of this in any file becomes something else, twins aside."""
    assert any(what in content for content in files.values())
    return {number: content.replace(what, bytes(byte ^ 255 for byte in what)) for number, content in files.items()}


def test_a_log_is_there_again(tmp_path: Path) -> None:
    log = FileLog(DiskDirectory(tmp_path / "log"))
    log.create("a", START)
    log.create("b", Snapshot(7, 2, MEMBERS))
    the(log).append(entries(1, 40, size=5000))
    the(log).save(HardState(2, 1, 30))
    sync(log)
    the(log).truncate_from(31)
    the(log).compact_to(Snapshot(10, 1, MEMBERS))
    sync(log)
    log.close()
    again = FileLog(DiskDirectory(tmp_path / "log"))
    assert again.groups() == ["a", "b"]
    assert the(again).hard == HardState(2, 1, 30)
    assert the(again).snapshot == Snapshot(10, 1, MEMBERS)
    assert loaded(the(again), 11, 31, 1 << 30) == entries(11, 20, size=5000)
    assert the(again, "b").first_index == 8
    assert not again.notes
    again.close()


def test_only_one_process_has_a_log(tmp_path: Path) -> None:
    (tmp_path / "other.log").touch()
    directory = DiskDirectory(tmp_path)
    assert directory.numbers() == []
    with pytest.raises(InUseError, match="belongs to another process"):
        DiskDirectory(tmp_path)
    directory.close()


def test_one_sync_for_all_groups() -> None:
    directory = SimDirectory()
    log = opened(directory)
    for name in "abcdef":
        log.create(name, START).append(entries(1, 3))
    before = directory.events.count(Sync(1))
    sync(log)
    assert directory.events.count(Sync(1)) == before + 1
    assert log.take() is None


def test_entries_that_are_not_in_memory_are_loaded() -> None:
    log = opened(filled(40, 2000))
    store = the(log)
    assert store.get_range(3, 9, 5000) == []
    assert store.missed() == (3, 9, 5000)
    assert store.missed() is None
    store.load(3, 9, 5000)()()
    assert store.get_range(3, 9, 5000) == entries(3, 2, size=2000)
    assert store.get(20) == entries(20, 1, size=2000)[0]
    assert loaded(store, 1, 41, 1) == entries(1, 1, size=2000)


def test_memory_is_bounded() -> None:
    log = opened(SimDirectory())
    store = log.create("a", START)
    store.append(entries(1, 40, size=1000))
    store.append(entries(41, 20, size=1000))
    assert len(all_of(store)) == 60, "what is not durable stays"
    sync(log)
    store.append(entries(61, 1, size=1000))
    assert not store.get_range(1, 60, 1 << 20)
    assert len(store.get_range(50, 62, 1 << 20)) == 12


def test_what_was_loaded_may_not_be_wanted_any_more() -> None:
    log = opened(filled(40, 2000))
    store = the(log)
    finish = store.load(3, 9, 1 << 20)()
    store.truncate_from(5)
    store.append(entries(5, 1, term=9))
    sync(log)
    finish()
    assert store.get_range(3, 6, 1 << 20) == entries(3, 2, size=2000) + entries(5, 1, term=9)


def test_what_is_being_written_is_not_read() -> None:
    log = opened(filled(5, 2000))
    store = the(log)
    store.append(entries(6, 1, size=2000))
    work = log.take()
    finish = store.load(5, 7, 1 << 20)()
    assert work
    work()
    store.append(entries(7, 20, size=2000))
    sync(log)
    store.append(entries(27, 1))
    assert not store.get_range(6, 7, 1), "it is not in memory any more"
    finish()
    assert not store.damaged
    assert loaded(store, 6, 7) == entries(6, 1, size=2000)


def test_damage_found_while_reading_is_told() -> None:
    directory = filled(5, 2000)
    log = opened(directory)
    store = the(log)
    for number, content in altered(directory.content(), entries(3, 1, size=2000)[0].data).items():
        directory.files[number][:] = content
    with pytest.raises(DamageError, match="entry 3 is damaged"):
        store.get(3)
    assert loaded(store, 2, 5) == entries(2, 1, size=2000)
    assert store.damaged == [range(3, 4)]
    assert loaded(store, 3, 5) == []
    assert store.missed() is None, "it would not help"


def test_what_cannot_be_read_is_damaged() -> None:
    directory = filled(5, 6000)
    content = entries(3, 1, size=6000)[0].data
    [number] = [number for number, data in directory.files.items() if content in data]
    directory.unreadable.add((number, directory.files[number].index(content) + 5000))
    again = SimDirectory(directory.content(), unreadable=directory.unreadable)
    log = opened(again)
    assert the(log).damaged == [range(3, 4)]
    assert loaded(the(log), 4, 6) == entries(4, 2, size=6000)
    again.unreadable.add((number, directory.files[number].index(entries(5, 1, size=6000)[0].data)))
    store = the(opened(again))
    assert store.damaged == [range(3, 4), range(5, 6)]
    with pytest.raises(DamageError, match="entry 5"):
        store.get(5)


def test_damage_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    opened(altered(filled().content(), entries(3, 1)[0].data))
    assert caplog.messages == ["raft log: damaged: 1 of the entries of group a, from 3 on"]


def test_damaged_entries_are_mended() -> None:
    files = altered(filled().content(), entries(3, 1)[0].data)
    files = altered(files, entries(4, 1)[0].data)
    log = opened(files)
    store = the(log)
    assert store.damaged == [range(3, 5)]
    assert [store.term(index) for index in range(1, 6)] == [1] * 5
    assert loaded(store, 3, 6) == []
    store.mend([Entry(2, 3, EntryKind.NORMAL, b"of another term"), *entries(2, 1, size=1), *entries(4, 1)])
    assert store.damaged == [range(3, 4)]
    store.mend(entries(3, 1))
    assert not store.damaged
    assert loaded(store, 2, 6) == entries(2, 4)
    work = log.take()
    assert work
    work()
    assert loaded(store, 2, 6) == entries(2, 4)


def test_what_was_mended_stays_so() -> None:
    directory = SimDirectory(altered(filled().content(), entries(3, 1)[0].data))
    log = opened(directory)
    the(log).mend(entries(3, 1))
    sync(log)
    again = opened(directory.content())
    assert not the(again).damaged
    assert loaded(the(again), 1, 6) == entries(1, 5)


def test_damaged_entries_may_be_replaced() -> None:
    directory = SimDirectory(altered(filled().content(), entries(3, 1)[0].data))
    log = opened(directory)
    the(log).truncate_from(3)
    assert not the(log).damaged
    the(log).append(entries(3, 1, term=2))
    sync(log)
    assert not the(opened(directory.content())).damaged


def lost_batch() -> SimDirectory:
    """Of the batch with the fourth entry nothing is left, neither in its place nor in its twin."""
    directory = filled()
    writes = [event for event in directory.events if isinstance(event, Write)]
    at = next(at for at, write in enumerate(writes) if entries(4, 1)[0].data in write.data)
    return SimDirectory(without(directory.content(), writes[at : at + 2]))


def test_a_node_that_is_not_sure_says_so_until_it_is_settled() -> None:
    directory = lost_batch()
    log = opened(directory)
    store = the(log)
    assert store.unsure
    assert store.last_index == 2, "so much was known to be committed"
    assert log.create("b", START).unsure, "there may have been one"
    sync(log)
    assert any("lost" in note for note in log.notes)
    again = opened(directory.content())
    assert the(again).unsure, "it is not forgotten"
    directory = SimDirectory(directory.content())
    log = opened(directory)
    the(log).settle(HardState(9))
    the(log).append(entries(3, 5, term=9))
    sync(log)
    settled = the(opened(directory.content()))
    assert not settled.unsure
    assert settled.hard == HardState(9)
    assert loaded(settled, 1, 8) == entries(1, 2) + entries(3, 5, term=9)


def without(files: Files, writes: Iterable[Write]) -> Files:
    """Of what was written there is something else."""
    changed = {number: bytearray(content) for number, content in files.items()}
    for write in writes:
        changed[write.number][write.offset : write.offset + len(write.data)] = bytes(byte ^ 255 for byte in write.data)
    return {number: bytes(content) for number, content in changed.items()}


def test_entries_that_a_lost_batch_replaced_do_not_count() -> None:
    directory = SimDirectory()
    log = opened(directory)
    store = log.create("a", START)
    store.append(entries(1, 5))
    store.save(HardState(1, 1, 3))
    sync(log)
    before = len(directory.events)
    store.truncate_from(5)
    store.append(entries(5, 1, term=2))
    sync(log)
    lost = [event for event in directory.events[before:] if isinstance(event, Write)]
    store.append(entries(6, 9, term=2, size=3000))
    sync(log)
    assert max(directory.files) == 2, "which begins with what there is: an entry 5"
    again = the(opened(without(directory.content(), lost)))
    assert again.unsure
    assert again.last_index == 3


def test_a_group_that_was_removed_does_not_come_back() -> None:
    directory = filled()
    log = opened(directory)
    log.create("b", START)
    sync(log)
    before = len(directory.events)
    log.remove("b")
    sync(log)
    assert opened(directory.content()).groups() == ["a"]
    lost = [event for event in directory.events[before:] if isinstance(event, Write)]
    the(log).append(entries(6, 30, size=10000))
    sync(log)
    log = opened(without(directory.content(), lost))
    assert log.groups() == ["a"], "the next segment does not name it"
    assert log.notes


def test_a_segment_that_is_not_there_is_missed() -> None:
    directory = filled(60, 3000)
    files = directory.content()
    assert len(files) > 2
    del files[2]
    store = the(opened(files))
    assert store.unsure
    assert store.last_index < 10


def test_a_log_of_which_nothing_is_left_is_no_new_log() -> None:
    files = {number: bytes(byte ^ 255 for byte in content) for number, content in filled().content().items()}
    with pytest.raises(DamageError, match="whose entries"):
        opened(files)


def test_segments_of_another_history_are_noticed() -> None:
    first = filled(60, 3000)
    one, other = SimDirectory(first.content()), SimDirectory(first.content())
    for directory, term in ((one, 7), (other, 8)):
        log = opened(directory)
        the(log).save(HardState(term))
        sync(log)
    newest = max(number for number, content in one.files.items() if any(content))
    mixed = one.content() | {newest: other.content()[newest]}
    assert the(opened(mixed)).hard == HardState(8), "both are whole"
    log = opened(one)
    the(log).save(HardState(9))
    sync(log)
    mixed = one.content() | {newest: other.content()[newest]}
    assert the(opened(mixed)).unsure


@pytest.mark.parametrize("operation", ["write", "sync"])
def test_after_a_failure_nothing_is_written(operation: str) -> None:
    directory = SimDirectory()
    log = opened(directory)
    log.create("a", START)
    sync(log)
    the(log).append(entries(1, 1))
    work = log.take()
    assert work
    directory.fault = lambda asked: errno.EIO if asked == operation else 0
    with pytest.raises(PoisonedError, match="injected"):
        work()
    directory.fault = lambda asked: 0
    count = len(directory.events)
    for again in (work, log.take):
        with pytest.raises(PoisonedError, match="failed earlier"):
            again()
    assert len(directory.events) == count


def test_a_full_host_fails_before_anything_is_written() -> None:
    directory = SimDirectory(limit=3 << 17)
    log = opened(directory)
    store = log.create("a", START)
    written = 0

    def fill() -> None:
        nonlocal written
        while True:
            store.append(entries(store.last_index + 1, 1, size=3000))
            store.save(HardState(1, 1, store.last_index))
            sync(log)
            written = store.last_index

    with pytest.raises(NoSpaceError, match="no space left"):
        fill()
    held = the(opened(directory.content()))
    assert held.last_index == written
    store.compact_to(Snapshot(written - 1, 1, MEMBERS))
    with pytest.raises(NoSpaceError):
        sync(log)
    directory.limit = 4 << 17
    sync(log)
    assert log.take() is None
    held = the(opened(directory.content()))
    assert loaded(held, held.first_index, held.last_index + 1) == entries(written, 2, size=3000)


def test_the_next_segment_is_at_hand_before_it_is_needed() -> None:
    directory = SimDirectory()
    log = opened(directory)
    store = log.create("a", START)
    while max(directory.files) == 1:
        store.append(entries(store.last_index + 1, 1, size=1000))
        sync(log)
    assert not any(directory.files[2])


def test_segments_that_nobody_needs_go() -> None:
    directory = SimDirectory()
    log = opened(directory)
    store, idle = log.create("a", START), log.create("idle", START)
    idle.append(entries(1, 2))
    idle.save(HardState(5, 2, 1))
    for _ in range(30):
        store.append(entries(store.last_index + 1, 5, size=3000))
        sync(log)
        store.compact_to(Snapshot(store.last_index - 1, 1, MEMBERS))
        sync(log)
    assert len(directory.files) <= 4
    assert min(directory.files) > 1
    again = opened(directory.content())
    assert not again.notes
    assert Group.of(the(again)) == Group.of(store)
    assert Group.of(the(again, "idle")) == Group.of(idle)
    assert the(again, "idle").hard == HardState(5, 2, 1)


def test_a_log_does_not_take_much_more_than_is_needed_of_it() -> None:
    directory = SimDirectory()
    log = opened(directory)
    idle, store = log.create("idle", START), log.create("a", START)
    idle.append(entries(1, 30, size=1000))
    for _ in range(60):
        store.append(entries(store.last_index + 1, 10, size=3000))
        sync(log)
        store.compact_to(Snapshot(store.last_index, 1, MEMBERS))
    assert sum(map(len, directory.files.values())) <= 7 * SIZES.segment_bytes
    again = opened(directory.content())
    assert not again.notes
    assert loaded(the(again, "idle"), 1, 31) == entries(1, 30, size=1000)


def test_what_a_removed_group_says_is_not_written() -> None:
    directory = filled()
    log = opened(directory)
    store = the(log)
    log.remove("a")
    store.save(HardState(9))
    sync(log)
    assert opened(directory.content()).groups() == []


def test_a_record_may_be_larger_than_a_segment() -> None:
    directory = SimDirectory()
    log = opened(directory)
    log.create("a", START).append(entries(1, 2, size=SIZES.segment_bytes * 2))
    sync(log)
    assert loaded(the(opened(directory.content())), 1, 3) == entries(1, 2, size=SIZES.segment_bytes * 2)


def test_many_groups_have_room() -> None:
    directory = SimDirectory()
    log = opened(directory)
    for number in range(400):
        log.create(f"group {number}", Snapshot(number, 1, MEMBERS))
    sync(log)
    again = opened(directory.content())
    assert len(again.groups()) == 400
    assert opened(again_files := again_content(again)).groups() == again.groups(), again_files.keys()


def again_content(log: FileLog) -> Files:
    directory = log._files._directory
    assert isinstance(directory, SimDirectory)
    return directory.content()


def test_a_log_that_cannot_be_opened_is_let_go(tmp_path: Path) -> None:
    (tmp_path / "00000001.log").write_bytes(b"something else" * 1000)
    for _ in range(2):
        with pytest.raises(DamageError):
            FileLog(DiskDirectory(tmp_path))


def test_a_later_version_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(records, "VERSION", 2)
        files = filled().content()
    with pytest.raises(ImageError, match="later version"):
        opened(files)


def test_changes_of_members_outlive_the_loss_of_their_place() -> None:
    directory = SimDirectory()
    log = opened(directory)
    change = Entry(1, 1, EntryKind.MEMBERS, Members(frozenset({4, 5, 6, 77})).pack())
    log.create("a", START).append([change])
    sync(log)
    write = next(event for event in directory.events if isinstance(event, Write) and change.data in event.data)
    content = bytearray(directory.content()[1])
    content[write.offset : write.offset + len(write.data)] = bytes(len(write.data))
    directory = SimDirectory({1: bytes(content)})
    log = opened(directory)
    assert list(the(log).members()) == [change]
    assert the(log).get(1) == change, "it was written again"
    assert not the(log).damaged
