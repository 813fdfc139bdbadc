"""WORM regions: nothing that was appended is lost, changed or removed unnoticed, and time is the image's own."""

import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

import nbdvde
from nbdvde import MasterKey, Stream, Worm
from nbdvde.disk import BLOCK, Disk
from nbdvde.engine.image import Image
from nbdvde.engine.keys import KeyArea, KeyFile
from nbdvde.engine.managed import worm as managed
from nbdvde.engine.managed.exported import RegionDisks
from nbdvde.engine.managed.worm import APPEND_MAX
from nbdvde.engine.regions.directory import FORM as DIRECTORY
from nbdvde.engine.regions.directory import WINDOW
from nbdvde.engine.regions.worm import CAPACITY_MAX, FORM, RULES_MAX, YEAR_NS, Header, Ledger, Record, length, shown
from nbdvde.engine.volume import Volume
from nbdvde.errors import DamageError, NbdvdeError, NoSpaceError, RefusedError, RequestError, UsageError

KEY = MasterKey(bytes(range(32)))
SIZE = 64 << 20
DAY_NS = 24 * 3600 * 10**9
NOW = 1_800_000_000 * 10**9


class Clock:
    """The monotonic clock of the host."""

    def __init__(self) -> None:
        self.now_ns, self.step_ns = 5, 0

    def __call__(self) -> int:
        self.now_ns += self.step_ns
        return self.now_ns


def clocked(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(managed, "monotonic_ns", clock)
    return clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return clocked(monkeypatch)


def new(folder: str | Path) -> Path:
    path = Path(folder) / "image.vde"
    nbdvde.create_image(path, SIZE, secret=KEY, segment_bytes=256 << 10)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return new(tmp_path)


async def made(image: Image, capacity: int = 100, retention_ns: int = 0, disk: str | None = None) -> Worm:
    return await Worm.create(image.regions, image.disk(disk), capacity, retention_ns, NOW)


async def held(worm: Worm) -> list[bytes]:
    return [await worm.content(record) for record in await worm.records()]


# The log


@given(st.lists(st.tuples(st.integers(0, 3 * BLOCK), st.integers(0, 5)), max_size=12))
def test_records_follow_from_each_other(appends: list[tuple[int, int]]) -> None:
    ledger, time, stored = Ledger(), NOW, list[bytes]()
    for size, later in [(0, 0), *appends]:
        time += later
        ledger, one = ledger.taking(Record(ledger.mark, time, size, bytes([size % 256]) * 32))
        stored.append(one)
    again = Ledger()
    for number, one in enumerate(stored):
        for at in (0, 8, 16, 20, 52):
            with pytest.raises(DamageError, match=f"record {number} is not what was chained"):
                again.following(one[:at] + bytes([one[at] ^ 1]) + one[at + 1 :])
        for other in {*stored} - {one}:
            with pytest.raises(DamageError):
                again.following(other)
        again = again.following(one)
    assert again == ledger
    assert ledger.mark == sum(-(-size // BLOCK) for size, _ in appends)


def test_the_chain_is_what_the_documents_say() -> None:
    ledger, first = Ledger().taking(Record(0, 1, 0, b"r" * 32))
    _, second = ledger.taking(Record(0, 2, 5, b"d" * 32))
    body = struct.pack("<QQI", 0, 1, 0) + b"r" * 32
    chain = sha256(bytes(32) + body).digest()
    assert first == body + chain
    body = struct.pack("<QQI", 0, 2, 5) + b"d" * 32
    assert second == body + sha256(chain + body).digest()
    assert length(second, 0) == 84
    assert length(bytes(84), 0) == 0


@pytest.mark.parametrize(
    "record", [Record(1, 7, 5, bytes(32)), Record(0, 6, 5, bytes(32))], ids=["not at the mark", "before the last one"]
)
def test_a_record_that_is_chained_but_makes_no_sense_is_damage(record: Record) -> None:
    ledger, _ = Ledger().taking(Record(0, 7, 0, bytes(32)))
    with pytest.raises(DamageError, match="record 1 does not follow"):
        ledger.following(ledger.taking(record)[1])


@pytest.mark.parametrize(("capacity", "retention"), [(0, 0), (CAPACITY_MAX + 1, 0), (1, -1), (1, 2000 * YEAR_NS)])
def test_what_cannot_be_is_refused(capacity: int, retention: int) -> None:
    with pytest.raises(UsageError, match="is not between"):
        Header.new(capacity, retention, NOW)


def test_the_largest_fits_into_its_window() -> None:
    assert Header.new(CAPACITY_MAX, 0, NOW).blocks <= WINDOW


def test_times_are_shown_as_people_say_them() -> None:
    assert [shown(s * 10**9) for s in (1, 2, 119, 120, 7200, 172799, 172800)] == [
        "1 second", "2 seconds", "119 seconds", "2 minutes", "2 hours", "48 hours", "2 days",
    ]  # fmt: skip


# In an image


async def test_what_is_appended_is_there_again(path: Path) -> None:
    parts = [b"x", b"y" * BLOCK, b"z" * (3 * BLOCK + 7), bytes(BLOCK)]
    async with nbdvde.open_image(path, key=KEY) as image:
        worm = await made(image)
        for part, block in zip(parts, (0, 1, 2, 6), strict=True):
            record = await worm.append(part)
            assert (record.block, record.length, record.sha256) == (block, len(part), sha256(part).digest())
        assert await held(worm) == parts
    assert nbdvde.check_image(path, key=KEY).ok
    for read_only in (False, True):
        async with nbdvde.open_image(path, key=KEY, read_only=read_only) as image:
            worm = await image.regions.get(Worm, image.disk())
            assert (worm.mark, worm.appends, await held(worm), await worm.verify()) == (7, 4, parts, 4)
            assert await worm.read(6, 3) == bytes(3 * BLOCK)
    async with nbdvde.open_image(path, key=KEY) as image:
        worm = await image.regions.get(Worm, image.disk())
        assert (await worm.append(b"more")).block == 7


async def test_logs_of_several_blocks_are_verified(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        worm = await made(image, 1000)
        async with trio.open_nursery() as nursery:
            for number in range(150):
                nursery.start_soon(worm.append, b"%d" % number)
        assert sorted(await held(worm)) == sorted(b"%d" % number for number in range(150))
    async with nbdvde.open_image(path, key=KEY) as image:
        worm = await image.regions.get(Worm, image.disk())
        assert await worm.verify() == 150
    assert nbdvde.check_image(path, key=KEY).ok


async def test_a_full_region_says_so(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        worm = await made(image, 3)
        await worm.append(bytes(2 * BLOCK))
        with pytest.raises(NoSpaceError, match="is full, 4096 bytes are left"):
            await worm.append(b"x" * (BLOCK + 1))
        await worm.append(b"x")
        with pytest.raises(NoSpaceError, match="is full, 0 bytes are left"):
            await worm.append(b"x")
        for data in (b"", bytes(APPEND_MAX + 1)):
            with pytest.raises(UsageError, match="append it in parts"):
                await worm.append(data)
        assert worm.mark == 3


# What is done to it behind its back

Tamper = Callable[[Image, int, bytes], Awaitable[None]]


def _written(at: int, change: Callable[[bytes], bytes], block: int = 0) -> Tamper:
    """Changes some bytes of a block and makes its trailer fit."""

    async def tamper(image: Image, start: int, log: bytes) -> None:
        body, generation = FORM.opened(log[block * BLOCK : (block + 1) * BLOCK])
        size = len(change(bytes(84)))
        body = body[:at] + change(body[at : at + size]) + body[at + size :]
        await _volume(image).write_together({start + block: FORM.block(body, generation)})

    return tamper


def _volume(image: Image) -> Volume:
    volume = image.volumes.existing_region(DIRECTORY, image.disk().number)
    assert volume is not None
    return volume


async def _older(image: Image, start: int, log: bytes) -> None:
    """Put the log back as it was two appends ago."""
    await _volume(image).write_together({start + n: log[n * BLOCK : (n + 1) * BLOCK] for n in range(len(log) // BLOCK)})


SECOND = 48 + 84
TAMPERED = {
    "a record": (_written(SECOND + 8, lambda old: bytes([old[0] ^ 1])), "record 1 is not what was chained"),
    "a digest": (_written(SECOND + 20, lambda old: bytes([old[0] ^ 1])), "record 1 is not what was chained"),
    "a chain": (_written(SECOND + 52, lambda old: bytes([old[0] ^ 1])), "record 1 is not what was chained"),
    "a record in the second block": (_written(0, lambda old: bytes([old[0] ^ 1]), 1), "is not what was chained"),
    "the last record gone": (_written(2 * 84, lambda old: bytes(84), 1), "has not the records that its header counts"),
    "the mark": (_written(0, lambda old: bytes([old[0] ^ 1])), "has not the records that its header counts"),
    "the capacity": (_written(8, lambda old: bytes([old[0] + 1])), "another size than it has"),
    "the retention": (_written(16, lambda old: struct.pack("<Q", 1)), "its capacity, retention or time of creation"),
    "the time of creation": (_written(24, lambda old: bytes([old[0] ^ 1])), "its capacity, retention or time"),
    "the clock": (_written(40, lambda old: struct.pack("<Q", 0)), "its clock went back"),
}  # fmt: skip


async def _tampered(path: Path, tamper: Tamper, *, late: bool = False) -> None:
    """Make a region with 51 records, and change it through the volume that it lies in."""
    async with nbdvde.open_image(path, key=KEY) as image:
        worm = await made(image, 1000, DAY_NS)
        area = await image.regions.area(image.disk())
        for number in range(48):
            await worm.append(b"%d" % number)
        log = await area.read(FORM, 0, 2)
        for number in range(2):
            await worm.append(b"%d" % number)
        if not late:
            log = await area.read(FORM, 0, 2)
        start = area.get(FORM).start
        image.regions.forget(Worm, image.disk())
        await tamper(image, start, log)


@pytest.mark.parametrize("name", TAMPERED)
async def test_what_is_changed_behind_its_back_is_found(path: Path, clock: Clock, name: str) -> None:
    tamper, why = TAMPERED[name]
    clock.step_ns = 1
    await _tampered(path, tamper)
    await _found_damaged(path, why)


async def test_an_older_copy_put_back_is_found(path: Path) -> None:
    await _tampered(path, _older, late=True)
    await _found_damaged(path, "is an older copy of itself")


async def _found_damaged(path: Path, why: str) -> None:
    """On opening, by a check, and by whoever asks; and nothing of the disk can be given up meanwhile."""
    report = nbdvde.check_image(path, key=KEY)
    assert [error.where for error in report.errors] == ["region RDIR of disk, WORM"]
    assert why in report.errors[0].what
    async with nbdvde.open_image(path, key=KEY) as image:
        assert image.regions.loaded(Worm, image.disk().number) is None
        with pytest.raises(DamageError, match=why):
            await image.regions.get(Worm, image.disk())
        await image.volumes.create("other", SIZE)
        with pytest.raises(RefusedError, match="what it retains cannot be read"):
            await image.volumes.delete("disk")
    async with nbdvde.open_image(path, key=KEY, read_only=True) as image:
        with pytest.raises(DamageError, match=why):
            await image.regions.get(Worm, image.disk())


async def test_a_clock_that_went_back_is_found(path: Path, clock: Clock) -> None:
    await test_what_is_changed_behind_its_back_is_found(path, clock, "the clock")


async def test_changed_data_is_found(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        worm = await made(image)
        await worm.append(b"a" * BLOCK)
        await worm.append(b"b" * BLOCK)
        start = (await image.regions.area(image.disk())).get(FORM).start + worm.header.log_blocks
        await _volume(image).write_together({start + 1: b"c" * BLOCK})
        with pytest.raises(DamageError, match="the data at block 1 is not what was appended"):
            await worm.verify()
    [error] = nbdvde.check_image(path, key=KEY).errors
    assert error.what == "the data of record 2 is not what was appended"


# Retention


async def refused(work: Callable[[], Awaitable[object]], why: str = "is retained for") -> None:
    with pytest.raises(RefusedError, match=f"WORM region of disk disk: {why}"):
        await work()


async def test_nothing_goes_while_it_is_retained(path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        volumes = image.volumes
        worm = await made(image, 10, 30 * DAY_NS)
        await volumes.create("other", SIZE)
        await volumes.snapshot("disk", "s")
        await volumes.clone("disk", "clone")
        for work in (
            worm.delete,
            lambda: volumes.resize("disk", SIZE // 2, discard=True),
            lambda: volumes.rollback("disk@s"),
        ):
            await refused(work, "is retained for 30 days")
        await volumes.delete("clone")
        await volumes.delete("disk@s")
        await refused(lambda: volumes.delete("disk"))
        await volumes.resize("disk", SIZE * 2)
        await volumes.resize("other", SIZE // 2)
    monkeypatch.setattr("time.time_ns", lambda: NOW + 100 * YEAR_NS)
    monkeypatch.setattr("time.time", lambda: (NOW + 100 * YEAR_NS) / 1e9)
    clock.now_ns += 1000 * DAY_NS  # while it is closed
    async with nbdvde.open_image(path, key=KEY) as image:
        worm = await image.regions.get(Worm, image.disk())
        assert worm.clock_ns == 0
        clock.now_ns += 20 * DAY_NS
        await refused(worm.delete, "is retained for 10 days")
    async with nbdvde.open_image(path, key=KEY, read_only=True) as image:
        clock.now_ns += 20 * DAY_NS  # nor while it is only read
        assert (await image.regions.get(Worm, image.disk())).clock_ns == 20 * DAY_NS
    async with nbdvde.open_image(path, key=KEY) as image:
        worm = await image.regions.get(Worm, image.disk())
        clock.now_ns += 10 * DAY_NS - 1
        await refused(lambda: image.volumes.delete("disk"))
        clock.now_ns += 1
        assert worm.left_ns == 0
        await image.volumes.resize("disk", SIZE // 2)
        await worm.delete()
        with pytest.raises(RefusedError, match="was deleted"):
            await worm.append(b"x")
        await image.volumes.delete("disk")


async def test_a_disk_goes_when_the_time_is_over(path: Path, clock: Clock) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        await image.volumes.create("other", SIZE)
        gone = await made(image, retention_ns=1)
        kept = await made(image, disk="other")
        clock.now_ns += 5
        await image.volumes.delete("disk")
        with pytest.raises(RefusedError, match="was deleted"):
            await gone.append(b"x")
        await image.regions.tend()
        assert kept.header.clock_ns == 5
    assert nbdvde.check_image(path, key=KEY).ok


async def test_one_that_cannot_note_the_time_keeps_no_other_from_it(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        await image.volumes.create("other", SIZE)
        first, second = await made(image), await made(image, disk="other")
        clock.now_ns += 5

        async def full() -> None:
            raise NoSpaceError("image", "is full")

        with monkeypatch.context() as patched:
            patched.setattr(first, "tend", full)
            with pytest.raises(NoSpaceError):
                await image.regions.tend()
        assert second.header.clock_ns == 5


@pytest.mark.parametrize("turns", range(5))
async def test_what_is_made_while_its_disk_is_deleted_is_refused_or_keeps_it(path: Path, turns: int) -> None:
    """A region without a disk would be an image that does not open any more."""
    async with nbdvde.open_image(path, key=KEY) as image:
        await image.volumes.create("other", SIZE)
        done = list[str]()

        async def make() -> None:
            with suppress(RefusedError):
                await made(image)
                done.append("made")

        async def delete() -> None:
            with suppress(RefusedError):
                await image.volumes.delete("disk")
                done.append("deleted")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(make if turns % 2 else delete)
            for _ in range(turns // 2 * 20):
                await trio.lowlevel.checkpoint()
            nursery.start_soon(delete if turns % 2 else make)
        assert len(done) == 1
        assert ("disk" in image.disks) is (done == ["made"])
    assert nbdvde.check_image(path, key=KEY).ok
    async with nbdvde.open_image(path, key=KEY) as image:
        assert image.disks == (["disk", "other"] if done == ["made"] else ["other"])


async def test_times_are_those_of_the_retention_clock(path: Path, clock: Clock) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        worm = await made(image)
        clock.now_ns += 50
        assert (await worm.append(b"x")).time_ns == NOW + 50
        clock.now_ns -= 20  # which no clock of this kind does
        assert (await worm.append(b"x")).time_ns == NOW + 50
        clock.now_ns += 5
        await image.regions.tend()
        assert worm.header.clock_ns == 55
    assert nbdvde.check_image(path, key=KEY).ok


async def test_the_clock_is_noted_while_it_is_served(path: Path, clock: Clock, autojump_clock: object) -> None:
    async with nbdvde.open_image(path, key=KEY) as image, trio.open_nursery() as nursery:
        nursery.start_soon(image.regions.keep_tending, 60)
        worm = await made(image)
        clock.now_ns += 7
        with trio.fail_after(100):
            while worm.header.clock_ns != 7:  # noqa: ASYNC110 - until it is noted
                await trio.sleep(1)
        nursery.cancel_scope.cancel()


async def test_for_ever_is_for_ever(path: Path, clock: Clock) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        worm = await made(image, retention_ns=0)
        clock.now_ns += 400 * YEAR_NS
        assert worm.left_ns is None
        await refused(worm.delete, "is retained for ever")
        await refused(lambda: worm.extend(YEAR_NS), "cannot be retained for a shorter time")


async def test_retention_is_extended_and_never_shortened(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        worm = await made(image, retention_ns=DAY_NS)
        await worm.append(b"x")
        await refused(lambda: worm.extend(DAY_NS - 1), "cannot be retained for a shorter time")
        await worm.extend(3 * DAY_NS)
        await worm.extend(0)
    async with nbdvde.open_image(path, key=KEY) as image:
        worm = await image.regions.get(Worm, image.disk())
        assert (worm.left_ns, await worm.verify(), await held(worm)) == (None, 1, [b"x"])
    assert nbdvde.check_image(path, key=KEY).ok


async def test_it_can_be_extended_so_often(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        worm = await made(image, retention_ns=DAY_NS)
        worm._state = replace(worm._state, ledger=replace(worm._state.ledger, about_rules=RULES_MAX))
        await refused(lambda: worm.extend(2 * DAY_NS), "was extended 1023 times")


async def test_the_last_key_stays(path: Path) -> None:
    nbdvde.update_keys(path, lambda area: area.with_slot(KEY, KeyFile(bytes(32)), nbdvde.engine.access.fresh()))

    def without(area: KeyArea) -> KeyArea:
        return replace(area, entries=(None,) * len(area.entries))

    with pytest.raises(RefusedError, match="would be left without a key"):
        nbdvde.update_keys(path, without)
    async with nbdvde.open_image(path, key=KEY) as image:
        with pytest.raises(RefusedError, match="would be left without a key"):
            await image.update_keys(without)


# As a disk


@pytest.fixture
async def disk(path: Path):
    async with nbdvde.open_image(path, key=KEY) as image:
        await made(image, 8)
        found = RegionDisks(image.regions).find(image.disk().number, "worm")
        assert found is not None
        yield found


async def content(disk: Disk, offset: int = 0, length: int | None = None) -> bytes:
    return b"".join(map(bytes, await disk.read(offset, disk.size if length is None else length)))


async def put(disk: Disk, offset: int, data: bytes) -> None:
    """As a session does it."""
    assert not disk.write_nowait(offset, memoryview(data), owned=True)
    await disk.write(offset, memoryview(data), owned=True)


async def test_writes_at_the_mark_are_appends(disk: Disk) -> None:
    assert (disk.size, disk.name, disk.read_only, disk.sequential) == (8 * BLOCK, "disk/worm", False, True)
    await put(disk, 0, b"a" * BLOCK)
    await put(disk, BLOCK, b"b" * 100)  # fills its block up
    await put(disk, 2 * BLOCK, b"c" * 2 * BLOCK)
    await disk.flush()
    whole = b"a" * BLOCK + b"b" * 100 + bytes(BLOCK - 100) + b"c" * 2 * BLOCK
    assert await content(disk) == whole + bytes(4 * BLOCK)
    assert await content(disk, 4000, 200) == whole[4000:4200]
    assert await disk.status("base:allocation", 0, disk.size, 9) == [(4 * BLOCK, 0), (4 * BLOCK, 3)]
    await disk.zero(4 * BLOCK, 2 * BLOCK)
    await put(disk, 6 * BLOCK, b"d")


@pytest.mark.parametrize("offset", [0, BLOCK, 2 * BLOCK - 1])
async def test_below_the_mark_all_is_refused(disk: Disk, offset: int) -> None:
    same = b"a" * 2 * BLOCK
    await put(disk, 0, same)
    for work in (
        lambda: put(disk, offset, same[offset:]), lambda: disk.write(offset, memoryview(b"x")),
        lambda: disk.zero(offset, 1), lambda: disk.trim(offset, 1),
    ):  # fmt: skip
        with pytest.raises(RefusedError, match="cannot be changed"):
            await work()
    for nowait in (lambda: disk.zero_nowait(offset, 1, allocate=True), lambda: disk.trim_nowait(offset, 9 * BLOCK)):
        with pytest.raises(RefusedError, match="cannot be changed"):
            nowait()
    assert await content(disk, 0, 2 * BLOCK) == same
    await put(disk, 2 * BLOCK, b"next")


async def test_just_below_the_mark_is_below_it(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        await made(image, 8)
        disk = RegionDisks(image.regions).find(image.disk().number, "worm")
        assert disk is not None
        await put(disk, 0, b"a" * 2 * BLOCK)
        for offset in (BLOCK, 2 * BLOCK - 1):
            with pytest.raises(RefusedError, match="cannot be changed"):
                disk.write_nowait(offset, memoryview(b"x"), owned=True)


@pytest.mark.parametrize("offset", [2 * BLOCK + 1, 3 * BLOCK])
async def test_beyond_the_mark_all_is_refused(disk: Disk, offset: int) -> None:
    await put(disk, 0, b"a" * 2 * BLOCK)
    for work in (lambda: put(disk, offset, b"x"), lambda: disk.zero(offset, 1), lambda: disk.trim(offset, 1)):
        with pytest.raises(RequestError, match="is not the mark, 8192"):
            await work()
    with pytest.raises(RequestError, match="is not the mark"):
        await disk.trim(2 * BLOCK, 1)
    assert not any(await content(disk, 2 * BLOCK, BLOCK))


async def test_writes_sent_at_once_are_appended_in_the_order_they_came(disk: Disk) -> None:
    for number in range(8):
        assert not disk.write_nowait(number * BLOCK, memoryview(b"%d" % number * BLOCK), owned=False)
    async with trio.open_nursery() as nursery:
        for number in reversed(range(8)):
            nursery.start_soon(disk.write, number * BLOCK, memoryview(b"%d" % number * BLOCK))
    assert await content(disk) == b"".join(b"%d" % number * BLOCK for number in range(8))


async def test_what_comes_behind_a_write_that_failed_fails_too(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[type[BaseException]] = []

    async def write(number: int) -> None:
        try:
            await disk.write(number * BLOCK, memoryview(b"x" * BLOCK))
        except NbdvdeError as error:
            failed.append(type(error))

    async def full(*_: object) -> None:
        monkeypatch.undo()
        raise NoSpaceError("image", "its capacity is used up")

    monkeypatch.setattr(Worm, "put", full)
    for number in range(3):
        assert not disk.write_nowait(number * BLOCK, memoryview(b"x" * BLOCK), owned=False)
    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(write, number)
    assert sorted(error.__name__ for error in failed) == ["NoSpaceError", "RequestError", "RequestError"]
    await put(disk, 0, b"again")


async def test_a_client_that_goes_leaves_no_gap(disk: Disk) -> None:
    for number in range(2):
        assert not disk.write_nowait(number * BLOCK, memoryview(b"x" * BLOCK), owned=False)
    with trio.move_on_after(0):
        await disk.write(0, memoryview(b"x" * BLOCK))
    with pytest.raises(RequestError):
        await disk.write(BLOCK, memoryview(b"x" * BLOCK))
    await put(disk, 0, b"again")


async def test_who_appends_meanwhile_comes_before_or_is_refused(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        worm = await made(image, 8)
        disk = RegionDisks(image.regions).find(image.disk().number, "worm")
        assert disk is not None
        assert not disk.write_nowait(0, memoryview(b"x"), owned=False)
        await worm.append(b"y")
        with pytest.raises(RefusedError, match="was appended to by somebody else"):
            await disk.write(0, memoryview(b"x"))
        await put(disk, BLOCK, b"z")
        assert await held(worm) == [b"y", b"z"]


# Salvaging


@pytest.mark.parametrize(("days", "lost"), [(30, False), (30, True), (1, True)])
async def test_nothing_is_salvaged_without_what_is_retained(
    tmp_path: Path, clock: Clock, days: int, lost: bool
) -> None:
    path, saved = tmp_path / "plain.vde", tmp_path / "saved.vde"
    nbdvde.create_image(path, SIZE, secret=None, compression="none")
    data = b"where it lies" * 300
    async with nbdvde.open_image(path) as image:
        worm = await made(image, 10, days * DAY_NS)
        await worm.append(data)
        clock.now_ns += 2 * DAY_NS
        await worm.tend()
    if lost:
        content = path.read_bytes()
        at = content.index(data)
        path.write_bytes(content[:at] + b"W" + content[at + 1 :])
    if lost and days > 2:
        with pytest.raises(RefusedError, match="disk disk: has a WORM region under retention that cannot be saved"):
            await nbdvde.salvage_image(path, saved)
        assert not saved.exists()
    else:
        assert (await nbdvde.salvage_image(path, saved)).ok is not lost
        async with nbdvde.open_image(saved) as image:
            assert (await image.regions.get(Worm, image.disk())).appends == 1


@pytest.mark.parametrize("days", [None, 30, 1])
async def test_nothing_is_salvaged_that_may_be_retained(tmp_path: Path, clock: Clock, days: int | None) -> None:
    """Nothing leads to the regions any more; where they begin can still be looked at."""
    path, saved = tmp_path / "plain.vde", tmp_path / "saved.vde"
    nbdvde.create_image(path, SIZE, secret=None, compression="none", extent_bytes=BLOCK)
    async with nbdvde.open_image(path) as image:
        if days:
            worm = await made(image, 10, days * DAY_NS)
            clock.now_ns += 2 * DAY_NS
            await worm.tend()
        await Stream.create(image.regions, image.disk(), 4)
    async with nbdvde.open_image(path, read_only=True) as image:
        directory = b"".join(map(bytes, await _volume(image).read(0, BLOCK)))
    content = path.read_bytes()
    at = content.rindex(directory)
    path.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
    wheres = [error.where for error in nbdvde.check_image(path).errors]
    assert wheres[-1] == "region RDIR of disk, directory"
    if days == 30:
        with pytest.raises(RefusedError, match="disk disk: has a WORM region under retention that cannot be saved"):
            await nbdvde.salvage_image(path, saved)
        assert not saved.exists()
        return
    report = await nbdvde.salvage_image(path, saved)
    names = "WORM region, stream" if days else "stream"
    assert (report.ok, report.repaired) == (False, [])
    assert report.errors[-1].what == f"cannot be read, lost with it: {names}"
    async with nbdvde.open_image(saved) as image:
        assert (await Stream.create(image.regions, image.disk(), 4)).head == 0
    assert nbdvde.check_image(saved).ok
