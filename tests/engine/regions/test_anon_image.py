"""The anonymisation table in an open image: mapped, found again, erased for good, and nobody else touched."""

import errno
import random
from pathlib import Path

import pytest
import trio

import nbdvde
from nbdvde import MasterKey
from nbdvde.engine.access import open_storage
from nbdvde.engine.image import Image
from nbdvde.engine.layout import SUBJECT_KEYS
from nbdvde.engine.managed import subjects
from nbdvde.engine.managed.anon import AnonTable
from nbdvde.engine.regions.anon import ERASED
from nbdvde.engine.subjectkeys import HEADS
from nbdvde.errors import DamageError, NoSpaceError, PoisonedError, RefusedError, UsageError
from tests.crash.recording import RecordingStorage
from tests.crash.session import KEY as MASTER
from tests.crash.test_erasure import NOW, ONE, TWO, VALUES, Made, fresh, table_of
from tests.engine.regions.adversary import entries

KEY = MasterKey(MASTER.data)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "image.vde"
    nbdvde.create_image(path, 1 << 20, secret=KEY, segment_bytes=256 << 10)
    return path


async def made(image: Image, capacity: int = 64 << 10, disk: str | None = None) -> AnonTable:
    await AnonTable.create(await image.regions.area(image.disk(disk)), capacity)
    return await image.regions.get(AnonTable, image.disk(disk))


async def test_a_life(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        assert not image.superblock.incompatible & SUBJECT_KEYS
        table = await made(image)
        assert image.superblock.incompatible & SUBJECT_KEYS
        first = await table.map(ONE, 1, b"value", NOW, fresh(1))
        assert await table.map(ONE, 1, b"value", NOW + 1, fresh(2)) == first
        second = await table.map(ONE, 2, b"value", NOW, fresh(3))
        other = await table.map(TWO, 1, b"value", NOW, fresh(4))
        assert first.hash == second.hash != other.hash
        assert len({first.token, second.token, other.token}) == 3
        assert await table.look_up(ONE, b"value") == [first, second]
        assert await table.look_up(ONE, b"another") == []
        assert table.by_id(other.id) == table.by_token(other.token) == other
        with pytest.raises(UsageError, match="subject: has no mappings"):
            await table.look_up(b"nobody at all 12", b"value")
        with pytest.raises(UsageError, match="was not erased"):
            table.proof(ONE)
    assert nbdvde.check_image(path, key=KEY).ok
    async with nbdvde.open_image(path, key=KEY) as image:
        table = await table_of(image)
        proof = await table.erase(ONE, NOW + 5)
        assert await table.erase(ONE, NOW + 6) == proof
        for refused in (table.map(ONE, 1, b"new", NOW, fresh(9)), table.look_up(ONE, b"value")):
            with pytest.raises(RefusedError, match="subject: was erased"):
                await refused
        with pytest.raises(UsageError, match="subject: has no mappings"):
            await table.erase(b"nobody at all 12", NOW)
    assert nbdvde.check_image(path, key=KEY).ok
    async with nbdvde.open_image(path, key=KEY, read_only=True) as image:
        table = await table_of(image)
        assert table.proof(ONE) == proof
        assert await table.doubts(ONE) == []
        assert [record.flags for record in table.mappings(ONE)] == [ERASED] * 2
        assert await table.look_up(TWO, b"value") == [other]
        with pytest.raises(RefusedError, match="reading only"):
            await table.map(TWO, 1, b"new", NOW, fresh(9))


async def test_more_subjects_than_fit_at_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subjects, "_BLOCKS", 1)
    async with nbdvde.open_image(path, key=KEY) as image:
        table = await made(image)
        kept = image.segments.kept_bytes
        for number in range(1, 150):
            await table.map(number.to_bytes(16, "big"), 1, b"value", NOW, fresh(number))
        assert image.segments.kept_bytes == 4 * kept
        await image.disk().write(0, memoryview(bytes(range(256)) * 64))
        await image.checkpoint()
    assert nbdvde.check_image(path, key=KEY).ok
    async with nbdvde.open_image(path, key=KEY) as image:
        table = await table_of(image)
        assert image.segments.kept_bytes == 4 * kept
        for number in range(1, 150):
            assert len(await table.look_up(number.to_bytes(16, "big"), b"value")) == 1
        await table.erase((149).to_bytes(16, "big"), NOW)
        image.segments.space.check()


async def test_keys_and_segments_do_not_meet(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        await (await made(image)).map(ONE, 1, b"value", NOW, fresh(1))
    async with nbdvde.open_image(path, key=KEY) as image:
        for number in range(4):
            await image.disk().write(0, memoryview(random.Random(number).randbytes(1 << 20)))
            await image.flush()
            await image.checkpoint()
    async with nbdvde.open_image(path, key=KEY) as image:
        assert len(await (await table_of(image)).look_up(ONE, b"value")) == 1


async def test_tables_of_two_disks_keep_apart(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        await image.volumes.create("other", 1 << 20)
        table, other = await made(image), await made(image, disk="other")
        await table.map(ONE, 1, b"value", NOW, fresh(1))
        await other.map(ONE, 1, b"value", NOW, fresh(2))
        await table.erase(ONE, NOW)
        assert len(await other.look_up(ONE, b"value")) == 1
        await other.erase(ONE, NOW)
        assert (await table.doubts(ONE), await other.doubts(ONE)) == ([], [])


async def test_keys_of_a_deleted_disk_go_with_it(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        await image.volumes.create("other", 1 << 20)
        table, other = await made(image), await made(image, disk="other")
        await table.map(ONE, 1, b"value", NOW, fresh(1))
        await other.map(TWO, 1, b"value", NOW, fresh(2))
        uuid = image.superblock.uuid
        await image.volumes.delete("other")
        assert {entry.subject for entry in entries(await trio.Path(path).read_bytes(), KEY.data, uuid)} == {ONE}
        assert len(await table.look_up(ONE, b"value")) == 1
    assert nbdvde.check_image(path, key=KEY).ok


async def test_a_full_table_can_still_be_erased(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        table = await made(image, 4096)
        for number in range(1, 36):
            await table.map(ONE, 1, b"%d" % number, NOW, fresh(number))
        with pytest.raises(NoSpaceError, match="its 4096 bytes are full"):
            await table.map(TWO, 1, b"value", NOW, fresh(99))
        await table.map(ONE, 1, b"last", NOW, fresh(36))
        with pytest.raises(NoSpaceError, match="its 4096 bytes are full"):
            await table.map(ONE, 1, b"too many", NOW, fresh(37))
        await table.erase(ONE, NOW)
        assert await table.doubts(ONE) == []
    assert nbdvde.check_image(path, key=KEY).ok


async def test_a_check_finds_damaged_keys_and_repair_mends_them(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        await (await made(image)).map(ONE, 1, b"value", NOW, fresh(1))
    with path.open("r+b") as file:
        file.seek(HEADS[1] + 80)
        file.write(b"damage")
    [error] = nbdvde.check_image(path, key=KEY).errors
    assert (error.where, error.what) == (f"subject keys at byte {HEADS[1]}", "its checksum is wrong")
    assert (await nbdvde.repair_image(path, key=KEY)).ok
    with path.open("r+b") as file:
        for offset in HEADS:
            file.seek(offset + 80)
            file.write(b"damage")
    assert not nbdvde.check_image(path, key=KEY).ok
    async with nbdvde.open_image(path, key=KEY) as image:
        table = await table_of(image)
        assert len(list(table.mappings())) == 1
        with pytest.raises(DamageError, match="subject keys: both copies are damaged"):
            await table.look_up(ONE, b"value")
        await image.disk().write(0, memoryview(bytes(4096)))


@pytest.mark.parametrize("operation", ["write", "sync"])
async def test_after_a_failed_write_nothing_is_acknowledged(operation: str) -> None:
    """Whatever was reached when the device failed, an erasure is finished by whoever opens the image next."""
    before = await Made.make()
    seen = set[bool]()
    for after in range(5):
        storage, calls = RecordingStorage(before.image), 0
        image = await open_storage(storage, MASTER)
        table = await table_of(image)

        def fault(asked: str, limit: int = after) -> int | None:
            nonlocal calls
            calls += asked == operation
            return errno.EIO if asked == operation and calls > limit else None

        storage.fault = fault
        with pytest.raises(PoisonedError):
            await table.erase(ONE, NOW)
        with pytest.raises(PoisonedError):
            await table.map(TWO, 1, b"new", NOW, fresh(500))
        storage.fault = lambda _: None
        with pytest.raises(PoisonedError):
            await image.close()
        image = await open_storage(reopened := RecordingStorage(bytes(storage.image)), MASTER)
        table = await table_of(image)
        seen.add(bool(table.proofs))
        assert len(await table.look_up(TWO, VALUES[TWO])) == 1
        assert before.leaks(bytes(reopened.image)) != bool(table.proofs)
        await image.close()
    assert seen == {False, True}
