"""Counters and latency histograms: plain integers that one event loop adds to."""

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

COMMANDS = ("read", "write", "disc", "flush", "trim", "cache", "write_zeroes", "block_status")
"""Names of the NBD commands, in the order of their numbers."""
_STEPS = (100, 112, 125, 140, 160, 180, 200, 224, 250, 280, 315, 355, 400, 450, 500, 560, 630, 710, 800, 900)
"""Renard's preferred numbers R20 (ISO 3): they hold 1, 2.5 and 5, and none is more than 15 % above the one before."""
BOUNDS_NS = (*(10 * step * 10**decade for decade in range(8) for step in _STEPS), 100 * 10**9)
"""Upper ends of the buckets of a histogram, 1 µs to 100 s; the last bucket has none."""


class Histogram:
    """Durations in fixed buckets: histograms of the same bounds are merged by adding, without loss."""

    __slots__ = ("counts", "max_ns", "sum_ns")

    def __init__(self) -> None:
        self.counts = array("q", bytes(8 * (len(BOUNDS_NS) + 1)))
        self.sum_ns = 0
        self.max_ns = 0

    @property
    def count(self) -> int:
        """Durations noted."""
        return sum(self.counts)

    @property
    def filled(self) -> list[tuple[int, int]]:
        """(bucket, durations in it), ascending, where there are any."""
        return [(index, self.counts[index]) for index in np.flatnonzero(np.frombuffer(self.counts, np.int64)).tolist()]

    def add(self, duration_ns: int, count: int = 1) -> None:
        """Note a duration, `count` times."""
        self.counts[bisect_left(BOUNDS_NS, duration_ns)] += count
        self.sum_ns += duration_ns * count
        if duration_ns > self.max_ns:  # noqa: PLR1730 - max() takes three times as long
            self.max_ns = duration_ns

    def merge(self, other: "Histogram") -> None:
        """Note everything that another has noted."""
        np.frombuffer(self.counts, np.int64)[:] += np.frombuffer(other.counts, np.int64)
        self.sum_ns += other.sum_ns
        self.max_ns = max(self.max_ns, other.max_ns)

    def since(self, earlier: "Histogram") -> "Histogram":
        """What was noted since this one was as `earlier` is; its greatest duration may be an older one."""
        later = Histogram()
        later.counts = array("q", (max(0, new - old) for new, old in zip(self.counts, earlier.counts, strict=True)))
        later.sum_ns, later.max_ns = max(0, self.sum_ns - earlier.sum_ns), self.max_ns
        return later

    def quantile_ns(self, share: float) -> float:
        """The duration that this share of them (0 to 1) does not exceed, within 15 %; 0 when there are none."""
        return self.quantiles_ns((share,))[0]

    def quantiles_ns(self, shares: Iterable[float]) -> list[float]:
        """The same for several shares."""
        filled = self.filled
        whole = sum(count for _, count in filled)
        return [self._quantile_ns(filled, share * whole) for share in shares]

    def _quantile_ns(self, filled: Sequence[tuple[int, int]], wanted: float) -> float:
        below = 0
        for index, count in filled:
            if below + count >= wanted:
                low = BOUNDS_NS[index - 1] if index else 0
                high = min(self.max_ns, BOUNDS_NS[index]) if index < len(BOUNDS_NS) else self.max_ns
                return low + max(0, high - low) * (wanted - below) / count
            below += count
        return 0.0

    def cumulative(self, bounds_ns: Sequence[int]) -> Iterator[int]:
        """How many durations do not exceed each of these bounds, which are some of `BOUNDS_NS`, ascending."""
        below = done = 0
        for bound in bounds_ns:
            index = bisect_left(BOUNDS_NS, bound) + 1
            below += sum(self.counts[done:index])
            done = index
            yield below


class Traffic:
    """What was asked for, and how long it took. The lists are indexed by command number.

    So counting a request costs two additions. Its latency is the time from when it was taken out of the receive buffer
    to when its answer was given to the kernel, waiting in between included; what is answered together took equally
    long.
    """

    __slots__ = ("errors", "latencies", "request_bytes", "requests")

    def __init__(self) -> None:
        self.requests = [0] * len(COMMANDS)
        self.request_bytes = [0] * len(COMMANDS)
        """Sum of the lengths asked for."""
        self.errors = 0
        """Requests answered with an error."""
        self.latencies: list[Histogram | None] = [None] * len(COMMANDS)

    def latency(self, command: int) -> Histogram:
        """The histogram of a command."""
        found = self.latencies[command]
        if found is None:
            found = self.latencies[command] = Histogram()
        return found

    def merge(self, other: "Traffic") -> None:
        """Count everything that another has counted."""
        self.requests = list(map(int.__add__, self.requests, other.requests))
        self.request_bytes = list(map(int.__add__, self.request_bytes, other.request_bytes))
        self.errors += other.errors
        for command, histogram in enumerate(other.latencies):
            if histogram is not None:
                self.latency(command).merge(histogram)

    def since(self, earlier: "Traffic") -> "Traffic":
        """What was counted since this one was as `earlier` is; all of it when the counting began anew."""
        if any(new < old for new, old in zip(self.requests, earlier.requests, strict=True)):
            return self
        later = Traffic()
        later.requests = list(map(int.__sub__, self.requests, earlier.requests))
        later.request_bytes = list(map(int.__sub__, self.request_bytes, earlier.request_bytes))
        later.errors = self.errors - earlier.errors
        for command, histogram in enumerate(self.latencies):
            before = earlier.latencies[command]
            later.latencies[command] = histogram.since(before) if histogram and before else histogram
        return later


def total(parts: Iterable[Traffic]) -> Traffic:
    """The sum, which goes on being what it is now."""
    traffic = Traffic()
    for part in parts:
        traffic.merge(part)
    return traffic


class Metrics:
    """What a server did since it started, over all its clients."""

    def __init__(self) -> None:
        self.connections = 0
        """Open now."""
        self.connections_total = 0
        self.connections_refused = 0
        """Closed at once because the limit of connections was reached."""
        self.protocol_errors = 0
        """Connections ended because of what the client sent."""
        self.stalled = 0
        """Connections ended because they were at a standstill while memory was short."""
        self._ended = Traffic()
        """Of clients that have left."""
        self._running: list[Traffic] = []

    @property
    def traffic(self) -> Traffic:
        """Of all clients so far."""
        return total((self._ended, *self._running))

    @contextmanager
    def counting(self, traffic: Traffic) -> Iterator[None]:
        """Take account of what a client counts meanwhile, and for good of what it has counted in the end."""
        self._running.append(traffic)
        try:
            yield
        finally:
            self._running.remove(traffic)
            self._ended.merge(traffic)

    def snapshot(self) -> dict[str, int]:
        """All counters by name; the lists become `requests_read`, `request_bytes_read` and so on."""
        traffic = self.traffic
        values = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        values["errors"] = traffic.errors
        for index, command in enumerate(COMMANDS):
            values[f"requests_{command}"] = traffic.requests[index]
            values[f"request_bytes_{command}"] = traffic.request_bytes[index]
        return values
