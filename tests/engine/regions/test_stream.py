"""Streams: every entry that is there comes back byte for byte, under the position that it was given, and no other."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

import nbdvde
from nbdvde import MasterKey
from nbdvde.disk import BLOCK
from nbdvde.engine.image import Image
from nbdvde.engine.managed.exported import RegionDisks
from nbdvde.engine.managed.stream import Stream
from nbdvde.engine.regions.directory import Slot
from nbdvde.engine.regions.form import Form
from nbdvde.engine.regions.stream import CAPACITY_MAX, FORM, LENGTHS, Ring, StreamPolicy, verify
from nbdvde.errors import DamageError, NoSpaceError, RefusedError, UsageError

KEY = MasterKey(bytes(range(32)))
SIZE = 64 << 20


def new(folder: str | Path) -> Path:
    path = Path(folder) / "image.vde"
    nbdvde.create_image(path, SIZE, secret=KEY, segment_bytes=256 << 10)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return new(tmp_path)


async def made(
    image: Image, capacity: int, policy: StreamPolicy = StreamPolicy.OVERWRITE, increment: int = 2
) -> Stream:
    return await Stream.create(image.regions, image.disk(), capacity, policy=policy, increment=increment)


async def held(stream: Stream) -> dict[int, bytes]:
    return dict(await stream.read(0, 1 << 20))


async def in_a_new_life(path: Path, work: Callable[[Stream], Awaitable[None]]) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        await work(await image.regions.get(Stream, image.disk()))


def entry(number: int) -> bytes:
    """Entries of all lengths, none like another."""
    return (b"%d," % number * BLOCK)[: (0, 1, 7, BLOCK, 4095, 100)[number % 6]]


# The ring


@given(
    capacity=st.integers(1, 9), increment=st.integers(1, 4),
    steps=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=20),
)  # fmt: skip
def test_entries_that_are_there_have_places_of_their_own(
    capacity: int, increment: int, steps: list[tuple[int, int]]
) -> None:
    ring = Ring.new(capacity, increment, StreamPolicy.OVERWRITE)
    for consumed, count in steps:
        ring = ring.advancing(min(ring.head, ring.tail + consumed)).appending(min(count, capacity))
        runs = ring.runs(ring.tail, ring.head)
        blocks = [block + i for block, many in runs for i in range(many)]
        base = 1 + ring.length_blocks
        # The same place for ever, whatever is allocated.
        assert blocks == [base + position % capacity for position in range(ring.tail, ring.head)]
        assert len(set(blocks)) == ring.entries <= ring.allocated <= capacity
        assert ring.allocated in (capacity, -(-ring.allocated // increment) * increment)
        assert Ring.unpack(ring.pack()) == ring
        assert max(blocks) < ring.blocks


def test_what_is_allocated_grows_with_what_is_held_and_stays() -> None:
    ring = Ring.new(100, 16, StreamPolicy.OVERWRITE)
    seen = [ring.allocated]
    for count in (1, 15, 1, 60, 40):
        ring = ring.appending(count)
        seen.append(ring.allocated)
    assert seen == [0, 16, 16, 32, 80, 100]
    assert ring.advancing(ring.head).appending(1).allocated == 100
    busy = Ring.new(100, 16, StreamPolicy.OVERWRITE)
    for _ in range(1000):
        busy = busy.appending(1).advancing(busy.head + 1)
    assert busy.allocated == 16


def test_lengths_lie_in_blocks_of_2040() -> None:
    ring = Ring.new(2 * LENGTHS + 5, 16, StreamPolicy.OVERWRITE)
    start = 10 * ring.capacity + LENGTHS - 1
    assert list(ring.length_runs(start, start + LENGTHS + 2)) == [
        (1, LENGTHS - 1, start, 1), (2, 0, start + 1, LENGTHS), (3, 0, start + 1 + LENGTHS, 1),
    ]  # fmt: skip
    wrapping = 2 * ring.capacity - 1
    assert list(ring.length_runs(wrapping, wrapping + 2)) == [(3, 4, wrapping, 1), (1, 0, wrapping + 1, 1)]


@pytest.mark.parametrize(("capacity", "increment"), [(0, 1), (CAPACITY_MAX + 1, 1), (1, 0), (1, 1 << 32)])
def test_what_cannot_be_is_refused(capacity: int, increment: int) -> None:
    with pytest.raises(UsageError, match="is not between"):
        Ring.new(capacity, increment, StreamPolicy.WAIT)


def test_the_largest_fits_into_its_window() -> None:
    assert Ring.new(CAPACITY_MAX, 16, StreamPolicy.WAIT).blocks <= 1 << 34


@pytest.mark.parametrize(
    "header",
    [
        Ring(10, 16, 5, 0, 4), Ring(10, 3, 3, 0, 2), Ring(10, 4, 5, 0, 4), Ring(0), Ring(10, 0, 0, 0, 0),
        Ring(10, 4, 2, 1, 4, policy=3),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_a_header_that_makes_no_sense_is_damage(header: Ring) -> None:
    with pytest.raises(DamageError, match="makes no sense"):
        Ring.unpack(header.pack())
    with pytest.raises(DamageError, match="makes no sense"):
        Ring.unpack(Ring(10).pack() + b"x")


def flaws(ring: Ring, *lengths: bytes, generation: int = 5, blocks: int | None = None) -> list[str]:
    held = [FORM.block(ring.pack(), 5), *(FORM.block(body, generation) for body in lengths)]
    return list(verify(lambda number: held[number], Slot(FORM.tag, 1 << 34, blocks or ring.blocks, 2)))


def test_a_check_finds_what_is_wrong() -> None:
    ring = Ring(4, 4, 7, 5, 4)
    assert flaws(ring, b"\0\x10" * 4) == []
    assert flaws(ring, b"\0\x10" * 4, generation=6) == ["has a block that is newer than the first"]
    assert flaws(ring, b"", blocks=99) == ["the directory gives it another size than it has"]
    assert flaws(ring, b"\1\x10" + b"\0\0" * 2 + b"\1\x10") == []  # of entries that are no more
    with pytest.raises(DamageError, match="longer than a block"):
        flaws(ring, b"\0\0\1\x10")


# In an image


@given(
    capacity=st.integers(1, 7),
    steps=st.lists(st.one_of(st.integers(1, 12), st.sampled_from(["advance", "reset", "reopen"])), max_size=12),
)
@settings(max_examples=12, deadline=None)
def test_it_holds_what_a_list_would(tmp_path_factory: pytest.TempPathFactory, capacity: int, steps: list[object]):
    path = tmp_path_factory.mktemp("stream") / "image.vde"
    nbdvde.create_image(path, SIZE, secret=None, segment_bytes=256 << 10)

    async def run() -> None:
        entries: list[bytes] = []
        tail, create, left = 0, True, [*steps, "reopen"]
        while left:
            async with nbdvde.open_image(path) as image:
                stream = await (made(image, capacity) if create else image.regions.get(Stream, image.disk()))
                create, step = False, left.pop(0)
                while step != "reopen":
                    if isinstance(step, int):
                        more = [entry(len(entries) + i) for i in range(step)]
                        assert await stream.append_many(more) == list(range(len(entries), len(entries) + step))
                        entries += more
                        tail = max(tail, len(entries) - capacity)
                    elif step == "advance":
                        tail = (tail + len(entries) + 1) // 2
                        await stream.advance_read_tail(tail)
                    else:
                        tail = len(entries)
                        await stream.reset()
                    assert await held(stream) == dict(enumerate(entries[tail:], tail))
                    step = left.pop(0)
        async with nbdvde.open_image(path, read_only=True) as image:
            stream = await image.regions.get(Stream, image.disk())
            assert await held(stream) == dict(enumerate(entries[tail:], tail))
        assert nbdvde.check_image(path).ok

    trio.run(run)


async def test_an_entry_is_there_or_it_is_not(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        stream = await made(image, 3)
        assert await stream.try_read(0) is None
        assert [await stream.append(entry(n)) for n in range(5)] == [0, 1, 2, 3, 4]
        assert [await stream.try_read(n) for n in range(6)] == [None, None, entry(2), entry(3), entry(4), None]
        assert await stream.append_many([]) == []
        with pytest.raises(UsageError, match="longer than 4096"):
            await stream.append_many([b"fits", bytes(BLOCK + 1)])
        assert stream.head == 5


async def test_what_is_consumed_takes_no_space(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        stream = await made(image, 64)
        volume = stream._area.volume
        await stream.append_many([bytes([n + 1]) * BLOCK for n in range(40)])
        await image.checkpoint()
        full = volume.map.mapped
        await stream.advance_read_tail(30)
        await image.checkpoint()
        assert volume.map.mapped == full - 30
        await stream.advance_read_tail(10)  # no way back
        assert stream.tail == 30
        with pytest.raises(UsageError, match="beyond the head of the stream, 40"):
            await stream.advance_read_tail(41)
        await stream.reset()
        await image.checkpoint()
        assert volume.map.mapped == full - 40
        assert (stream.head, stream.tail, stream.ring.allocated) == (40, 40, 40)


async def test_what_is_rejected_leaves_nothing(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        stream = await made(image, 3, StreamPolicy.REJECT)
        assert await stream.append_many([b"a", b"b"]) == [0, 1]
        with pytest.raises(NoSpaceError, match="stream of disk disk: is full, with 2 of 3 entries"):
            await stream.append_many([b"c", b"d"])
        assert await held(stream) == {0: b"a", 1: b"b"}
        assert await stream.append(b"c") == 2
        await stream.advance_read_tail(1)
        assert await stream.append(b"d") == 3
        assert await held(stream) == {1: b"b", 2: b"c", 3: b"d"}


async def test_of_many_at_once_as_many_are_rejected_as_do_not_fit(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        stream = await made(image, 5, StreamPolicy.REJECT)
        refused = []

        async def append(number: int) -> None:
            try:
                await stream.append(entry(number))
            except NoSpaceError:
                refused.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(append, number)
        assert len(refused) == 3
        assert sorted((await held(stream)).values()) == sorted(entry(n) for n in range(8) if n not in refused)


async def test_an_append_waits_for_a_reader_and_can_be_cancelled(path: Path, autojump_clock: object) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        stream = await made(image, 2, StreamPolicy.WAIT)
        await stream.append_many([b"a", b"b"])
        with trio.move_on_after(1) as scope:
            await stream.append(b"never")
        assert scope.cancelled_caught
        got: list[bytes] = []

        async def consume() -> None:
            while len(got) < 9:
                await stream.wait(stream.tail)
                found = await stream.read(stream.tail, 1)
                got.extend(data for _, data in found)
                await stream.advance_read_tail(found[-1][0] + 1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(consume)
            assert await stream.append_many([b"%d" % n for n in range(7)]) == list(range(2, 9))
        assert got == [b"a", b"b", *(b"%d" % n for n in range(7))]


async def test_many_writers_share_commits(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        stream = await made(image, 1000)
        before = image.statistics["commits"]
        positions: dict[int, int] = {}

        async def append(number: int) -> None:
            positions[await stream.append(entry(number))] = number

        async with trio.open_nursery() as nursery:
            for number in range(300):
                nursery.start_soon(append, number)
        assert sorted(positions) == list(range(300))
        assert await held(stream) == {position: entry(number) for position, number in positions.items()}
        assert image.statistics["commits"] - before < 10


async def test_a_reader_beside_a_writer_never_sees_one_entry_for_another(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY, cache_bytes=0) as image:
        stream = await made(image, 6)
        seen: dict[int, bytes] = {}
        written = 400

        async def write() -> None:
            for number in range(0, written, 4):
                await stream.append_many([b"%d;" % n * 1000 for n in range(number, number + 4)])

        async def read() -> None:
            position = 0
            while position < written:
                await stream.wait(position)
                for at, data in await stream.read(position, 6):
                    assert data == b"%d;" % at * 1000
                    seen[at] = data
                position += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            nursery.start_soon(read)
            nursery.start_soon(write)
        assert len(seen) > written // 8


async def test_what_is_overwritten_while_it_is_read_is_not_shown(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        stream = await made(image, 4)
        await stream.append_many([b"0", b"1", b"2", b"3"])
        reading = stream._area.read

        async def slowly(form: Form, first: int, count: int = 1) -> bytes:
            monkeypatch.undo()
            found = await reading(form, first, count)
            await stream.append_many([b"4", b"5"])
            return found

        monkeypatch.setattr(stream._area, "read", slowly)
        assert await stream.read(0) == [(2, b"2"), (3, b"3")]


async def test_a_full_image_takes_none_and_the_stream_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "small.vde"
    nbdvde.create_image(path, SIZE, secret=None, capacity=64 << 20, compression="none")
    async with nbdvde.open_image(path) as image:
        stream = await made(image, 1 << 20)
        chance = [bytes([n]) + bytes(range(256)) * 15 for n in range(256)]
        with pytest.raises(NoSpaceError, match="capacity"):
            await stream.append_many(chance * 200)
        head = stream.head
        assert (stream.ring.head, stream.tail) == (head, 0)
        assert await stream.try_read(head - 1) == chance[(head - 1) % 256]
        await stream.advance_read_tail(head // 2 // 256 * 256)
        await image.clean()
        assert await stream.append(b"again") == head
    assert nbdvde.check_image(path).ok


async def test_a_deleted_stream_is_none(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        stream = await made(image, 4, StreamPolicy.WAIT)
        await stream.append_many([b"x"] * 4)
        async with trio.open_nursery() as nursery:
            for work in (lambda: stream.append(b"y"), lambda: stream.wait(4)):
                nursery.start_soon(_refused, work)
            await trio.testing.wait_all_tasks_blocked()
            await stream.delete()
        assert await stream.append_many([]) == []
        await _refused(stream.delete)
        await _refused(lambda: stream.read(0))
        with pytest.raises(UsageError, match="disk disk: has no stream"):
            await image.regions.get(Stream, image.disk())
        again = await made(image, 5)
        assert again is not stream
        assert await held(again) == {}
        with pytest.raises(RefusedError, match="disk disk: has a stream already"):
            await made(image, 5)
    await in_a_new_life(path, _holds_nothing)


async def test_nobody_waits_for_the_stream_of_a_deleted_disk(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image, trio.open_nursery() as nursery:
        await image.volumes.create("other", SIZE)
        stream = await made(image, 4, StreamPolicy.WAIT)
        await stream.append_many([b"x"] * 4)
        for work in (lambda: stream.append(b"y"), lambda: stream.wait(4)):
            nursery.start_soon(_refused, work)
        await trio.testing.wait_all_tasks_blocked()
        await image.volumes.delete("disk")


async def _refused(work: Callable[[], Awaitable[object]]) -> None:
    with pytest.raises(RefusedError, match="stream of disk disk: was deleted"):
        await work()


async def _holds_nothing(stream: Stream) -> None:
    assert await held(stream) == {}


# As a disk


async def content(disk: nbdvde.disk.Disk, offset: int, length: int) -> bytes:
    return b"".join(map(bytes, await disk.read(offset, length)))


async def test_as_a_disk_it_has_the_entries_in_order_and_nothing_moves(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        stream = await made(image, 5)
        await stream.append_many([b"%d" % n for n in range(7)])  # 2 to 6 are there
        disks, number = RegionDisks(image.regions), image.disk().number
        disk = disks.find(number, "stream")
        assert disk is not None
        assert disk is disks.find(number, "stream")
        pages = [(b"%d" % n).ljust(BLOCK, b"\0") for n in range(9)]
        assert (disk.size, disk.name, disk.read_only) == (5 * BLOCK, "disk/stream", True)
        assert await content(disk, 0, disk.size) == b"".join(pages[2:7])
        await stream.advance_read_tail(4)
        await stream.append(b"7")
        assert await content(disk, 0, disk.size) == bytes(2 * BLOCK) + b"".join(pages[4:7])
        for offset, length in ((100, 4), (BLOCK - 1, 2 * BLOCK + 2), (3 * BLOCK, 1)):
            whole = bytes(2 * BLOCK) + b"".join(pages[4:7])
            assert await content(disk, offset, length) == whole[offset : offset + length]
        later = disks.find(number, "stream")
        assert later is not None
        assert await content(later, 0, later.size) == b"".join(pages[4:8]) + bytes(BLOCK)
        assert await later.status("base:allocation", 0, later.size, 9) == [(4 * BLOCK, 0), (BLOCK, 3)]
        assert await disk.status("base:allocation", 0, disk.size, 9) == [(2 * BLOCK, 3), (3 * BLOCK, 0)]
        assert await disk.status("qemu:allocation-depth", BLOCK, 2 * BLOCK, 9) == [(BLOCK, 0), (BLOCK, 1)]
        assert await disk.status("base:allocation", BLOCK, 2 * BLOCK, 1) == [(BLOCK, 3)]
        with pytest.raises(RefusedError, match="cannot be written"):
            await disk.write(0, memoryview(b"x"))
        await stream.delete()
        with pytest.raises(RefusedError, match="was deleted"):
            await disk.read(0, 1)
        assert disks.find(number, "stream") is None
