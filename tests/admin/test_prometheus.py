"""The text for Prometheus, read by its own library."""

from pathlib import Path

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from nbdvde.admin import prometheus
from nbdvde.admin.clustermeasures import ClusterMeasures
from nbdvde.admin.measures import (
    ConnectionMeasures,
    ExportMeasures,
    ImageMeasures,
    Latency,
    Measures,
    TrafficMeasures,
)
from nbdvde.engine.gauges import DiskGauges, SpaceGauges
from nbdvde.metrics import BOUNDS_NS, Histogram, Traffic
from tests.admin.test_measures import ask, working

MILLISECOND = 1_000_000


def traffic() -> TrafficMeasures:
    found = Traffic()
    found.requests[0], found.request_bytes[0], found.errors = 3, 12288, 1
    for milliseconds in (1, 2, 30_000):
        found.latency(0).add(milliseconds * MILLISECOND)
    return TrafficMeasures.of(found)


def measures(path: str = "a.vde", capacity: int | None = 1000) -> Measures:
    syncs = Histogram()
    syncs.add(200 * 10**9)
    statistics: dict[str, int | float] = {"bytes_in": 40960, "bytes_stored": 4096, "blocks_shared": 5, "commits": 2}
    image = ImageMeasures(
        path, False, "full", 1, 900, SpaceGauges(1, 2, 3, 4, 5, capacity), [DiskGauges("d", 512, 256, 7)], statistics,
        11, 12, 13, 14, 15, 16, 17, Latency.of(syncs),
        ClusterMeasures(2, "leader", 2, 7, 1, 3, 1, 100, 99, 4096, 12, 0, 5 << 20, 3, 2, "full"),
    )  # fmt: skip
    export = ExportMeasures('odd "name"\\\n', 512, False, 2, traffic())
    return Measures(1.5, traffic(), ConnectionMeasures(1, 2, 3, 4, 5), [], [export], [image])


def parsed(found: Measures) -> dict[str, Metric]:
    return {metric.name: metric for metric in text_string_to_metric_families(prometheus.render(found).decode())}


def value(families: dict[str, Metric], name: str, sample: str = "", **labels: str) -> float:
    (found,) = [
        one.value
        for one in families[name].samples
        if one.name == (sample or name) and labels.items() <= one.labels.items()
    ]
    return found


def test_a_cluster() -> None:
    found = parsed(measures())
    wanted = {"leads": 1, "leader": 2, "term": 7, "committed_index": 100, "applied_index": 99, "behind_entries": 12}
    for name, number in {**wanted, "connected_nodes": 1, "stands_still": 1}.items():
        assert value(found, f"nbdvde_cluster_{name}", image="a.vde") == number


def test_bounds_are_some_of_those_that_are_counted() -> None:
    assert {round(bound * 1e9) for bound in prometheus.BOUNDS} <= set(BOUNDS_NS)


def test_numbers() -> None:
    found = parsed(measures())
    odd = {"export": 'odd "name"\\\n', "command": "read"}
    assert value(found, "nbdvde_export_requests", "nbdvde_export_requests_total", **odd) == 3
    assert value(found, "nbdvde_server_request_bytes", "nbdvde_server_request_bytes_total", command="read") == 12288
    latency, bucket = "nbdvde_export_request_duration_seconds", "nbdvde_export_request_duration_seconds_bucket"
    below = {bound: value(found, latency, bucket, le=bound, **odd) for bound in ("0.0005", "0.001", "0.0025", "+Inf")}
    assert below == {"0.0005": 0, "0.001": 1, "0.0025": 2, "+Inf": 3}
    assert value(found, latency, f"{latency}_count", **odd) == 3
    assert abs(value(found, latency, f"{latency}_sum", **odd) - 30.003) < 1e-9
    kinds = [value(found, "nbdvde_image_space_bytes", kind=kind) for kind in ("live", "garbage", "overhead", "free")]
    assert kinds == [1, 2, 3, 4]
    ratios = [value(found, f"nbdvde_image_{name}_ratio", image="a.vde") for name in ("compression", "dedup")]
    assert ratios == [(40960 - 5 * 4096) / 4096, 40960 / (40960 - 5 * 4096)]
    assert value(found, "nbdvde_image_failed") == 1
    assert value(found, "nbdvde_image_cache_hits", "nbdvde_image_cache_hits_total") == 12
    assert value(found, "nbdvde_disk_snapshots", image="a.vde", disk="d") == 7
    sync = "nbdvde_image_sync_duration_seconds"
    assert [value(found, sync, f"{sync}_bucket", le=bound) for bound in ("100.0", "+Inf")] == [0, 1]


def test_conventions() -> None:
    for name, family in parsed(measures()).items():
        assert name.startswith(("nbdvde_", "process_"))
        assert family.documentation
        if name.startswith("nbdvde_"):
            assert family.documentation.endswith(".")
            assert family.type != "unknown"
        assert not name.endswith(("_ms", "_ns", "_kb", "_mb"))


def test_paths_that_are_no_text_and_no_capacity() -> None:
    found = parsed(measures("caf\udce9.vde", None))
    assert value(found, "nbdvde_image_capacity_bytes", image="caf\ufffd.vde") == float("inf")


async def test_of_a_server(tmp_path: Path) -> None:
    async with working(tmp_path) as (control, connect, address):
        await connect(address).go("image")
        found = parsed(await ask(control))
    assert value(found, "nbdvde_connections_open") == value(found, "nbdvde_export_clients", export="image") == 1
    assert value(found, "nbdvde_image_compression_ratio") == 1
