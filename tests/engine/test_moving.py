"""Blocks that are stored again in order, and duplicates that become references, while clients write."""

import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from copy import copy

import numpy as np
import pytest

from nbdvde.disk import BLOCK
from nbdvde.engine.access import format_storage, open_storage
from nbdvde.engine.check import check_storage
from nbdvde.engine.image import Image
from nbdvde.engine.layout import SLOT_SHIFT, UNIT_SHIFT, pack_entry
from nbdvde.engine.lbamap import LEAF_BLOCKS
from nbdvde.engine.optimize import DUPLICATES, PASSES, RECOMPRESS, REPACK, Options
from nbdvde.engine.redundancy import Candidates, Known
from nbdvde.engine.repack import scattered
from nbdvde.engine.report import OptimizeReport
from nbdvde.engine.revision import Revision
from nbdvde.engine.uses import KEPT, NEVER, OFTEN, ONCE, Uses
from nbdvde.engine.volume import Volume
from nbdvde.engine.writer import Writer
from nbdvde.errors import DamageError
from tests.crash.oracle import master_of
from tests.crash.recording import FrozenStorage, RecordingStorage
from tests.crash.session import KEY
from tests.engine.test_optimize import untold
from tests.engine.trained import dictionary, text
from tests.model.world import page

SIZE = 8 << 20


@asynccontextmanager
async def opened(*, dedup: bool = True, level: int = 1) -> AsyncIterator[Image]:
    storage = RecordingStorage()
    format_storage(storage, SIZE, KEY, level, extent_bytes=32 << 10, segment_bytes=256 << 10, domain=int(dedup))
    image = await open_storage(storage, KEY, path=os.devnull)
    yield image
    await image.close()
    assert check_storage(FrozenStorage(bytes(storage.image)), master_of).errors == []


async def write(image: Image, numbers: dict[int, int], disk: str = "disk") -> None:
    """Blocks one by one, in an order of their own."""
    for block in sorted(numbers, key=lambda block: block * 7919 % 1009):
        await image.disk(disk).write(block * BLOCK, memoryview(page(numbers[block])))
        await image.flush()


async def holds(image: Image, numbers: dict[int, int], disk: str = "disk") -> bool:
    last = max(numbers) + 1
    whole = b"".join(map(bytes, await image.disk(disk).read(0, last * BLOCK)))
    return all(
        whole[block * BLOCK : (block + 1) * BLOCK] == (page(numbers[block]) if block in numbers else bytes(BLOCK))
        for block in range(last)
    )


async def optimized(image: Image, *passes: str, memory: int = 1 << 20) -> OptimizeReport:
    return await image.optimize(Options(passes, memory=memory), untold)


def extents(disk: Volume, blocks: range) -> int:
    return len({(disk.map.lookup(block) or 0) >> UNIT_SHIFT for block in blocks})


async def test_scattered_blocks_are_stored_in_order() -> None:
    numbers = {block: block for block in range(1, 200)}
    async with opened() as image:
        await write(image, numbers)
        assert extents(image.disk(), range(1, 200)) == 199
        assert (await optimized(image, REPACK)).blocks_repacked == 199
        assert await holds(image, numbers)
        assert extents(image.disk(), range(1, 200)) < 28
        assert (await optimized(image, REPACK)).blocks_repacked == 0


async def test_what_a_snapshot_shares_stays_where_it_is() -> None:
    numbers = {block: block for block in range(1, 200)}
    async with opened() as image:
        await write(image, numbers)
        await image.volumes.snapshot("disk", "s")
        again = {block: 1000 + block for block in range(1, 100)}
        await write(image, again)
        assert (await optimized(image, REPACK)).blocks_repacked == 99
        assert await holds(image, numbers | again)
        assert await holds(image, numbers, "disk@s")
        await image.volumes.delete("disk@s")
        assert (await optimized(image, REPACK)).blocks_repacked >= 100
        assert await holds(image, numbers | again)


@pytest.mark.parametrize("blocks_at_a_time", [1, 40, 10_000])
async def test_duplicates_are_found_that_were_written_one_by_one(
    blocks_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdvde.engine.redundancy._BLOCK_BYTES", (1 << 20) // blocks_at_a_time)
    numbers = {block: block % 100 for block in range(100, 400)}
    async with opened() as image:
        await write(image, numbers)
        report = await optimized(image, REPACK, DUPLICATES)
        assert (report.blocks_repacked, report.blocks_shared) == (300, 200)
        assert await holds(image, numbers)
        assert (await image.space()).unique_bytes == 100 * BLOCK
        assert (await optimized(image, REPACK, DUPLICATES)).blocks_shared == 0


async def test_scattered_duplicates_are_not_shared() -> None:
    numbers = {block: block * 7919 % 211 for block in range(211)} | {500 + block: block for block in range(0, 211, 2)}
    async with opened() as image:
        await write(image, numbers)
        assert (await optimized(image, DUPLICATES)).blocks_shared == 0


async def test_what_snapshots_hold_is_referred_to_and_not_replaced() -> None:
    numbers = {block: block for block in range(1, 100)}
    async with opened() as image:
        await image.disk().write(BLOCK, memoryview(b"".join(map(page, numbers))))
        await image.volumes.snapshot("disk", "s")
        await image._writable().roll()  # or the snapshot's segment has garbage, and is cleaned
        await write(image, numbers)
        assert (await optimized(image, REPACK, DUPLICATES)).blocks_shared == 99
        assert await holds(image, numbers)
        assert await holds(image, numbers, "disk@s")
        assert (await optimized(image, DUPLICATES)).blocks_shared == 0


async def test_what_is_damaged_is_not_referred_to() -> None:
    numbers = {block: block for block in range(1, 41)}
    async with opened() as image:
        await image.disk().write(BLOCK, memoryview(b"".join(map(page, numbers))))
        await image.flush()
        await image._writable().roll()
        await write(image, {block + 100: block for block in numbers})
        await optimized(image, REPACK)
        await image._writable().roll()
        first = image.segments.states[(image.disk().map.lookup(1) or 0) >> SLOT_SHIFT]
        assert isinstance(image.segments.storage, RecordingStorage)
        data, at = image.segments.storage.image, first.segment.offset + first.used // 2
        data[at] ^= 1
        assert (await optimized(image, DUPLICATES)).blocks_shared == 0
        data[at] ^= 1
        assert await holds(image, numbers | {block + 100: block for block in numbers})


async def test_domains_share_nothing() -> None:
    numbers = {block: block for block in range(1, 100)}
    async with opened() as image:
        await image.volumes.create("other", SIZE)
        await write(image, numbers)
        await write(image, numbers, "other")
        assert (await optimized(image, REPACK, DUPLICATES)).blocks_shared == 0
        await image.volumes.clone("other", "third")
        await write(image, dict.fromkeys(numbers, 0), "third")
        await write(image, numbers, "third")
        assert (await optimized(image, REPACK, DUPLICATES)).blocks_shared == 99
        assert await holds(image, numbers, "third")


async def test_who_takes_no_part_shares_nothing() -> None:
    async with opened(dedup=False) as image:
        await write(image, {block: block % 50 for block in range(100)})
        report = await optimized(image, REPACK, DUPLICATES)
        assert (report.blocks_repacked, report.blocks_shared) == (100, 0)


async def test_extents_with_a_dictionary_stay_readable() -> None:
    pages = {block: text(0, random.Random(block)) for block in range(300)}
    async with opened() as image:
        await image.register_dictionary(dictionary(0), 32)
        for block, data in pages.items():
            await image.disk().write(block * BLOCK, memoryview(data))
            await image.flush()
            if block == 150:
                await optimized(image, RECOMPRESS)
        report = await optimized(image, *PASSES)
        assert report.blocks_repacked > 200
        assert report.segments_recompressed
        whole = b"".join(map(bytes, await image.disk().read(0, 300 * BLOCK)))
        assert whole == b"".join(pages.values())


# One step, with somebody else at work between the look and the commit


class Step:
    """Two runs of blocks of one disk that hold the same, and a step that has one refer to the other."""

    def __init__(self, image: Image) -> None:
        self.image, self.disk = image, image.disk()
        self.states = dict(image.segments.states)
        self.writer: Writer = image._writable()

    def entries(self, blocks: range) -> list[int]:
        return [self.disk.map.lookup(block) or 0 for block in blocks]

    def moving(self) -> Revision:
        pages = [page(block) for block in range(10, 14)]
        return Revision(self.disk, range(10, 14), self.entries(range(10, 14)), self.states, pages)

    def referring(self) -> Revision:
        old, new = self.entries(range(20, 24)), self.entries(range(10, 14))
        may = self.image._duplicates.may_refer_to
        return Revision(self.disk, range(20, 24), old, self.states, new=new, may_refer_to=may)

    async def holds(self, **changed: int) -> bool:
        expected = {block: block if block < 20 else block - 10 for block in (*range(10, 14), *range(20, 24))}
        return await holds(self.image, expected | {int(name[1:]): number for name, number in changed.items()})


@asynccontextmanager
async def step() -> AsyncIterator[Step]:
    async with opened() as image:
        await write(image, {block: block for block in range(10, 14)} | {block + 10: block for block in range(10, 14)})
        yield Step(image)


async def test_a_step_moves_what_is_as_it_was() -> None:
    async with step() as made:
        assert await made.writer.revise(made.referring()) == 4
        assert made.entries(range(20, 24)) == made.entries(range(10, 14))
        assert await made.writer.revise(made.moving()) == 4
        assert made.entries(range(20, 24)) != made.entries(range(10, 14))
        assert await made.holds()


async def test_what_was_written_meanwhile_stays() -> None:
    async with step() as made:
        moving, referring = made.moving(), made.referring()
        await write(made.image, {11: 77, 21: 78})
        assert await made.writer.revise(moving) == 3
        assert await made.writer.revise(referring) == 3
        assert await made.holds(b11=77, b21=78)


async def test_what_waits_in_the_buffer_is_newer() -> None:
    async with step() as made:
        for block, number in ((11, 77), (21, 78)):
            assert made.disk.write_nowait(block * BLOCK, memoryview(page(number)), owned=False)
        made.disk.zero_nowait(12 * BLOCK, BLOCK, allocate=False)
        assert await made.writer.revise(made.referring()) == await made.writer.revise(made.moving()) == 4
        await made.image.flush()
        expected = {10: 10, 11: 77, 13: 13, 20: 10, 21: 78, 22: 12, 23: 13}
        assert await holds(made.image, expected)


async def test_no_reference_leads_into_a_victim() -> None:
    async with step() as made:
        referring = made.referring()
        for state in made.states.values():
            state.victim = True
        assert await made.writer.revise(referring) == 0
        assert await made.writer.revise(made.moving()) == 4
        for state in made.states.values():
            state.victim = False


async def test_a_segment_that_is_another_one_now_is_left_alone() -> None:
    async with step() as made:
        moving, referring = made.moving(), made.referring()
        for revision in (moving, referring):
            for slot in list(revision.states):
                revision.states[slot] = copy(revision.states[slot])
        assert await made.writer.revise(moving) == await made.writer.revise(referring) == 0


async def test_a_disk_that_is_gone_or_shorter() -> None:
    async with step() as made:
        moving = made.moving()
        await made.image.volumes.create("other", SIZE)
        await made.image.volumes.resize("disk", 12 * BLOCK, discard=True)
        assert await made.writer.revise(moving) == 2
        await made.image.volumes.delete("disk")
        assert await made.writer.revise(moving) == 0


# Parts


def entries(*units: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Map entries of a leaf: block 0 of each of these units, 0 for holes."""
    found = np.zeros(LEAF_BLOCKS, np.uint64)
    found[: len(units)] = [unit and pack_entry(3, unit, 0) for unit in units]
    return found


@pytest.mark.parametrize(
    ("units", "chosen"),
    [((1, 2, 3), 0), ((1, 2, 3, 4), 4), ((1, 1, 2, 2, 3, 3), 0), ((5, 0, 4, 0, 3, 0, 2), 4), (tuple(range(1, 33)), 32)],
)
def test_what_is_scattered(units: tuple[int, ...], chosen: int) -> None:
    leaf = entries(*units)
    assert np.count_nonzero(scattered(leaf, leaf > 0, 8)) == chosen


def test_a_whole_leaf_in_tiny_extents_and_extents_that_are_longer_than_that() -> None:
    leaf = entries(*range(1, 513))
    for blocks, chosen in ((1, 0), (16, 512), (256, 512)):
        assert np.count_nonzero(scattered(leaf, leaf > 0, blocks)) == chosen


def test_uses() -> None:
    uses = Uses({3: 4}, 2, kept_from=9)
    a, b, c, d, e = (pack_entry(3, unit, block) for unit, block in ((0, 0), (0, 1), (1, 0), (2, 1), (3, 0)))
    found = np.array([a, b, b, c, d, d], np.uint64)
    low, high = np.array([1, 1, 2, 1, 9, 1], np.int32), np.array([1, 1, 2, 2, 9, 1], np.int32)
    uses.add(found, low, high)
    uses.add(np.array([d], np.uint64), np.array([1], np.int32), np.array([1], np.int32))
    asked = np.array([a, b, c, d, e, 0, 2, pack_entry(3, 4, 0), pack_entry(7, 0, 0)], np.uint64)
    assert uses.of(asked).tolist() == [ONCE, OFTEN, OFTEN, KEPT, NEVER, NEVER, NEVER, NEVER, NEVER]
    with pytest.raises(DamageError):
        uses.add(np.array([4 << SLOT_SHIFT], np.uint64), low[:1], high[:1])


def test_the_lowest_of_equal_blocks_is_taken() -> None:
    def known(*blocks: tuple[int, int, int]) -> Known:
        table = np.array(blocks, np.uint64).reshape(-1, 3)
        return Known(table[:, 0], table[:, 1:])

    candidates = Candidates([known((7, 1, 1), (5, 2, 2)), known((9, 1, 1), (8, 2, 3))])
    candidates.meet(known((6, 1, 1), (4, 2, 9), (5, 2, 2), (3, 8, 8)))
    candidates.meet(known((7, 1, 1)))
    before, after = candidates.found()
    assert (before.tolist(), after.tolist()) == ([7, 9], [6, 6])
