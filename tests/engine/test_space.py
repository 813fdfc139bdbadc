"""Free space: nothing is handed out twice, neighbours coalesce, the tightest gap is used."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdvde.engine.space import FreeSpace
from nbdvde.errors import NoSpaceError

ACTIONS = st.lists(st.tuples(st.integers(1, 9), st.booleans(), st.integers(0, 1 << 30)), max_size=60)


@given(actions=ACTIONS)
def test_allocations_never_overlap_and_all_space_comes_back(actions: list[tuple[int, bool, int]]) -> None:
    space = FreeSpace(100, 1 << 40)
    used: dict[int, int] = {}
    for length, give_back, which in actions:
        if give_back and used:
            offset = sorted(used)[which % len(used)]
            space.free(offset, used.pop(offset))
        else:
            used[space.allocate(length)] = length
        space.check()
        taken = sorted(used.items())
        assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(taken))
        assert space.end - 100 - space.free_bytes == sum(used.values())
    for offset, length in used.items():
        space.free(offset, length)
    assert (space.end, space.gaps()) == (100, [])


@given(lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=30), seed=st.randoms())
def test_reserving_in_any_order_leaves_the_gaps_between(lengths: list[tuple[int, int]], seed: object) -> None:
    ranges, at = [], 0
    for length, gap in lengths:
        ranges.append((at + gap, length))
        at += gap + length
    gaps = [(start - gap, gap) for (start, _), (_, gap) in zip(ranges, lengths, strict=True) if gap]
    seed.shuffle(ranges)  # type: ignore[attr-defined]
    space = FreeSpace(0, 1 << 40)
    for offset, length in ranges:
        space.reserve(offset, length)
        space.check()
    assert space.gaps() == gaps
    assert space.end == at


def test_the_tightest_gap_is_taken() -> None:
    space = FreeSpace(0, 1000)
    for start, length in ((0, 10), (15, 10), (45, 10)):
        space.reserve(start, length)
    assert space.allocate(4) == 10
    assert space.allocate(7) == 25
    assert space.allocate(100) == 55


def test_what_is_used_cannot_be_reserved_or_freed_twice() -> None:
    space = FreeSpace(0, 1000)
    space.reserve(10, 10)
    for offset, length in ((10, 10), (15, 2), (5, 6), (19, 5)):
        with pytest.raises(ValueError, match="used twice"):
            space.reserve(offset, length)
    space.reserve(0, 5)
    space.free(0, 5)
    with pytest.raises(ValueError, match="freed twice"):
        space.free(3, 1)


def test_the_limit_holds() -> None:
    space = FreeSpace(0, 10)
    assert space.allocate(10) == 0
    with pytest.raises(NoSpaceError):
        space.allocate(1)
    space.free(4, 2)
    assert space.allocate(2) == 4
