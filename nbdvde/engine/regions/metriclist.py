"""The metrics that a server records of itself: numbers, names and units, in this one place."""

from typing import Literal, NamedTuple

from nbdvde.errors import UsageError

OWN = 4096
"""Numbers from here on are for other programs; those below are, or will be, in the table."""
Unit = Literal["per second", "bytes per second", "seconds", "bytes", "ratio", "number"]


class Metric(NamedTuple):
    """What a number stands for."""

    number: int
    name: str
    unit: Unit
    """A rate (`... per second`) is that of the interval that ends at the sample; all others are gauges."""
    description: str


METRICS = (
    Metric(1, "read_requests", "per second", "read requests of clients"),
    Metric(2, "read_bytes", "bytes per second", "bytes that clients asked for"),
    Metric(3, "write_requests", "per second", "write requests of clients"),
    Metric(4, "write_bytes", "bytes per second", "bytes that clients wrote"),
    Metric(5, "flush_requests", "per second", "flush requests of clients"),
    Metric(6, "trim_requests", "per second", "trim and write-zeroes requests of clients"),
    Metric(7, "trim_bytes", "bytes per second", "bytes that clients trimmed or zeroed"),
    Metric(8, "errors", "per second", "requests answered with an error"),
    Metric(9, "clients", "number", "clients connected to the disk"),
    Metric(10, "read_latency_p50", "seconds", "half of the reads took no longer"),
    Metric(11, "read_latency_p99", "seconds", "99 % of the reads took no longer"),
    Metric(12, "write_latency_p50", "seconds", "half of the writes took no longer"),
    Metric(13, "write_latency_p99", "seconds", "99 % of the writes took no longer"),
    Metric(14, "flush_latency_p50", "seconds", "half of the flushes took no longer"),
    Metric(15, "flush_latency_p99", "seconds", "99 % of the flushes took no longer"),
    Metric(16, "sync_time_p99", "seconds", "99 % of the host's syncs took no longer"),
    Metric(17, "compression_ratio", "ratio", "bytes written so far, divided by the bytes stored for them"),
    Metric(18, "cache_hits", "ratio", "part of the look-ups in the cache that found something"),
    Metric(19, "file_bytes", "bytes", "space that the image takes on the host"),
    Metric(20, "live_bytes", "bytes", "of stored data in use"),
    Metric(21, "garbage_bytes", "bytes", "of stored data that nobody uses any more"),
    Metric(22, "cleaned_bytes", "bytes per second", "freed by the cleaner"),
)
"""All there are. Numbers are never given to something else."""
_BY_NAME = {metric.name: metric for metric in METRICS}
_BY_NUMBER = {metric.number: metric for metric in METRICS}


def name_of(number: int) -> str:
    """The name of a metric; of one that is not in the table its number."""
    metric = _BY_NUMBER.get(number)
    return metric.name if metric else str(number)


def unit_of(number: int) -> str:
    """The unit of a metric, empty for one that is not in the table."""
    metric = _BY_NUMBER.get(number)
    return metric.unit if metric else ""


def description_of(number: int) -> str:
    """What a metric tells."""
    metric = _BY_NUMBER.get(number)
    return metric.description if metric else f"metric {number}"


def number_of(name: str) -> int:
    """The metric of this name, or number. Raises UsageError."""
    if name in _BY_NAME:
        return _BY_NAME[name].number
    if name.isascii() and name.isdigit() and int(name) < 1 << 16:
        return int(name)
    raise UsageError(f"metric {name}", "is unknown", "see nbdvde metrics list, or give a number up to 65535")
