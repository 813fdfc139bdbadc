"""Changes of regions as entries: the same on every node, and once, whatever a crash leaves."""

import json
import random
from collections.abc import Sequence
from itertools import islice
from typing import Any, cast

import msgspec
import pytest
import trio

from nbdvde.admin.streamcalls import AdvanceTail, AppendEntries, CreateStream
from nbdvde.admin.wormcalls import CreateWorm, ExtendRetention, WormRequest
from nbdvde.disk import BLOCK
from nbdvde.engine.access import format_storage, open_storage
from nbdvde.engine.image import Image
from nbdvde.engine.managed.area import Area
from nbdvde.engine.managed.metricslog import MetricsLog
from nbdvde.engine.managed.stream import Stream
from nbdvde.engine.managed.vault import Vault
from nbdvde.engine.managed.worm import Worm
from nbdvde.engine.regions.directory import FORM as DIRECTORY
from nbdvde.engine.regions.directory import VOLUME_BYTES
from nbdvde.engine.regions.query import Question
from nbdvde.engine.regions.samples import Sample
from nbdvde.errors import DamageError, FullError, RefusedError
from nbdvde.moment import RetentionClock
from nbdvde.raft.messages import Snapshot
from nbdvde.replication.catchup import Taker
from nbdvde.replication.compare import Hasher
from nbdvde.replication.giving import Giver
from nbdvde.replication.machine import ImageMachine
from nbdvde.replication.notes import Note
from nbdvde.replication.operations import Action, Call, Change, Operation
from nbdvde.replication.regioncopy import found, labels_of
from nbdvde.replication.regionexport import AppendData
from nbdvde.replication.results import pack
from tests.crash.recording import RecordingStorage
from tests.crash.session import KEY
from tests.crash.states import crashes
from tests.replication.entries import CLUSTER, GROUP, MEMBERS, Author, machine_of
from tests.replication.test_catchup import run

BORN_NS, SECOND_NS = 1_700_000_000_000_000_000, 10**9


def fresh(size: int = 1 << 20) -> RecordingStorage:
    storage = RecordingStorage()
    format_storage(storage, size, KEY, segment_bytes=1 << 20)
    return RecordingStorage(bytes(storage.image))


def call(path: str, request: msgspec.Struct, clock_ns: int = 0, *, of_ns: int = BORN_NS, at_ns: int = BORN_NS) -> Call:
    """`clock_ns` is what the clock of the region showed that was made at `of_ns`."""
    return Call(path, msgspec.msgpack.encode(request), at_ns, bytes(32), RetentionClock(of_ns, clock_ns))


def append(*entries: bytes) -> Call:
    return call("stream/append", AppendEntries(list(entries), wait=False))


async def told(image: Image) -> tuple[Any, ...]:
    """All that the regions of the disk say."""
    area = await image.regions.area(image.disk())
    found = list[Any]([area.directory.slots])
    if area.find(Stream.FORM):
        stream = await image.regions.get(Stream, image.disk())
        found += [stream.tail, await stream.read(0)]
    if area.find(Worm.FORM):
        worm = await image.regions.get(Worm, image.disk())
        records = await worm.records()
        found += [worm.header, records, [await worm.content(record) for record in records]]
    return tuple(found)


async def applied(storage: RecordingStorage, operations: Sequence[Operation], chance: random.Random) -> Any:
    """What regions say when everything is applied that was not yet."""
    image = await open_storage(storage, KEY, checkpoint_bytes=256 << 10)
    image.regions.alone = False
    machine = await machine_of(image)
    execute = machine._execute

    async def executing(machine: ImageMachine, call: Call) -> bytes:
        """Now and then a commit begins before the machine knows that the call is done."""
        try:
            return await execute(machine, call)
        finally:
            if chance.random() < 0.3:
                await image.flush()

    machine._execute = executing
    before, results = machine.applied.index, list[Any]()
    for entry in Author().entries(operations)[before:]:
        results += await machine.apply([entry])
        if chance.random() < 0.15:
            await machine.durable()
        elif chance.random() < 0.2:
            await image.flush()
    found = await told(image)
    await image.close()
    return found, results, before


def history(seed: int) -> list[Operation]:
    chance, clock_ns = random.Random(seed), 0
    operations: list[Operation] = [
        call("stream/create", CreateStream(16 * BLOCK, policy="reject", increment=BLOCK)),
        call("worm/create", CreateWorm(32 * BLOCK, 60 * SECOND_NS)),
    ]
    for number in range(50):
        kind = chance.random()
        clock_ns += chance.randrange(SECOND_NS)
        if kind < 0.5:
            operations.append(append(*(b"%d.%d" % (number, at) for at in range(chance.randint(1, 4)))))
        elif kind < 0.6:
            operations.append(call("stream/advance", AdvanceTail(number)))
        elif kind < 0.75:
            operations.append(call("worm/append", AppendData(chance.randbytes(chance.randint(1, 9000))), clock_ns))
        elif kind < 0.8:
            operations.append(call("worm/tend", WormRequest(), clock_ns))
        else:
            operations.append([Change("disk", 0, Action.WRITE, number * BLOCK, BLOCK, bytes([number]) * BLOCK)])
    return operations


def test_all_nodes_come_to_the_same() -> None:
    operations = history(2)
    (first, results, _), (second, others, _) = (
        trio.run(applied, fresh(), operations, random.Random(seed)) for seed in (1, 2)
    )
    assert first == second
    assert list(map(pack, results)) == list(map(pack, others))
    assert any(isinstance(result, FullError) for result in results)
    assert any(isinstance(result, bytes) and b"positions" in result for result in results)


def test_after_a_crash_nothing_is_done_twice() -> None:
    operations = history(3)
    storage = fresh()
    trio.run(applied, storage, [], random.Random(0))
    storage = RecordingStorage(bytes(storage.image))
    wanted, _, _ = trio.run(applied, storage, operations, random.Random(4))
    seen, skipped = set[int](), 0
    for crash in islice(crashes(storage.base, storage.events, random.Random(1), 4, 1), None, None, 24):
        found, results, before = trio.run(applied, RecordingStorage(crash.image), operations, random.Random(5))
        assert found == wanted, (crash.what, before)
        seen.add(before)
        skipped += sum(isinstance(one, RefusedError) and "before a failure" in one.why for one in results)
    assert len(seen) > 5
    assert skipped > 5, "some changes were in commits that tell of no such entry but for regions"


async def test_retention_ends_for_all_at_once() -> None:
    """Whatever the clocks of nodes show: what the entry says counts, and what was agreed on before."""
    author = Author()
    image = await open_storage(fresh(), KEY)
    machine = await machine_of(image)
    operations = [
        call("worm/create", CreateWorm(4 * BLOCK, SECOND_NS)), call("worm/delete", WormRequest(), SECOND_NS - 1),
        call("worm/tend", WormRequest(), SECOND_NS - 1), call("worm/extend", ExtendRetention(2 * SECOND_NS), 5),
        call("worm/delete", WormRequest(), SECOND_NS), call("worm/delete", WormRequest(), 2 * SECOND_NS),
    ]  # fmt: skip
    results: list[Any] = list(await machine.apply(author.entries(operations)))
    made, early, tended, extended, later, gone = results
    assert isinstance(early, RefusedError)
    assert isinstance(later, RefusedError)
    clocks = [msgspec.json.decode(answer)["clock_ns"] for answer in (made, tended, extended, gone)]
    assert clocks == [0, SECOND_NS - 1, SECOND_NS - 1, 2 * SECOND_NS]
    await image.close()


async def test_what_was_meant_for_a_region_that_is_gone_does_nothing_to_a_later_one() -> None:
    """Whoever asked knew only the earlier one: its clock showed more (seed 5027 of the whole stack)."""
    author = Author()
    image = await open_storage(fresh(), KEY)
    machine = await machine_of(image)
    create, later_ns = CreateWorm(4 * BLOCK, SECOND_NS), BORN_NS + 9 * SECOND_NS
    operations = [
        call("worm/create", create), call("worm/delete", WormRequest(), SECOND_NS),
        call("worm/create", create, at_ns=later_ns), call("worm/extend", ExtendRetention(SECOND_NS), 9 * SECOND_NS),
        call("worm/delete", WormRequest(), 9 * SECOND_NS), call("worm/append", AppendData(b"its", block=0), 1),
        call("worm/append", AppendData(b"data", block=0), 1, of_ns=later_ns),
        call("worm/delete", WormRequest(), SECOND_NS, of_ns=later_ns),
    ]  # fmt: skip
    results: list[Any] = list(await machine.apply(author.entries(operations)))
    refused = [index for index, result in enumerate(results) if isinstance(result, RefusedError)]
    assert refused == [4, 5]
    assert msgspec.json.decode(results[3])["clock_ns"] == 0
    await image.close()


@pytest.mark.parametrize("seed", range(3))
async def test_who_catches_up_while_regions_change(seed: int) -> None:
    """What came over with the regions is not done again, and what came later is."""
    chance = random.Random(seed)
    operations = [*history(seed), *history(seed + 10)[2:], *history(seed + 20)[2:]]
    entries, away, begun = Author().entries(operations), 12, 30
    first, second = await open_storage(fresh(), KEY), await open_storage(fresh(), KEY)
    source, behind = await machine_of(first), await machine_of(second)
    for image in (first, second):
        image.regions.alone = False
    await source.apply(entries[:begun])
    await behind.apply(entries[:away])
    giver, at = Giver(first, CLUSTER.key, lambda: [source.note], compared=nothing_compared), begun

    async def ask(question: bytes) -> bytes:
        nonlocal at
        count = chance.randrange(6)
        await source.apply(entries[at : at + count])
        at += count
        return await giver.answer(question)

    note = (await run(Taker(second, CLUSTER.key, ask)))[GROUP]
    assert begun <= note.applied.index <= at < len(entries)
    behind.applied = note.applied
    await behind.apply(entries[note.applied.index :])
    await source.apply(entries[at:])
    assert await told(second) == await told(first)
    for label in await labels_of(first, first.disk()):
        one, other = await found(first, label), await found(second, label)
        assert await Hasher(CLUSTER.key).chunk(one, 0) == await Hasher(CLUSTER.key).chunk(other, 0)
    await first.close()
    await second.close()


async def nothing_compared(group: str, index: int) -> bytes:
    raise AssertionError(index)


async def test_regions_that_are_gone_and_those_that_a_node_records_of_itself() -> None:
    first, second = await open_storage(fresh(), KEY), await open_storage(fresh(), KEY)
    for image, value in ((first, 1.0), (second, 2.0)):
        area = await image.regions.area(image.disk())
        await MetricsLog.create(area)
        log = await image.regions.get(MetricsLog, image.disk())
        await log.append([Sample(1, 1, value)])
    await Vault.create(await second.regions.area(second.disk()))
    await Stream.create(first.regions, first.disk(), 4, increment=1)
    giver = Giver(first, CLUSTER.key, lambda: [Note(GROUP, Snapshot(1, 1, MEMBERS))], nothing_compared)
    await run(Taker(second, CLUSTER.key, giver.answer))
    area = await second.regions.area(second.disk())
    assert [slot.name for slot in area.directory] == ["MTRK", "STRE"]
    assert (await second.regions.get(Stream, second.disk())).ring.capacity == 4
    log = await second.regions.get(MetricsLog, second.disk())
    await log.append([Sample(1, 2, value)])
    (answer,) = await log.ask([Question(next(iter(await log.series())))])
    assert [point["sum"] for point in answer.windows.rows] == [2.0, 2.0]
    await first.close()
    await second.close()


@pytest.mark.parametrize("regions", [True, False])
async def test_a_directory_that_is_damaged_is_replaced(regions: bool) -> None:
    first, second = await open_storage(fresh(), KEY), await open_storage(fresh(), KEY)
    if regions:
        await Stream.create(first.regions, first.disk(), 4, increment=1)
    await second.enable_regions()
    volume = await second.volumes.region(DIRECTORY, VOLUME_BYTES, second.disk().number)
    await volume.write(0, memoryview(b"damaged" * 100))
    giver = Giver(first, CLUSTER.key, lambda: [Note(GROUP, Snapshot(1, 1, MEMBERS))], nothing_compared)
    await run(Taker(second, CLUSTER.key, giver.answer))
    area = await second.regions.area(second.disk())
    assert [slot.name for slot in area.directory] == (["STRE"] if regions else [])
    await first.close()
    await second.close()


async def test_what_a_node_cannot_read_is_no_reason_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a WORM region that must not go: the others would give its disk up."""
    image = await open_storage(fresh(), KEY)
    machine = await machine_of(image)
    author, tries = Author(), 0
    load = Worm.load.__func__  # type: ignore[attr-defined]

    async def fails_once(kind: type[Worm], area: Area) -> Worm:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise DamageError("extent", "fails its authentication")
        return cast(Worm, await load(kind, area))

    made = json.dumps({"name": "more", "size": 1 << 20}).encode()
    create = call("worm/create", CreateWorm(4 * BLOCK, SECOND_NS, "more"))
    await machine.apply(author.entries([Call("disks/create", made, BORN_NS, bytes(32)), create]))
    image.regions.forget(Worm, image.disk("more"))
    monkeypatch.setattr(Worm, "load", classmethod(fails_once))
    monkeypatch.setattr("nbdvde.replication.changes._AGAIN_S", 0.01)
    delete = Call("disks/delete", b'{"name": "more"}', BORN_NS, bytes(32), RetentionClock(BORN_NS, SECOND_NS))
    early = Call("disks/delete", b'{"name": "more"}', BORN_NS, bytes(32), RetentionClock(BORN_NS, SECOND_NS - 1))
    refused, gone = await machine.apply(author.entries([early, delete]))
    assert isinstance(refused, RefusedError)
    assert "retained" in refused.why
    assert isinstance(gone, bytes)
    assert tries == 2
    await image.close()
