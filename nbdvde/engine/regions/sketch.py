"""Sketches for percentiles, of many windows at once: how many values there were in each of buckets that grow by 4 %.

A bucket is a signed number. Level 0: values x of key k > 0 are those with g^(k - 1 - OFFSET) < x <= g^(k - OFFSET),
g = 1.02 / 0.98, so that the middle of a bucket is within 2 % of all its values; negative values have negative keys,
and what is nearer to zero than `TINY` has key 0. At level n as many as 2^n of these are one bucket. A window that has
more than `BUCKETS_MAX` of them is taken to the next level: the error is (g^(2^n) - 1) / (g^(2^n) + 1), which is 2 %,
4 %, 8 % and so on. Sketches are merged by adding.

Source: DDSketch (Masson, Rim, Lee: VLDB 12, 2019), with the uniform collapse of UDDSketch (Epicoco et al., 2020).
"""

from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

ACCURACY = 0.02
BUCKETS_MAX = 240
OFFSET = 15024
"""Keys up to 32767 reach the largest 64-bit float."""
_LOG = float(np.log((1 + ACCURACY) / (1 - ACCURACY)))
TINY = float(np.exp(-(OFFSET - 1) * _LOG))
LEVEL_MAX = 15
_DENSE = 8
"""Cells of a table for each bucket that is added up in it, at most."""
COUNT_MAX = (1 << 32) - 1
"""Of a bucket; one that has seen more says so many."""

Floats: TypeAlias = npt.NDArray[np.float64]
Integers: TypeAlias = npt.NDArray[np.int64]


def keys_of(values: Floats) -> Integers:
    """The buckets of finite values, at level 0."""
    sizes = np.abs(values)
    found = np.zeros(len(values), np.int64)
    far = sizes > TINY
    found[far] = np.clip(np.ceil(np.log(sizes[far]) / _LOG), 1 - OFFSET, 32767 - OFFSET) + OFFSET
    return np.where(values < 0, -found, found)


def gathered(sizes: Integers, ends: Integers, chosen: Integers) -> Integers:
    """Where the buckets of the chosen windows are, when window i has the last `sizes[i]` of those before `ends[i]`."""
    taken = sizes[chosen]
    stops = np.cumsum(taken)
    return np.arange(int(stops[-1]) if len(stops) else 0) + np.repeat(ends[chosen] - stops, taken)


@dataclass(frozen=True, slots=True)
class Sketches:
    """One for each window."""

    levels: Integers
    sizes: Integers
    """Buckets of each window, 1 at least."""
    keys: Integers
    """Of all windows one after the other, ascending in each."""
    counts: Integers

    @classmethod
    def of_values(cls, values: Floats) -> Self:
        """A window for each value."""
        ones = np.ones(len(values), np.int64)
        return cls(np.zeros(len(values), np.int64), ones, keys_of(values), ones)

    def merged(self, groups: Integers, number: int) -> Self:
        """Those of so many groups of windows; `groups` names the group of each, and none has no window."""
        levels = np.zeros(number, np.int64)
        np.maximum.at(levels, groups, self.levels)
        owners = np.repeat(groups, self.sizes)
        keys = _collapsed(self.keys, levels[owners] - np.repeat(self.levels, self.sizes))
        counts = self.counts
        while True:
            owners, keys, counts = _added(owners, keys, counts)
            sizes = np.bincount(owners, minlength=number)
            crowded = sizes > BUCKETS_MAX
            if not crowded.any():
                return type(self)(levels, sizes, keys, np.minimum(counts, COUNT_MAX))
            levels = levels + crowded
            keys = _collapsed(keys, crowded[owners].astype(np.int64))

    def quantiles(self, share: float) -> Floats:
        """Of each window, the value that this share of its values (0 to 1) does not exceed."""
        ends, sums = np.cumsum(self.sizes), np.cumsum(self.counts)
        starts = ends - self.sizes
        below = sums[starts] - self.counts[starts]
        ranks = below + np.floor(share * (sums[ends - 1] - below - 1)).astype(np.int64)
        at = np.searchsorted(sums, ranks, side="right")
        steps = np.exp2(self.levels)
        with np.errstate(over="ignore"):
            middle = 2 / (1 + np.exp(_LOG * steps))
            values = np.exp(_LOG * (np.abs(self.keys[at]) * steps - OFFSET)) * middle
        signed: Floats = np.sign(self.keys[at]) * values
        return signed


def _collapsed(keys: Integers, levels: npt.NDArray[Any]) -> Integers:
    """The keys so many levels further up."""
    if not levels.any():
        return keys
    moved: Integers = np.sign(keys) * ((np.abs(keys) + (1 << levels) - 1) >> levels)
    return moved


def _added(owners: Integers, keys: Integers, counts: Integers) -> tuple[Integers, Integers, Integers]:
    """Each bucket of each owner once, in the order of owners and keys."""
    codes = owners << 16 | keys + 32768
    steps = np.diff(codes)
    if (steps > 0).all():
        return owners, keys, counts
    low, span = int(keys.min()), int(keys.max() - keys.min()) + 1
    if (int(owners.max()) + 1) * span <= _DENSE * len(keys):  # quicker than sorting, and as exact below 2^53
        sums = np.bincount(owners * span + (keys - low), weights=counts)
        found = np.flatnonzero(sums)
        return found // span, found % span + low, sums[found].astype(np.int64)
    if (steps < 0).any():
        order = np.argsort(codes, kind="stable")
        codes, counts = codes[order], counts[order]
    firsts = np.flatnonzero(np.concatenate(([True], codes[1:] != codes[:-1])))
    codes = codes[firsts]
    return codes >> 16, (codes & 65535) - 32768, np.add.reduceat(counts, firsts)
