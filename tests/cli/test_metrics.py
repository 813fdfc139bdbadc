"""The commands about metrics logs, at rest and served."""

import csv
import io
import math
import time
from pathlib import Path

import msgspec
import pytest
import trio
from prometheus_client.openmetrics.parser import text_string_to_metric_families

import nbdvde
from nbdvde import MetricsLog, Sample
from nbdvde.admin.metricscalls import Point, SeriesPoints
from nbdvde.cli.plot import plot
from nbdvde.cli.quantities import amount, nice_ticks, time_ticks
from nbdvde.cli.times import parse_duration, parse_past
from nbdvde.engine.regions.metriclist import number_of
from nbdvde.errors import UsageError
from tests.cli.conftest import Command, serving
from tests.pictures import strictly

SECOND_NS = 10**9
DAY_S = 86400


async def fill(path: Path, now_ns: int) -> None:
    """A day of two metrics, and one of somebody else, every 100 s."""
    async with nbdvde.open_image(path) as image:
        log = await image.regions.get(MetricsLog, image.disk())
        found = []
        for second in range(0, DAY_S - 200, 100):
            time_ns = now_ns - (DAY_S - 100 - second) * SECOND_NS
            value = 3e6 * (1.2 + math.sin(second / 9000))
            found.append(Sample(number_of("write_bytes"), time_ns, value))
            found.append(Sample(number_of("write_latency_p99"), time_ns, value / 1e9))
            found.append(Sample(5000, time_ns, -value, 6))
        await log.append(found)


@pytest.fixture
def log(command: Command, plain_image: Path) -> Path:
    """An image with a metrics log."""
    assert command("metrics", "create", plain_image, "--capacity", "1M").code == 0
    trio.run(fill, plain_image, time.time_ns())
    return plain_image


def test_a_log_is_made_and_listed(command: Command, log: Path) -> None:
    found = command("metrics", "list", log)
    assert found.code == 0
    titles, first, *_, end = found.out.splitlines()
    assert titles.split() == ["metric", "aggregation", "unit", "samples", "first", "last"]
    assert first.split()[:5] == ["write_bytes", "raw", "bytes", "per", "second"]
    assert end.startswith("2586 samples in ")
    told = command("metrics", "list", log, "--json").json
    assert [(one["metric"], one["aggregation"], one["samples"]) for one in told["series"]] == [
        ("write_bytes", "raw", 862), ("write_latency_p99", "raw", 862), ("5000", "p99", 862),
    ]  # fmt: skip
    command("metrics", "create", log).fails(9, "disk disk: has a metrics log already")


def test_what_was_measured_is_shown(command: Command, log: Path) -> None:
    sums = command("metrics", "show", log, "--since", "1y")
    assert sums.code == 0
    assert len(sums.out.splitlines()) == 4
    assert "write_bytes" in sums.out
    assert "MiB/s" in sums.out
    newest = command("metrics", "show", log, "--metric", "write_bytes", "--last", "3")
    assert len(newest.out.splitlines()) == 4
    hours = command("metrics", "show", log, "--metric", "write_bytes", "--resolution", "1h", "--json").json
    [series] = hours["series"]
    assert sum(point["count"] for point in series["points"]) == 862
    assert {point["length_ns"] for point in series["points"]} == {3600 * SECOND_NS}
    for point in series["points"]:
        assert point["minimum"] <= point["p50"] <= point["p95"] <= point["p99"] <= point["maximum"]
    none = command("metrics", "show", log, "--metric", "write_bytes", "--since", "2001-01-01", "--until", "2002-01-01")
    assert none.out.split()[:2] == ["metric", "time"]
    assert none.out.count("\n") == 1


def test_prometheus_takes_what_is_exported(command: Command, log: Path) -> None:
    for options in ((), ("--resolution", "1h")):
        text = command("metrics", "export", log, "--format", "prometheus", "--since", "2d", *options).out
        families = {family.name: family for family in text_string_to_metric_families(text)}
        assert families.keys() == {"nbdvde_write_bytes", "nbdvde_write_latency_p99", "nbdvde_metric_5000_p99"}
        samples = families["nbdvde_write_bytes"].samples
        assert {sample.labels["disk"] for sample in samples} == {"disk"}
        assert len({sample.labels["statistic"] for sample in samples}) == (6 if options else 1)
        assert options or len(samples) == 862


def test_other_programs_read_it_as_csv_and_json(command: Command, log: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(command("metrics", "export", log, "--metric", "5000").out)))
    assert len(rows) == 862
    assert rows[0]["aggregation"] == "p99"
    assert float(rows[0]["mean"]) == float(rows[0]["minimum"]) < 0
    found = command("metrics", "export", log, "--format", "json", "--metric", "5000").json
    assert len(found["series"][0]["points"]) == 862


def test_a_plot_fits_a_terminal(command: Command, log: Path) -> None:
    shown = command("metrics", "plot", log)
    assert shown.code == 0
    assert all(len(line) <= 80 for line in shown.out.splitlines())
    assert "write_bytes (bytes per second)" in shown.out
    assert "█ mean" in shown.out
    assert "\x1b" not in shown.out
    assert command("metrics", "plot", log, "--metric", "77").out == "no samples of 77\n"
    old = command("metrics", "plot", log, "--metric", "write_bytes", "--since", "2001-01-01", "--until", "2001-01-02")
    assert old.out.splitlines() == ["write_bytes (bytes per second)", "  no samples in this time"]


def test_a_picture_is_what_decoders_accept(command: Command, log: Path, tmp_path: Path) -> None:
    file = tmp_path / "metrics.png"
    assert command("metrics", "plot", log, "--png", file).code == 0
    picture = strictly(file)
    assert picture.size == (960, 44 + 2 * 220)
    assert len(set(picture.get_flattened_data())) > 20
    assert file.stat().st_size < 150_000
    command("metrics", "plot", log, "--png", file).fails(9, "exists already", "--overwrite")
    assert command("metrics", "plot", log, "--png", file, "--overwrite", "--metric", "7").code == 0
    assert strictly(file).size == (960, 44 + 220)
    assert not list(tmp_path.glob(".*part"))
    command("metrics", "plot", log, "--png", "/").fails(2, "is a directory")
    command("metrics", "plot", log, "--png", tmp_path / "no" / "x.png").fails(
        3, f"{tmp_path}/no/x.png: ", "no such file or directory"
    )


def test_a_log_is_given_up(command: Command, log: Path) -> None:
    assert command("metrics", "delete", log, "--json").json["samples"] == 2586
    command("metrics", "delete", log).fails(2, "has no metrics log")
    assert command("metrics", "create", log, "--capacity", "256K").code == 0
    assert command("metrics", "list", log).out.endswith("0 samples in 4K of 256K\n")


def test_the_same_is_shown_of_a_served_image(command: Command, log: Path, tmp_path: Path) -> None:
    rest = command("metrics", "show", log, "--json", "--since", "2d").json
    with serving(log, "--listen", f"unix:{tmp_path}/s", "--metrics-interval", "0", cwd=tmp_path):
        assert command("metrics", "show", log, "--json", "--since", "2d").json == rest
        command("metrics", "create", log).fails(9, "has a metrics log already")
        command("metrics", "list", log, "--disk", "other").fails(2, "other")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("list",), 2, "disk disk: has no metrics log (make one with nbdvde metrics create)"),
        (("show",), 2, "has no metrics log"),
        (("plot",), 2, "has no metrics log"),
        (("export",), 2, "has no metrics log"),
        (("create", "--capacity", "1K"), 2, "capacity 1024: is not a multiple of 4096 from 256 KiB to 1 GiB"),
        (("create", "--threshold", "1"), 2, "threshold 1.0: is not between 0.25 and 0.95"),
        (("show", "--since", "yesterday"), 2, "time 'yesterday': is no day and no moment (like 24h for so long ago"),
        (("show", "--since", "1h", "--until", "2h"), 2, "--since 1h: does not lie before the end of the range"),
        (("show", "--resolution", "0s"), 2, "duration '0s': must be more than 0"),
        (("export", "--format", "xml"), 2, "xml"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_told(
    command: Command, plain_image: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    name, *options = arguments
    command("metrics", name, plain_image, *options).fails(code, words)


def test_a_metric_that_is_unknown_is_told(command: Command, log: Path) -> None:
    command("metrics", "show", log, "--metric", "speed").fails(2, "metric speed: is unknown", "nbdvde metrics list")
    command("metrics", "show", log, "--metric", "65536").fails(2, "metric 65536: is unknown")


def points(values: list[float]) -> list[Point]:
    return [Point(n * SECOND_NS, SECOND_NS, 1, v, v, v + abs(v) / 2, v, v, v) for n, v in enumerate(values)]


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        [0.0],
        [0.0] * 40,
        [5.0, 5.0],
        [1e-9, 1e9],
        [-3.0, 3.0],
        [-7.0],
        [1.1e308],
        [-1.1e308, 1.1e308],
        [float(n) for n in range(200)],
    ],
)
def test_any_values_can_be_plotted(values: list[float], ascii_only: bool) -> None:
    for unit in ("bytes", "seconds", ""):
        series = SeriesPoints("m", 1, "raw", unit, "", points(values))
        lines = list(plot(series, 0, len(values) * SECOND_NS, ascii_only=ascii_only))
        assert len(lines) == 14
        assert all(len(line) <= 80 for line in lines)
        assert not ascii_only or "".join(lines).isascii()


@pytest.mark.parametrize(("length", "said"), [
    (0, "newest 1.5 at 1970-01-02 00:00:00Z"), (1, "mean 1.5 since 1970-01-02 00:00:00Z"),
])  # fmt: skip
def test_of_a_window_is_said_when_it_began(length: int, said: str) -> None:
    day = 86400 * SECOND_NS
    [one] = points([1.5])
    one = msgspec.structs.replace(one, time_ns=day, length_ns=length * day)
    lines = list(plot(SeriesPoints("m", 1, "raw", "", "", [one]), 0, 3 * day))
    assert lines[-1].endswith(said)


def test_a_higher_value_is_a_higher_bar() -> None:
    series = SeriesPoints("m", 1, "raw", "", "", points([float(n) for n in range(1, 69)]))
    rows = [line[12:] for line in plot(series, 0, 68 * SECOND_NS)][1:11]
    heights = [sum(column == "█" for column in (row[at : at + 1] for row in rows)) for at in range(68)]
    assert heights == sorted(heights)
    assert heights[0] < 1 < heights[-1]


def test_amounts_have_three_digits_and_a_unit() -> None:
    told = [
        amount(1536 * 1024, "bytes per second"), amount(0.00034, "seconds"), amount(12, "seconds"),
        amount(2e-9, "seconds"),
        amount(12_500, "per second"), amount(0.97, "ratio"), amount(123.4, "number"), amount(0, "seconds"),
        amount(-1e308, "number"), amount(1e308, "bytes"), amount(3e20, "number"),
    ]  # fmt: skip
    assert told == [
        "1.5 MiB/s", "340 us", "12 s", "0.002 us", "12.5k/s", "0.97", "123", "0 s",
        "-1.00e+308", "1.00e+308 B", "300E",
    ]  # fmt: skip


def test_ticks_are_round() -> None:
    assert nice_ticks(0, 9.7, 5) == [0, 2.5, 5, 7.5, 10]
    assert nice_ticks(0, 3 << 20, 5, 1024) == [0, 1 << 20, 2 << 20, 3 << 20]
    assert nice_ticks(-3, 3, 5) == [-4, -2, 0, 2, 4]
    assert nice_ticks(0, 0, 5)[-1] > 0
    assert time_ticks(0, 86400 * SECOND_NS, 4) == [(n * 21600 * SECOND_NS, f"{6 * n % 24:02}:00") for n in range(5)]
    assert [name for _, name in time_ticks(0, 400 * 86400 * SECOND_NS, 6)][:2] == ["1970-01", "1970-04"]


def test_times_and_durations() -> None:
    now = 1_700_000_000 * SECOND_NS
    assert parse_duration("90s") == 90 * SECOND_NS
    assert parse_past("24h", now) == now - DAY_S * SECOND_NS
    assert parse_past("99y", now) == 0
    assert parse_past("2023-11-14T22:13:20", now) == now == parse_past("2023-11-14T23:13:20+01:00", 0)
    for text in ("", "5", "h", "-1h", "1.5h", "12 Uhr"):
        with pytest.raises(UsageError):
            parse_past(text, now)


def test_what_is_exported_is_json_whatever_was_added(command: Command, plain_image: Path) -> None:
    async def extremes() -> None:
        async with nbdvde.open_image(plain_image) as image:
            await MetricsLog.create(await image.regions.area(image.disk()), 1 << 20)
            log = await image.regions.get(MetricsLog, image.disk())
            await log.append([Sample(1, 60 * SECOND_NS + n, 1.7e308) for n in range(3)])
            await log.append([Sample(1, (1 << 64) - 1, -5e-324)])

    trio.run(extremes)
    found = command("metrics", "export", plain_image, "--format", "json", "--since", "99y", "--resolution", "1h")
    [series] = msgspec.json.decode(found.out)["series"]
    assert series["points"][0]["mean"] == 1.7e308
    assert command("metrics", "show", plain_image, "--since", "99y", "--metric", "1").code == 0
