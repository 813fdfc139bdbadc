"""Measures in the text format of Prometheus, version 0.0.4. Names and units follow its conventions."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from nbdvde.admin.clustermeasures import ClusterMeasures
from nbdvde.admin.measures import ExportMeasures, ImageMeasures, Latency, Measures, TrafficMeasures, as_text
from nbdvde.disk import BLOCK
from nbdvde.version import VERSION

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
BOUNDS = (*(step * 10**decade / 1e7 for decade in range(1, 9) for step in (1, 2.5, 5)), 100.0)
"""Upper ends of buckets in seconds: few, as each is a time series of its own."""


def render(measures: Measures) -> bytes:
    """The whole exposition."""
    registry = CollectorRegistry()
    registry.register(_Measured(measures))
    ProcessCollector(registry=registry)
    return generate_latest(registry)


class _Measured(Collector):
    def __init__(self, measures: Measures) -> None:
        self._measures = measures

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        measures = self._measures
        yield InfoMetricFamily("nbdvde_build", "What is running.", {"version": VERSION})
        yield GaugeMetricFamily("nbdvde_uptime_seconds", "Since the server began.", measures.uptime_s)
        yield from _connections(measures)
        yield from _traffic("nbdvde_server", (), [((), measures.traffic)])
        named = [((export.name,), export.traffic) for export in measures.exports]
        yield from _traffic("nbdvde_export", ("export",), named)
        yield from _exports(measures.exports)
        yield from _images(measures.images)


def _connections(measures: Measures) -> Iterator[Metric]:
    found = measures.connections
    yield GaugeMetricFamily("nbdvde_connections_open", "Clients connected now.", found.open)
    for name, text, value in (
        ("connections", "Clients that connected.", found.total),
        ("connections_refused", "Connections closed at once because a limit was reached.", found.refused),
        ("connections_stalled", "Connections ended at a standstill while memory was short.", found.stalled),
        ("protocol_errors", "Connections ended because of what the client sent.", found.protocol_errors),
    ):
        yield CounterMetricFamily(f"nbdvde_{name}", text, value)


def _traffic(
    prefix: str, labels: Sequence[str], parts: Sequence[tuple[Sequence[str], TrafficMeasures]]
) -> Iterator[Metric]:
    by_command = (*labels, "command")
    requests = CounterMetricFamily(f"{prefix}_requests", "Requests of clients.", labels=by_command)
    asked = CounterMetricFamily(f"{prefix}_request_bytes", "Sum of the lengths asked for.", labels=by_command)
    errors = CounterMetricFamily(f"{prefix}_request_errors", "Requests answered with an error.", labels=labels)
    latency = HistogramMetricFamily(
        f"{prefix}_request_duration_seconds",
        "From when a request was taken out of the receive buffer to when its answer was given to the kernel.",
        labels=by_command,
    )
    for values, traffic in parts:
        for command, count in traffic.requests.items():
            requests.add_metric([*values, command], count)
            asked.add_metric([*values, command], traffic.bytes[command])
        errors.add_metric(list(values), traffic.errors)
        for command, durations in traffic.latency.items():
            latency.add_metric([*values, command], *_histogram(durations))
    yield from (requests, asked, errors, latency)


def _histogram(latency: Latency) -> tuple[list[tuple[str, float]], float]:
    """Cumulative buckets and the sum, as the library takes them."""
    found, below, rest = [], 0, list(latency.buckets)
    for bound in BOUNDS:
        while rest and rest[0][0] is not None and rest[0][0] <= bound:
            below += rest.pop(0)[1]
        found.append((repr(bound), float(below)))
    return [*found, ("+Inf", float(latency.count))], latency.sum_s


def _exports(exports: Iterable[ExportMeasures]) -> Iterator[Metric]:
    clients = GaugeMetricFamily("nbdvde_export_clients", "Clients that use the export now.", labels=["export"])
    size = GaugeMetricFamily("nbdvde_export_size_bytes", "Size of the disk.", labels=["export"])
    for export in exports:
        clients.add_metric([export.name], export.clients)
        size.add_metric([export.name], export.size)
    yield from (clients, size)


def _images(images: Sequence[ImageMeasures]) -> Iterator[Metric]:
    space = GaugeMetricFamily(
        "nbdvde_image_space_bytes", "Bytes of the file by kind, as the counts say.", labels=["image", "kind"]
    )
    syncs = HistogramMetricFamily(
        "nbdvde_image_sync_duration_seconds", "How long the host took to make writes durable.", labels=["image"]
    )
    for image in images:
        kinds = image.space
        for kind in ("live", "garbage", "overhead", "free"):
            space.add_metric([as_text(image.path), kind], getattr(kinds, f"{kind}_bytes"))
        syncs.add_metric([as_text(image.path)], *_histogram(image.syncs))
    yield from (space, syncs, *_gauges(images), *_counters(images), *_disks(images), *_clusters(images))


def _gauges(images: Sequence[ImageMeasures]) -> Iterator[Metric]:
    rows = [(as_text(image.path), image, image.space, image.statistics) for image in images]
    for name, text, values in (
        ("reserved_bytes", "Of the capacity: only for checkpoints, trims and cleaning.",
         [space.reserved_bytes for _, _, space, _ in rows]),
        ("capacity_bytes", "Limit of the file; infinite when there is none.",
         [float("inf") if space.capacity_bytes is None else space.capacity_bytes for _, _, space, _ in rows]),
        ("file_bytes", "Bytes that the file takes on the host.", [image.file_bytes for _, image, _, _ in rows]),
        ("buffered_bytes", "Written by clients and not yet in the file.", [i.buffered_bytes for _, i, _, _ in rows]),
        ("cache_bytes", "Decoded data kept in memory.", [image.cache_bytes for _, image, _, _ in rows]),
        ("compression_ratio", "Bytes compressed to bytes stored, since the image was made.",
         [_ratio(_compressed(counts), counts["bytes_stored"]) for *_, counts in rows]),
        ("dedup_ratio", "Bytes written to bytes that were new, since the image was made.",
         [_ratio(counts["bytes_in"], _compressed(counts)) for *_, counts in rows]),
        ("failed", "1 when it takes no writes any more.", [image.failure is not None for _, image, _, _ in rows]),
        ("damaged_segments", "Segments in which damage was found.", [i.damaged_segments for _, i, _, _ in rows]),
    ):  # fmt: skip
        family = GaugeMetricFamily(f"nbdvde_image_{name}", text, labels=["image"])
        for (path, *_), value in zip(rows, values, strict=True):
            family.add_metric([path], value)
        yield family


_CLUSTER: tuple[tuple[str, str, Callable[[ClusterMeasures], float]], ...] = (
    ("leader", "Number of the node that leads; 0 for none.", lambda found: found.leader),
    ("leads", "1 when this node does.", lambda found: found.leader == found.node),
    ("term", "How many elections there were that anybody may have won.", lambda found: found.term),
    ("elections", "How often this node asked for votes since it began.", lambda found: found.elections),
    ("nodes", "That belong to the cluster.", lambda found: found.nodes),
    ("connected_nodes", "Others that this one has a connection to.", lambda found: found.connected),
    ("committed_index", "Last entry that a majority has, as far as is known.", lambda found: found.committed),
    ("applied_index", "Last entry that is in the image.", lambda found: found.applied),
    ("log_bytes", "Of entries that are kept for others.", lambda found: found.log_bytes),
    ("behind_entries", "What the slowest of the others lacks; of a leader.", lambda found: found.behind or 0),
    ("catch_up_bytes", "Taken over from another node, the last time.", lambda found: found.received_bytes),
    ("compared_bytes", "Of disks, compared on all nodes in the background.", lambda found: found.compared_bytes),
    ("differences", "Chunks of them that were not the same everywhere.", lambda found: found.differences),
    ("repaired", "Of these, those that are now.", lambda found: found.repaired),
    ("stands_still", "1 when something keeps this node from taking part.", lambda found: bool(found.problem)),
)
"""Name, help and value of what is told of the cluster of an image."""


def _clusters(images: Sequence[ImageMeasures]) -> Iterator[Metric]:
    found = [(as_text(image.path), image.cluster) for image in images if image.cluster]
    for name, text, value in _CLUSTER if found else ():
        family = GaugeMetricFamily(f"nbdvde_cluster_{name}", text, labels=["image"])
        for path, cluster in found:
            family.add_metric([path], value(cluster))
        yield family


def _counters(images: Sequence[ImageMeasures]) -> Iterator[Metric]:
    for name, text, value in (
        ("written_bytes", "Written by clients since the image was made, without zeroes.", "bytes_in"),
        ("stored_bytes", "What of it went into the file, compressed.", "bytes_stored"),
        ("shared_blocks", "Blocks stored as references since the image was made.", "blocks_shared"),
        ("commits", "Since the image was made.", "commits"),
        ("checkpoints", "Since it was opened.", "checkpoints"),
        ("cache_hits", "Frames found in the cache.", "cache_hits"),
        ("cache_misses", "Frames not found in the cache.", "cache_misses"),
        ("cleaned_segments", "Segments written anew.", "cleaned_segments"),
        ("cleaned_bytes", "Bytes freed by cleaning.", "cleaned_bytes"),
    ):
        family = CounterMetricFamily(f"nbdvde_image_{name}", text, labels=["image"])
        for image in images:
            counted = image.statistics.get(value)
            family.add_metric([as_text(image.path)], getattr(image, value) if counted is None else counted)
        yield family


def _disks(images: Sequence[ImageMeasures]) -> Iterator[Metric]:
    for name, text, value in (
        ("size_bytes", "Size of the disk.", "size"),
        ("logical_bytes", "Bytes that hold data, as a client sees them.", "logical_bytes"),
        ("snapshots", "Snapshots of the disk.", "snapshots"),
    ):
        family = GaugeMetricFamily(f"nbdvde_disk_{name}", text, labels=["image", "disk"])
        for image in images:
            for disk in image.disks:
                family.add_metric([as_text(image.path), disk.name], getattr(disk, value))
        yield family


def _compressed(statistics: dict[str, int | float]) -> float:
    return statistics["bytes_in"] - statistics["blocks_shared"] * BLOCK


def _ratio(above: float, below: float) -> float:
    return above / below if below else 1.0
