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
    space = FreeSpace(100, 1 << 40, wide=5)
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


def test_writes_leave_the_reserve_in_gaps_that_take_any_segment() -> None:
    space = FreeSpace(0, 100, reserve=20, wide=8)
    space.reserve(0, 90)
    for offset in (10, 20, 30):
        space.free(offset, 6)
    assert (space.room, space.wide_room) == (28, 10)
    assert space.fits(6), "of a gap that is narrow already"
    assert not space.fits(7), "only 3 of 20 bytes would be wide"
    with pytest.raises(NoSpaceError):
        space.allocate(7, reserved=False)
    space.free(40, 20)
    assert space.fits(10)
    assert space.allocate(10, reserved=False) == 40, "the tightest"
    assert not space.fits(10), "10 of 20 bytes would be wide, 15 have to be"
    assert space.fits(6)
    assert space.room - space.allocate(6, reserved=False) > 0
    space.check()


def test_of_what_cleaning_would_win_back_writes_take_half_the_reserve() -> None:
    space = FreeSpace(0, 10_000, reserve=320, wide=10)
    space.reserve(0, 9700)
    assert space.in_reserve
    assert not space.fits(1)
    space.reclaimable = 20
    assert (space.kept, space.in_reserve, space.fits(1)) == (300, False, False)
    space.reclaimable = 100
    assert (space.kept, space.fits(80), space.fits(81)) == (220, True, False)
    space.reclaimable = 5000
    assert space.kept == 160
    narrow = FreeSpace(0, 10_000, reserve=320, wide=30)
    narrow.reclaimable = 5000
    assert narrow.kept == 240, "eight segments"


def test_a_round_of_cleaning_leaves_room_for_checkpoints() -> None:
    space = FreeSpace(0, 1000, reserve=80, wide=10)
    assert space.scratch == 50, "whatever room there is, as writes may take that meanwhile"
    space.reserve(0, 960)
    assert space.scratch == 30
    assert space.leaves_checkpoints(30)
    assert not space.leaves_checkpoints(31)
    assert FreeSpace(0).scratch > 1 << 40


def test_zones_have_the_gaps_in_them_that_take_no_segment() -> None:
    space = FreeSpace(0, 1000, reserve=160, wide=10)
    space.reserve(0, 100)
    space.free(20, 9)
    space.free(60, 10)
    assert [space.zone(at) for at in (0, 39, 40)] == [1, 1, 2]
    assert space.beside(0, 20) == 9
    assert space.beside(0, 19) == space.beside(29, 31) == 0
    endless = FreeSpace(0, wide=10)
    endless.reserve(20, 20)
    assert endless.zone(20) == endless.beside(0, 0) == 0
