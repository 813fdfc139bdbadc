"""Cleaning: what is freed, and what is not touched."""

import os
import random
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from nbdvde.disk import BLOCK
from nbdvde.engine import checkpointer as module
from nbdvde.engine.access import format_storage, open_storage
from nbdvde.engine.check import check_storage
from nbdvde.engine.checkpoint import Result, write
from nbdvde.engine.image import Image
from nbdvde.engine.layout import KIND_COMPACT, KIND_LOG, SLOT_SHIFT
from nbdvde.engine.recovery import load
from nbdvde.engine.segments import State
from tests.crash.oracle import master_of, observe
from tests.crash.recording import FrozenStorage, RecordingStorage
from tests.crash.session import KEY, Pages, digest, overwritten, zeroed

SIZE = 4 << 20


class Life:
    """An image in use, and what its disk must hold."""

    def __init__(self, storage: RecordingStorage, image: Image, seed: int) -> None:
        self.storage, self.image, self.rng = storage, image, random.Random(seed)
        self.pages: Pages = {}

    async def write(self, block: int, blocks: int) -> None:
        data = self.rng.randbytes(blocks * BLOCK)
        await self.image.disk().write(block * BLOCK, memoryview(data))
        self.pages = overwritten(self.pages, block * BLOCK, data)

    async def scatter(self, writes: int) -> None:
        for _ in range(writes):
            await self.write(self.rng.randrange(SIZE // BLOCK - 4), self.rng.randint(1, 4))

    async def trim(self, block: int, blocks: int) -> None:
        await self.image.disk().trim(block * BLOCK, blocks * BLOCK)
        self.pages = zeroed(self.pages, block * BLOCK, blocks * BLOCK)

    async def holds_everything(self) -> bool:
        pieces = await self.image.disk().read(0, SIZE)
        whole = b"".join(bytes(piece) for piece in pieces)
        return all(whole[at : at + BLOCK] == self.pages.get(at // BLOCK, bytes(BLOCK)) for at in range(0, SIZE, BLOCK))

    def check(self) -> None:
        """What is in the file now is sound, and holds what it must."""
        frozen = FrozenStorage(bytes(self.storage.image))
        assert observe(frozen) == digest(self.pages)
        assert check_storage(frozen, master_of).errors == []

    @property
    def garbage(self) -> int:
        return sum(state.garbage for state in self.image.segments.states.values() if state.linked)

    def kinds(self) -> list[int]:
        return [state.kind for state in self.image.segments.states.values()]


Living = Callable[..., AsyncIterator[Life]]


@asynccontextmanager
async def living(level: int = 1, extent_bytes: int = 32 << 10, capacity: int = 0, seed: int = 1) -> AsyncIterator[Life]:
    storage = RecordingStorage()
    format_storage(storage, SIZE, KEY, level, extent_bytes=extent_bytes, segment_bytes=256 << 10, capacity=capacity)
    image = await open_storage(storage, KEY, buffer_bytes=256 << 10, path=os.devnull)
    life = Life(storage, image, seed)
    yield life
    await image.close()
    life.check()


@pytest.mark.parametrize("level", [0, 1])
async def test_half_dead_segments_get_smaller(level: int) -> None:
    async with living(level) as life:
        for block in range(0, 1024, 16):
            await life.write(block, 16)
        await life.scatter(400)
        await life.image.checkpoint()
        before, size = life.garbage, life.image.segments.space.used_bytes
        freed = await life.image.clean()
        assert freed > before // 2
        assert life.image.segments.space.used_bytes < size - freed // 2
        assert life.garbage < before // 3
        assert life.kinds().count(KIND_COMPACT) > 3
        assert await life.holds_everything()
        await life.image.flush()
        life.check()
        await life.scatter(300)
        await life.image.clean()
        assert await life.holds_everything()


async def test_what_is_compacted_can_be_compacted_again_and_dies() -> None:
    async with living() as life:
        await life.write(0, 256)
        slots = set()
        for part in range(4):
            await life.trim(part * 64, 40)
            await life.write(512, 64)
            await life.image.clean()
            slots |= {slot for slot, state in life.image.segments.states.items() if state.kind == KIND_COMPACT}
            assert await life.holds_everything()
        assert slots
        await life.trim(0, 1024)
        await life.image.clean()
        await life.image.checkpoint()
        await life.image.checkpoint()
        assert not life.kinds().count(KIND_COMPACT)
        assert life.image.segments.space.used_bytes < 1 << 20
        for _ in range(3):  # the log moves on, into what is free now
            await life.write(0, 64)
            await life.image.clean()
        assert life.storage.size() < 2 << 20, "freed space leaves the file while it is open"


async def test_readers_in_a_segment_keep_it() -> None:
    async with living() as life:
        for block in range(0, 1024, 16):
            await life.write(block, 16)
        await life.scatter(300)
        await life.image.checkpoint()
        old = {slot: state for slot, state in life.image.segments.states.items() if state.kind == KIND_LOG}
        with life.image._checkpointer.reading():
            ranges = [
                (state.segment.offset, bytes(life.storage.image[state.segment.offset :][: state.used]))
                for state in old.values()
            ]
            assert await life.image.clean()
            await life.scatter(100)
            await life.image.clean()
            assert all(life.storage.image[offset : offset + len(data)] == data for offset, data in ranges)
        await life.image.checkpoint()


async def test_a_damaged_extent_stays_where_it_is() -> None:
    async with living() as life:
        for block in range(0, 1024, 16):
            await life.write(block, 16)
        await life.trim(8, 1000)
        await life.image.checkpoint()
        [first] = [s for s in life.image.segments.states.values() if s.kind == KIND_LOG and s.live and s.linked][:1]
        saved = bytes(life.storage.image)
        life.storage.image[first.segment.offset : first.segment.end] = bytes(first.segment.length)
        await life.image.clean()
        assert life.image.segments.states[first.segment.slot] is first
        life.storage.image[first.segment.offset : first.segment.end] = saved[first.segment.offset : first.segment.end]
        assert await life.holds_everything()


async def test_what_a_damaged_leaf_may_lead_to_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    async with living() as life:
        image, disk = life.image, life.image.disk()
        for block in range(0, 1024, 16):
            await life.write(block, 16)
        for block in range(0, 1024, 32):
            await life.trim(block, 24)
        await image.flush()
        await image.checkpoint()
        led_to = [{entry >> SLOT_SHIFT for entry in disk.map.leaves[number] if entry} for number in (0, 1)]
        ref = disk.map.leaf_ref(0)
        assert ref is not None
        at = image.segments.states[ref.slot].segment.offset + ref.position
        life.storage.image[at] ^= 1
        before = dict(image.segments.states)
        assert await image.clean() > 0
        assert await image.clean() == 0
        replaced = {slot for slot, state in before.items() if image.segments.states.get(slot) is not state}
        assert len(replaced & (led_to[1] - led_to[0])) > 5
        assert not replaced & led_to[0]
        assert len([record for record in caplog.records if "not cleaned" in record.getMessage()]) == 1
        assert "damaged part of a map" in image.info().cleaning_held
        assert await life.holds_everything()
        life.storage.image[at] ^= 1
        assert await image.clean() > 0
        assert image.info().cleaning_held == ""
        assert await life.holds_everything()


async def test_counts_that_are_too_high_are_made_exact() -> None:
    async with living() as life:
        await life.write(0, 200)
        await life.trim(0, 180)
        await life.image.checkpoint()
        for state in life.image.segments.states.values():
            state.live += 1000
        await life.image.clean()
        await life.image.flush()
        await life.image.checkpoint()
        loaded = load(FrozenStorage(bytes(life.storage.image)), master_of, replay=False)
        assert sum(state.live for state in loaded.segments.states.values() if state.holds_blocks) == 20


@pytest.mark.parametrize("how", ["delete", "rollback"])
async def test_what_only_a_snapshot_needed_is_freed_by_itself(how: str) -> None:
    async with living() as life:
        image = life.image
        for block in range(0, 1024, 16):
            await life.write(block, 16)
        await image.volumes.snapshot("disk", "before")
        pages = life.pages
        for block in range(0, 1024, 16):
            await life.write(block, 16)
        await image.flush()
        await image.checkpoint()
        size = image.segments.space.used_bytes
        if how == "delete":
            await image.volumes.delete("disk@before")
        else:
            await image.volumes.rollback("disk@before")
            life.pages = pages
        await image._cleaning.finish()
        assert image.segments.space.used_bytes < size * 0.7
        assert await life.holds_everything()
        if how == "rollback":
            await image.volumes.delete("disk@before")


async def test_no_segment_is_replaced_while_a_checkpoint_is_written() -> None:
    """That one lists the old segment, which it would free too early."""
    going_on = threading.Event()
    when_replaced: list[bool] = []

    def slow_write(*args: Any) -> Result:
        going_on.wait(10)
        return write(*args)

    async with living() as life, trio.open_nursery() as nursery:
        checkpointer = life.image._checkpointer
        replace = checkpointer.replace

        async def replace_meanwhile(old: State, new: State) -> bool:
            with mock.patch.object(checkpointer, "replace", replace), mock.patch.object(module, "write", slow_write):
                going_on.clear()
                nursery.start_soon(life.image.checkpoint)
                await wait_all_tasks_blocked()
                nursery.start_soon(replace, old, new)
                await wait_all_tasks_blocked()
                when_replaced.append(life.image.segments.states[old.segment.slot] is old)
                going_on.set()
                async with checkpointer.lock:
                    return True

        for block in range(0, 1024, 16):
            await life.write(block, 16)
        await life.scatter(300)
        with mock.patch.object(checkpointer, "replace", replace_meanwhile):
            await life.image.clean()
        assert len(when_replaced) > 3
        assert all(when_replaced)
        assert await life.holds_everything()


async def test_when_a_cleaned_segment_was_born_is_known_after_opening() -> None:
    """Or what is overwritten in it would be counted as in use until the next mark."""
    async with living() as life:
        for block in range(0, 1024, 16):
            await life.write(block, 16)
        await life.scatter(300)
        await life.image.clean()
        await life.image.checkpoint()
        loaded = load(FrozenStorage(bytes(life.storage.image)), master_of, replay=False)
        born = {slot: state.born for slot, state in life.image.segments.states.items() if state.kind == KIND_COMPACT}
        assert len(born) > 3
        assert born.items() <= {slot: state.born for slot, state in loaded.segments.states.items()}.items()
        assert 0 not in born.values()


async def test_the_log_goes_on_in_durable_space_only() -> None:
    async with living() as life:
        assert life.image._writer is not None
        storage, log = life.storage, life.image._writer.log
        sync, roll = storage.sync, log._roll
        durable, rolls = storage.size(), 0

        def synced() -> None:
            nonlocal durable
            size = storage.size()
            sync()
            durable = size

        def rolled() -> None:
            nonlocal rolls
            assert log.ready[0].segment.end <= durable
            rolls += 1
            roll()

        with mock.patch.object(storage, "sync", synced), mock.patch.object(log, "_roll", rolled):
            for block in range(0, 1024, 16):
                await life.write(block, 16)
            await life.image.flush()
        assert rolls > 10


async def test_garbage_starts_the_cleaner_by_itself() -> None:
    async with living() as life:
        for turn in range(12):
            await life.scatter(150)
            await life.image.checkpoint()
            await life.trim(turn * 64, 32)
            await life.image.flush()
        await life.image._cleaning.finish()
        assert life.image._cleaner.freed > 0
        assert await life.holds_everything()


async def test_segments_are_written_to_their_end() -> None:
    async with living() as life:
        await life.image.flush()
        for block in range(0, 1000, 40):  # a group does not fit any number of times
            await life.write(block, 40)
            await life.image.flush()
        states = [s for s in life.image.segments.states.values() if s.kind == KIND_LOG and s.linked]
        *closed, _ = sorted(states, key=lambda state: state.segment.sequence)
        assert len(closed) > 10
        assert all(state.segment.length - state.used < 36 << 10 for state in closed)
        assert await life.holds_everything()


async def test_zones_without_garbage_come_last() -> None:
    async with living(capacity=64 << 20) as life:
        space, cleaner = life.image.segments.space, life.image._cleaner
        start = space.allocate(100 << 10)
        space.free(start + (60 << 10), 20 << 10)  # the other 20 keep it a gap

        def zone(garbage: int) -> list[State]:
            segment = SimpleNamespace(offset=start, length=60 << 10)
            return [cast(State, SimpleNamespace(segment=segment, used=60 << 10, garbage=garbage))]

        assert cleaner._gain(zone(0), 0.1) == (False, 0.25)
        assert cleaner._gain(zone(5 << 10), 0.1) == (False, 25 / 80)
        assert cleaner._gain(zone(6 << 10), 0.1) == (True, 1 - 54 / 80)
        space.free(start, 60 << 10)
        space.free(start + (80 << 10), 20 << 10)
