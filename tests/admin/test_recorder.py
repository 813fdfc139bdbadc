"""A served image records what it does, and nothing while nothing happens."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

import nbdvde
from nbdvde import MetricsLog
from nbdvde.admin.recorder import Recorder
from nbdvde.engine.image import Image
from nbdvde.engine.regions.metriclist import METRICS, OWN, number_of
from nbdvde.engine.regions.query import Question, Series
from nbdvde.errors import NoSpaceError
from nbdvde.exports import Export, Exports
from nbdvde.metrics import COMMANDS, Histogram, Traffic
from nbdvde.server import Server

READ, WRITE, FLUSH = (COMMANDS.index(name) for name in ("read", "write", "flush"))
NOW_NS = 1_700_000_000 * 10**9


class Clock:
    """The wall clock, ten seconds further each time."""

    def __init__(self) -> None:
        self.now_ns = NOW_NS

    def __call__(self) -> int:
        self.now_ns += 10 * 10**9
        return self.now_ns


@asynccontextmanager
async def recording(folder: Path, *, region: bool = True) -> AsyncIterator[tuple[Image, Export, Recorder]]:
    """An image with an export that nobody serves, and a recorder."""
    nbdvde.create_image(folder / "image.vde", 1 << 20, secret=None, segment_bytes=256 << 10)
    async with nbdvde.open_image(folder / "image.vde") as image:
        if region:
            await MetricsLog.create(await image.regions.area(image.disk()), 1 << 20)
        export = Export("disk", image.disk())
        server = Server(Exports([export]))
        yield image, export, Recorder(image, server, lambda: [export], Clock())


def use(export: Export, count: int = 4) -> None:
    """What clients asked for, as the server counts it."""
    traffic = Traffic()
    for command in (READ, WRITE, FLUSH):
        traffic.requests[command] = count
        traffic.request_bytes[command] = 4096 * count if command != FLUSH else 0
        traffic.latency(command).add(2_000_000, count)
    export.traffic.merge(traffic)


async def last(image: Image, name: str) -> list[float]:
    """Every value of a metric."""
    log = await image.regions.get(MetricsLog, image.disk())
    [answer] = await log.ask([Question(Series(number_of(name)))])
    values: list[float] = answer.windows.rows["sum"].tolist()
    return values


async def test_rates_latencies_and_space_are_recorded(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with recording(tmp_path) as (image, export, recorder):
        await recorder.record()
        await trio.sleep(10)
        use(export, 40)
        await image.disk().write(0, memoryview(b"some text " * 4096)[:40960])
        await image.flush()
        await recorder.record()
        assert await last(image, "read_requests") == [4.0]
        assert await last(image, "write_bytes") == [16384.0]
        assert await last(image, "read_latency_p99") == pytest.approx([0.002], rel=0.15)
        assert await last(image, "clients") == [0.0]
        [ratio] = await last(image, "compression_ratio")
        assert ratio > 1
        assert (await last(image, "file_bytes"))[0] > 0
        assert len(await last(image, "sync_time_p99")) == 1
        await trio.sleep(20)
        use(export, 40)
        await recorder.record()
        assert await last(image, "read_requests") == [4.0, 2.0]


async def test_nothing_is_recorded_while_nothing_happens(tmp_path: Path) -> None:
    async with recording(tmp_path) as (image, export, recorder):
        for _ in range(5):
            await recorder.record()
        assert len(await last(image, "clients")) == 1, "that nothing happens is said once"
        use(export)
        await recorder.record()
        for _ in range(5):
            await recorder.record()
        assert len(await last(image, "clients")) == 3
        blocks = (await image.regions.area(image.disk())).volume.active.blocks
        await image.flush()
        await recorder.record()
        assert blocks
        assert not (await image.regions.area(image.disk())).volume.active.blocks


async def test_without_a_log_nothing_is_written(tmp_path: Path) -> None:
    async with recording(tmp_path, region=False) as (image, export, recorder):
        await recorder.record()
        use(export)
        await recorder.record()
        assert not (await image.regions.area(image.disk())).directory.slots
        await MetricsLog.create(await image.regions.area(image.disk()), 1 << 20)
        await recorder.record()
        use(export)
        await recorder.record()
        assert len(await last(image, "clients")) == 1, "a log made meanwhile is used"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (NoSpaceError("image", "its capacity is used up", "trim or delete data"),
         "its metrics are not recorded: image: its capacity is used up (trim or delete data)"),
        (FileNotFoundError(2, "No such file"), "its metrics are not recorded: [Errno 2] No such file"),
        (ZeroDivisionError(), "its metrics are recorded no more: unexpected failure"),
    ],
)  # fmt: skip
async def test_what_goes_wrong_is_told_once_and_ends_nothing(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, error: Exception, told: str,
) -> None:  # fmt: skip
    async def fail(self: MetricsLog, samples: object) -> None:
        raise error

    monkeypatch.setattr(MetricsLog, "append", fail)
    async with recording(tmp_path) as (_, export, recorder), trio.open_nursery() as nursery:
        nursery.start_soon(recorder.run, 10)
        for _ in range(4):
            await trio.sleep(10)
            use(export)
        nursery.cancel_scope.cancel()
    assert [record.message.partition(": ")[2] for record in caplog.records] == [told]


def test_what_was_counted_since() -> None:
    early, late = Histogram(), Histogram()
    early.add(1000, 3)
    late.merge(early)
    late.add(50_000, 2)
    assert late.since(early).count == 2
    assert late.since(early).quantile_ns(0.5) > 40_000
    one, other = Traffic(), Traffic()
    one.requests[READ] = 5
    assert other.since(one) is other, "counting began anew"
    assert one.since(other).requests[READ] == 5


def test_every_metric_has_a_number_of_its_own() -> None:
    assert len({metric.number for metric in METRICS}) == len({metric.name for metric in METRICS}) == len(METRICS)
    assert all(0 < metric.number < OWN for metric in METRICS)
