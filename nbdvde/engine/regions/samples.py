"""What a metrics log keeps: samples, and the windows of time that samples are taken together in.

    sample = metric u16 | time u64 | value f64 | aggregation u8
    window = metric u16 | aggregation u8 | width u8 | buckets u16 | level u8 | zero u8 | start u64 | count u64
           | sum f64 | minimum f64 | maximum f64 | keys i16 * buckets | counts u(8 * width) * buckets

Records of time 0, and of count 0, are the zeroes behind the last one of a block. A window of the same metric and start
may come more than once: what reads them adds them up.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from nbdvde.engine.regions.form import ROOM, Form
from nbdvde.engine.regions.sketch import BUCKETS_MAX, LEVEL_MAX, Floats, Integers, Sketches, gathered
from nbdvde.errors import UsageError

FORM = Form("MTRK", 32, 40)
SAMPLE = np.dtype([("metric", "<u2"), ("time", "<u8"), ("value", "<f8"), ("aggregation", "u1")])
WINDOW = np.dtype(
    [
        ("metric", "<u2"), ("aggregation", "u1"), ("width", "u1"), ("buckets", "<u2"), ("level", "u1"), ("zero", "u1"),
        ("start", "<u8"), ("count", "<u8"), ("sum", "<f8"), ("minimum", "<f8"), ("maximum", "<f8"),
    ]
)  # fmt: skip
SAMPLES_PER_BLOCK = ROOM // SAMPLE.itemsize
AGGREGATIONS = ("raw", "sum", "average", "minimum", "maximum", "count", "p99")
"""What the value of a sample is: measured, or made of several by whoever records it."""
_WIDTHS = {1: "<u1", 2: "<u2", 4: "<u4"}
Rows: TypeAlias = npt.NDArray[Any]
"""Of dtype SAMPLE or WINDOW."""


class Sample(NamedTuple):
    """A value of a metric."""

    metric: int
    """0 to 65535; those from `metriclist.OWN` on are the caller's."""
    time_ns: int
    """Nanoseconds since 1970-01-01 UTC, 1 at least; in any order."""
    value: float
    """Finite."""
    aggregation: int = 0
    """Index in `AGGREGATIONS`."""


def rows_of(samples: Iterable[Sample]) -> Rows:
    """Checked samples. Raises UsageError."""
    checked = []
    for metric, time_ns, value, aggregation in samples:
        what = f"sample of metric {metric}"
        if not 0 <= metric < 1 << 16:
            raise UsageError(what, "its number is not between 0 and 65535")
        if not 0 < time_ns < 1 << 64:
            raise UsageError(what, "its time is not between 1 and 2^64 - 1 nanoseconds since 1970")
        if not isfinite(value):
            raise UsageError(what, f"its value, {value}, is not finite", "leave it out")
        if not 0 <= aggregation < len(AGGREGATIONS):
            raise UsageError(what, f"aggregation {aggregation} is unknown", f"use 0 to {len(AGGREGATIONS) - 1}")
        checked.append((metric, time_ns, value, aggregation))
    return np.array(checked, SAMPLE)


class Contents(ABC):
    """What a tier holds, oldest first."""

    __slots__ = ()
    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    @abstractmethod
    def part(self, chosen: Integers) -> Self:
        """Some of the records."""

    @abstractmethod
    def joined(self, *others: Any) -> Self:
        """With others of its kind behind."""

    @abstractmethod
    def windows(self) -> "Windows":
        """Each record as a window."""

    @abstractmethod
    def bodies(self) -> list[tuple[bytes, int]]:
        """(contents of a block, records in it)."""

    @classmethod
    @abstractmethod
    def parse(cls, bodies: Sequence[bytes]) -> tuple[Self, Integers]:
        """The records in blocks, and how many each has. Raises DamageError."""

    @property
    @abstractmethod
    def starts(self) -> npt.NDArray[np.uint64]:
        """Nanoseconds since 1970."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Samples in it."""


@dataclass(frozen=True, slots=True)
class Samples(Contents):
    """Samples as they came."""

    rows: Rows

    def part(self, chosen: Integers) -> Self:
        return type(self)(self.rows[chosen])

    def joined(self, *others: Any) -> Self:
        return type(self)(_concatenated([self.rows, *(other.rows for other in others)]))

    def windows(self) -> "Windows":
        rows, values = np.zeros(len(self.rows), WINDOW), self.rows["value"].astype(np.float64)
        rows["metric"], rows["aggregation"] = self.rows["metric"], self.rows["aggregation"]
        rows["start"], rows["count"] = self.rows["time"], 1
        rows["sum"] = rows["minimum"] = rows["maximum"] = values
        return Windows.of(rows, Sketches.of_values(values))

    def bodies(self) -> list[tuple[bytes, int]]:
        parts = (self.rows[at : at + SAMPLES_PER_BLOCK] for at in range(0, len(self.rows), SAMPLES_PER_BLOCK))
        return [(part.tobytes(), len(part)) for part in parts]

    @classmethod
    def parse(cls, bodies: Sequence[bytes]) -> tuple[Self, Integers]:
        tables, end = [], SAMPLES_PER_BLOCK * SAMPLE.itemsize
        for body in bodies:
            table = np.frombuffer(body[:end], SAMPLE)
            used = int(np.count_nonzero(table["time"]))
            _refuse_more(body[used * SAMPLE.itemsize :])
            tables.append(table[:used])
        rows = np.concatenate(tables) if tables else np.zeros(0, SAMPLE)
        if not np.isfinite(rows["value"]).all() or (rows["aggregation"] >= len(AGGREGATIONS)).any():
            raise FORM.damage("has a sample that makes no sense")
        return cls(rows), np.array([len(table) for table in tables], np.int64)

    @property
    def starts(self) -> npt.NDArray[np.uint64]:
        times: npt.NDArray[np.uint64] = self.rows["time"]
        return times

    @property
    def count(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class Windows(Contents):
    """Windows, with what is needed to find the buckets of each."""

    rows: Rows
    keys: npt.NDArray[np.int16]
    counts: npt.NDArray[np.uint32]
    ends: Integers = field(compare=False)
    """Of each window, the number of buckets up to its last one."""

    @classmethod
    def of(cls, rows: Rows, sketches: Sketches) -> Self:
        """Windows and their sketches."""
        rows["buckets"], rows["level"] = sketches.sizes, sketches.levels
        return cls(rows, sketches.keys.astype(np.int16), sketches.counts.astype(np.uint32), np.cumsum(sketches.sizes))

    @classmethod
    def none(cls) -> Self:
        """No windows."""
        return cls(np.zeros(0, WINDOW), np.zeros(0, np.int16), np.zeros(0, np.uint32), np.zeros(0, np.int64))

    @property
    def sketches(self) -> Sketches:
        """Of all windows."""
        levels, sizes = self.rows["level"].astype(np.int64), self.rows["buckets"].astype(np.int64)
        return Sketches(levels, sizes, self.keys.astype(np.int64), self.counts.astype(np.int64))

    def part(self, chosen: Integers) -> Self:
        rows = self.rows[chosen]
        at = gathered(self.rows["buckets"].astype(np.int64), self.ends, chosen)
        return type(self)(rows, self.keys[at], self.counts[at], np.cumsum(rows["buckets"].astype(np.int64)))

    def joined(self, *others: Any) -> Self:
        parts = (self, *others)
        rows = _concatenated([part.rows for part in parts])
        keys, counts = (np.concatenate([getattr(part, name) for part in parts]) for name in ("keys", "counts"))
        return type(self)(rows, keys, counts, np.cumsum(rows["buckets"].astype(np.int64)))

    def windows(self) -> "Windows":
        return self

    def grouped(self, width_ns: int) -> "Windows":
        """All that begin in the same window of this length taken together, by metric and start."""
        if not len(self):
            return self
        starts = self.rows["start"] - self.rows["start"] % np.uint64(width_ns)
        series = series_of(self.rows)
        rows, order = self.rows, None
        if not _ascend(series, starts):
            order = np.lexsort((starts, series))
            rows, starts, series = rows[order], starts[order], series[order]
        first = np.concatenate(([True], (starts[1:] != starts[:-1]) | (series[1:] != series[:-1])))
        at = np.flatnonzero(first)
        groups = np.cumsum(first) - 1
        if order is not None:
            groups[order] = groups.copy()
        result = rows[at]
        result["start"], result["count"] = starts[at], np.add.reduceat(rows["count"], at)
        with np.errstate(over="ignore", invalid="ignore"):
            result["sum"] = np.add.reduceat(rows["sum"], at)
        result["minimum"], result["maximum"] = (
            np.minimum.reduceat(rows["minimum"], at), np.maximum.reduceat(rows["maximum"], at),
        )  # fmt: skip
        return Windows.of(result, self.sketches.merged(groups, len(at)))

    def plain(self) -> Self:
        """Without their sketches: percentiles tell nothing, and everything is quicker."""
        rows, ones = self.rows.copy(), np.ones(len(self.rows), np.int64)
        return type(self).of(rows, Sketches(0 * ones, ones, 0 * ones, ones))

    def quantiles(self, share: float) -> Floats:
        """As of `Sketches`, and never beyond the least and the greatest value."""
        return np.clip(self.sketches.quantiles(share), self.rows["minimum"], self.rows["maximum"])

    def bodies(self) -> list[tuple[bytes, int]]:
        bodies: list[tuple[bytearray, int]] = []
        for record in self._records():
            if not bodies or len(bodies[-1][0]) + len(record) > ROOM:
                bodies.append((bytearray(), 0))
            body, count = bodies[-1]
            body += record
            bodies[-1] = body, count + 1
        return [(bytes(body), count) for body, count in bodies]

    def _records(self) -> Iterator[bytes]:
        if not len(self):
            return
        rows, begins = self.rows.copy(), self.ends - self.rows["buckets"]
        most = np.maximum.reduceat(self.counts, begins)
        rows["width"] = np.where(most < 1 << 8, 1, np.where(most < 1 << 16, 2, 4))
        fixed, keys = rows.tobytes(), self.keys.astype("<i2").tobytes()
        counts = {width: self.counts.astype(kind).tobytes() for width, kind in _WIDTHS.items()}
        columns = zip(rows["width"].tolist(), begins.tolist(), self.ends.tolist(), strict=True)
        for number, (width, begin, end) in enumerate(columns):
            row = fixed[number * WINDOW.itemsize : (number + 1) * WINDOW.itemsize]
            yield row + keys[2 * begin : 2 * end] + counts[width][width * begin : width * end]

    @classmethod
    def parse(cls, bodies: Sequence[bytes]) -> tuple[Self, Integers]:
        parts = _Parts()
        numbers = [parts.take(body) for body in bodies]
        rows, keys, counts = parts.joined()
        windows = cls(rows, keys, counts, np.cumsum(rows["buckets"].astype(np.int64)))
        if len(rows):
            windows._refuse_nonsense()
        windows.rows["width"] = 0  # of the record alone
        return windows, np.array(numbers, np.int64)

    def _refuse_nonsense(self) -> None:
        rows = self.rows
        bad = (rows["zero"] > 0) | (rows["level"] > LEVEL_MAX) | (rows["aggregation"] >= len(AGGREGATIONS))
        bad |= ~(np.isfinite(rows["minimum"]) & np.isfinite(rows["maximum"]) & (rows["minimum"] <= rows["maximum"]))
        ascending = np.diff(self.keys.astype(np.int64)) > 0
        ascending[self.ends[:-1] - 1] = True
        if bad.any() or not ascending.all() or not self.counts.all():
            raise FORM.damage("has a window that makes no sense")

    @property
    def starts(self) -> npt.NDArray[np.uint64]:
        starts: npt.NDArray[np.uint64] = self.rows["start"]
        return starts

    @property
    def count(self) -> int:
        return int(self.rows["count"].sum())


class _Parts:
    """The fields of windows, cut out of their blocks."""

    def __init__(self) -> None:
        self._fixed: list[bytes] = []
        self._keys: list[bytes] = []
        self._counts: dict[int, list[bytes]] = {width: [] for width in _WIDTHS}

    def take(self, body: bytes) -> int:
        """Take the windows of a block; answers how many there are. Raises DamageError."""
        at = number = 0
        while at + WINDOW.itemsize <= len(body):
            width, buckets = body[at + 3], int.from_bytes(body[at + 4 : at + 6], "little")
            keys = at + WINDOW.itemsize
            if not any(body[at + 16 : at + 24]):  # its count
                break
            counts, end = keys + 2 * buckets, keys + (2 + width) * buckets
            if width not in _WIDTHS or not 1 <= buckets <= BUCKETS_MAX or end > ROOM:
                raise FORM.damage("has a window that makes no sense")
            self._fixed.append(body[at:keys])
            self._keys.append(body[keys:counts])
            self._counts[width].append(body[counts:end])
            at, number = end, number + 1
        _refuse_more(body[at:])
        return number

    def joined(self) -> tuple[Rows, npt.NDArray[np.int16], npt.NDArray[np.uint32]]:
        """The fixed fields, keys and counts of all."""
        rows = np.frombuffer(b"".join(self._fixed), WINDOW).copy()
        widths = np.repeat(rows["width"], rows["buckets"])
        counts = np.zeros(len(widths), np.uint32)
        for width, parts in self._counts.items():
            counts[widths == width] = np.frombuffer(b"".join(parts), _WIDTHS[width])
        return rows, np.frombuffer(b"".join(self._keys), "<i2").astype(np.int16), counts


def series_of(rows: Rows) -> Integers:
    """A number for each metric and aggregation."""
    series: Integers = rows["metric"].astype(np.int64) << 8 | rows["aggregation"]
    return series


def _ascend(series: Integers, starts: npt.NDArray[np.uint64]) -> bool:
    """Whether rows are in the order of series and starts."""
    same = series[1:] == series[:-1]
    return bool(((series[1:] > series[:-1]) | (same & (starts[1:] >= starts[:-1]))).all())


def _concatenated(tables: Sequence[Rows]) -> Rows:
    """As numpy does it, which takes longer to compare the fields than to copy them."""
    dtype = tables[0].dtype
    raw = np.concatenate([np.ascontiguousarray(table).view(f"V{dtype.itemsize}") for table in tables])
    return raw.view(dtype)


def _refuse_more(rest: bytes) -> None:
    if rest.strip(b"\0"):
        raise FORM.damage("has bytes behind its records that are not zero")
