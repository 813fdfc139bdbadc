"""The metrics log: the cap holds whatever arrives, and counts, minima and maxima survive being taken together."""

import math
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdvde.engine.layout import BLOCK
from nbdvde.engine.regions.directory import WINDOW, Slot
from nbdvde.engine.regions.query import WHOLE, Extent, Question, Series, ask, extents
from nbdvde.engine.regions.samples import FORM, SAMPLE, SAMPLES_PER_BLOCK, Sample, rows_of
from nbdvde.engine.regions.sketch import BUCKETS_MAX
from nbdvde.engine.regions.tiers import (
    CAPACITY,
    CAPACITY_MIN,
    DAY_NS,
    HOUR_NS,
    MINUTE_NS,
    THRESHOLD,
    Change,
    History,
    flaws,
)
from nbdvde.errors import DamageError, UsageError

NOW_NS = 1_700_000_000 * 10**9
SECOND_NS = 10**9


@dataclass
class Log:
    """A log, and its blocks as an image would hold them."""

    capacity: int = CAPACITY_MIN
    threshold: float = THRESHOLD
    blocks: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.history, change = History.create(self.capacity, self.threshold)
        self._apply(change)

    def _apply(self, change: Change) -> None:
        assert 0 in change.blocks
        for start, stop in change.holes:
            for number in range(start, stop):
                assert self.blocks.pop(number, None) is not None, "what is given up was there"
        assert not change.blocks.keys() & {n for start, stop in change.holes for n in range(start, stop)}
        self.blocks |= change.blocks
        assert max(self.blocks) < self.capacity // BLOCK

    def add(self, rows: np.ndarray) -> None:
        while len(rows):
            self.history, change, taken = self.history.adding(rows)
            self._apply(change)
            rows = rows[taken:]
            while self.history.is_due:
                step = self.history.stepped()
                assert step is not None
                before = self.history.samples
                self.history, change = step
                self._apply(change)
                assert self.history.samples <= before
        assert self.history.stepped() is None

    def read(self, start: int, count: int) -> bytes:
        return b"".join(self.blocks[start + number] for number in range(count))

    def loaded(self) -> History:
        return History.load(self.read)

    def check(self) -> None:
        """It is the same when it is read back, and has no block that nobody uses."""
        loaded, history = self.loaded(), self.history
        assert loaded.samples == history.samples == sum(tier.contents.count for tier in history.tiers)
        assert [tier.ring for tier in loaded.tiers] == [tier.ring for tier in history.tiers]
        for found, tier in zip(loaded.tiers, history.tiers, strict=True):
            assert found.per_block.tolist() == tier.per_block.tolist()
            assert found.contents.rows.tobytes() == tier.contents.rows.tobytes()
        assert len(self.blocks) == 1 + sum(tier.ring.used for tier in history.tiers)
        slot = Slot(FORM.tag, WINDOW, self.capacity // BLOCK, self.capacity // BLOCK)
        assert not list(flaws(lambda number: self.blocks[number], slot))


def interleaved(metrics: int, seconds: range, seed: int = 1) -> np.ndarray:
    """A sample of each metric at each of these seconds."""
    rows = np.zeros(metrics * len(seconds), SAMPLE)
    rows["metric"] = np.tile(np.arange(metrics), len(seconds))
    rows["time"] = NOW_NS + np.repeat(np.array(seconds, np.uint64), metrics) * np.uint64(SECOND_NS)
    rows["value"] = np.random.default_rng(seed).normal(100, 30, len(rows))
    return rows


def whole(history: History, series: Series, resolution_ns: int = DAY_NS) -> tuple[int, float, float, float]:
    """Count, minimum, maximum and sum of all that there is."""
    rows = ask(history, Question(series, resolution_ns=resolution_ns)).windows.rows
    return int(rows["count"].sum()), rows["minimum"].min(), rows["maximum"].max(), rows["sum"].sum()


def test_interleaved_metrics_become_windows_of_a_minute() -> None:
    log = Log()
    rows = interleaved(20, range(0, 3600, 10))
    log.add(rows)
    log.check()
    raw, minutes = log.history.tiers[:2]
    assert raw.ring.used <= THRESHOLD * raw.ring.blocks
    assert len(minutes.contents) < minutes.contents.count / 3
    assert log.history.samples == len(rows)
    for metric in range(20):
        mine = rows["value"][rows["metric"] == metric]
        found = whole(log.history, Series(metric))
        assert found[:3] == (len(mine), mine.min(), mine.max())
        assert found[3] == pytest.approx(mine.sum())


SAMPLES = st.lists(
    st.tuples(
        st.sampled_from((0, 1, 2, 7, 65535)) | st.integers(0, 65535),
        st.integers(1, 1 << 20) | st.integers(NOW_NS, NOW_NS + 3 * DAY_NS) | st.integers(1, (1 << 64) - 1),
        st.floats(allow_nan=False, allow_infinity=False),
        st.integers(0, 6),
        st.integers(1, 700),
    ),
    min_size=1,
    max_size=12,
)


@given(SAMPLES, st.sampled_from((0.25, 0.8, 0.95)))
@settings(max_examples=30, deadline=None)
def test_the_cap_holds_whatever_arrives(
    given_samples: list[tuple[int, int, float, int, int]], threshold: float
) -> None:
    """Any metrics, values and times in any order, a clock that goes back: what is there is what was added."""
    log = Log(threshold=threshold)
    added: dict[Series, list[float]] = defaultdict(list)
    for metric, time_ns, value, aggregation, times in given_samples:
        log.add(np.repeat(rows_of([Sample(metric, time_ns, value, aggregation)]), times))
        added[Series(metric, aggregation)] += [value] * times
    log.check()
    assert log.history.samples == sum(map(len, added.values())), "so few are never given up"
    for series, values in added.items():
        count, least, most, total = whole(log.history, series)
        assert (count, least, most) == (len(values), min(values), max(values))
        size = sum(map(abs, values))
        assert not math.isfinite(size) or total == pytest.approx(sum(values), abs=1e-9 * size)
    found = extents(log.history)
    assert {series: extent.samples for series, extent in found.items()} == {s: len(v) for s, v in added.items()}


@pytest.mark.parametrize("order", ["as they come", "backwards", "at random"])
def test_every_metric_at_once_stays_within_the_cap(order: str) -> None:
    """Nothing can be taken together: the oldest go, and the rest is whole."""
    log = Log()
    rows = np.zeros(1 << 16, SAMPLE)
    rows["metric"] = np.arange(1 << 16)
    rng = np.random.default_rng(3)
    for turn in range(4):
        rows["time"] = NOW_NS + turn * DAY_NS * 3
        rows["value"] = rng.normal(size=len(rows))
        part = {"as they come": rows, "backwards": rows[::-1], "at random": rows[rng.permutation(len(rows))]}[order]
        log.add(part[:5_000])
        log.check()
    assert 0 < log.history.samples < 4 * 5_000
    newest = log.history.tiers[0].contents.rows[-1]
    assert newest == part[4_999], "the newest are still there"


def test_metrics_of_a_year_stay_within_a_part_of_the_cap() -> None:
    """Two metrics, every 10 minutes, of values that fill a sketch: a 20th of the cap for each is enough for a year.

    All 20 of them every 10 s take minutes: docs/decisions/0023-metrics-log.md has the figures.
    """
    log = Log(CAPACITY // 10 // BLOCK * BLOCK)
    for day in range(365):
        rows = interleaved(2, range(day * 86400, day * 86400 + 86400, 600), day)
        rows["value"] = np.exp(np.random.default_rng(day).uniform(-10, 10, len(rows)))
        log.add(rows)
    log.check()
    assert log.history.samples == 365 * 144 * 2, "nothing was given up"
    days = log.history.tiers[3]
    assert days.ring.used <= days.ring.blocks
    least = len(ask(log.history, Question(Series(1), resolution_ns=DAY_NS)).windows)
    assert least in (365, 366)


def test_days_of_20_metrics_fit_whatever_they_measured() -> None:
    """The longest window of a day, 8640 samples in as many buckets as there can be: four in a block."""
    longest = 48 + BUCKETS_MAX * (2 + 2)
    blocks = History.create(CAPACITY, THRESHOLD)[0].tiers[3].ring.blocks
    partial = 1.4  # a day that two steps took together is there twice
    assert (4096 - 16) // longest * blocks > 20 * 366 * partial


def test_a_range_is_answered_in_windows_of_any_length() -> None:
    log = Log()
    rows = interleaved(3, range(0, 86400, 20))
    log.add(rows)
    mine = rows[rows["metric"] == 1]
    for resolution in (0, MINUTE_NS, 5 * MINUTE_NS, HOUR_NS, DAY_NS):
        whole = ask(log.history, Question(Series(1), resolution_ns=resolution))
        starts, ends = whole.windows.starts, whole.windows.starts + np.maximum(whole.widths_ns, 1).astype(np.uint64)
        assert whole.windows.count == len(mine)
        assert (whole.widths_ns >= resolution).all()
        assert (np.diff(starts.astype(np.int64)) >= 0).all()
        for row, start, end in zip(whole.windows.rows, starts, ends, strict=True):
            values = mine["value"][(mine["time"] >= start) & (mine["time"] < end)]
            assert row["count"] <= len(values)
            assert values.min() <= row["minimum"] <= row["sum"] / row["count"] <= row["maximum"] <= values.max()
        since, until = NOW_NS + 7 * 3600 * SECOND_NS, NOW_NS + 19 * 3600 * SECOND_NS
        part = ask(log.history, Question(Series(1), since, until, resolution))
        inside = np.flatnonzero((starts <= until) & (ends > since))
        assert part.windows.rows.tobytes() == whole.windows.part(inside).rows.tobytes()
        assert part.widths_ns.tolist() == whole.widths_ns[inside].tolist()
    one = ask(log.history, Question(Series(1), NOW_NS, NOW_NS + DAY_NS, WHOLE))
    assert one.windows.starts.tolist() == [NOW_NS]
    assert one.widths_ns.tolist() == [DAY_NS]
    assert one.windows.count == len(mine)
    fresh = Log()
    fresh.add(rows[:900])
    few = ask(fresh.history, Question(Series(1), NOW_NS + 5000 * SECOND_NS, resolution_ns=WHOLE))
    assert few.windows.count == 300 - 250, "and no more than is asked for"
    assert len(whole.windows) == 2, "and of what was taken together in days alone, each day is one"


def test_percentiles_survive_being_taken_together() -> None:
    log = Log()
    rows = interleaved(2, range(0, 86400, 10))
    log.add(rows)
    assert log.history.tiers[2].ring.used
    windows = ask(log.history, Question(Series(0), resolution_ns=7 * DAY_NS)).windows
    values = np.sort(rows["value"][rows["metric"] == 0])
    for share in (0.0, 0.5, 0.95, 0.99, 1.0):
        exact = values[int(share * (len(values) - 1))]
        assert windows.quantiles(share)[0] == pytest.approx(exact, rel=0.021)
    quick = ask(log.history, Question(Series(0), resolution_ns=7 * DAY_NS, percentiles=False)).windows
    for name in ("start", "count", "sum", "minimum", "maximum"):
        assert quick.rows[name].tolist() == windows.rows[name].tolist()


def test_the_newest_are_those_of_the_latest_time() -> None:
    log = Log()
    log.add(rows_of([Sample(1, NOW_NS + at, float(at)) for at in (5, 1, 9, 3)]))
    answer = ask(log.history, Question(Series(1), last=2))
    assert answer.windows.rows["sum"].tolist() == [5.0, 9.0]
    assert extents(log.history) == {Series(1): Extent(4, NOW_NS + 1, NOW_NS + 9)}


def test_what_is_summed_by_its_maker_stays_apart() -> None:
    log = Log()
    log.add(rows_of([Sample(1, NOW_NS, 5.0), Sample(1, NOW_NS, 7.0, 6)]))
    assert whole(log.history, Series(1, 6))[:3] == (1, 7.0, 7.0)
    assert whole(log.history, Series(1, 0))[:3] == (1, 5.0, 5.0)


@pytest.mark.parametrize(
    ("sample", "why"),
    [
        (Sample(65536, 1, 0.0), "not between 0 and 65535"),
        (Sample(-1, 1, 0.0), "not between 0 and 65535"),
        (Sample(0, 0, 0.0), "its time"),
        (Sample(0, 1 << 64, 0.0), "its time"),
        (Sample(0, 1, math.nan), "not finite"),
        (Sample(0, 1, math.inf), "not finite"),
        (Sample(0, 1, 0.0, 7), "aggregation 7 is unknown"),
    ],
)  # fmt: skip
def test_a_sample_that_makes_no_sense_is_refused(sample: Sample, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        rows_of([Sample(0, 1, 0.0), sample])


def damaged(log: Log, number: int, at: int, new: bytes) -> History:
    body, generation = FORM.opened(log.blocks[number])
    blocks = {**log.blocks, number: FORM.block(body[:at] + new + body[at + len(new) :], generation)}
    return History.load(lambda start, count: b"".join(blocks[start + n] for n in range(count)))


def test_what_makes_no_sense_is_damage() -> None:
    log = Log()
    log.add(interleaved(20, range(0, 7200, 10)))
    window = log.history.tiers[1].ring.place(log.history.tiers[1].ring.head)
    sample = log.history.tiers[0].ring.place(log.history.tiers[0].ring.head)
    for number, at, new, why in (
        (0, 0, b"\1", "counts"), (0, 8, b"\1", "header"), (0, 16, b"\0" * 8, "header"), (0, 24, b"\1", "header"),
        (0, 40, b"\2", "header"), (0, 56, b"\xff" * 8, "header"), (0, 300, b"\1", "header"),
        (sample, 10, b"\xff" * 8, "a sample"), (sample, 18, b"\7", "a sample"), (sample, 4075, b"\1", "not zero"),
        (sample, 2, b"\0" * 8, "not zero|counts"),
        (window, 2, b"\7", "a window"), (window, 3, b"\3", "a window"), (window, 4, b"\0\0", "a window"),
        (window, 4, b"\xff\xff", "a window"), (window, 7, b"\1", "a window"), (window, 8, b"\1", "beside"),
        (window, 32, b"\xff" * 8, "a window"), (window, 48, b"\xff\x7f", "a window"),
    ):  # fmt: skip
        with pytest.raises(DamageError, match=why):
            assert not damaged(log, number, at, new), (number, at)


FULL = Log()
FULL.add(interleaved(5, range(0, 86400 * 2, 30)))
PLACES = st.integers(0, 260) | st.integers(0, 4079)
CHANGES = st.lists(
    st.tuples(st.sampled_from(sorted(FULL.blocks)), PLACES, st.binary(min_size=1, max_size=9)), min_size=1, max_size=3
)


@given(CHANGES)
@settings(max_examples=100, deadline=None)
def test_whatever_blocks_hold_is_damage_or_can_be_asked(changes: list[tuple[int, int, bytes]]) -> None:
    """Sealed blocks come from us; what a bug or a key in wrong hands made of them is met like damage."""
    blocks = dict(FULL.blocks)
    for number, at, new in changes:
        body, generation = FORM.opened(blocks[number])
        blocks[number] = FORM.block((body[:at] + new + body[at + len(new) :])[: len(body)], generation)
    try:
        history = History.load(lambda start, count: b"".join(blocks.get(start + n, b"") for n in range(count)))
    except DamageError:
        return
    for series in extents(history):
        for resolution in (0, HOUR_NS):
            ask(history, Question(series, resolution_ns=resolution)).windows.quantiles(0.99)
    while history.is_due:
        step = history.stepped()
        assert step is not None
        history = step[0]


def test_a_block_newer_than_the_first_is_damage() -> None:
    log = Log()
    log.add(interleaved(1, range(SAMPLES_PER_BLOCK + 5)))
    old = log.blocks[0]
    log.add(interleaved(1, range(3)))
    log.blocks[0] = old
    with pytest.raises(DamageError, match="newer than the first"):
        log.loaded()


def test_the_directory_has_the_same_capacity() -> None:
    log = Log()
    slot = Slot(FORM.tag, WINDOW, 99, 99)
    assert list(flaws(lambda number: log.blocks[number], slot)) == ["says 64 blocks, and the directory 99"]
