"""Several groups share the disks of an image: what concerns all of them happens between the same changes everywhere."""

import random
from collections.abc import Callable
from itertools import islice
from typing import Any

import msgspec
import pytest
import trio

from nbdvde.disk import BLOCK
from nbdvde.engine.access import format_storage, open_storage
from nbdvde.engine.image import Image
from nbdvde.errors import DetachedError, MovedError, RefusedError, UsageError
from nbdvde.raft.messages import Entry, Snapshot
from nbdvde.raft.placement import Table
from nbdvde.replication.assembly import DEFAULT, Assembly
from nbdvde.replication.compare import CHUNK
from nbdvde.replication.notes import Note, Notes
from nbdvde.replication.operations import (
    Action,
    Arrange,
    Attach,
    Begin,
    Call,
    Change,
    Compare,
    Fence,
    GiveUp,
    Hold,
    Operation,
    Repair,
    Retire,
)
from nbdvde.replication.routing import STRIPE, Routing
from tests.crash.recording import RecordingStorage
from tests.crash.session import KEY
from tests.crash.states import crashes
from tests.replication.entries import MEMBERS, Author, assembly_of

STRIPES, BLOCKS = 6, 3
"""Of the disk, and of those that are written in each."""
SIZE = STRIPES * STRIPE


def fresh() -> RecordingStorage:
    storage = RecordingStorage()
    format_storage(storage, SIZE, KEY, segment_bytes=64 << 10)
    return RecordingStorage(bytes(storage.image))


class History:
    """Logs of the groups of a cluster, and what they come to."""

    def __init__(self) -> None:
        self.authors = {DEFAULT: Author()}
        self.logs: dict[str, list[Entry]] = {DEFAULT: []}
        self.routing = Routing(Table.of([DEFAULT]))
        self.disk: dict[tuple[int, int], int] = {}
        """What blocks hold, by stripe and number in there."""
        self.snapshots: dict[str, dict[tuple[int, int], int]] = {}
        self.retired: set[str] = set()

    def add(self, group: str, operation: Operation) -> int:
        """Have an operation be the next of a group; its index."""
        self.logs[group].append(self.authors[group].entry(operation))
        return self.authors[group].index

    def write(self, stripe: int, block: int, value: int) -> None:
        offset = stripe * STRIPE + block * BLOCK
        data = value.to_bytes(2, "little") * (BLOCK // 2)
        change = Change("disk", 0, Action.WRITE, offset, BLOCK, data, self.routing.version)
        self.add(self.routing.at("disk", offset), [change])
        self.disk[stripe, block] = value

    def trim(self) -> None:
        """All of the disk."""
        for group in self.routing.groups:
            self.add(group, [Change("disk", 0, Action.TRIM, 0, SIZE, table=self.routing.version)])
        self.disk.clear()

    def hold(self) -> int:
        """Have all groups stand still."""
        hold = self.add(DEFAULT, Begin())
        for group in sorted({*self.logs} - self.retired - {DEFAULT}):
            self.add(group, Hold(hold))
        return hold

    def call(self, path: str, name: str) -> None:
        request = msgspec.json.encode({"name": name})
        self.add(DEFAULT, Call(path, request, 1_700_000_000_000_000_000, bytes(32), hold=self.hold()))

    def snapshot(self, name: str) -> None:
        self.call("snapshots/create", f"disk@{name}")
        self.snapshots[name] = dict(self.disk)

    def rollback(self, name: str) -> None:
        self.call("snapshots/rollback", f"disk@{name}")
        self.disk = dict(self.snapshots[name])

    def arrange(self, *groups: str) -> None:
        self.add(DEFAULT, Arrange(self.hold(), groups))
        self.routing = Routing(self.routing.table.spread({DEFAULT, *groups}))
        for group in groups:
            if group not in self.logs:
                self.authors[group], self.logs[group] = Author(group, index=1), []

    def retire(self, *groups: str) -> None:
        self.add(DEFAULT, Retire(groups))
        self.retired |= {*groups}

    def wanted(self) -> dict[str, dict[tuple[int, int], int]]:
        """What the image holds in the end."""
        return {"disk": self.disk, **{f"disk@{name}": held for name, held in self.snapshots.items()}}


def history(seed: int, steps: int = 60) -> History:
    """Writes in all stripes, and now and then something that concerns all groups."""
    chance, made = random.Random(seed), History()
    names = [["a", "b"], ["a", "b", "c"], ["b", "c"], ["b", "c", "d"]]
    for step in range(steps):
        kind = chance.random()
        if step % 15 == 5 and names:
            made.arrange(*names.pop(0))
            retired = [group for group in made.logs if group not in made.routing.groups and group not in made.retired]
            if chance.random() < 0.5 and retired:
                made.retire(*retired)
        elif kind < 0.8:
            for _ in range(chance.randint(1, 6)):
                made.write(chance.randrange(STRIPES), chance.randrange(BLOCKS), chance.randrange(1, 1 << 16))
        elif kind < 0.85:
            made.trim()
        elif kind < 0.95 or not made.snapshots:
            made.snapshot(f"s{step}")
        else:
            made.rollback(chance.choice(sorted(made.snapshots)))
    return made


async def content(image: Image) -> dict[str, dict[tuple[int, int], int]]:
    """What the disk and its snapshots hold, as `History.wanted`."""
    found = dict[str, dict[tuple[int, int], int]]()
    for label in ["disk", *(f"disk@{member.name}" for member in image.volumes.snapshots(image.disk()))]:
        found[label] = {}
        for stripe in range(STRIPES):
            pieces = await image.disk(label).read(stripe * STRIPE, BLOCKS * BLOCK)
            data = b"".join(bytes(piece) for piece in pieces)
            values = [int.from_bytes(data[at * BLOCK : at * BLOCK + 2], "little") for at in range(BLOCKS)]
            found[label] |= {(stripe, at): value for at, value in enumerate(values) if value}
    return found


async def apply(assembly: Assembly, logs: dict[str, list[Entry]], chance: random.Random) -> None:
    """Apply to each group what it has not, all at the same time, as far as there are such groups."""
    finished = trio.Event()

    async def run(name: str) -> None:
        while name not in assembly.machines:
            if finished.is_set():
                return
            await trio.lowlevel.checkpoint()
        machine = assembly.machines[name]
        entries = [entry for entry in logs[name] if entry.index > machine.applied.index]
        while entries:
            await wander()
            del entries[: len(await machine.apply(entries[: chance.randint(1, 5)]))]
        if name == DEFAULT:
            finished.set()

    async def wander() -> None:
        for _ in range(chance.randrange(4)):
            await trio.lowlevel.checkpoint()
        if chance.random() < 0.05:
            await assembly.image.flush()

    async with trio.open_nursery() as nursery:
        for name in logs:
            nursery.start_soon(run, name)


async def replay(storage: RecordingStorage, made: History, seed: int) -> tuple[dict[str, object], dict[str, int]]:
    """What the image holds after everything; how far its groups were before."""
    image = await open_storage(storage, KEY, checkpoint_bytes=48 << 10)
    assembly = await assembly_of(image)
    before = {name: machine.applied.index for name, machine in assembly.machines.items()}
    await apply(assembly, made.logs, random.Random(seed))
    found: dict[str, object] = dict(await content(image))
    assembly.close()
    await image.close()
    return found, before


@pytest.mark.parametrize("seed", range(4))
def test_all_groups_come_to_what_was_asked_for(seed: int) -> None:
    made = history(seed)
    found, _ = trio.run(replay, fresh(), made, seed)
    assert found == made.wanted()


def test_after_a_crash_all_groups_go_on_from_what_is_there() -> None:
    made, storage = history(7, steps=40), fresh()
    trio.run(replay, storage, History(), 0)
    storage = RecordingStorage(bytes(storage.image))
    found, _ = trio.run(replay, storage, made, 7)
    assert found == made.wanted()
    seen = set[str]()
    for crash in islice(crashes(storage.base, storage.events, random.Random(1), 4, 1), 3, None, 12):
        found, before = trio.run(replay, RecordingStorage(crash.image), made, 8)
        assert found == made.wanted(), (crash.what, before)
        seen.add(repr(before))
    assert len(seen) > 3


async def opened() -> Assembly:
    return await assembly_of(await open_storage(fresh(), KEY))


async def results(assembly: Assembly, group: str, entries: list[Entry]) -> list[Any]:
    return list(await assembly.machines[group].apply(entries))


def two_groups() -> History:
    made = History()
    made.arrange("a")
    return made


async def test_what_was_sent_by_an_older_table_comes_to_nothing() -> None:
    made, assembly = two_groups(), await opened()
    change = Change("disk", 0, Action.WRITE, 0, BLOCK, b"x" * BLOCK, 0)
    made.add(DEFAULT, [change])
    *_, (moved,) = await results(assembly, DEFAULT, made.logs[DEFAULT])
    assert isinstance(moved, MovedError)
    assert (await content(assembly.image))["disk"] == {}
    await assembly.image.close()


async def test_nothing_is_done_under_a_hold_that_was_given_up() -> None:
    made, assembly = two_groups(), await opened()
    hold = made.hold()
    assert await results(assembly, DEFAULT, made.logs[DEFAULT]) == [1, None, 3]
    made.write(0, 0, 5)
    late = Call("snapshots/create", b'{"name": "disk@s"}', 1, bytes(32), hold=hold)
    entries = [Author(index=3).entry(GiveUp(hold)), Author(index=4).entry(late)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(apply, assembly, {"a": made.logs["a"]}, random.Random(1))
        await trio.testing.wait_all_tasks_blocked()
        assert assembly.machines["a"].held == hold
        assert assembly.machines["a"].applied.index == made.authors["a"].index - 1, "it stands still"
        _, refused = await results(assembly, DEFAULT, entries)
    assert isinstance(refused, RefusedError)
    assert assembly.machines["a"].applied.index == made.authors["a"].index
    await assembly.image.close()


async def test_a_call_without_a_hold_is_refused_where_there_are_groups() -> None:
    made, assembly = two_groups(), await opened()
    made.add(DEFAULT, Call("snapshots/create", b'{"name": "disk@s"}', 1, bytes(32)))
    made.add(DEFAULT, Begin())
    made.add(DEFAULT, Begin())
    *_, refused, begun, another = await results(assembly, DEFAULT, made.logs[DEFAULT])
    assert isinstance(refused, MovedError)
    assert (begun, another) == (4, 0)
    await assembly.image.close()


async def test_one_group_is_left_and_knows_by_which_table() -> None:
    made, storage = two_groups(), fresh()
    made.write(0, 0, 4)
    made.arrange()
    made.retire("a")
    made.write(0, 0, 5)
    assembly = await assembly_of(await open_storage(storage, KEY))
    await apply(assembly, made.logs, random.Random(1))
    await assembly.durable()
    assembly.close()
    image = await open_storage(RecordingStorage(bytes(storage.image)), KEY)
    again = await assembly_of(image)
    assert again.routing.version == made.routing.version == 2
    made.write(0, 0, 6)
    assert await results(again, DEFAULT, made.logs[DEFAULT][-1:]) == [[None]]
    assert await content(image) == made.wanted()
    ahead = again.machines[DEFAULT]
    ahead.take(Note(DEFAULT, Snapshot(0, 0, MEMBERS)))
    assert again.routing.version == 0
    await assembly.image.close()
    await image.close()


async def test_a_comparison_counts_no_more_when_there_is_another_table() -> None:
    """Another group may have written since what this one compared."""
    made, assembly = two_groups(), await opened()
    compared = {group: made.add(group, Compare("disk", 0, 1, table=1)) for group in (DEFAULT, "a")}
    made.arrange("a", "b")
    await apply(assembly, made.logs, random.Random(1))
    for group, index in compared.items():
        repair = Repair("disk", index, 0, bytes(CHUNK))
        assert await results(assembly, group, [made.authors[group].entry(repair)]) == [0]
    await assembly.image.close()


async def test_a_group_that_comes_knows_who_uses_a_disk() -> None:
    made, assembly = History(), await opened()
    made.add(DEFAULT, Attach("disk", 2))
    made.arrange("a")
    await results(assembly, DEFAULT, made.logs[DEFAULT])
    machine = assembly.machines["a"]
    assert machine.epochs == {"disk": (1, 2)}
    assert machine.applied == Snapshot(1, 0, MEMBERS)
    made.add("a", Fence("disk", 9, 3))
    made.add("a", Fence("disk", 8, 1))
    await results(assembly, "a", made.logs["a"])
    assert machine.epochs == {"disk": (9, 3)}
    await assembly.image.close()


async def test_a_disk_that_comes_again_is_another_one_in_all_groups() -> None:
    made, assembly = two_groups(), await opened()
    for path in ("disks/create", "disks/delete", "disks/create"):
        request = msgspec.json.encode({"name": "other", "size": SIZE})
        made.add(DEFAULT, Call(path, request, 1, bytes(32), hold=made.hold()))
    await apply(assembly, made.logs, random.Random(1))
    created = made.authors[DEFAULT].index
    assert {machine.epochs["other"] for machine in assembly.machines.values()} == {(created, 0)}
    await assembly.image.close()


async def test_a_group_that_is_gone_is_forgotten() -> None:
    storage = fresh()
    made, assembly = two_groups(), await assembly_of(await open_storage(storage, KEY))
    made.arrange("b")
    made.write(0, 0, 1)
    made.retire("a")
    await apply(assembly, made.logs, random.Random(1))
    assert {*assembly.machines} == {DEFAULT, "b"}
    await assembly.durable()
    await assembly.image.close()
    image = await open_storage(RecordingStorage(bytes(storage.image)), KEY)
    notes = await Notes.load(image)
    assert notes
    assert {*notes.found} == {DEFAULT, "b"}
    await image.close()


async def test_a_state_is_taken_over_for_all_groups() -> None:
    made = history(3)
    source = await opened()
    await apply(source, made.logs, random.Random(1))
    image = await open_storage(fresh(), KEY)
    steps: list[Callable[[], object]] = []

    async def fetch(node: int, have: object, begin: Callable[[], object]) -> dict[str, object]:
        steps.append(begin)
        await begin()  # type: ignore[misc]
        return {note.group: note for note in source.all()}

    behind = await assembly_of(image, fetch=fetch)  # type: ignore[arg-type]
    taken = await behind.machines[DEFAULT].install(1, Snapshot(3, 1, MEMBERS))
    assert taken == source.machines[DEFAULT].applied
    assert {name: machine.note for name, machine in behind.machines.items()} == {
        name: machine.note for name, machine in source.machines.items()
    }
    assert behind.routing.table == source.routing.table
    late = made.logs["b"][-1]
    ((told,),) = await results(behind, "b", [late])
    assert isinstance(told, DetachedError), "it is part of the state: who asked for it is not told that it is done"
    with pytest.raises(UsageError):
        behind.image.disk("none")
    for assembly in (source, behind):
        await assembly.image.close()
