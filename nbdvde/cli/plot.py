"""Metrics as a plot of characters: bars for the mean, a dot for the maximum; no colours needed."""

from collections.abc import Iterator, Sequence

from nbdvde.admin.metricscalls import Point, SeriesPoints
from nbdvde.cli.quantities import amount, nice_ticks, time_text, time_ticks

_BARS = " ▁▂▃▄▅▆▇█"
_ASCII_BARS = " ...:::##"
LABEL = 12
"""Columns of the labels on the left, with the axis."""


def plot(
    series: SeriesPoints, since_ns: int, until_ns: int, *, width: int = 80, height: int = 10, ascii_only: bool = False
) -> Iterator[str]:  # fmt: skip
    """Lines of at most `width` characters."""
    unit = f" ({series.unit})" if series.unit else ""
    kind = "" if series.aggregation == "raw" else f", {series.aggregation}"
    yield f"{series.metric}{kind}{unit}"[:width]
    if not series.points:
        yield f"  {newest(series)}"
        return
    columns = width - LABEL
    means, tops = _columns(series.points, since_ns, until_ns, columns)
    low = min(0.0, *(value for value in means if value is not None))
    high = max(value for value in tops if value is not None)
    ticks = nice_ticks(low, high, 5, 1024 if series.unit.startswith("bytes") else 10)
    rows = _Rows(ticks[0], ticks[-1], height, _ASCII_BARS if ascii_only else _BARS, "'" if ascii_only else "˙")
    labels = {rows.row(tick): amount(tick, series.unit)[: LABEL - 2] for tick in ticks}
    side, corner, tick_mark = ("|", "+", "+") if ascii_only else ("┤", "└", "┴")
    plain = "|" if ascii_only else "│"
    for row in range(height, 0, -1):
        label = labels.get(row, "")
        body = "".join(map(rows.cell, [row] * columns, means, tops)).rstrip()
        yield f"{label:>{LABEL - 2}} {side if label else plain}{body}".rstrip()
    yield from _axis(since_ns, until_ns, columns, f"{labels.get(0, ''):>{LABEL - 2}} {corner}", tick_mark, ascii_only)
    yield f"{'':{LABEL}}{'#' if ascii_only else '█'} mean  {rows.dot} maximum   {newest(series)}"[:width]


def newest(series: SeriesPoints) -> str:
    """What is known last: a sample, or the mean of a window."""
    if not series.points:
        return "no samples in this time"
    point = series.points[-1]
    mean = amount(point.mean, series.unit)
    if point.length_ns:
        return f"mean {mean} since {time_text(point.time_ns)}"
    return f"newest {mean} at {time_text(point.time_ns)}"


def _columns(
    points: Sequence[Point], since_ns: int, until_ns: int, columns: int
) -> tuple[list[float | None], list[float | None]]:
    """The mean and the maximum of each column, None where nothing is known."""
    sums, counts, tops = [0.0] * columns, [0] * columns, list[float | None]([None] * columns)
    span = max(1, until_ns - since_ns)
    for point in points:
        first = (point.time_ns - since_ns) * columns // span
        last = (point.time_ns + max(0, point.length_ns - 1) - since_ns) * columns // span
        for column in range(max(0, first), min(columns - 1, last) + 1):
            sums[column] += point.mean * point.count
            counts[column] += point.count
            known = tops[column]
            tops[column] = point.maximum if known is None else max(known, point.maximum)
    return [total / count if count else None for total, count in zip(sums, counts, strict=True)], tops


class _Rows:
    """Values as heights: row 1 is the lowest one."""

    def __init__(self, low: float, high: float, rows: int, bars: str, dot: str) -> None:
        self._low, self._scale, self._bars, self.dot = low, rows / (high - low), bars, dot

    def row(self, value: float) -> int:
        """The row that a value reaches the top of."""
        return round((value - self._low) * self._scale)

    def cell(self, row: int, mean: float | None, top: float | None) -> str:
        """What stands in a row of a column."""
        if mean is None or top is None:
            return " "
        eighths = round((mean - self._low) * self._scale * 8) - (row - 1) * 8
        if eighths > 0:
            return self._bars[min(eighths, 8)]
        at = max(1, min(-(-(top - self._low) * self._scale // 1), 1e9))
        return self.dot if top > mean and int(at) == row else " "


def _axis(
    since_ns: int, until_ns: int, columns: int, begin: str, mark: str, ascii_only: bool
) -> Iterator[str]:  # fmt: skip
    line, names = ["-" if ascii_only else "─"] * columns, [" "] * (columns + 8)
    free = -1
    for time, name in time_ticks(since_ns, until_ns, columns // 10):
        column = min(columns - 1, (time - since_ns) * columns // max(1, until_ns - since_ns))
        line[column] = mark
        start = max(0, min(column - len(name) // 2, columns - len(name)))
        if start > free:
            names[start : start + len(name)] = name
            free = start + len(name)
    yield begin + "".join(line)
    yield " " * LABEL + "".join(names).rstrip()
