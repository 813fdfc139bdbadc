"""The regions that version 1 of the format wrote are read by every later version, and stay sound when used."""

import shutil
from pathlib import Path

import pytest

from nbdvde import AnonTable, MetricsLog, Stream, Vault, Worm, open_image
from nbdvde.engine.access import check_image
from nbdvde.engine.image import Image
from nbdvde.engine.regions.query import Question
from nbdvde.errors import RefusedError
from tools.region_fixture import (
    ERASED,
    KEPT,
    KEY,
    METRIC,
    NAME,
    NOW_NS,
    SAMPLES,
    SIGNER,
    STREAM,
    VALUE,
    WORM,
    passport,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A copy."""
    return Path(shutil.copy(Path(__file__).parents[2] / "fixtures" / NAME, tmp_path))


def content(path: Path) -> bytes:
    """Of the file."""
    return path.read_bytes()


async def compare(image: Image) -> None:
    """Everything is as it was written."""
    disk, regions = image.disk(), image.regions
    stream = await regions.get(Stream, disk)
    entries = await stream.read(stream.ring.tail, 32)
    assert entries == list(enumerate(STREAM))[-32:]
    worm = await regions.get(Worm, disk)
    assert [await worm.content(record) for record in await worm.records()] == WORM
    assert await worm.verify() == len(WORM)
    vault = await regions.get(Vault, disk)
    [entry] = vault.query()
    assert entry.passport == passport(image)
    assert not entry.flaw(SIGNER.public_key(), NOW_NS)
    table = await regions.get(AnonTable, disk)
    [mapping] = await table.look_up(KEPT, VALUE)
    assert table.by_token(mapping.token) == mapping
    assert not await table.doubts(ERASED)
    with pytest.raises(RefusedError, match="was erased"):
        await table.look_up(ERASED, VALUE)
    metrics = await regions.get(MetricsLog, disk)
    [series] = [series for series in await metrics.series() if series.metric == METRIC]
    [answer] = await metrics.ask([Question(series)])
    assert answer.windows.rows["sum"].tolist() == [float(at) for at in range(SAMPLES)]


async def test_regions_read_as_they_were_written(path: Path) -> None:
    before = content(path)
    async with open_image(path, key=KEY, read_only=True) as image:
        await compare(image)
    report = check_image(path, key=KEY)
    assert report.ok, report.errors
    assert content(path) == before, "reading changes nothing"


async def test_regions_can_be_used(path: Path) -> None:
    async with open_image(path, key=KEY) as image:
        await compare(image)
        await (await image.regions.get(Stream, image.disk())).append(b"more")
        await (await image.regions.get(Worm, image.disk())).append(b"more")
        await (await image.regions.get(AnonTable, image.disk())).erase(KEPT, NOW_NS)
        await image.clean(0.05)
        with pytest.raises(RefusedError):
            await (await image.regions.get(Worm, image.disk())).delete()
    report = check_image(path, key=KEY)
    assert report.ok, report.errors
