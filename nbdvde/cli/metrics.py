"""The commands about metrics logs."""

import time
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from nbdvde.cli import output
from nbdvde.cli.arguments import Control, DiskName, ImageArgument, Json, KeyFile, Overwrite, PngFile, image_at

if TYPE_CHECKING:
    from nbdvde.admin.metricscalls import MetricsInfo, SeriesPoints
    from nbdvde.cli.images import ImageByPath

metrics_app = typer.Typer(
    help="Keep a history of what a served image does, show it, plot it and export it.", rich_markup_mode=None
)

_PLOTTED = ("read_bytes", "write_bytes", "write_latency_p99")
_COLUMNS = 68
"""Of a plot: windows are as long as one of them."""
_POINTS = 400
"""Of a picture."""


class Format(StrEnum):
    """What other programs read."""

    CSV = "csv"
    PROMETHEUS = "prometheus"
    JSON = "json"


Metric = Annotated[
    list[str] | None,
    typer.Option("--metric", metavar="NAME", help="A metric, by name or number; repeatable. [default: all]"),
]
Since = Annotated[str, typer.Option(metavar="TIME", help="From when on: so long ago, like 24h or 7d, or a time (UTC).")]
Until = Annotated[str | None, typer.Option(metavar="TIME", help="Until when, likewise. [default: now]")]
Resolution = Annotated[
    str | None,
    typer.Option(metavar="LENGTH", help="Length of windows, like 1m, 1h, 1d. [default: samples as they came]"),
]


@metrics_app.command("create")
def create(
    image: ImageArgument, disk: DiskName = None,
    capacity: Annotated[str, typer.Option(metavar="SIZE", help="Most that it may take, 256K to 1G.")] = "32M",
    threshold: Annotated[
        float, typer.Option(help="Part of the room for samples that is used before the oldest become windows.")
    ] = 0.8,
    key_file: KeyFile = None, control: Control = None, json: Json = False,
) -> None:  # fmt: skip
    """Make the metrics log of a disk; from then on the server records in it, every 10 s while the disk is used."""
    from nbdvde.admin.metricscalls import CREATE, CreateMetrics
    from nbdvde.config import parse_size

    request = CreateMetrics(disk, parse_size(capacity), threshold)
    made = image_at(image, key_file, control).call(CREATE, request)
    if json:
        output.json(made)


@metrics_app.command("list")
def list_(
    image: ImageArgument, disk: DiskName = None, key_file: KeyFile = None, control: Control = None, json: Json = False
) -> None:
    """List the metrics in a log, how many samples there are of each, and since when."""
    found = _info(image_at(image, key_file, control), disk)
    if json:
        output.json(found)
        return
    from nbdvde.cli.quantities import time_text

    rows: list[tuple[str, ...]] = [("metric", "aggregation", "unit", "samples", "first", "last")]
    for one in found.series:
        times = time_text(one.first_ns), time_text(one.last_ns)
        rows.append((one.metric, one.aggregation, one.unit or "-", str(one.samples), *times))
    output.table(rows)
    output.line(f"{found.samples} samples in {output.size(found.used)} of {output.size(found.capacity)}")


@metrics_app.command("show")
def show(
    image: ImageArgument, metric: Metric = None, since: Since = "24h", until: Until = None,
    resolution: Resolution = None,
    last: Annotated[int | None, typer.Option(metavar="N", min=1, help="Only the newest N. [default: all]")] = None,
    disk: DiskName = None, key_file: KeyFile = None, control: Control = None, json: Json = False,
) -> None:  # fmt: skip
    """Show what was measured: of one metric each value, of several what they came to."""
    from nbdvde.engine.regions.query import WHOLE

    asked = _Asked(image_at(image, key_file, control), disk, metric, since, until)
    one = metric is not None and len(metric) == 1
    sums = not (one or last or json or resolution)
    found = asked.read(resolution, last, WHOLE if sums else None)
    if json:
        output.json({"series": found})
    elif sums:
        _show_sums(found)
    else:
        _show_points(found)


@metrics_app.command("plot")
def plot(
    image: ImageArgument, metric: Metric = None, since: Since = "24h", until: Until = None,
    png: PngFile = None, overwrite: Overwrite = False, disk: DiskName = None, key_file: KeyFile = None,
    control: Control = None,
) -> None:  # fmt: skip
    """Plot metrics in the terminal, or as a picture: bytes read and written and the latency of writes unless named."""
    asked = _Asked(image_at(image, key_file, control), disk, metric or list(_PLOTTED), since, until)
    found = asked.read(None, None, max(1, asked.span_ns // (_POINTS if png else _COLUMNS)))
    if png:
        from nbdvde.cli.chart import chart, title_of
        from nbdvde.cli.pngfile import save

        title = title_of(f"{image.name}, disk {asked.disk_name}", asked.since_ns, asked.until_ns)
        save(chart(found, title, asked.since_ns, asked.until_ns), png, image, overwrite=overwrite)
        return
    from nbdvde.cli.plot import plot as lines

    if not found:
        output.line(f"no samples of {', '.join(metric or _PLOTTED)}")
    ascii_only = not output.prints("█")
    for number, series in enumerate(found):
        if number:
            output.line("")
        for line in lines(series, asked.since_ns, asked.until_ns, ascii_only=ascii_only):
            output.line(line)


@metrics_app.command("export")
def export(
    image: ImageArgument,
    format_: Annotated[Format, typer.Option("--format", help="What to write.")] = Format.CSV,
    metric: Metric = None, since: Since = "1y", until: Until = None, resolution: Resolution = None,
    disk: DiskName = None, key_file: KeyFile = None, control: Control = None,
) -> None:  # fmt: skip
    """Write what was measured to standard output, for other programs; `prometheus` is the text of OpenMetrics."""
    from nbdvde.cli.exposition import csv_lines, csv_titles, openmetrics_lines

    asked = _Asked(image_at(image, key_file, control), disk, metric, since, until)
    found = asked.read(resolution, None, None)
    if format_ is Format.JSON:
        output.json({"series": found})
        return
    known: set[str] = set()
    if format_ is Format.CSV:
        output.line(csv_titles())
    for series in found:
        lines = csv_lines(series) if format_ is Format.CSV else openmetrics_lines(series, asked.disk_name, known)
        output.lines(lines)
    if format_ is Format.PROMETHEUS:
        output.line("# EOF")


@metrics_app.command("delete")
def delete(
    image: ImageArgument, disk: DiskName = None, key_file: KeyFile = None, control: Control = None, json: Json = False
) -> None:
    """Give up the metrics log of a disk with all it has, to make another one or to record no more."""
    from nbdvde.admin.metricscalls import DELETE, MetricsRequest

    had = image_at(image, key_file, control).call(DELETE, MetricsRequest(disk))
    if json:
        output.json(had)


class _Asked:
    """A range of time in the log of a disk."""

    def __init__(
        self, image: "ImageByPath", disk: str | None, metrics: list[str] | None, since: str, until: str | None
    ) -> None:
        from nbdvde.cli.times import parse_past
        from nbdvde.errors import UsageError

        now_ns = time.time_ns()
        self._image, self._disk, self._metrics = image, disk, metrics or []
        self.since_ns = parse_past(since, now_ns)
        self.until_ns = parse_past(until, now_ns) if until else now_ns
        self.span_ns = self.until_ns - self.since_ns
        if self.span_ns <= 0:
            raise UsageError(f"--since {since}", "does not lie before the end of the range", "like --since 24h")

    @property
    def disk_name(self) -> str:
        """Of the log."""
        return self._disk or self._image.info().disks[0].name

    def read(self, resolution: str | None, last: int | None, window_ns: int | None) -> list["SeriesPoints"]:
        """What there is, in windows of the length that was asked for, or this one, or samples as they came."""
        from nbdvde.admin.metricscalls import READ, ReadMetrics
        from nbdvde.cli.times import parse_duration

        length_ns = parse_duration(resolution) if resolution else window_ns or 0
        found: list[SeriesPoints] = []
        request = ReadMetrics(self._disk, self._metrics, self.since_ns, self.until_ns, length_ns, last)
        self._image.feed(READ, request, found.append)
        order = {name: number for number, name in enumerate(self._metrics)}
        return sorted(found, key=lambda series: (order.get(series.metric, len(order)), series.number))


def _show_points(found: list["SeriesPoints"]) -> None:
    from nbdvde.cli.quantities import amount, time_text

    rows: list[tuple[str, ...]] = [("metric", "time", "length", "count", "mean", "min", "max", "p50", "p95", "p99")]
    for series in found:
        for point in series.points:
            values = (point.mean, point.minimum, point.maximum, point.p50, point.p95, point.p99)
            length = f"{point.length_ns / 1e9:g}s" if point.length_ns else "-"
            figures = (amount(value, series.unit) for value in values)
            rows.append((series.metric, time_text(point.time_ns), length, str(point.count), *figures))
    output.table(rows)


def _show_sums(found: list["SeriesPoints"]) -> None:
    """A line for each series, of one window."""
    from nbdvde.cli.quantities import amount

    rows: list[tuple[str, ...]] = [("metric", "samples", "mean", "min", "max", "p50", "p95", "p99")]
    for series in found:
        for point in series.points:
            values = (point.mean, point.minimum, point.maximum, point.p50, point.p95, point.p99)
            rows.append((series.metric, str(point.count), *(amount(value, series.unit) for value in values)))
    output.table(rows)


def _info(image: "ImageByPath", disk: str | None) -> "MetricsInfo":
    from nbdvde.admin.metricscalls import LIST, MetricsRequest

    return image.call(LIST, MetricsRequest(disk))
