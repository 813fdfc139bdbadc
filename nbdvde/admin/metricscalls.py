"""Metrics logs: making one, which series it has, and what they say."""

from collections.abc import AsyncGenerator, Iterator

import msgspec
import numpy as np

from nbdvde.admin.calls import Call, Feed
from nbdvde.engine.image import Image
from nbdvde.engine.managed.metricslog import MetricsLog
from nbdvde.engine.regions.metriclist import description_of, name_of, number_of, unit_of
from nbdvde.engine.regions.query import TIME_MAX, Answer, Question, Series
from nbdvde.engine.regions.samples import AGGREGATIONS
from nbdvde.engine.regions.tiers import CAPACITY, THRESHOLD
from nbdvde.errors import UsageError

SHARES = (0.5, 0.95, 0.99)
"""Of the percentiles that are told."""


class CreateMetrics(msgspec.Struct, frozen=True):
    """A log to be made."""

    disk: str | None = None
    """The first one without."""
    capacity: int = CAPACITY
    """Bytes that it may take: 256 KiB to 1 GiB, a multiple of 4096."""
    threshold: float = THRESHOLD
    """Part of the room for samples that is filled before the oldest are taken together in windows."""


class SeriesInfo(msgspec.Struct, frozen=True):
    """A series of a log. Times are nanoseconds since 1970-01-01 UTC."""

    metric: str
    """Its name, or number."""
    number: int
    aggregation: str
    unit: str
    description: str
    samples: int
    first_ns: int
    last_ns: int


class MetricsInfo(msgspec.Struct, frozen=True):
    """A log, and the series it has."""

    disk: str
    capacity: int
    """Bytes."""
    used: int
    """Bytes of blocks in use."""
    samples: int
    """Those in windows included."""
    series: list[SeriesInfo]


class MetricsRequest(msgspec.Struct, frozen=True):
    """What is to be looked at."""

    disk: str | None = None


class ReadMetrics(msgspec.Struct, frozen=True):
    """What is asked of a log."""

    disk: str | None = None
    metrics: list[str] = []
    """Names or numbers; all that there are without."""
    since_ns: int = 0
    until_ns: int = TIME_MAX
    resolution_ns: int = 0
    """Length of windows; 0 for samples as they came, 2^64 - 1 for one window of the whole range. What is kept in longer
    windows comes in those."""
    last: int | None = None
    """Only so many of each series, the newest."""


class Point(msgspec.Struct, frozen=True):
    """A window of a series, or a sample, which is one of length 0."""

    time_ns: int
    """Its begin."""
    length_ns: int
    count: int
    mean: float
    minimum: float
    maximum: float
    p50: float
    p95: float
    p99: float


class SeriesPoints(msgspec.Struct, frozen=True):
    """A series, in the order of time."""

    metric: str
    number: int
    aggregation: str
    unit: str
    description: str
    points: list[Point]


async def _log(image: Image, disk: str | None) -> MetricsLog:
    return await image.regions.get(MetricsLog, image.disk(disk))


async def create(image: Image, asked: CreateMetrics) -> MetricsInfo:
    """Make the metrics log of a disk."""
    await MetricsLog.create(await image.regions.area(image.disk(asked.disk)), asked.capacity, asked.threshold)
    return await list_series(image, MetricsRequest(asked.disk))


async def list_series(image: Image, asked: MetricsRequest) -> MetricsInfo:
    """The series in the metrics log of a disk."""
    log = await _log(image, asked.disk)
    history = log.history
    series = [
        SeriesInfo(
            name_of(key.metric), key.metric, AGGREGATIONS[key.aggregation], unit_of(key.metric),
            description_of(key.metric), *extent,
        )
        for key, extent in (await log.series()).items()
    ]  # fmt: skip
    return MetricsInfo(image.disk(asked.disk).name, history.capacity, history.used_bytes, history.samples, series)


async def delete(image: Image, asked: MetricsRequest) -> MetricsInfo:
    """Give up the metrics log of a disk, with all it has; answers what that was."""
    had = await list_series(image, asked)
    await (await _log(image, asked.disk)).delete()
    return had


async def read(image: Image, asked: ReadMetrics) -> AsyncGenerator[SeriesPoints, None]:
    """What the metrics log of a disk says: a line for each series."""
    _check(asked)
    log = await _log(image, asked.disk)
    wanted = {number_of(name) for name in asked.metrics}
    for series in await log.series():
        if series.metric in wanted or not wanted:
            question = Question(series, asked.since_ns, asked.until_ns, asked.resolution_ns, asked.last)
            [answer] = await log.ask([question])
            yield _points(series, answer)


def _check(asked: ReadMetrics) -> None:
    if not 0 <= asked.resolution_ns <= TIME_MAX:
        raise UsageError(f"resolution {asked.resolution_ns}", "is no length of time in nanoseconds")
    if not 0 <= asked.since_ns <= asked.until_ns <= TIME_MAX:
        raise UsageError(f"range {asked.since_ns} to {asked.until_ns}", "is none in nanoseconds since 1970")
    if asked.last is not None and asked.last < 1:
        raise UsageError(f"last {asked.last}", "is no number of values")


def _points(series: Series, answer: Answer) -> SeriesPoints:
    number, aggregation = series
    return SeriesPoints(
        name_of(number), number, AGGREGATIONS[aggregation], unit_of(number), description_of(number),
        list(_each(answer)),
    )  # fmt: skip


def _each(answer: Answer) -> Iterator[Point]:
    windows, widths = answer.windows, answer.widths_ns
    if not len(windows):
        return
    rows = windows.rows
    means = np.clip(np.nan_to_num(rows["sum"] / rows["count"]), rows["minimum"], rows["maximum"])
    columns = (rows["start"], widths, rows["count"], means, rows["minimum"], rows["maximum"])
    percentiles = (windows.quantiles(share) for share in SHARES)
    for values in zip(*(column.tolist() for column in (*columns, *percentiles)), strict=True):
        yield Point(*values)


CREATE = Call("metrics/create", CreateMetrics, MetricsInfo, create)
LIST = Call("metrics/list", MetricsRequest, MetricsInfo, list_series, changes=False, here=True)
READ = Feed("metrics/read", ReadMetrics, SeriesPoints, read, here=True)
DELETE = Call("metrics/delete", MetricsRequest, MetricsInfo, delete)
CALLS = (CREATE, LIST, READ, DELETE)
