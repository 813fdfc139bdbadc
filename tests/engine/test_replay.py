"""Checks of recovery that no crash can reach, and what `check` says of damage."""

import tracemalloc
from collections.abc import Callable, Iterator

import pytest
import trio

from nbdvde.engine.access import format_storage, open_storage
from nbdvde.engine.buffer import Generation
from nbdvde.engine.check import check_storage
from nbdvde.engine.layout import BLOCK, KIND_LOG, SUPERBLOCKS, LogPoint, Segment, TableEntry, unpack_index
from nbdvde.engine.log import LogWriter
from nbdvde.engine.recovery import load
from nbdvde.engine.replay import Replay
from nbdvde.engine.segments import Segments
from nbdvde.errors import DamageError
from tests.crash.oracle import master_of
from tests.crash.recording import FrozenStorage, RecordingStorage
from tests.crash.session import KEY, Profile, Session

CHAIN = b"c" * 32


class Log:
    """A log of one segment, and what a replay makes of it."""

    def __init__(self) -> None:
        self.storage = RecordingStorage()
        format_storage(self.storage, 1 << 20, KEY, segment_bytes=64 << 10)
        self.segments = load(self.storage, master_of).segments
        self.state = self.segments.new(KIND_LOG, 64 << 10, bytes(32))
        self.storage.allocate(0, self.state.segment.end)
        self.writer = self.write(5, CHAIN, 3)

    def write(self, sequence: int, chain: bytes, epoch: int) -> LogWriter:
        return LogWriter(
            self.storage, self.state, sequence=sequence, chain=chain, epoch=epoch, level=1, extent_blocks=4
        )

    def accepted(self, *, sequence: int = 5, chain: bytes = CHAIN, epoch: int = 3) -> int:
        """How many transactions a replay takes."""
        fresh = Segments(self.storage, self.segments.keyring, type(self.segments.space)(0, 1 << 40), 64 << 10)
        fresh.adopt(TableEntry(self.state.segment, None, 0, 0, 0, KIND_LOG))
        return sum(1 for _ in Replay(fresh, LogPoint(self.state.segment, 0, 0, sequence, chain), epoch).transactions())


def page(number: int) -> Generation:
    """A write of one block."""
    written = Generation()
    written.put(number, memoryview(b"x" * BLOCK))
    return written


def test_a_record_counts_only_in_its_own_history() -> None:
    log = Log()
    log.writer.append(1, page(0))
    log.writer.append(1, page(1))
    assert log.accepted() == 2
    assert log.accepted(chain=b"d" * 32) == 0
    assert log.accepted(epoch=4) == 0
    assert log.accepted(sequence=6) == 0


def test_a_record_that_follows_another_past_is_not_accepted() -> None:
    log = Log()
    log.writer.append(1, page(0))
    log.write(6, b"another past".ljust(32), 3).append(1, page(1))
    assert log.accepted() == 1


def stopped() -> bytes:
    return bytes(Session(3, Profile(steps=12, largest=60 << 10)).run().storage.image)


def extents_of(image: bytes) -> Iterator[tuple[Segment, int]]:
    loaded = load(FrozenStorage(image), master_of)
    for state in loaded.segments.states.values():
        if state.kind == KIND_LOG:
            for entry in filter(None, loaded.segments.index(state)):
                yield state.segment, state.segment.offset + unpack_index(entry)[0]


def damaged(image: bytes, offset: int) -> bytes:
    return image[:offset] + bytes([image[offset] ^ 1]) + image[offset + 1 :]


def test_a_sound_image_checks_out() -> None:
    report = check_storage(FrozenStorage(stopped()), master_of)
    assert report.ok
    assert report.errors == []
    assert report.units_verified > 5


def test_check_names_the_bytes_that_a_damaged_extent_held() -> None:
    image = stopped()
    named = 0
    for _, offset in extents_of(image):
        report = check_storage(FrozenStorage(damaged(image, offset + 20)), master_of)
        if report.ok:
            continue  # nothing points at this extent any more
        named += 1
        places = [error for error in report.errors if error.offset is not None]
        assert places
        assert all(error.disk == "disk" and error.length and (error.offset or 0) % BLOCK == 0 for error in places)
    assert named >= 2


@pytest.mark.parametrize(
    ("offset", "where"),
    [(SUPERBLOCKS[0] + 100, "superblock"), (SUPERBLOCKS[1] + 100, "superblock"), (4096 + 5, "key area")],
)
def test_check_reports_a_copy_that_is_not_in_use(offset: int, where: str) -> None:
    report = check_storage(FrozenStorage(damaged(stopped(), offset)), master_of)
    assert not report.ok
    assert [error.where.startswith(where) for error in report.errors] == [True]


def test_check_tells_how_far_it_is() -> None:
    calls: list[tuple[int, int]] = []
    report: Callable[[int, int], None] = lambda done, total: calls.append((done, total))  # noqa: E731
    check_storage(FrozenStorage(stopped()), master_of, report)
    assert calls[0][0] == 0
    assert calls[-1][0] == calls[-1][1] > 0


def test_check_keeps_little_of_what_the_maps_hold() -> None:
    """64 MiB in 16,384 extents of one block, each in a leaf on its own: two bytes an extent, not a list of them."""
    storage, leaves = RecordingStorage(), 8192
    format_storage(storage, leaves * 512 * BLOCK, KEY, extent_bytes=BLOCK, segment_bytes=1 << 20)

    async def fill() -> None:
        image = await open_storage(storage, KEY)
        for number in range(leaves):
            await image.disk().write(number * 512 * BLOCK, memoryview(number.to_bytes(8, "little") * (2 * BLOCK // 8)))
        await image.close()

    trio.run(fill)
    frozen = FrozenStorage(bytes(storage.image))
    tracemalloc.start()
    try:
        assert check_storage(frozen, master_of).ok
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 << 20


def test_a_cut_that_takes_the_root_is_called_so() -> None:
    image = stopped()
    root = load(FrozenStorage(image), master_of).superblock.root
    with pytest.raises(DamageError, match=f"is truncated: {root.offset + 10} of "):
        load(FrozenStorage(image[: root.offset + 10]), master_of)
