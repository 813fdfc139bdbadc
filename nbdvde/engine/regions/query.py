"""Questions to a metrics log: ranges of time in windows of any length, and which series there are."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nbdvde.engine.regions.samples import Contents, Windows, series_of
from nbdvde.engine.regions.sketch import Integers
from nbdvde.engine.regions.tiers import History

TIME_MAX = (1 << 64) - 1
WHOLE = TIME_MAX
"""As a resolution: one window for all that is asked for."""


class Series(NamedTuple):
    """What samples are of: a metric, and what was made of it (`samples.AGGREGATIONS`)."""

    metric: int
    aggregation: int = 0


@dataclass(frozen=True, slots=True)
class Question:
    """What of a series is asked for."""

    series: Series
    since_ns: int = 0
    until_ns: int = TIME_MAX
    """The last nanosecond that is asked for."""
    resolution_ns: int = 0
    """Length of the windows, 0 for samples as they came, or `WHOLE`. What is kept in longer ones comes in those."""
    last: int | None = None
    """Only so many, the newest."""
    percentiles: bool = True
    """Whether they are asked for as well: that takes twice as long, and more of long ranges."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Windows in the order of their starts. Those of one length are disjoint."""

    windows: Windows
    widths_ns: Integers
    """Of each window; 0 for a sample."""


def ask(history: History, question: Question) -> Answer:
    """The answer. A window that is asked for in part belongs to it as a whole."""
    resolution = question.resolution_ns
    fine, found, widths = [Windows.none()], [], []
    for tier in history.tiers:
        width = tier.ring.width_ns
        chosen = tier.contents.part(_chosen(tier.contents, question, width)).windows()
        chosen = chosen if question.percentiles else chosen.plain()
        if width <= resolution:
            fine.append(chosen)
        elif len(chosen):
            found.append(chosen.grouped(width))
            widths.append(width)
    finest = fine[0].joined(*fine[1:])
    if resolution == WHOLE:
        finest.rows["start"], resolution = question.since_ns, question.until_ns - question.since_ns
        finest = finest.grouped(1)
    elif resolution:
        finest = finest.grouped(resolution)
    found.append(finest)
    widths.append(resolution)
    every = found[0].joined(*found[1:])
    lengths = np.repeat(widths, [len(windows) for windows in found])
    order = np.argsort(every.starts, kind="stable")
    if question.last is not None:
        order = order[max(0, len(order) - question.last) :]
    return Answer(every.part(order), lengths[order])


def _chosen(contents: Contents, question: Question, width_ns: int) -> Integers:
    rows, starts = contents.rows, contents.starts
    step = max(width_ns, question.resolution_ns % WHOLE, 1)
    since, until = question.since_ns - question.since_ns % step, question.until_ns - question.until_ns % step + step - 1
    wanted = (rows["metric"] == question.series.metric) & (rows["aggregation"] == question.series.aggregation)
    wanted &= (starts >= np.uint64(since)) & (starts <= np.uint64(min(until, TIME_MAX)))
    return np.flatnonzero(wanted)


class Extent(NamedTuple):
    """How much of a series there is."""

    samples: int
    first_ns: int
    last_ns: int
    """Where the newest window begins, or when the newest sample was."""


def extents(history: History) -> dict[Series, Extent]:
    """All series there are, by metric and aggregation."""
    found: dict[Series, Extent] = {}
    for tier in history.tiers:
        rows, starts = tier.contents.rows, tier.contents.starts
        if not len(rows):
            continue
        series = series_of(rows)
        order = np.argsort(series, kind="stable")
        at = np.flatnonzero(np.diff(series[order], prepend=-1))
        counts = rows["count"] if tier.ring.width_ns else np.ones(len(rows), np.uint64)
        sums = np.add.reduceat(counts[order], at)
        firsts, lasts = np.minimum.reduceat(starts[order], at), np.maximum.reduceat(starts[order], at)
        columns = (series[order][at], sums, firsts, lasts)
        for code, *values in zip(*(column.tolist() for column in columns), strict=True):
            key, here = Series(code >> 8, code & 255), Extent(*values)
            known = found.get(key, here._replace(samples=0))
            found[key] = Extent(
                known.samples + here.samples, min(known.first_ns, here.first_ns), max(known.last_ns, here.last_ns)
            )
    return dict(sorted(found.items()))
