"""Fingerprints of what was stored lately are found before they are in the index, and afterwards in it."""

import numpy as np

from nbdvde.engine.dedup import CONTAINER_SHIFT, PLACE_UNIT_SHIFT, Index, Places, Prints, parse_prints
from nbdvde.engine.fresh import _FEW, _MANY, Fresh


def index() -> Index:
    return Index(4 << 20, lambda slots: np.ones(len(slots), np.bool_))


def prints_of(*numbers: int) -> Prints:
    return parse_prints(b"".join(number.to_bytes(8, "little") * 2 for number in numbers))


def places_of(container: int, count: int) -> Places:
    return np.array([container << CONTAINER_SHIFT | unit << PLACE_UNIT_SHIFT for unit in range(count)], np.uint64)


def found(fresh: Fresh, *numbers: int) -> list[int]:
    return [int(place) >> CONTAINER_SHIFT for place in fresh.find(prints_of(*numbers))]


def test_they_are_found_at_once():
    fresh = Fresh(index())
    assert found(fresh, 1) == [0]
    fresh.add(prints_of(1, 0, 2), places_of(5, 3), 7, 0, 3)
    assert found(fresh, 1, 2, 3, 0) == [5, 5, 0, 0], "nothing is found of a block without a fingerprint"
    assert fresh.containers() == {5}


def test_half_a_fingerprint_is_none():
    fresh = Fresh(index())
    fresh.add(prints_of(1, 2), places_of(5, 2), 7, 0, 2)
    forged = prints_of(1, 2)
    forged = np.stack([forged[:, 0], forged[::-1, 1]], axis=1)
    assert not fresh.find(forged).any()


def test_the_last_one_counts():
    fresh = Fresh(index())
    fresh.add(prints_of(1, 2), places_of(5, 2), 7, 0, 2)
    fresh.add(prints_of(2), places_of(6, 1), 7, 2, 1)
    assert found(fresh, 1, 2) == [5, 6]


def test_few_wait_and_many_are_entered():
    table = index()
    fresh = Fresh(table)
    prints, places = prints_of(*range(1, _FEW + 2)), places_of(5, _FEW + 1)
    fresh.add(prints[:-1], places[:-1], 7, 0, 0)
    fresh.settle()
    assert not table.find(prints).any()
    fresh.add(prints[-1:], places[-1:], 7, 0, 0)
    fresh.settle()
    assert (table.find(prints) == places).all()
    assert not fresh.find(prints).any()
    assert fresh.containers() == set()


def test_hooks_are_entered_once_there_are_enough():
    table = index()
    fresh = Fresh(table)
    asked = prints_of(*(4 * number for number in range(1, _MANY + 1)))
    fresh.add(asked[:-1], places_of(5, _MANY - 1), 7, 254, _MANY - 1)
    assert not fresh.is_due
    fresh.enter()
    assert not table.chunks(asked).any()
    fresh.add(asked[-1:], places_of(5, 2)[1:], 7, 300, 1)
    fresh.enter()
    assert table.chunks(asked).tolist() == [7 << 8 | (254 + at) // 256 for at in range(_MANY - 1)] + [7 << 8 | 1]
    fresh.enter()


def test_only_what_is_in_the_list_of_the_slot_leads_to_it():
    table = index()
    fresh = Fresh(table)
    asked = prints_of(*(4 * number for number in range(1, 2 * _MANY + 1)))
    fresh.add(asked, places_of(5, 2 * _MANY), 7, 0, _MANY)
    assert fresh.is_due
    fresh.enter()
    assert table.chunks(asked)[:_MANY].all()
    assert not table.chunks(asked)[_MANY:].any()
    assert table.find(asked).all()
