"""What GET /v1/metrics tells: counters and latencies of a server, and gauges of its images."""

import time
from collections.abc import Iterable, Sequence
from typing import Self

import msgspec

from nbdvde.admin.clustermeasures import ClusterMeasures, cluster_measures
from nbdvde.engine.gauges import ImageGauges
from nbdvde.engine.image import Image
from nbdvde.exports import Export
from nbdvde.metrics import BOUNDS_NS, COMMANDS, Histogram, Traffic
from nbdvde.server import Connection, Server

_PAUSE = 100
"""Times as long as reading the gauges of an image takes: so long they are taken for true."""

_BOUNDS_S = (*(bound / 1e9 for bound in BOUNDS_NS), None)


class Latency(msgspec.Struct, frozen=True):
    """How long something took, in seconds; percentiles are within 15 %."""

    count: int
    sum_s: float
    max_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    buckets: list[tuple[float | None, int]]
    """(most that is counted here, how many), ascending, empty ones left out; None for what is above 100 s."""

    @classmethod
    def of(cls, histogram: Histogram) -> Self:
        """What a histogram holds."""
        p50, p95, p99 = (quantile / 1e9 for quantile in histogram.quantiles_ns((0.5, 0.95, 0.99)))
        buckets = [(_BOUNDS_S[index], count) for index, count in histogram.filled]
        return cls(histogram.count, histogram.sum_ns / 1e9, histogram.max_ns / 1e9, p50, p95, p99, buckets)


class TrafficMeasures(msgspec.Struct, frozen=True):
    """What clients asked for, by NBD command: read, write, flush, trim, write_zeroes, cache, block_status, disc."""

    requests: dict[str, int]
    bytes: dict[str, int]
    """Sum of the lengths asked for."""
    errors: int
    """Requests answered with an error."""
    latency: dict[str, Latency]
    """From when a request was taken out of the receive buffer to when its answer was given to the kernel."""

    @classmethod
    def of(cls, traffic: Traffic) -> Self:
        """What was counted; commands that nobody used are left out."""
        used = [number for number in range(len(COMMANDS)) if traffic.requests[number]]
        timed = [(COMMANDS[number], traffic.latencies[number]) for number in used]
        return cls(
            {COMMANDS[number]: traffic.requests[number] for number in used},
            {COMMANDS[number]: traffic.request_bytes[number] for number in used},
            traffic.errors,
            {name: Latency.of(latency) for name, latency in timed if latency is not None and latency.sum_ns},
        )


class ConnectionMeasures(msgspec.Struct, frozen=True):
    """Clients, taken together."""

    open: int
    total: int
    refused: int
    """Closed at once because a limit was reached."""
    protocol_errors: int
    """Ended because of what the client sent."""
    stalled: int
    """Ended because they were at a standstill while memory was short."""


class ClientMeasures(msgspec.Struct, frozen=True):
    """A connected client."""

    number: int
    peer: str
    export: str | None
    requests: int
    bytes: int
    """Received and sent."""


class ExportMeasures(msgspec.Struct, frozen=True):
    """An export. Of those EXPORT@SNAPSHOT only the ones that clients use now are listed."""

    name: str
    size: int
    read_only: bool
    clients: int
    traffic: TrafficMeasures


class ImageMeasures(ImageGauges, frozen=True):
    """An image, and how long the host took to make it durable."""

    syncs: Latency
    cluster: ClusterMeasures | None = None
    """If it is replicated."""


class Measures(msgspec.Struct, frozen=True):
    """Answer of GET /v1/metrics. What only grows is counted since the server, or the export, began."""

    uptime_s: float
    traffic: TrafficMeasures
    """Of all exports, those that have ended included."""
    connections: ConnectionMeasures
    clients: list[ClientMeasures]
    exports: list[ExportMeasures]
    images: list[ImageMeasures]


class Gauges:
    """The gauges of images, each read anew when that costs less than 1 % of the time."""

    def __init__(self) -> None:
        self._known: dict[Image, tuple[float, ImageMeasures]] = {}
        """With when they are to be read again."""

    def of(self, images: Iterable[Image]) -> list[ImageMeasures]:
        """What the images tell."""
        known, self._known = self._known, {}
        for image in images:
            begun_s = time.monotonic()
            until_s, measures = known.get(image, (0.0, None))
            if measures is None or begun_s >= until_s:
                fields = msgspec.structs.asdict(image.gauges())
                measures = ImageMeasures(**fields, syncs=Latency.of(image.syncs), cluster=cluster_measures(image))
                taken_s = time.monotonic() - begun_s
                until_s = begun_s + _PAUSE * taken_s
            self._known[image] = until_s, measures
        return [measures for _, measures in self._known.values()]


def measures(server: Server, exports: Sequence[Export], images: list[ImageMeasures], uptime_s: float) -> Measures:
    """Everything."""
    metrics = server.metrics
    return Measures(
        uptime_s,
        TrafficMeasures.of(metrics.traffic),
        ConnectionMeasures(
            metrics.connections, metrics.connections_total, metrics.connections_refused, metrics.protocol_errors,
            metrics.stalled,
        ),
        [_client(connection) for connection in server.connections],
        list(map(_export, exports, server.traffic(exports))),
        images,
    )  # fmt: skip


def _client(connection: Connection) -> ClientMeasures:
    export, session = connection.visitor.export, connection.session
    requests, moved = (sum(session.traffic.requests), session.moved) if session else (0, 0)
    return ClientMeasures(connection.number, connection.peer, export.name if export else None, requests, moved)


def _export(export: Export, traffic: Traffic) -> ExportMeasures:
    info = export.info
    return ExportMeasures(info.name, info.size, info.read_only, export.clients, TrafficMeasures.of(traffic))


def as_text(path: str) -> str:
    """A path, which need not be text."""
    return path.encode(errors="surrogateescape").decode(errors="replace")
