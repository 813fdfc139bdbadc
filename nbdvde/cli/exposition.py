"""Metrics for other programs: CSV, and the text of OpenMetrics, which Prometheus takes history from."""

import csv
import io
from collections.abc import Iterator
from typing import Any

from nbdvde.admin.metricscalls import Point, SeriesPoints
from nbdvde.cli.quantities import moment

COLUMNS = (
    "time", "length_s", "metric", "aggregation", "unit", "count", "mean", "minimum", "maximum", "p50", "p95", "p99",
)  # fmt: skip
_STATISTICS = ("mean", "minimum", "maximum", "p50", "p95", "p99")


def csv_lines(series: SeriesPoints) -> Iterator[str]:
    """A line for each point, without the one of titles."""
    for point in series.points:
        begin = [moment(point.time_ns).isoformat(), point.length_ns / 1e9]
        names = [series.metric, series.aggregation, series.unit]
        yield _csv([*begin, *names, point.count, *(getattr(point, name) for name in _STATISTICS)])


def csv_titles() -> str:
    """The first line."""
    return _csv(list(COLUMNS))


def _csv(cells: list[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(cells)
    return text.getvalue()


def openmetrics_lines(series: SeriesPoints, disk: str, known: set[str]) -> Iterator[str]:
    """The family of a series; `known` are the names that were told before. `# EOF` comes behind the last.

    Source: OpenMetrics 1.0. What was measured once has the statistic `mean` alone.
    """
    name = f"nbdvde_{series.metric if not series.metric.isdigit() else f'metric_{series.metric}'}"
    if series.aggregation != "raw":
        name += f"_{series.aggregation}"
    if name not in known:
        known.add(name)
        yield f"# TYPE {name} gauge"
        unit = f", in {series.unit}" if series.unit else ""
        yield f"# HELP {name} {series.description}{unit}"
    for statistic in _STATISTICS:
        for time, value in _latest(series.points, statistic):
            yield f'{name}{{disk="{disk}",statistic="{statistic}"}} {value!r} {time // 10**9}.{time % 10**9:09}'


def _latest(points: list[Point], statistic: str) -> Iterator[tuple[int, float]]:
    """(time, value), each time once: of several the last one."""
    values = {
        point.time_ns: float(getattr(point, statistic)) for point in points if statistic == "mean" or point.length_ns
    }
    yield from values.items()
