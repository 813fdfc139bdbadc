"""Entries applied to an image, and what a crash leaves of that."""

import random
from collections.abc import Sequence
from itertools import islice
from typing import Any

import msgspec
import pytest
import trio

from nbdvde.disk import BLOCK
from nbdvde.engine.access import format_storage, open_storage
from nbdvde.engine.image import Image
from nbdvde.errors import DetachedError, InUseError, NetworkError, RefusedError, UsageError
from nbdvde.raft.messages import Snapshot
from nbdvde.replication.compare import CHUNK, NOTHING
from nbdvde.replication.machine import ImageMachine
from nbdvde.replication.notes import Note, Place
from nbdvde.replication.operations import Action, Attach, Call, Change, Compare, Dismiss, Enrol, Operation, Repair
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
    first, second = Enrol("a:1", "a"), Enrol("b:1", "b")
    assert await done(machine, author, first, second, first, Dismiss(2), second) == [1, 2, 1, None, 3]
    assert heard.nodes == {1: Place("a:1", "a"), 2: Place("", ""), 3: Place("b:1", "b")}
    await image.close()


async def test_a_chunk_is_repaired_only_while_nothing_has_changed_it():
    author = Author()
    image = await open_storage(fresh(), KEY)
    machine = await machine_of(image)
    compare, data = Compare("disk", 0, 9), b"r" * CHUNK
    ((index, before),) = await done(machine, author, compare)
    assert (index, before) == (1, NOTHING)
    assert await done(machine, author, [write(0, 1)], Repair("disk", 1, 0, data)) == [[None], 0]
    ((index, _),) = await done(machine, author, compare)
    assert await done(machine, author, Repair("disk", 1, 0, data), Repair("disk", index, 0, data)) == [0, 1]
    assert await content(image) == [int.from_bytes(b"rr", "little")] * BLOCKS
    ((index, _),) = await done(machine, author, compare)
    late = await done(machine, author, call("snapshots/create", "disk@x"), Repair("disk", index, 0, bytes(CHUNK)))
    assert late[1] == 0
    await image.close()


async def test_a_state_that_was_taken_over_in_part_is_completed_first(autojump_clock: object):
    """Its source fails, the node ends and starts again; nothing is applied to half a state."""
    author, storage = Author(), fresh()
    entries = author.entries([[write(0, 1)], [write(1, 2)], call("snapshots/create", "disk@a"), [write(2, 3)]])
    asked = list[int]()
    image = await open_storage(storage, KEY)

    async def fails(source: int, snapshot: Snapshot) -> Note:
        asked.append(source)
        await image.disk().write(0, memoryview(bytes(BLOCK)))
        raise NetworkError("node 2", "is gone")

    machine = await machine_of(image, fetch=fails)
    await machine.apply(entries[:1])
    with pytest.raises(NetworkError):
        await machine.install(2, Snapshot(3, 1, MEMBERS))
    assert machine.applied.index == 1
    await image.close()
    image = await open_storage(RecordingStorage(bytes(storage.image)), KEY)

    async def works(source: int, snapshot: Snapshot) -> Note:
        asked.append(source)
        if len(asked) == 2:
            raise NetworkError("cluster", "has no leader")
        await image.disk().write(0, memoryview(b"\5\0" * BLOCK))
        return Note(GROUP, Snapshot(3, 1, MEMBERS))

    machine = await machine_of(image, fetch=works)
    assert machine.applied.index == 1
    assert await machine.apply(entries[2:]) == [None, [None]]
    assert asked == [2, 0, 0]
    assert (await content(image))[:3] == [5, 5, 3]
    assert list(image.volumes.snapshots(image.disk())) == []
    await image.close()


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
