"""Damaged images that are repaired, or saved into new ones.

Promise. Whatever is damaged, of what is read from the new image every block is what was written, or an error; and just
those blocks are errors that the report names.
"""

import errno
import random
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from nbdvde.disk import BLOCK
from nbdvde.engine import recovery, repair
from nbdvde.engine.access import format_storage, open_storage
from nbdvde.engine.check import check_storage
from nbdvde.engine.image import Image
from nbdvde.engine.layout import KEY_AREAS, KIND_LOG, SUPERBLOCKS, Kind, UnitRef, unpack_index
from nbdvde.engine.lbamap import LEAF_BLOCKS
from nbdvde.engine.replay import find_header
from nbdvde.engine.report import CheckReport, RepairReport
from nbdvde.engine.versions import FANOUT
from nbdvde.errors import DamageError, UnreadableError
from tests.crash.oracle import master_of
from tests.crash.recording import FrozenStorage, RecordingStorage
from tests.crash.session import KEY

SIZE = 600 * LEAF_BLOCKS * BLOCK
"""So that a map has two levels of nodes."""
Place = tuple[str, int]
"""A volume, and the number of a block."""


def page(number: int) -> bytes:
    """A block that does not compress much, and is no other's."""
    return random.Random(number).randbytes(BLOCK)


@dataclass
class Target:
    """An image, and what it holds."""

    image: bytes = b""
    held: dict[Place, bytes] = field(default_factory=dict)

    def loaded(self) -> recovery.Loaded:
        return recovery.load(FrozenStorage(self.image), master_of, replay=False)

    def damaged(self, *spans: tuple[int, int]) -> bytes:
        """With a bit flipped in the middle of each (offset, length)."""
        image = bytearray(self.image)
        for offset, length in spans:
            image[offset + length // 2] ^= 4
        return bytes(image)

    def span(self, ref: UnitRef | None) -> tuple[int, int]:
        """Where a metadata unit lies in the file."""
        assert ref is not None
        return self.loaded().segments.find(ref.slot).segment.offset + ref.position, ref.length

    def map_unit(self, label: str, level: int, number: int = 0) -> tuple[int, int]:
        """Where a leaf (level 0) or a node lies."""
        loaded = self.loaded()
        lbamap = loaded.catalogue.find(label).map
        ref = lbamap.root
        for above in range(lbamap.height, level, -1):
            assert ref is not None
            index = number // FANOUT ** (above - level)
            lbamap.base.install(above, index, loaded.segments.read_unit(ref, Kind.NODE))
            ref = lbamap.base.find(above - 1, number // FANOUT ** (above - 1 - level))
        return self.span(ref)

    def written(self) -> set[Place]:
        return set(self.held)


class Writing:
    """Writes to an image and remembers it."""

    def __init__(self, target: Target, image: Image) -> None:
        self._target, self._image = target, image

    async def blocks(self, label: str, first: int, count: int, seed: int) -> None:
        for block in range(first, first + count):
            self._target.held[label, block] = page(seed + block)
            await self._image.disk(label).write(block * BLOCK, memoryview(page(seed + block)))

    def copied(self, source: str, name: str) -> None:
        held = self._target.held
        held |= {(name, block): data for (label, block), data in list(held.items()) if label == source}


@pytest.fixture(scope="module")
def stopped() -> Target:
    return trio.run(_life, True)


@pytest.fixture(scope="module")
def crashed() -> Target:
    return trio.run(_life, False)


async def _life(stop: bool) -> Target:
    """Two disks and a snapshot, in several segments and checkpoints."""
    storage, target = RecordingStorage(), Target()
    format_storage(storage, SIZE, KEY, extent_bytes=4 * BLOCK, segment_bytes=128 << 10, domain=1)
    image = await open_storage(storage, KEY)
    writing = Writing(target, image)
    await writing.blocks("disk", 0, 40, 1000)
    await writing.blocks("disk", 3 * LEAF_BLOCKS, 8, 1000)
    await writing.blocks("disk", 599 * LEAF_BLOCKS, 8, 1000)
    await image.flush()
    await image.checkpoint()
    await image.volumes.snapshot("disk", "before")
    writing.copied("disk", "disk@before")
    await image.volumes.create("other", 4 << 20)
    await writing.blocks("other", 500, 30, 2000)
    await image.flush()
    await image.checkpoint()
    await writing.blocks("disk", 10, 12, 3000)
    await image.flush()
    await image.checkpoint()
    for number in range(4):
        await writing.blocks("disk", 20 + number, 4, 4000 + 100 * number)
        await image.flush()
    if stop:
        await image.close()
    target.image = bytes(storage.image)
    return target


async def saved(image: bytes, source: FrozenStorage | None = None) -> tuple[bytes, RepairReport]:
    new = RecordingStorage()
    report = await repair.salvage(source or FrozenStorage(image), new, master_of, "new")
    return bytes(new.image), report


def named(report: CheckReport) -> set[Place]:
    """Blocks that a report names, of those near to any that were written."""
    near = [*range(600), *range(3 * LEAF_BLOCKS - 2, 3 * LEAF_BLOCKS + 10)]
    near += range(599 * LEAF_BLOCKS - 2, 599 * LEAF_BLOCKS + 10)
    found = set()
    for error in report.errors:
        if error.disk is not None and error.offset is not None and error.length is not None:
            span = range(error.offset // BLOCK, -(-(error.offset + error.length) // BLOCK))
            found |= {(error.disk, block) for block in near if block in span}
    return found


async def lost_in(new: bytes, target: Target) -> set[Place]:
    """Blocks of a new image that are errors; all others are what was written."""
    lost = set()
    image = await open_storage(RecordingStorage(new), KEY)
    for label in ("disk", "disk@before", "other"):
        disk = image.disk(label)
        near = [*range(600), *range(3 * LEAF_BLOCKS - 2, 3 * LEAF_BLOCKS + 10)]
        near += range(599 * LEAF_BLOCKS - 2, 599 * LEAF_BLOCKS + 10)
        for block in near:
            if (block + 1) * BLOCK > disk.size:
                continue
            try:
                found = b"".join(map(bytes, await disk.read(block * BLOCK, BLOCK)))
            except DamageError:
                lost.add((label, block))
            else:
                assert found == target.held.get((label, block), bytes(BLOCK)), (label, block)
    await image.close()
    return lost


async def check_saved(image: bytes, target: Target) -> tuple[RepairReport, set[Place]]:
    """Save what can be read; what is lost, which is just what the report names, and what a later check names."""
    new, report = await saved(image)
    lost = await lost_in(new, target)
    assert lost == named(report)
    assert report.ok == (not lost)
    again = check_storage(FrozenStorage(new), master_of)
    assert again.ok == (not lost), again.errors
    assert named(again) == lost
    assert all(error.offset is not None for error in again.errors), again.errors
    return report, lost


async def test_a_sound_image_is_copied(stopped: Target, crashed: Target) -> None:
    for target in (stopped, crashed):
        report, lost = await check_saved(target.image, target)
        assert (report.ok, report.errors, report.repaired, lost) == (True, [], [], set())


@pytest.mark.parametrize("offset", [*SUPERBLOCKS, *KEY_AREAS])
async def test_one_copy_is_enough(stopped: Target, offset: int) -> None:
    image = stopped.damaged((offset, 64))
    report, lost = await check_saved(image, stopped)
    assert not lost
    assert [error.where.split(" at ")[0] for error in report.repaired] in (["superblock"], ["key area"])


@pytest.mark.parametrize("offset", [*SUPERBLOCKS, *KEY_AREAS])
async def test_the_other_copy_is_made_again_in_place(stopped: Target, offset: int) -> None:
    storage = RecordingStorage(stopped.damaged((offset, 64)))
    report = await repair.repair(storage, master_of, "image")
    assert (report.ok, len(report.repaired)) == (True, 1)
    assert check_storage(FrozenStorage(bytes(storage.image)), master_of).ok
    assert await lost_in(bytes(storage.image), stopped) == set()


async def test_a_leaf(stopped: Target) -> None:
    report, lost = await check_saved(stopped.damaged(stopped.map_unit("disk", 0, 0)), stopped)
    assert lost == {("disk", block) for block in range(LEAF_BLOCKS)}, "the snapshot has a leaf of its own"
    assert [(e.disk, e.offset, e.length) for e in report.errors] == [("disk", 0, LEAF_BLOCKS * BLOCK)]


async def test_a_leaf_that_volumes_share(stopped: Target) -> None:
    _, lost = await check_saved(stopped.damaged(stopped.map_unit("disk", 0, 599)), stopped)
    assert {label for label, _ in lost} == {"disk", "disk@before"}
    assert stopped.written() - lost >= {("disk", block) for block in range(40)}


@pytest.mark.parametrize("level", [1, 2])
async def test_a_node(stopped: Target, level: int) -> None:
    _, lost = await check_saved(stopped.damaged(stopped.map_unit("disk", level)), stopped)
    assert {label for label, _ in lost} == {"disk"}
    assert (("disk", 599 * LEAF_BLOCKS) in lost) == (level == 2)


async def test_extents(stopped: Target) -> None:
    loaded = stopped.loaded()
    state = next(s for s in loaded.segments.states.values() if s.kind == KIND_LOG)
    spans = []
    for entry in loaded.segments.index(state):
        if entry:
            position, length, _ = unpack_index(entry)
            spans.append((state.segment.offset + position, length))
    for span in spans[:6]:
        report, lost = await check_saved(stopped.damaged(span), stopped)
        assert 0 < len(lost) <= 8, "four blocks, of the disk and of its snapshot"
        assert all(error.what == "fails its authentication" for error in report.errors)


@pytest.mark.parametrize("how", ["saved", "repaired"])
async def test_what_was_lost_and_is_written_again_is_no_duplicate_of_what_is_damaged(stopped: Target, how: str) -> None:
    loaded = stopped.loaded()
    state = next(s for s in loaded.segments.states.values() if s.kind == KIND_LOG)
    position, length, _ = unpack_index(next(filter(None, loaded.segments.index(state))))
    image = stopped.damaged((state.segment.offset + position, length))
    if how == "saved":
        new, _ = await saved(image)
    else:
        storage = RecordingStorage(image)
        assert not (await repair.repair(storage, master_of, "image")).ok
        new = bytes(storage.image)
    lost = await lost_in(new, stopped)
    assert lost
    storage = RecordingStorage(new)
    opened = await open_storage(storage, KEY)
    await trio.testing.wait_all_tasks_blocked()
    await opened._hooking.finish()  # it reads the lists of fingerprints
    for block in sorted(block for label, block in lost if label == "disk"):
        await opened.disk("disk").write(block * BLOCK, memoryview(stopped.held["disk", block]))
    await opened.close()
    assert await lost_in(bytes(storage.image), stopped) == {place for place in lost if place[0] != "disk"}


def indexes(target: Target) -> list[tuple[int, int]]:
    states = target.loaded().segments.states.values()
    return [target.span(state.index_ref) for state in states if state.index_ref and state.kind == KIND_LOG]


async def test_all_indexes_come_back_from_the_log(stopped: Target) -> None:
    image = stopped.damaged(*indexes(stopped))
    assert not check_storage(FrozenStorage(image), master_of).ok
    report, lost = await check_saved(image, stopped)
    assert not lost
    assert len(report.repaired) == len(indexes(stopped)) > 1
    storage = RecordingStorage(image)
    assert (await repair.repair(storage, master_of, "image")).ok
    assert await lost_in(bytes(storage.image), stopped) == set()


async def test_an_index_and_a_group_of_the_same_segment(stopped: Target) -> None:
    """What the group held is lost, and nothing else."""
    state = next(s for s in stopped.loaded().segments.states.values() if s.kind == KIND_LOG)
    image = stopped.damaged(stopped.span(state.index_ref), (state.segment.offset, 40))
    _, lost = await check_saved(image, stopped)
    assert lost
    assert len(lost) < 100 < len(stopped.held)


async def test_in_place_nothing_is_given_up(stopped: Target) -> None:
    storage = RecordingStorage(stopped.damaged(stopped.map_unit("disk", 0, 0), (SUPERBLOCKS[0], 64)))
    report = await repair.repair(storage, master_of, "image")
    assert not report.ok
    assert [error.where for error in report.errors] == ["map leaf 0 of disk"]
    assert [error.where for error in report.repaired] == ["superblock at byte 0"]
    offset, length = stopped.map_unit("disk", 0, 0)
    assert bytes(storage.image[offset : offset + length]) != stopped.image[offset : offset + length]
    assert (
        sum(a != b for a, b in zip(storage.image[offset : offset + length], stopped.image[offset:], strict=False)) == 1
    )


async def test_the_newest_root(crashed: Target) -> None:
    loaded = crashed.loaded()
    image = crashed.damaged((loaded.superblock.root.offset, loaded.superblock.root_length))
    report, lost = await check_saved(image, crashed)
    assert not lost, "the one before and the log lead to the same state"
    assert report.repaired


async def test_all_roots(stopped: Target, crashed: Target) -> None:
    for target in (stopped, crashed):
        newest, older = recovery.read_superblocks(FrozenStorage(target.image))
        image = target.damaged((newest.root.offset, newest.root_length))
        if older.root != newest.root:
            at = older.root.offset + older.root_length // 2
            image = image[:at] + bytes([image[at] ^ 1]) + image[at + 1 :]
        with pytest.raises(DamageError):
            await saved(image)


def group(target: Target, sequence: int) -> int:
    """Where a group of the log begins."""
    loaded = recovery.load(FrozenStorage(target.image), master_of)
    for state in loaded.segments.states.values():
        data = target.image[state.segment.offset : state.segment.end]
        for position in range(0, len(data), BLOCK):
            header = find_header(state.sealer, data, position)
            if header is not None and header.sequence == sequence:
                return state.segment.offset + position
    raise AssertionError(f"no group {sequence}")


async def test_the_log_is_cut_where_it_is_damaged(crashed: Target) -> None:
    """In the middle, as later groups say: the image does not open, and an earlier state is saved."""
    sequence = crashed.loaded().sequence
    image = crashed.damaged((group(crashed, sequence + 1), 100))
    with pytest.raises(DamageError):
        recovery.load(FrozenStorage(image), master_of)
    with pytest.raises(DamageError, match="salvage"):
        await repair.repair(RecordingStorage(image), master_of, "image")
    new, report = await saved(image)
    assert not report.ok
    assert "log record" in report.errors[0].where
    earlier = Target(held={**crashed.held})
    earlier.held |= {("disk", block): page((3000 if block < 22 else 1000) + block) for block in range(20, 27)}
    earlier.held |= {("disk", block): page(4000 + block) for block in range(20, 24)}
    assert await lost_in(new, earlier) == set()


@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
async def test_the_end_of_the_file_is_missing(stopped: Target, part: float) -> None:
    """The root may lie anywhere: where it is gone nothing is told, else all of what is left comes out."""
    image = stopped.image[: int(len(stopped.image) * part)]
    root = recovery.read_superblocks(FrozenStorage(image))[0].root
    if root.offset + root.length > len(image):
        with pytest.raises(DamageError):
            await saved(image)
    else:
        await check_saved(image, stopped)


@pytest.mark.parametrize("part", [0.3, 0.6, 0.9, 1 - 2**-12])
async def test_what_is_truncated_is_not_repaired_in_place(stopped: Target, crashed: Target, part: float) -> None:
    """What is missing may come back, and must find what it was cut from."""
    for target in (stopped, crashed):
        used = recovery.load(FrozenStorage(target.image), master_of).segments.space.end
        storage = RecordingStorage(target.image[: int(used * part)])
        cut = bytes(storage.image)
        with pytest.raises(DamageError, match="salvage"):
            await repair.repair(storage, master_of, "image")
        assert bytes(storage.image) == cut


async def test_a_bad_sector(stopped: Target) -> None:
    class Unreadable(FrozenStorage):
        def read(self, offset: int, length: int) -> bytes:
            if offset <= at < offset + length:
                raise OSError(errno.EIO, "bad sector")
            return super().read(offset, length)

    at = stopped.map_unit("other", 0)[0]
    with pytest.raises(UnreadableError):
        recovery.load(Unreadable(stopped.image), master_of).segments.read(at, 1)
    new, report = await saved(stopped.image, Unreadable(stopped.image))
    lost = await lost_in(new, stopped)
    assert {("other", block) for block in range(500, 530)} <= lost == named(report)
    assert f"byte {at - at % BLOCK} of the file" in [error.where for error in report.repaired]


@pytest.mark.parametrize("seed", range(3))
async def test_anything(stopped: Target, seed: int) -> None:
    """Damage in several places at random, but not in both copies of what there is no way without."""
    rng = random.Random(seed)
    root = recovery.read_superblocks(FrozenStorage(stopped.image))[0].root
    for _ in range(8):
        spans: list[tuple[int, int]] = []
        while len(spans) < 4:
            offset = rng.randrange(2 * SUPERBLOCKS[1], len(stopped.image))
            if not root.offset <= offset < root.offset + root.length:
                spans.append((offset, 1))
        await check_saved(stopped.damaged(*spans), stopped)
