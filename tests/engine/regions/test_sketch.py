"""Sketches: percentiles within their promise, merging without loss, and a bounded size whatever comes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdvde.engine.regions.sketch import ACCURACY, BUCKETS_MAX, TINY, Sketches, keys_of

VALUES = st.floats(allow_nan=False, allow_infinity=False)


def sketch(values: list[float], groups: list[int] | None = None) -> Sketches:
    """Of all values, or of each group of them."""
    groups = groups or [0] * len(values)
    return Sketches.of_values(np.array(values)).merged(np.array(groups), max(groups) + 1)


@given(st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=BUCKETS_MAX), st.floats(0, 1))
def test_percentiles_are_within_two_percent(values: list[float], share: float) -> None:
    exact = sorted(values)[int(share * (len(values) - 1))]
    for sign in (1, -1):
        signed = sorted(sign * value for value in values)
        exact = signed[int(share * (len(values) - 1))]
        [found] = sketch(signed).quantiles(share)
        assert found == pytest.approx(exact, rel=ACCURACY + 1e-9)


@given(st.lists(VALUES, min_size=1, max_size=60), st.data())
def test_merging_loses_nothing_whatever_the_order(values: list[float], data: st.DataObject) -> None:
    groups = data.draw(st.lists(st.integers(0, 3), min_size=len(values), max_size=len(values)))
    numbers = {group: number for number, group in enumerate(sorted(set(groups)))}
    parts = sketch(values, [numbers[group] for group in groups])
    merged = parts.merged(np.zeros(len(numbers), np.int64), 1)
    whole = sketch(values)
    assert merged.keys.tolist() == whole.keys.tolist()
    assert merged.counts.tolist() == whole.counts.tolist()
    assert merged.counts.sum() == len(values)


@given(st.lists(VALUES, min_size=2, max_size=200))
@settings(max_examples=50)
def test_values_of_any_size_have_buckets_in_their_order(values: list[float]) -> None:
    keys = keys_of(np.array(sorted(values)))
    assert (np.diff(keys) >= 0).all()
    assert abs(keys).max() <= 32767


def test_what_is_nearly_zero_is_zero() -> None:
    assert keys_of(np.array([0.0, -0.0, TINY, -TINY, 5e-324])).tolist() == [0] * 5
    assert sketch([0.0, TINY / 2, -TINY]).quantiles(0.5).tolist() == [0.0]


def test_many_buckets_become_few_wide_ones() -> None:
    rng = np.random.default_rng(1)
    values = rng.uniform(-700, 700, 20_000)
    values = np.sign(values) * np.exp(np.abs(values))
    crowded = sketch(values.tolist())
    assert crowded.sizes.tolist() == [len(crowded.keys)]
    assert len(crowded.keys) <= BUCKETS_MAX
    assert crowded.counts.sum() == len(values)
    level = int(crowded.levels[0])
    assert level > 0
    growth = ((1 + ACCURACY) / (1 - ACCURACY)) ** (1 << level)
    promised = (growth - 1) / (growth + 1)
    for share in (0.01, 0.3, 0.6, 0.99):
        exact = np.sort(values)[int(share * (len(values) - 1))]
        assert crowded.quantiles(share)[0] == pytest.approx(exact, rel=promised + 1e-9)


def test_a_level_is_the_same_whenever_it_is_reached() -> None:
    values = np.exp(np.random.default_rng(2).uniform(0, 30, 3000))
    whole = sketch(values.tolist())
    parts = sketch(values.tolist(), [0] * 5 + [1] * 2995)
    assert parts.levels[0] == 0 < parts.levels[1]
    merged = parts.merged(np.zeros(2, np.int64), 1)
    assert merged.levels.tolist() == whole.levels.tolist()
    assert merged.keys.tolist() == whole.keys.tolist()
    assert merged.counts.tolist() == whole.counts.tolist()
