"""The metrics log of a disk in an open image: what is added is there again, within its capacity."""

from pathlib import Path
from typing import Any

import pytest

import nbdvde
from nbdvde import MasterKey, MetricsLog, Sample
from nbdvde.admin.metricscalls import ReadMetrics, read
from nbdvde.engine.image import Image
from nbdvde.engine.regions.query import Question, Series
from nbdvde.engine.regions.samples import FORM
from nbdvde.engine.regions.tiers import CAPACITY_MIN, DAY_NS
from nbdvde.errors import DamageError, NoSpaceError, RefusedError, UsageError

KEY = MasterKey(bytes(range(32)))
NOW_NS = 1_700_000_000 * 10**9


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "image.vde"
    nbdvde.create_image(path, 64 << 20, secret=KEY, segment_bytes=256 << 10)
    return path


async def make(image: Image, capacity: int = CAPACITY_MIN, threshold: float = 0.8) -> MetricsLog:
    await MetricsLog.create(await image.regions.area(image.disk()), capacity, threshold)
    return await image.regions.get(MetricsLog, image.disk())


def samples(count: int, metrics: int = 5, begin: int = 0) -> list[Sample]:
    return [Sample(n % metrics, NOW_NS + (begin + n) * 10**9, float(n % 97)) for n in range(count)]


async def test_samples_are_there_again(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        log = await make(image)
        for begin in range(0, 6000, 1000):
            await log.append(samples(1000, begin=begin))
        before = log.history
        assert before.tiers[1].ring.used, "some were taken together"
        assert (await image.regions.get(MetricsLog, image.disk())).history is before
    report = nbdvde.check_image(path, key=KEY)
    assert report.ok, report.errors
    async with nbdvde.open_image(path, key=KEY, read_only=True) as image:
        log = await image.regions.get(MetricsLog, image.disk())
        assert log.history.samples == before.samples == 6000
        for found, tier in zip(log.history.tiers, before.tiers, strict=True):
            assert found.ring == tier.ring
            assert found.contents.rows.tobytes() == tier.contents.rows.tobytes()
        [answer] = await log.ask([Question(Series(1), resolution_ns=DAY_NS)])
        assert answer.windows.count == 1200
        with pytest.raises(RefusedError, match="reading only"):
            await log.append(samples(1))


async def test_blocks_of_old_samples_are_given_back(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        log = await make(image)
        for begin in range(0, 30_000, 3000):
            await log.append(samples(3000, begin=begin))
        await image.flush()
        in_use = log.history.used_bytes
        area = await image.regions.area(image.disk())
        assert area.volume.map.mapped * 4096 == in_use + 4096, "the directory is the other block"
        assert in_use <= CAPACITY_MIN


async def test_an_append_of_a_few_samples_writes_two_blocks(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        log = await make(image)
        await log.append(samples(20))
        await image.flush()
        area = await image.regions.area(image.disk())
        await log.append(samples(20))
        assert len(area.volume.active.blocks) == 2


async def test_what_is_not_valid_changes_nothing(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        log = await make(image)
        with pytest.raises(UsageError, match="not finite"):
            await log.append([*samples(3), Sample(1, 1, float("nan"))])
        assert log.history.samples == 0
        await log.append([])
        area = await image.regions.area(image.disk())
        for capacity, threshold in (
            (CAPACITY_MIN - 4096, 0.8),
            (CAPACITY_MIN + 1, 0.8),
            (2 << 30, 0.8),
            (1 << 20, 1.0),
        ):
            with pytest.raises(UsageError, match="is not"):
                await MetricsLog.create(area, capacity, threshold)
        with pytest.raises(RefusedError, match="disk disk: has a metrics log already"):
            await MetricsLog.create(area)


@pytest.mark.parametrize(
    "asked",
    [
        ReadMetrics(resolution_ns=-1), ReadMetrics(resolution_ns=1 << 64), ReadMetrics(since_ns=-1),
        ReadMetrics(since_ns=2, until_ns=1), ReadMetrics(until_ns=1 << 64), ReadMetrics(last=0),
        ReadMetrics(metrics=["nonsense"]), ReadMetrics(metrics=["-1"]), ReadMetrics(disk="other"),
    ],
)  # fmt: skip
async def test_questions_that_make_no_sense_are_refused(path: Path, asked: ReadMetrics) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        await (await make(image)).append(samples(3))
        with pytest.raises(UsageError):
            [_ async for _ in read(image, asked)]


async def test_the_longest_range_and_window(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        await (await make(image)).append([*samples(3, 1), Sample(0, (1 << 64) - 1, 5.0)])
        for resolution in (0, 1, (1 << 64) - 1):
            [series] = [series async for series in read(image, ReadMetrics(resolution_ns=resolution))]
            assert sum(point.count for point in series.points) == 4


async def test_without_space_the_log_is_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        log = await make(image)
        await log.append(samples(1100))
        area, asked = await image.regions.area(image.disk()), 0
        change = area.change

        async def full(*arguments: Any, **options: Any) -> None:
            nonlocal asked
            asked += 1
            if asked in (2, 3):
                raise NoSpaceError("image", "its capacity is used up")
            await change(*arguments, **options)

        monkeypatch.setattr(area, "change", full)
        with pytest.raises(NoSpaceError):
            await log.append(samples(200, begin=1100))
        assert log.history.samples == 1300, "these were there before their windows could be made"
        assert log.history.is_due
        with pytest.raises(NoSpaceError):
            await log.append(samples(1, begin=1300))
        assert log.history.samples == 1300, "it does not fill up meanwhile"
        await log.append(samples(1, begin=1300))
        assert not log.history.is_due
        kept = log.history
    async with nbdvde.open_image(path, key=KEY) as image:
        found = (await image.regions.get(MetricsLog, image.disk())).history
        assert found.samples == kept.samples == 1301
        assert [tier.ring for tier in found.tiers] == [tier.ring for tier in kept.tiers]


async def test_another_one_takes_the_place_of_a_deleted_one(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        old = await make(image)
        await old.append(samples(3000))
        await old.delete()
        with pytest.raises(UsageError, match="has no metrics log"):
            await image.regions.get(MetricsLog, image.disk())
        log = await make(image, 1 << 20)
        with pytest.raises(RefusedError, match="was deleted"):
            await old.append(samples(1))
        await log.append(samples(7))
        assert log.history.samples == 7
    assert nbdvde.check_image(path, key=KEY).ok


async def test_damage_is_found_by_a_check(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        log = await make(image)
        await log.append(samples(300))
        area = await image.regions.area(image.disk())
        block = log.history.tiers[0].ring.place(0)
        await area.change(FORM, {block: FORM.block(b"\xff" * 19, log.history.generation)})
    [error] = nbdvde.check_image(path, key=KEY).errors
    assert (error.where, error.what) == ("region RDIR of disk, MTRK", "has a sample that makes no sense")
    async with nbdvde.open_image(path, key=KEY) as image:
        with pytest.raises(DamageError, match="a sample that makes no sense"):
            await image.regions.get(MetricsLog, image.disk())


async def test_it_is_of_one_disk_and_goes_with_it(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        await image.volumes.create("two", 1 << 20)
        area = await image.regions.area(image.disk("two"))
        await MetricsLog.create(area)
        with pytest.raises(UsageError, match="disk disk: has no metrics log"):
            await image.regions.get(MetricsLog, image.disk())
        await image.volumes.snapshot("two", "then")
        with pytest.raises(UsageError, match="snapshot two@then: has no regions"):
            await image.regions.get(MetricsLog, image.disk("two@then"))
