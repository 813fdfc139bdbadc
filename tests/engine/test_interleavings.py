"""What happens to volumes while something else is under way, and where counts and catalogues come to their ends."""

import random
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

from nbdvde import workers
from nbdvde.disk import BLOCK
from nbdvde.engine import checkpoint, volumes
from nbdvde.engine.access import format_storage, open_storage
from nbdvde.engine.check import check_storage
from nbdvde.engine.image import Image
from nbdvde.engine.layout import UnitRef
from nbdvde.engine.segments import Segments
from nbdvde.engine.volume import Volume
from nbdvde.errors import DamageError, RefusedError
from tests.crash.oracle import master_of
from tests.crash.recording import FrozenStorage, RecordingStorage
from tests.crash.session import KEY

MIB = 1 << 20


async def fresh(size: int, segment_bytes: int = 64 << 10) -> tuple[RecordingStorage, Image]:
    storage = RecordingStorage()
    format_storage(storage, size, KEY, 1, 16 << 10, segment_bytes=segment_bytes)
    return storage, await open_storage(storage, KEY)


async def again(storage: RecordingStorage) -> Image:
    """The image as it is found after a crash now."""
    return await open_storage(RecordingStorage(bytes(storage.image)), KEY)


def page(number: int) -> memoryview:
    return memoryview(number.to_bytes(4, "little") * (BLOCK // 4))


def noise(seed: int, blocks: int) -> memoryview:
    return memoryview(random.Random(seed).randbytes(blocks * BLOCK))


async def first_byte(disk: Volume, block: int) -> int:
    [piece] = await disk.read(block * BLOCK, 1)
    return bytes(piece)[0]


def errors(storage: RecordingStorage) -> list[Any]:
    return check_storage(FrozenStorage(bytes(storage.image)), master_of).errors


class Held:
    """Holds up the next checkpoint, before it is written or after."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, written: bool) -> None:
        self.go, self.there = trio.Event(), trio.Event()
        self._run, self._written = workers.run, written
        monkeypatch.setattr(workers, "run", self._held)

    async def _held(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if function is not checkpoint.write or self.there.is_set():
            return await self._run(function, *args, **options)
        result = await self._run(function, *args, **options) if self._written else None
        self.there.set()
        await self.go.wait()
        return result if self._written else await self._run(function, *args, **options)


async def resized(image: Image, disk: str, held: Held, checkpoint: Callable[[], Awaitable[None]]) -> None:
    """Have the map of a disk get higher while a checkpoint is written, all leaves of which were replaced since."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(checkpoint)
        await held.there.wait()
        if image.volumes.find(disk) is None:
            await image.volumes.clone("disk", disk)
        await image.disk(disk).write(0, page(4))
        await image.flush()
        nursery.start_soon(image.volumes.resize, disk, 1 << 32)
        try:
            while image.disk(disk).size == MIB and not image._checkpointer.lock.statistics().tasks_waiting:
                await trio.lowlevel.checkpoint()
        finally:
            held.go.set()


@pytest.mark.parametrize("crashed", [False, True])
@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("disk", ["disk", "copy"])
async def test_a_disk_that_grows_while_a_checkpoint_is_written(
    monkeypatch: pytest.MonkeyPatch, disk: str, written: bool, crashed: bool
) -> None:
    storage, image = await fresh(MIB)
    await image.disk().write(0, page(1))
    await image.disk().write(BLOCK, page(2))
    await image.checkpoint()
    await image.disk().write(0, page(3))
    await image.flush()
    await resized(image, disk, Held(monkeypatch, written=written), image.checkpoint)
    if crashed:
        image = await again(storage)
    else:
        await image.checkpoint()
    assert image.disk(disk).size == 1 << 32
    assert [await first_byte(image.disk(disk), block) for block in (0, 1)] == [4, 2]
    await image.close()


async def test_disks_with_equal_maps_share_no_node_unawares() -> None:
    storage, image = await fresh(8 * MIB)
    names = ["disk", "b", "c"]
    for name in names[1:]:
        await image.volumes.create(name, 8 * MIB)
    for name in names:
        await image.disk(name).zero(0, 8 * MIB, allocate=True)
    await image.checkpoint()
    await image.clean(2.0)  # counts what is in use
    for leaf in range(4):
        await image.disk("disk").write(leaf * 2 * MIB, page(1))
    await image.disk("b").write(0, page(2))
    await image.checkpoint()
    assert errors(storage) == []
    for seed in range(4):  # into what is free
        await image.disk("disk").write(0, noise(seed, 8))
        await image.checkpoint()
    assert errors(storage) == []
    assert await first_byte(image.disk("c"), 0) == 0
    await image.close()


@pytest.mark.parametrize("clones", [2, 3])
async def test_clones_that_trim_the_same_share_no_node_unawares(clones: int) -> None:
    storage, image = await fresh(1 << 30)
    await image.disk().write(0, page(1))
    await image.disk().write(2 * MIB, page(2))
    names = [f"c{number}" for number in range(clones)]
    for name in names:
        await image.volumes.clone("disk", name)
    await image.checkpoint()
    for name in names:
        await image.disk(name).trim(0, 2 * MIB)
    await image.checkpoint()
    await image.clean(2.0)
    assert errors(storage) == []
    for number, name in enumerate(names[:-1]):
        await image.disk(name).write(0, page(number + 5))
        await image.checkpoint()
    for seed in range(4):
        await image.disk().write(0, noise(seed, 8))
        await image.checkpoint()
    assert errors(storage) == []
    assert [await first_byte(image.disk(name), 512) for name in names] == [2] * clones
    await image.close()


async def test_shrinking_within_a_block_needs_discard_too() -> None:
    _, image = await fresh(MIB)
    await image.disk().write(0, memoryview(b"x" * BLOCK))
    with pytest.raises(RefusedError, match="holds data beyond 512 bytes"):
        await image.volumes.resize("disk", 512)
    await image.disk().write(512, memoryview(bytes(BLOCK - 512)))
    await image.volumes.resize("disk", 512)
    assert await first_byte(image.disk(), 0) == ord("x")
    await image.close()


async def test_many_disks_written_in_one_commit() -> None:
    _, image = await fresh(MIB, segment_bytes=MIB)
    names = [f"d{number}" for number in range(60)]
    for name in names:
        await image.volumes.create(name, MIB)
    for turn in range(16):
        for number, name in enumerate(names):
            await image.disk(name).write(0, noise(turn * 100 + number, 1))
        await image.flush()
    await image.close()


async def test_more_references_than_are_stored_are_not_counted_down() -> None:
    storage, image = await fresh(MIB)
    await image.disk().write(0, noise(1, 8))
    await image.flush()
    state = next(state for state in image.segments.states.values() if state.holds_blocks and state.live)
    state.live += 1 << 32  # as a mark may find it: a block of a pattern, in hundreds of snapshots
    slot = state.segment.slot
    await image.checkpoint()
    image = await again(storage)
    assert image.segments.states[slot].live > 1 << 32
    await image.disk().trim(0, 7 * BLOCK)
    await image.clean(2.0)
    assert image.segments.states[slot].live == 1
    await image.close()


async def test_no_more_volumes_than_can_be_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    _, image = await fresh(MIB)
    monkeypatch.setattr(volumes, "MAX_VOLUMES", 3)
    await image.volumes.snapshot("disk", "a")
    await image.volumes.clone("disk", "b")
    with pytest.raises(RefusedError, match="no room for more"):
        await image.volumes.snapshot("disk", "c")
    await image.close()


async def test_a_context_stays_with_the_snapshot_that_had_the_name() -> None:
    _, image = await fresh(4 * MIB)
    disk = image.disk()
    await disk.write(0, page(1))
    await image.volumes.snapshot("disk", "a")
    context = disk.bind("qemu:dirty-bitmap:a")
    await disk.write(0, page(2))
    assert await disk.status(context, 0, BLOCK, 1) == [(BLOCK, 1)]
    await image.volumes.delete("disk@a")
    await image.volumes.snapshot("disk", "a")
    with pytest.raises(RefusedError, match="its snapshot was deleted"):
        await disk.status(context, 0, BLOCK, 1)
    assert await disk.status(disk.bind("qemu:dirty-bitmap:a"), 0, BLOCK, 1) == [(BLOCK, 0)]
    await image.close()


async def test_a_write_that_waits_while_the_disk_shrinks_is_refused() -> None:
    _, image = await fresh(8 * MIB)
    disk = image.disk()

    async def write() -> None:
        with pytest.raises(RefusedError, match="has become shorter"):
            await disk.write(7 * MIB, page(1))

    async with trio.open_nursery() as nursery, disk.exclusive():
        nursery.start_soon(image.volumes.resize, "disk", MIB)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(write)
        await trio.testing.wait_all_tasks_blocked()
    await image.close()


async def test_the_status_of_lost_blocks() -> None:
    _, image = await fresh(4 * MIB)
    await image.disk().write(0, page(1))
    await image.flush()
    image.disk().map.lose(0, np.arange(512) == 0)
    assert await image.disk().status("x-nbdvde:extent", 0, 2 * BLOCK, 9) == [(BLOCK, 0), (BLOCK, 2)]
    await image.close()


async def test_a_check_looks_once_at_what_snapshots_share(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, image = await fresh(64 * MIB, segment_bytes=256 << 10)
    for leaf in range(32):
        await image.disk().write(leaf * 2 * MIB, page(leaf))
    for number in range(50):
        await image.volumes.snapshot("disk", f"s{number}")
    await image.disk().write(0, page(99))
    await image.close()
    units = 0
    read = Segments.read_unit

    def counted(segments: Segments, ref: UnitRef, kind: int) -> bytes:
        nonlocal units
        units += 1
        return read(segments, ref, kind)

    monkeypatch.setattr(Segments, "read_unit", counted)
    assert errors(storage) == []
    assert units < 200


async def test_an_unaligned_write_over_damage_keeps_nothing_reserved() -> None:
    storage, image = await fresh(MIB)
    await image.disk().write(0, noise(1, 8))
    await image.flush()
    for state in image.segments.states.values():
        if state.holds_blocks:
            storage.image[state.segment.offset : state.segment.end] = bytes(state.segment.length)
    for _ in range(4):
        with pytest.raises(DamageError):
            image.disk().write_nowait(100, memoryview(b"x"), owned=False)
    assert image._writer is not None
    assert image._writer._admitted == 0
    await image.close()
