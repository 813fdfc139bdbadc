"""Entries applied to an image, and what a crash leaves of that."""

import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import islice
from typing import Any, cast

import msgspec
import pytest
import trio

from nbdvde.disk import BLOCK
from nbdvde.engine.access import format_storage, open_storage
from nbdvde.engine.image import Image
from nbdvde.engine.volume import Volume
from nbdvde.errors import (
    DamageError,
    DetachedError,
    InUseError,
    NetworkError,
    RefusedError,
    UnreadableError,
    UsageError,
)
from nbdvde.raft.messages import Entry, EntryKind, Snapshot
from nbdvde.replication.compare import Hasher
from nbdvde.replication.comparison import UNREADABLE
from nbdvde.replication.machine import ImageMachine
from nbdvde.replication.notes import Note, Place
from nbdvde.replication.operations import (
    Action,
    Attach,
    Call,
    Change,
    Compare,
    Dismiss,
    Enrol,
    Operation,
    Release,
    Repair,
)
from tests.crash.recording import RecordingStorage
from tests.crash.session import KEY
from tests.crash.states import crashes
from tests.replication.entries import GROUP, MEMBERS, Author, Heard, machine_of

SIZE = 1 << 20
BLOCKS = 64


def fresh() -> RecordingStorage:
    storage = RecordingStorage()
    format_storage(storage, SIZE, KEY, segment_bytes=64 << 10)
    return RecordingStorage(bytes(storage.image))


def write(block: int, value: int, epoch: int = 0, disk: str = "disk") -> Change:
    return Change(disk, epoch, Action.WRITE, block * BLOCK, BLOCK, value.to_bytes(2, "little") * (BLOCK // 2))


def call(path: str, name: str, **more: object) -> Call:
    return Call(path, msgspec.json.encode({"name": name, **more}), 1_700_000_000_000_000_000, bytes(32))


async def done(machine: ImageMachine, author: Author, *operations: Operation) -> list[Any]:
    """The results of new entries."""
    return list(await machine.apply(author.entries(operations)))


async def content(image: Image, label: str | None = None) -> list[int]:
    """What the first blocks hold, as numbers."""
    data = b"".join(bytes(piece) for piece in await image.disk(label).read(0, BLOCKS * BLOCK))
    return [int.from_bytes(data[at : at + 2], "little") for at in range(0, len(data), BLOCK)]


async def test_changes_of_older_attachments_are_dropped():
    author, heard = Author(), Heard()
    image = await open_storage(fresh(), KEY)
    machine = await machine_of(image, heard)
    first = await done(machine, author, Attach("disk", 1), [write(0, 5, epoch=1)], Attach("disk", 2))
    assert first == [1, [None], 3]
    ((late, current),) = await done(machine, author, [write(1, 6, epoch=1), write(2, 7, epoch=3)])
    assert isinstance(late, DetachedError)
    assert current is None
    assert (await content(image))[:3] == [5, 0, 7]
    assert heard.attachments == [("disk", 1, 1), ("disk", 3, 2)]
    await image.close()


async def test_refusals_are_results():
    author = Author()
    image = await open_storage(fresh(), KEY)
    machine = await machine_of(image)
    operations: list[Operation] = [
        [write(0, 1, disk="none"), write(SIZE // BLOCK, 1)], call("snapshots/create", "disk@a"),
        call("snapshots/create", "disk@a"), Attach("disk", 1), call("snapshots/rollback", "disk@a"),
        call("snapshots/rollback", "disk@a", force=True), call("something/else", "x"),
    ]  # fmt: skip
    (missing, beyond), made, again, epoch, used, forced, unknown = await done(machine, author, *operations)
    assert isinstance(missing, UsageError)
    assert isinstance(beyond, RefusedError)
    assert msgspec.json.decode(made)["created_ns"] == 1_700_000_000_000_000_000
    assert isinstance(again, RefusedError)
    assert epoch == 4
    assert isinstance(used, InUseError)
    assert b"disk@a" in forced
    assert isinstance(unknown, RefusedError)
    ((dropped,),) = await done(machine, author, [write(0, 1, epoch=4)])
    assert isinstance(dropped, DetachedError)
    await image.close()


async def test_nodes_get_numbers_once():
    author, heard = Author(), Heard()
    image = await open_storage(fresh(), KEY)
    machine = await machine_of(image, heard)
    members, new = [Enrol(f"{name}:1", name) for name in "abc"], Enrol("d:1", "d")
    assert await done(machine, author, *members, new, Dismiss(4), new) == [1, 2, 3, 4, None, 5]
    assert heard.nodes == {
        1: Place("a:1", "a"), 2: Place("b:1", "b"), 3: Place("c:1", "c"), 4: Place("", ""), 5: Place("d:1", "d"),
    }  # fmt: skip
    for known in (members[0], new):
        (refusal,) = await done(machine, author, known)
        assert isinstance(refusal, RefusedError), "who has that address may not have left all groups"
    await image.close()


async def test_who_uses_a_disk_is_known_until_nobody_does():
    author = Author()
    image = await open_storage(fresh(), KEY)
    machine = await machine_of(image)
    rollback = call("snapshots/rollback", "disk@a")
    found = await done(
        machine, author, call("snapshots/create", "disk@a"), Attach("disk", 1), Release("disk", 1), rollback
    )
    assert isinstance(found[3], InUseError)
    found = await done(machine, author, Release("disk", 2), rollback, Attach("disk", 2))
    assert b"disk@a" in found[1]
    assert machine.epochs["disk"] == (7, 2)
    await image.close()


async def test_a_disk_that_comes_again_is_another_one():
    author = Author()
    image = await open_storage(fresh(), KEY)
    machine = await machine_of(image)
    await done(machine, author, call("disks/create", "more", size=SIZE), Attach("more", 1), Release("more", 2))
    await done(machine, author, call("disks/delete", "more"), call("disks/create", "more", size=SIZE))
    ((late,),) = await done(machine, author, [write(0, 1, epoch=2, disk="more")])
    assert isinstance(late, DetachedError)
    assert list(machine.epochs) == ["more"]
    await image.close()


@pytest.mark.parametrize(
    "history",
    [
        [call("disks/create", "more", size=SIZE)],
        [call("disks/create", "more", size=SIZE), Attach("more", 1), call("disks/delete", "more", force=True)],
        [call("snapshots/create", "disk@a"), call("disks/clone", "more", source="disk@a")],
    ],
)
async def test_disks_are_noted_alike_when_a_change_comes_again_after_a_failure(history: list[Operation]):
    storage, entries = fresh(), Author().entries(history)
    image = await open_storage(storage, KEY)
    machine = await machine_of(image)
    await machine.apply(entries)
    left = RecordingStorage(bytes(storage.image))
    again = await open_storage(left, KEY)
    late = await machine_of(again)
    assert late.applied.index == len(entries) - 1, "the last one is in the image, and not noted"
    (refused,) = await late.apply(entries[-1:])
    assert isinstance(refused, RefusedError | UsageError)
    assert late.note == machine.note
    await image.close()
    await again.close()


async def test_what_is_in_the_image_is_noted_with_it():
    storage, author = RecordingStorage(), Author()
    format_storage(storage, SIZE, KEY)
    image = await open_storage(storage, KEY)
    await (await machine_of(image)).apply(author.entries([[write(0, 1)], [write(0, 2)]]))
    await image.flush()
    again = await open_storage(RecordingStorage(bytes(storage.image)), KEY)
    assert (await machine_of(again)).applied.index == 2
    await image.close()
    await again.close()


async def test_what_a_state_contains_is_not_applied_again():
    author = Author()
    image = await open_storage(fresh(), KEY)
    machine = await machine_of(image)
    entries = author.entries([call("snapshots/create", "disk@a"), [write(0, 1)], [write(0, 2)]])
    await machine.apply(entries)
    made, (written,) = cast(Any, await machine.apply(entries[:2]))
    assert isinstance(made, DetachedError)
    assert isinstance(written, DetachedError)
    assert await machine.apply([Entry(1, 3, EntryKind.MEMBERS, b"")]) == [None], "its fate is known"
    assert (await content(image))[0] == 2
    await image.close()


async def test_a_state_of_another_node_counts_when_all_of_it_is_there():
    storage, noted = fresh(), list[Note]()
    image = await open_storage(storage, KEY)
    theirs = Note(GROUP, Snapshot(9, 2, MEMBERS), {"disk": (5, 2)}, {1: Place("a:1", "a")})

    async def fetch(source: int, have: Mapping[str, int], begin: Callable[[], Awaitable[None]]) -> Mapping[str, Note]:
        assert have[GROUP] == (9 if source else 0)
        assert heard.steps_back == len(noted) + 1, "others lead meanwhile"
        await begin()
        copy = await open_storage(RecordingStorage(bytes(storage.image)), KEY)
        noted.append((await machine_of(copy)).note)
        await copy.close()
        if len(noted) == 1:
            raise NetworkError("node 2", "has gone")
        return {GROUP: theirs}

    heard = Heard()
    machine = await machine_of(image, heard, fetch)
    await machine.begin()
    with pytest.raises(NetworkError):
        await machine.install(2, theirs.applied)
    assert noted[0].incomplete
    assert noted[0].begun
    later = Author()
    later.index = 9
    await machine.apply(later.entries([[write(3, 7, epoch=5)]]))
    assert (machine.applied.index, machine.note.incomplete, len(noted)) == (10, False, 2)
    assert heard.attachments == [("disk", 5, 2)]
    assert (await content(image))[3] == 7
    await image.close()


async def test_a_chunk_is_mended_unless_it_was_changed():
    image = await open_storage(fresh(), KEY)
    machine = await machine_of(image)
    author, sound = Author(), (8).to_bytes(2, "little") * (SIZE // 2)
    found = await done(machine, author, Compare("disk", 0, 1), Repair("disk", 1, 0, sound))
    assert found[1] == 1
    found = await done(machine, author, Compare("disk", 0, 1), [write(0, 1)], Repair("disk", 3, 0, sound))
    assert found[2] == 0
    found = await done(machine, author, Compare("disk", 0, 1), Compare("disk", 0, 1), Repair("disk", 6, 0, sound))
    assert found[2] == 0
    assert (await content(image))[:2] == [1, 8]
    await image.close()


async def test_comparing_says_what_cannot_be_read(monkeypatch: pytest.MonkeyPatch):
    author = Author()
    image = await open_storage(fresh(), KEY)
    machine = await machine_of(image)

    async def fails(*_: object) -> bytes:
        raise DamageError("extent", "fails its authentication")

    monkeypatch.setattr(Hasher, "chunk", fails)
    assert await done(machine, author, Compare("disk", 0, 1)) == [(1, UNREADABLE)]
    await image.close()


async def test_damage_of_one_image_is_no_reason_to_refuse(monkeypatch: pytest.MonkeyPatch, autojump_clock: object):
    """Others may be able to: what was agreed on is tried again until it can be done."""
    author, tries, write_nowait, write_once = Author(), 0, Volume.write_nowait, Volume.write

    def fail_twice() -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise UnreadableError("extent", "cannot be read")

    def fails_nowait(volume: Volume, offset: int, data: memoryview, *, owned: bool) -> bool:
        fail_twice()
        return write_nowait(volume, offset, data, owned=owned)

    async def fails(volume: Volume, offset: int, data: memoryview, *, owned: bool) -> None:
        fail_twice()
        await write_once(volume, offset, data, owned=owned)

    image = await open_storage(fresh(), KEY)
    machine = await machine_of(image)
    monkeypatch.setattr(Volume, "write_nowait", fails_nowait)
    monkeypatch.setattr(Volume, "write", fails)
    beside = Change("disk", 0, Action.TRIM, BLOCK, BLOCK)
    assert await done(machine, author, [write(0, 7), beside]) == [[None, None]]
    assert (tries, machine.stuck, (await content(image))[0]) == (3, "", 7)
    await image.close()


async def test_writes_of_an_entry_are_made_together_or_one_by_one(monkeypatch: pytest.MonkeyPatch):
    """What they come to is the same: the last one of a block counts, and each is refused for itself."""
    chance, contents, results = random.Random(1), list[list[int]](), list[Any]()
    for together in (True, False):
        if not together:
            monkeypatch.setattr(Volume, "write_many_nowait", lambda *_: False)
        image, author, chance = await open_storage(fresh(), KEY), Author(), random.Random(1)
        machine = await machine_of(image)
        await done(machine, author, Attach("disk", 1))
        for _ in range(20):
            changes = [write(chance.randrange(BLOCKS), chance.randrange(1, 1 << 16), 1) for _ in range(16)]
            changes.append(Change("disk", 1, Action.WRITE, 0, 3 * BLOCK, bytes([chance.randrange(1, 256)]) * 3 * BLOCK))
            results.append(await done(machine, author, changes))
        results.append(await done(machine, author, [write(0, 7, 1), write(1, 8, 0), write(1 << 20, 9, 1)]))
        contents.append(await content(image))
        await image.close()
    assert contents[0] == contents[1]
    assert [str(result) for result in results[:21]] == [str(result) for result in results[21:]]
    assert [type(result) for result in results[20][0]] == [type(None), DetachedError, RefusedError]


async def test_shrinking_does_not_depend_on_how_zeroes_are_stored():
    author, results = Author(), list[Any]()
    for zeroes in (Action.ZERO, Action.TRIM):
        image = await open_storage(fresh(), KEY)
        machine = await machine_of(image)
        await done(machine, author, [Change("disk", 0, zeroes, SIZE // 2, SIZE // 2)])
        results += await done(machine, author, call("disks/resize", "disk", size=SIZE // 2))
        author = Author()
        await image.close()
    assert results[0] == results[1]
    assert isinstance(results[0], bytes)


def history(seed: int) -> list[Operation]:
    """Writes, and now and then something that cannot be done twice."""
    chance, operations = random.Random(seed), list[Operation]()
    for number in range(60):
        kind = chance.random()
        snapshot = f"disk@s{number}"
        if kind < 0.8:
            operations.append(
                [write(chance.randrange(BLOCKS), number * 8 + at + 1) for at in range(chance.randint(1, 6))]
            )
        elif kind < 0.9:
            operations += [call("snapshots/create", snapshot), [write(0, number)]]
        else:
            operations += [call("snapshots/create", snapshot), [write(1, 9)], call("snapshots/rollback", snapshot)]
            operations += [[write(2, 3)], call("snapshots/delete", snapshot)]
    return operations


async def run(storage: RecordingStorage, operations: Sequence[Operation]) -> tuple[list[list[int]], int]:
    """Apply what is not applied yet; what the disk and its snapshots hold then, and how much was there before."""
    image = await open_storage(storage, KEY, checkpoint_bytes=48 << 10)
    machine = await machine_of(image)
    before, entries = machine.applied.index, Author().entries(operations)
    chance = random.Random(3)
    for entry in entries[before:]:
        await machine.apply([entry])
        if chance.random() < 0.1:
            await machine.durable()
        elif chance.random() < 0.1:
            await image.flush()
    labels = ["disk", *(f"disk@{member.name}" for member in image.volumes.snapshots(image.disk()))]
    found = [await content(image, label) for label in labels]
    await image.close()
    return found, before


def test_after_a_crash_the_rest_is_applied_to_what_is_there() -> None:
    operations = history(1)
    storage = fresh()
    trio.run(run, storage, [])
    storage = RecordingStorage(bytes(storage.image))
    wanted, _ = trio.run(run, storage, operations)
    seen = set[int]()
    for crash in islice(crashes(storage.base, storage.events, random.Random(1), 4, 1), None, None, 16):
        found, before = trio.run(run, RecordingStorage(crash.image), operations)
        assert found == wanted, (crash.what, before)
        seen.add(before)
    assert len(seen) > 10
