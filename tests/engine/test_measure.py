"""What `df` tells adds up, and deleting a snapshot frees what is only its own."""

import pytest

from nbdvde.disk import BLOCK
from nbdvde.engine import image
from nbdvde.engine.check import check_storage
from nbdvde.engine.layout import DATA_START
from nbdvde.engine.report import DiskUsage, SpaceReport
from tests.crash.oracle import master_of
from tests.crash.recording import FrozenStorage
from tests.engine.test_cleaner import SIZE, Life, living


@pytest.fixture(autouse=True)
def file_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "file_bytes", lambda path: 7)


async def measured(life: Life) -> SpaceReport:
    report = await life.image.space()
    used = DATA_START + life.image.segments.space.used_bytes
    parts = report.compressed_bytes + report.garbage_bytes + report.overhead_bytes
    assert 0 <= used - parts < used // 2, (
        "what is in use of the file, but for segments not begun and roots not yet freed"
    )
    assert report.logical_bytes == report.unique_bytes + report.shared_bytes
    return report


async def test_one_disk() -> None:
    async with living(level=0) as life:
        await life.write(0, 300)
        report = await measured(life)
        assert report.disks == [DiskUsage("disk", SIZE, 300 * BLOCK, 300 * BLOCK, 0)]
        assert (report.unique_bytes, report.shared_bytes, report.written_bytes) == (300 * BLOCK, 0, 300 * BLOCK)
        assert 300 * BLOCK <= report.compressed_bytes <= 301 * BLOCK
        assert report.garbage_bytes < BLOCK
        assert report.fill < 1
        for block in range(0, 200, 2):
            await life.trim(block, 1)
        report = await measured(life)
        assert report.unique_bytes == 200 * BLOCK
        assert abs(report.garbage_bytes - 100 * BLOCK) < 4 * BLOCK
        assert report.written_bytes == 300 * BLOCK


async def test_a_snapshot_has_what_the_disk_lost() -> None:
    async with living(level=0, capacity=16 << 20) as life:
        await life.write(0, 300)
        await life.image.volumes.snapshot("disk", "old")
        await life.write(50, 100)
        await life.trim(250, 50)
        report = await measured(life)
        assert report.disks == [
            DiskUsage("disk", SIZE, 250 * BLOCK, 100 * BLOCK, 150 * BLOCK),
            DiskUsage("disk@old", SIZE, 300 * BLOCK, 150 * BLOCK, 150 * BLOCK),
        ]
        assert report.unique_bytes == 400 * BLOCK
        assert (report.capacity, report.reserved_bytes) == (16 << 20, 1 << 20)
        assert check_storage(FrozenStorage(bytes(life.storage.image)), master_of).errors == []
        await life.image.clean()
        assert (await measured(life)).disks == report.disks
        await life.image.volumes.delete("disk@old")
        after = await measured(life)
        assert after.disks == [DiskUsage("disk", SIZE, 250 * BLOCK, 250 * BLOCK, 0)]
        assert abs(after.garbage_bytes - report.garbage_bytes - 150 * BLOCK) < 8 * BLOCK
        await life.image.clean()
        cleaned = await measured(life)
        assert cleaned.garbage_bytes < after.garbage_bytes // 3
        assert cleaned.unique_bytes == 250 * BLOCK
        assert await life.holds_everything()


async def test_what_only_an_old_snapshot_keeps_is_found_dead_by_the_mark() -> None:
    async with living(level=0) as life:
        await life.write(0, 512)
        await life.image.volumes.snapshot("disk", "old")
        for turn in range(4):
            await life.write(turn * 64, 192)
            await life.image.checkpoint()
        await life.image.volumes.delete("disk@old")
        before = await measured(life)
        assert before.garbage_bytes > 500 * BLOCK
        await life.image.clean()
        assert (await measured(life)).garbage_bytes < 150 * BLOCK
