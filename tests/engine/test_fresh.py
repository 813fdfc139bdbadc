"""Fingerprints of what was stored lately are found before they are in the index, and afterwards in it."""

import numpy as np

from nbdvde.engine.dedup import CONTAINER_SHIFT, PLACE_UNIT_SHIFT, Index, Places, parse_prints
from nbdvde.engine.fresh import _ENTERED, Fresh


def index() -> Index:
    return Index(4 << 20, lambda slots: np.ones(len(slots), np.bool_))


def prints_of(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(8, "little") * 2 for number in numbers)


def places_of(container: int, count: int) -> Places:
    return np.array([container << CONTAINER_SHIFT | unit << PLACE_UNIT_SHIFT for unit in range(count)], np.uint64)


def found(fresh: Fresh, *numbers: int) -> list[int]:
    return [int(place) >> CONTAINER_SHIFT for place in fresh.find(parse_prints(prints_of(*numbers)))]


def test_they_are_found_at_once():
    fresh = Fresh(index())
    assert found(fresh, 1) == [0]
    fresh.add(prints_of(1, 0, 2), places_of(5, 3), 7, 0, 3)
    assert found(fresh, 1, 2, 3, 0) == [5, 5, 0, 0], "nothing is found of a block without a fingerprint"
    assert fresh.containers() == {5}


def test_the_last_one_counts():
    fresh = Fresh(index())
    fresh.add(prints_of(1, 2), places_of(5, 2), 7, 0, 2)
    fresh.add(prints_of(2), places_of(6, 1), 7, 2, 1)
    assert found(fresh, 1, 2) == [5, 6]


def test_they_are_in_the_index_in_the_end():
    table = index()
    fresh = Fresh(table)
    fresh.add(prints_of(4, 8), places_of(5, 2), 7, 254, 1)
    fresh.enter()
    asked = parse_prints(prints_of(4, 8))
    assert (table.find(asked) >> np.uint64(CONTAINER_SHIFT)).tolist() == [5, 5]
    assert table.chunks(asked).tolist() == [7 << 8, 0], "only what is in the list of the slot leads to it"
    assert found(fresh, 4, 8) == [0, 0]
    fresh.enter()


def test_the_same_blocks_again_and_again_do_not_wait_for_ever():
    fresh = Fresh(index())
    for _ in range(_ENTERED // 2):
        assert not fresh.is_due
        fresh.add(prints_of(1, 2), places_of(5, 2), 7, 0, 2)
    assert fresh.is_due
