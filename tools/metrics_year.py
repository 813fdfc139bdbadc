"""A year of 20 metrics, one sample of each every 10 s, in a metrics log of the default size: how full, how fast.

`python -m tools.metrics_year [DAYS]`. Time is made up, nothing is stored. Takes minutes; decision 23 has the results.
"""

import sys
from time import process_time

import numpy as np

from nbdvde.engine.regions.query import Question, Series, ask
from nbdvde.engine.regions.samples import SAMPLE, Rows
from nbdvde.engine.regions.tiers import CAPACITY, DAY_NS, THRESHOLD, WIDTHS_NS, History

METRICS, STEP_NS, BEGIN_NS = 20, 10 * 10**9, 1_700_006_400 * 10**9
SHARES = (0.5, 0.95, 0.99)


def day_of(number: int, rng: np.random.Generator) -> Rows:
    """The samples of a day: latencies, rates, numbers that stay what they are, and such with a sign, interleaved."""
    count = DAY_NS // STEP_NS
    rows = np.zeros((count, METRICS), SAMPLE)
    rows["metric"] = np.arange(METRICS)
    rows["time"] = (BEGIN_NS + number * DAY_NS + np.arange(count) * STEP_NS)[:, None]
    for metric in range(METRICS):
        rows["value"][:, metric] = (
            rng.lognormal(-8, 2, count), rng.uniform(0, 1e6, count), np.full(count, 3.0), rng.normal(0, 5, count),
        )[metric % 4]  # fmt: skip
    return rows.ravel()


def fed(days: int) -> History:
    """A log after so many days."""
    rng = np.random.default_rng(1)
    history, _ = History.create(CAPACITY, THRESHOLD)
    for number in range(days):
        rows = day_of(number, rng)
        while len(rows):
            history, _, taken = history.adding(rows)
            rows = rows[taken:]
            while step := history.stepped():
                history = step[0]
    return history


def milliseconds(history: History, metric: int, width_ns: int, *, percentiles: bool) -> float:
    """Of a processor, to answer for the whole time: the best of seven."""
    taken = []
    for _ in range(7):
        begun = process_time()
        windows = ask(history, Question(Series(metric), resolution_ns=width_ns, percentiles=percentiles)).windows
        if percentiles:
            for share in SHARES:
                windows.quantiles(share)
        taken.append(process_time() - begun)
    return min(taken) * 1e3


def main() -> None:
    """Print what came of it."""
    days = int(sys.argv[1]) if len(sys.argv) > 1 else 365
    history = fed(days)
    print(f"{history.samples} samples, {history.used_bytes >> 20} of {CAPACITY >> 20} MiB")
    for tier in history.tiers:
        first = (tier.contents.starts.max() - tier.contents.starts.min()) / DAY_NS if len(tier.contents) else 0.0
        ring = tier.ring
        print(f"  tier of {ring.width_ns // 10**9:>5} s: {ring.used} of {ring.blocks} blocks, {first:.1f} days")
    for width_ns in WIDTHS_NS:
        times = [
            [milliseconds(history, metric, width_ns, percentiles=wanted) for metric in range(4)]
            for wanted in (False, True)
        ]
        plain, whole = (max(found) for found in times)
        print(f"  all in windows of {width_ns // 10**9:>5} s: {plain:.1f} ms, {whole:.1f} ms with percentiles")


if __name__ == "__main__":
    main()
