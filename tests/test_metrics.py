"""Counters and latency histograms."""

from bisect import bisect_left
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from nbdvde.metrics import BOUNDS_NS, COMMANDS, Histogram, Metrics, Traffic, total

DURATIONS = st.integers(0, 10**12)
READ, WRITE = COMMANDS.index("read"), COMMANDS.index("write")


def histogram_of(durations: list[int]) -> Histogram:
    histogram = Histogram()
    for duration in durations:
        histogram.add(duration)
    return histogram


def state(histogram: Histogram) -> tuple[list[int], int, int]:
    return histogram.counts.tolist(), histogram.sum_ns, histogram.max_ns


def test_bounds() -> None:
    assert BOUNDS_NS[0] == 1000
    assert BOUNDS_NS[-1] == 100 * 10**9
    assert all(low < high <= low * 1.15 for low, high in pairwise(BOUNDS_NS))
    for decade in range(8):
        assert {10**decade * step for step in (1000, 2500, 5000)} <= set(BOUNDS_NS)


@given(st.lists(DURATIONS), st.lists(DURATIONS))
def test_merging_is_as_noting_all(some: list[int], others: list[int]) -> None:
    merged = histogram_of(some)
    merged.merge(histogram_of(others))
    assert state(merged) == state(histogram_of(some + others))
    assert merged.count == len(some + others)


@given(DURATIONS, st.integers(1, 1000))
def test_several_at_once(duration: int, count: int) -> None:
    once = Histogram()
    once.add(duration, count)
    assert state(once) == state(histogram_of([duration] * count))


@given(st.lists(st.integers(1001, 10**11), min_size=1), st.sampled_from([0.01, 0.5, 0.95, 0.99, 1.0]))
def test_quantiles_are_as_near_as_their_bucket(durations: list[int], share: float) -> None:
    exact = sorted(durations)[max(0, -(-int(share * 1000) * len(durations) // 1000) - 1)]
    found = histogram_of(durations).quantile_ns(share)
    assert exact / 1.15 <= found <= exact * 1.15
    assert found <= max(durations)


def test_quantiles_of_nothing_and_of_the_ends() -> None:
    assert Histogram().quantile_ns(0.99) == 0
    assert histogram_of([400]).quantile_ns(0.5) <= 400
    assert 10**11 <= histogram_of([2 * 10**11]).quantile_ns(0.99) <= 2 * 10**11


@given(st.lists(DURATIONS))
def test_cumulative(durations: list[int]) -> None:
    bounds = BOUNDS_NS[::10]
    exact = [sum(duration <= bound for duration in durations) for bound in bounds]
    assert list(histogram_of(durations).cumulative(bounds)) == exact
    assert all(bounds[index] == BOUNDS_NS[bisect_left(BOUNDS_NS, bounds[index])] for index in range(len(bounds)))


def traffic_of(reads: int) -> Traffic:
    traffic = Traffic()
    traffic.requests[READ] += reads
    traffic.request_bytes[READ] += 4096 * reads
    traffic.errors += 1
    traffic.latency(READ).add(5000, reads)
    return traffic


def test_traffic_adds_up() -> None:
    parts = [traffic_of(1), traffic_of(2), Traffic()]
    parts[2].latency(WRITE).add(7)
    whole = total(parts)
    assert (whole.requests[READ], whole.request_bytes[READ], whole.errors) == (3, 3 * 4096, 2)
    assert (whole.latency(READ).count, whole.latency(WRITE).count) == (3, 1)
    whole.latency(WRITE).add(7)
    assert parts[2].latency(WRITE).count == 1


def test_clients_count_while_they_are_there_and_afterwards() -> None:
    metrics, client = Metrics(), traffic_of(1)
    with metrics.counting(client):
        client.requests[READ] += 4
        assert metrics.traffic.requests[READ] == 5
        with metrics.counting(traffic_of(1)):
            assert metrics.snapshot()["requests_read"] == 6
    assert metrics.traffic.requests[READ] == 6
    assert metrics.snapshot()["errors"] == 2
