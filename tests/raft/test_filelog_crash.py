"""What a crash or rot may leave of a log, and what is made of it."""

from collections.abc import Callable, Iterator, Sequence
from random import Random

import pytest

from nbdvde.errors import DamageError
from nbdvde.raft.filelog import FileLog, Sizes
from nbdvde.raft.messages import Entry, EntryKind, HardState
from nbdvde.raft.store import LogStore
from tests.raft.simdisk import Create, Event, Files, Mark, Moment, SimDirectory, Write, moments, subsets
from tests.raft.workload import SIZES, START, Group, Workload, World


def opened(files: Files, seed: int = 0) -> FileLog:
    return FileLog(SimDirectory(files), SIZES, Random(seed).randbytes)


def stores_of(log: FileLog) -> list[LogStore]:
    return [store for name in log.groups() if (store := log.group(name))]


def held(log: FileLog) -> World:
    return {name: Group.of(store) for name in log.groups() if (store := log.group(name))}


def check_crash(files: Files, worlds: list[World], mark: Mark) -> None:
    """It holds what was acknowledged or a later state; nothing is damaged but entries that were being written."""
    log = opened(files)
    world = held(log)
    assert not any(store.unsure for store in stores_of(log))
    states = [other for other in worlds[mark.acknowledged : mark.newest + 1] if alike(world, other)]
    assert states
    for name, group in world.items():
        lost = set(states[-1][name].entries) - set(group.entries)
        assert set(group.entries) <= set(states[-1][name].entries)
        assert not lost & set(worlds[mark.acknowledged][name].entries if name in worlds[mark.acknowledged] else ())
    log.close()


def alike(one: World, other: World) -> bool:
    """Whether two states differ at most in entries whose data is lost."""
    return one.keys() == other.keys() and all(group.is_like(other[name]) for name, group in one.items())


@pytest.mark.parametrize("seed", range(8))
def test_a_crash_loses_nothing_that_was_acknowledged(seed: int) -> None:
    directory = SimDirectory()
    work = Workload(seed, directory)
    work.run(12)
    random = Random(seed)
    for moment in moments({}, directory.events):
        for kept in subsets(len(moment.pending), random, 4):
            check_crash(moment.left(kept), work.worlds, moment.mark)


@pytest.mark.parametrize("seed", range(4))
def test_lives_that_end_in_crashes(seed: int) -> None:
    random = Random(seed)
    files: Files = {}
    world: World = {}
    for life in range(6):
        directory = SimDirectory(files)
        work = Workload(100 * seed + life, directory, world)
        work.run(random.randint(0, 5))
        for moment in random.sample(history := list(frozen(files, directory.events)), min(12, len(history))):
            kept = [at for at in range(len(moment.pending)) if random.random() < 0.7]
            check_crash(left := moment.left(kept), work.worlds, moment.mark)
        log = opened(left)
        if any(store.damaged for store in stores_of(log)):
            left = directory.content()
        files, world = left, held(opened(left))


def frozen(base: Files, events: Sequence[Event]) -> Iterator[Moment]:
    """Moments that do not change any more."""
    for moment in moments(base, events):
        yield Moment(
            {number: bytearray(content) for number, content in moment.files.items()}, [*moment.pending], moment.mark
        )


def check_rot(files: Files, world: World) -> list[str]:
    """Nothing is lost that is not said to be; answers the groups that are mute."""
    try:
        log = opened(files)
    except DamageError:
        return ["*"]
    mute = []
    for name in log.groups():
        store = log.group(name)
        assert store is not None
        if store.damaged or store.unsure:
            mute.append(name)
        if not store.unsure:
            group, whole = Group.of(store), world[name]
            assert group.is_like(whole)
            lost = [index for part in store.damaged for index in part]
            assert group.entries == tuple(entry for entry in whole.entries if entry.index not in lost)
    assert world.keys() <= set(log.groups()) or log.unsure
    return mute


def rotten(files: Files, number: int, offset: int, data: bytes) -> Files:
    content = files[number]
    return files | {number: content[:offset] + data + content[offset + len(data) :]}


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_damages_one_entry_at_most(seed: int) -> None:
    directory = SimDirectory()
    work = Workload(seed, directory)
    work.run(8)
    *_, end = moments({}, directory.events)
    files, random, world = end.left(()), Random(seed), work.world()
    places = [(number, at) for number, content in files.items() for at in range(0, len(content), 64)]
    written = [(number, at) for number, at in places if any(files[number][at : at + 64])]
    counts = set()
    for number, offset in random.sample(written, min(60, len(written))):
        at = offset + random.randrange(64)
        flipped = rotten(files, number, at, bytes([files[number][at] ^ 1 << random.randrange(8)]))
        check_rot(flipped, world)
        stores = stores_of(opened(flipped))
        assert not any(store.unsure for store in stores)
        counts.add(sum(len(part) for store in stores for part in store.damaged))
    assert counts == {0, 1}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("lost", [True, False], ids=["lost", "elsewhere"])
def test_a_write_that_went_astray_is_noticed(seed: int, *, lost: bool) -> None:
    directory = SimDirectory()
    work = Workload(seed, directory)
    work.run(10)
    sizes = {event.number: event.size for event in directory.events if isinstance(event, Create)}
    random, mute = Random(seed), 0
    for wrong, event in enumerate(directory.events):
        if not isinstance(event, Write):
            continue
        room = sizes[event.number] - len(event.data)
        target = Write(event.number, random.randrange(0, room, 512), event.data)
        events = [*directory.events]
        events[wrong : wrong + 1] = [] if lost else [target]
        *_, moment = moments({}, events)
        mute += bool(check_rot(moment.left(()), work.world()))
    assert mute


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("flip", [0, 255], ids=["never written", "wrong"])
def test_the_loss_of_a_whole_batch_is_noticed(seed: int, flip: int) -> None:
    directory = SimDirectory()
    work = Workload(seed, directory)
    work.run(14)
    files, world, mute = directory.content(), work.world(), 0
    writes = [event for event in directory.events if isinstance(event, Write) and event.number in files]
    pairs = list(zip(writes[::2], writes[1::2], strict=True))
    for batch, twin in pairs if flip else pairs[:-1]:  # of the last one nothing is left that could tell
        left = files
        for write in (batch, twin):
            changed = bytes(byte ^ flip if flip else 0 for byte in write.data)
            left = rotten(left, write.number, write.offset, changed)
        mute += bool(check_rot(left, world))
    assert mute


Damage = Callable[[bytes], bytes]


def whole(data: bytes) -> bytes:
    return data


def missing(data: bytes) -> bytes:
    return bytes(len(data))


def wrong(data: bytes) -> bytes:
    return bytes(byte ^ 255 for byte in data)


def middle_missing(data: bytes) -> bytes:
    return data[:512] + bytes(512) + data[1024:]


def middle_wrong(data: bytes) -> bytes:
    return data[:512] + bytes([data[512] ^ 1]) + data[513:]


CUT, DAMAGED, UNSURE, FINE = "cut", "damaged", "unsure", "fine"


@pytest.mark.parametrize(("batch", "twin", "verdict"), [
    (whole, whole, FINE), (whole, missing, FINE), (whole, wrong, FINE), (whole, middle_wrong, FINE),
    (missing, whole, DAMAGED), (wrong, whole, DAMAGED), (middle_missing, whole, DAMAGED),
    (middle_wrong, whole, DAMAGED),
    (missing, missing, CUT), (middle_missing, missing, CUT), (middle_missing, middle_missing, CUT),
    (missing, middle_missing, CUT),
    (wrong, missing, UNSURE), (middle_wrong, missing, UNSURE), (wrong, middle_missing, UNSURE),
    (missing, wrong, UNSURE), (missing, middle_wrong, UNSURE), (middle_missing, middle_wrong, UNSURE),
    (middle_missing, wrong, UNSURE), (wrong, wrong, UNSURE),
])  # fmt: skip
def test_a_torn_tail_is_told_from_rot(batch: Damage, twin: Damage, verdict: str) -> None:
    directory = SimDirectory()
    log = FileLog(directory, Sizes(1 << 20), Random(0).randbytes)
    store = log.create("default", START)
    data = Random(1).randbytes(1000)
    for first in (1, 21):
        store.append([Entry(1, index, EntryKind.NORMAL, data) for index in range(first, first + 20)])
        store.save(HardState(first, 1, 0))
        if work := log.take():
            work()
    *_, last, its_twin = (event for event in directory.events if isinstance(event, Write))
    files = rotten(directory.content(), last.number, last.offset, batch(last.data))
    found = opened(rotten(files, its_twin.number, its_twin.offset, twin(its_twin.data))).group("default")
    assert found
    told = UNSURE if found.unsure else DAMAGED if found.damaged else FINE if found.last_index == 40 else CUT
    assert told == verdict
    assert found.hard.term == (21 if verdict in {FINE, DAMAGED} else 1)
    assert found.last_index == {FINE: 40, DAMAGED: 40, CUT: 20, UNSURE: 0}[verdict]
    if damaged := [len(part) for part in found.damaged]:
        assert sum(damaged) == (20 if batch in {missing, wrong} else 1)


def test_what_cannot_be_read_was_not_torn() -> None:
    directory = SimDirectory()
    Workload(1, directory).run(3)
    *_, batch, twin = (event for event in directory.events if isinstance(event, Write))
    directory.unreadable = {(write.number, write.offset) for write in (batch, twin)}
    log = FileLog(SimDirectory(directory.content(), unreadable=directory.unreadable), SIZES, Random(0).randbytes)
    assert all(store.unsure for store in stores_of(log))
    assert log.unsure


def test_a_twin_of_another_history_is_no_torn_tail() -> None:
    files: Files = {}
    twins = []
    for term in (7, 8):
        directory = SimDirectory()
        log = FileLog(directory, SIZES, Random(0).randbytes)
        store = log.create("default", START)
        for commit in range(2):
            store.save(HardState(term, 0, commit))
            if work := log.take():
                work()
        *_, batch, twin = (event for event in directory.events if isinstance(event, Write))
        files = rotten(directory.content(), batch.number, batch.offset, bytes(len(batch.data)))
        twins.append(twin)
    log = opened(rotten(files, twins[0].number, twins[0].offset, twins[0].data))
    assert all(store.unsure for store in stores_of(log))
