"""Calls of the control interface about regions that all nodes have."""

import gc
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import cast
from weakref import ref

import pytest
import trio

from nbdvde import moment
from nbdvde.admin import anoncalls, streamcalls, wormcalls
from nbdvde.admin.calls import answer, feed
from nbdvde.admin.streamappends import Appends
from nbdvde.admin.streamcalls import AdvanceTail, AppendEntries, CreateStream, ReadEntries, StreamRequest
from nbdvde.admin.wormcalls import CreateWorm, WormRequest
from nbdvde.disk import BLOCK
from nbdvde.engine.access import open_storage
from nbdvde.engine.image import Image
from nbdvde.engine.managed.exported import RegionDisks
from nbdvde.engine.managed.stream import Stream
from nbdvde.engine.managed.worm import Worm
from nbdvde.engine.managed.wormdisk import WormDisk
from nbdvde.errors import DetachedError, FullError, NbdvdeError, QuorumError, RefusedError, UsageError
from nbdvde.moment import NO_CLOCK, RetentionClock
from nbdvde.replication.machine import ImageMachine
from nbdvde.replication.operations import Call
from nbdvde.replication.regionexport import AppendData, shown_through
from nbdvde.replication.registry import register
from nbdvde.replication.replica import Replica
from tests.crash.session import KEY
from tests.replication.entries import Author, machine_of
from tests.replication.test_regions import fresh


class Alone:
    """A replica whose group agrees with it at once, an entry at a time, or that has no leader."""

    def __init__(self, machine: ImageMachine) -> None:
        self.machine, self.author = machine, Author()
        self.leader, self.incomplete = True, False
        self.taken = 0
        self.calls: list[str] = []

    async def call(self, path: str, request: bytes, clock: RetentionClock = NO_CLOCK) -> bytes:
        self.calls.append(path)
        await trio.sleep(0.1)
        operation = Call(path, request, moment.now_ns(), moment.draw(32), clock)
        (result,) = await self.machine.apply([self.author.entry(operation)])
        if isinstance(result, NbdvdeError):
            raise result
        return cast(bytes, result)

    async def barrier(self) -> None:
        if not self.leader:
            await trio.sleep_forever()


@asynccontextmanager
async def replicated() -> AsyncIterator[tuple[Image, Alone]]:
    image = await open_storage(fresh(), KEY)
    alone = Alone(await machine_of(image))
    register(image, cast(Replica, alone))
    yield image, alone
    await image.close()


async def test_many_who_append_share_entries(autojump_clock: object) -> None:
    async with replicated() as (image, alone):
        await answer(streamcalls.CREATE, image, CreateStream(1024 * BLOCK))
        found: dict[int, list[int]] = {}

        async def append(number: int) -> None:
            entries = [b"%d.%d" % (number, at) for at in range(number % 3 + 1)]
            found[number] = (await answer(streamcalls.APPEND, image, AppendEntries(entries))).positions

        async with trio.open_nursery() as nursery:
            for number in range(60):
                nursery.start_soon(append, number)
        assert len(alone.calls) == 3
        stream = await image.regions.get(Stream, image.disk())
        there = dict(await stream.read(0))
        for number, positions in found.items():
            assert [there[at] for at in positions] == [b"%d.%d" % (number, at) for at in range(number % 3 + 1)]
        assert sorted(at for positions in found.values() for at in positions) == list(range(120))
        longest = await answer(streamcalls.APPEND, image, AppendEntries([b"x"] * 600))
        assert longest.positions == list(range(120, 720))


async def test_a_full_stream_refuses_or_waits(autojump_clock: object) -> None:
    async with replicated() as (image, _):
        await answer(streamcalls.CREATE, image, CreateStream(4 * BLOCK, policy="wait", increment=BLOCK))
        refused = 0

        async def append(number: int) -> None:
            nonlocal refused
            try:
                await answer(streamcalls.APPEND, image, AppendEntries([b"x", b"y"], wait=False))
            except FullError:
                refused += 1

        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(append, number)
        assert refused == 1
        with trio.move_on_after(5) as early:
            await answer(streamcalls.APPEND, image, AppendEntries([b"late"]))
        assert early.cancelled_caught
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer, streamcalls.APPEND, image, AppendEntries([b"late", b"later"]))
            await trio.sleep(5)
            assert (await answer(streamcalls.ADVANCE, image, AdvanceTail(2))).head == 4
        assert (await answer(streamcalls.STATUS, image, StreamRequest())).head == 6


async def test_who_gives_up_leaves_the_others_alone(autojump_clock: object) -> None:
    """Nobody knows what became of what was on its way together with theirs; whoever came later goes on."""
    proposed, outcomes = list[list[bytes]](), dict[bytes, object]()

    async def propose(entries: Sequence[bytes]) -> Sequence[int]:
        proposed.append(list(entries))
        await trio.sleep(10)
        return range(len(entries))

    appends, given_up = Appends(), trio.CancelScope()

    async def append(entry: bytes, scope: trio.CancelScope | None = None) -> None:
        with scope or trio.CancelScope():
            try:
                outcomes[entry] = await appends.append([entry], propose)
            except DetachedError as error:
                outcomes[entry] = error

    async with trio.open_nursery() as nursery:
        nursery.start_soon(append, b"a")
        await trio.sleep(1)
        nursery.start_soon(append, b"b", given_up)
        await trio.sleep(1)
        nursery.start_soon(append, b"c")
        await trio.sleep(13)
        nursery.start_soon(append, b"d")
        given_up.cancel()
    assert proposed == [[b"a"], [b"b", b"c"], [b"d"]]
    assert isinstance(outcomes.pop(b"c"), DetachedError)
    assert outcomes == {b"a": range(1), b"d": range(1)}


def test_an_image_whose_streams_were_appended_to_does_not_stay_in_memory() -> None:
    async def appended() -> ref[Image]:
        async with replicated() as (image, _):
            await answer(streamcalls.CREATE, image, CreateStream(4 * BLOCK, increment=BLOCK))
            await answer(streamcalls.APPEND, image, AppendEntries([b"entry"]))
            return ref(image)

    left = trio.run(appended)
    gc.collect()
    assert left() is None


async def test_reads_wait_for_what_was_answered(autojump_clock: object) -> None:
    async with replicated() as (image, alone):
        await answer(streamcalls.CREATE, image, CreateStream(4 * BLOCK, increment=BLOCK))
        alone.leader = False
        with pytest.raises(QuorumError, match="no majority"):
            await answer(streamcalls.STATUS, image, StreamRequest())
        alone.incomplete = True
        with pytest.raises(RefusedError, match="taking over"):
            await answer(streamcalls.STATUS, image, StreamRequest())


async def test_a_disk_that_was_made_elsewhere_a_moment_ago() -> None:
    """The node that is asked may not have heard of it."""
    async with replicated() as (image, alone):

        async def made() -> None:
            if image.volumes.find("new") is None:
                await image.volumes.create("new", 1 << 20)
                await Stream.create(image.regions, image.disk("new"), 16, increment=1)

        alone.barrier = made  # type: ignore[method-assign]
        found = await answer(streamcalls.APPEND, image, AppendEntries([b"x"], disk="new"))
        assert found.positions == [0]
        with pytest.raises(UsageError, match="other"):
            await answer(wormcalls.CREATE, image, CreateWorm(4 * BLOCK, 0, disk="other"))


async def test_the_clock_of_who_is_asked_is_told(autojump_clock: object) -> None:
    async with replicated() as (image, _):
        await answer(wormcalls.CREATE, image, CreateWorm(4 * BLOCK, 1))
        assert (await answer(wormcalls.DELETE, image, WormRequest())).left_ns == 0
        with pytest.raises(UsageError, match="has no WORM region"):
            await answer(wormcalls.RETENTION, image, WormRequest())


async def test_what_would_stay_in_logs_is_refused() -> None:
    async with replicated() as (image, _):
        with pytest.raises(RefusedError, match="cannot be changed in a cluster"):
            await answer(anoncalls.CREATE, image, anoncalls.CreateTable())


async def test_a_client_appends_by_writing_at_the_mark() -> None:
    """Whoever is told that it is there may go on behind it, though the node that told may not have got so far."""
    async with replicated() as (image, alone):
        await answer(wormcalls.CREATE, image, CreateWorm(64 * BLOCK, 0))
        worm = await image.regions.get(Worm, image.disk())
        disk = shown_through(alone)(WormDisk(worm))
        for at in (0, BLOCK):
            assert disk.write_nowait(at, memoryview(b"x" * BLOCK), owned=False) is False
        async with trio.open_nursery() as nursery:
            for at in (0, BLOCK):
                nursery.start_soon(partial(disk.write, at, memoryview(b"x" * BLOCK)))
        await disk.write(2 * BLOCK, memoryview(b"y" * (2 * BLOCK)))
        await disk.flush(disk.mark())
        assert [record.block for record in await worm.records()] == [0, 1, 2]
        assert b"".join(map(bytes, await disk.read(0, 4 * BLOCK))) == b"x" * 2 * BLOCK + b"y" * 2 * BLOCK
        assert await disk.status("base:allocation", 0, 8 * BLOCK, 4) == [(4 * BLOCK, 0), (4 * BLOCK, 3)]
        with pytest.raises(RefusedError, match="cannot be changed"):
            await disk.write(BLOCK, memoryview(b"z" * BLOCK))
        with pytest.raises(RefusedError, match="by somebody else"):
            await answer(wormcalls.APPEND, image, AppendData(b"z", block=3))


@pytest.mark.parametrize("kind", ["stream", "worm"])
async def test_who_uses_a_region_that_is_another_one_by_now_has_to_come_again(kind: str) -> None:
    """It was taken over from another node; what is appended may be there or not."""
    async with replicated() as (image, alone):
        await answer(streamcalls.CREATE, image, CreateStream(4 * BLOCK))
        await answer(wormcalls.CREATE, image, CreateWorm(4 * BLOCK, 0))
        shown = RegionDisks(image.regions).find(image.disk().number, kind)
        assert shown
        disk = shown_through(alone)(shown)
        await disk.read(0, BLOCK)
        await image.regions.reload(image.disk(), ())
        with pytest.raises(DetachedError, match="connect again"):
            await disk.read(0, BLOCK)
        with pytest.raises(DetachedError, match="connect again"):
            await disk.status("base:allocation", 0, BLOCK, 1)
        if kind == "worm":
            with pytest.raises(DetachedError, match="connect again"):
                disk.write_nowait(0, memoryview(bytes(BLOCK)), owned=False)
            with pytest.raises(DetachedError, match="connect again"):
                await disk.write(0, memoryview(bytes(BLOCK)))


async def test_who_appended_to_a_region_that_is_taken_over_then_is_told_that_it_is_done() -> None:
    """And whoever comes behind it that nobody knows."""
    async with replicated() as (image, alone):
        await answer(wormcalls.CREATE, image, CreateWorm(4 * BLOCK, 0))
        disk = shown_through(alone)(WormDisk(await image.regions.get(Worm, image.disk())))

        async def elsewhere(path: str, request: bytes, clock: RetentionClock = NO_CLOCK) -> bytes:
            await image.regions.reload(image.disk(), ())
            return b""

        alone.call = elsewhere  # type: ignore[method-assign]
        data = memoryview(bytes(BLOCK))
        for at in (0, BLOCK):
            assert disk.write_nowait(at, data, owned=False) is False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.write, 0, data)
            with pytest.raises(DetachedError, match="connect again"):
                await disk.write(BLOCK, data)


class Taking(Alone):
    """Begins to take over a state while somebody reads, the first time."""

    asked = rounds = 0

    @property
    def taken(self) -> int:
        self.asked += 1
        return min(self.asked - 1, 1)

    @taken.setter
    def taken(self, value: int) -> None: ...

    async def barrier(self) -> None:
        self.rounds += 1


async def test_what_was_read_of_regions_while_a_state_was_taken_over_is_not_told() -> None:
    async with replicated() as (image, alone):
        await answer(streamcalls.CREATE, image, CreateStream(4 * BLOCK))
        await answer(streamcalls.APPEND, image, AppendEntries([b"x"]))
        shown = RegionDisks(image.regions).find(image.disk().number, "stream")
        assert shown
        for look in (lambda disk: disk.read(0, BLOCK), lambda disk: disk.status("base:allocation", 0, BLOCK, 1)):
            ways = Taking(alone.machine)
            await look(shown_through(ways)(shown))
            assert (ways.asked, ways.rounds) == (4, 2)
        taking = Taking(alone.machine)
        register(image, cast(Replica, taking))
        assert (await answer(streamcalls.STATUS, image, StreamRequest())).entries == 1
        assert (taking.asked, taking.rounds) == (4, 2)
        taking.asked = 0
        with pytest.raises(RefusedError, match="meanwhile"):
            await feed(streamcalls.READ_ENTRIES, image, ReadEntries(), failing)
        taking.asked = 1
        with pytest.raises(AssertionError, match="told"):
            await feed(streamcalls.READ_ENTRIES, image, ReadEntries(), failing)


async def failing(line: object) -> None:
    await trio.lowlevel.checkpoint()
    raise AssertionError("told")
