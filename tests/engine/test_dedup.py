"""The index of fingerprints against plain dictionaries, and the choice of what is shared."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdvde.engine.dedup import (
    CONTAINER_SHIFT,
    PLACE_UNIT_SHIFT,
    SAME_BATCH,
    Index,
    Mask,
    Places,
    Prints,
    Slots,
    chunks_of,
    map_entries,
    parse_prints,
    within_batch,
    worth_sharing,
)
from nbdvde.engine.layout import pack_entry

AMPLE = 1 << 20


def prints_of(numbers: list[int] | range) -> Prints:
    """Fingerprints of blocks that are numbers: evenly distributed, as hashes are; 0 has a key of 0."""
    table = np.random.default_rng(1).integers(1, 1 << 64, (4096, 2), np.uint64)
    table[0, 0] = 0
    return table[list(numbers)]


def places_of(container: int, count: int) -> Places:
    return np.arange(count, dtype=np.uint64) << np.uint64(PLACE_UNIT_SHIFT) | np.uint64(container << CONTAINER_SHIFT)


def all_in_use(slots: Slots) -> Mask:
    return np.ones(len(slots), np.bool_)


@settings(max_examples=60)
@given(lists=st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=80), max_size=8))
def test_what_is_remembered_is_found_as_a_dictionary_would(lists: list[list[int]]) -> None:
    index, model = Index(AMPLE, all_in_use, 0), dict[int, int]()
    for container, numbers in enumerate(lists, 1):
        index.remember(prints_of(numbers), places_of(container, len(numbers)))
        index.hook(prints_of(numbers), chunks_of(container, 0, len(numbers)))
        model |= dict(zip(numbers, places_of(container, len(numbers)).tolist(), strict=True))
        index.check()
    asked = list(range(400))
    assert index.find(prints_of(asked)).tolist() == [model.get(number, 0) for number in asked]
    slots = [model.get(number, 0) >> CONTAINER_SHIFT for number in asked]
    assert (index.chunks(prints_of(asked)) >> 8).tolist() == slots
    assert index.containers().tolist() == sorted(set(slots) - {0})


@settings(max_examples=30)
@given(memory=st.integers(0, 20_000), lists=st.lists(st.lists(st.integers(0, 4095), max_size=300), max_size=10))
def test_with_little_memory_answers_are_fewer_and_never_wrong(memory: int, lists: list[list[int]]) -> None:
    index, places, slots = Index(memory, all_in_use, 0), dict[int, set[int]](), dict[int, set[int]]()
    for container, numbers in enumerate(lists, 1):
        index.remember(prints_of(numbers), places_of(container, len(numbers)))
        index.hook(prints_of(numbers), chunks_of(container, 0, len(numbers)))
        for number, place in zip(numbers, places_of(container, len(numbers)).tolist(), strict=True):
            places.setdefault(number, {0}).add(place)
            slots.setdefault(number, {0}).add(container)
        index.check()
        assert index.memory <= memory + 3 * 16 * 24
    asked = range(4096)
    for number, place, slot in zip(
        asked, index.find(prints_of(asked)).tolist(), (index.chunks(prints_of(asked)) >> 8).tolist(), strict=True
    ):
        assert place in places.get(number, {0})
        assert slot in slots.get(number, {0})


def test_an_index_at_its_limit_still_leads_to_every_container() -> None:
    memory, index = 60_000, Index(60_000, all_in_use, 0)
    rng = np.random.default_rng(2)
    lists = [rng.integers(1, 1 << 64, (500, 2), np.uint64) for _ in range(60)]
    for slot, prints in enumerate(lists, 1):
        index.remember(prints, places_of(slot, len(prints)))
        index.hook(prints, chunks_of(slot, 0, len(prints)))
    index.check()
    assert index.memory <= memory
    assert index.mask == 31, "30,000 fingerprints, room for 1,500 hooks"
    for slot, prints in enumerate(lists, 1):
        led = index.chunks(prints) >> 8
        assert slot in led
        assert set(led.tolist()) == {0, slot}
    assert index.find(lists[-1][-90:]).all(), "what came last is found without a hook"
    assert not index.find(lists[0]).any()
    assert index.generation > 2


def test_hooks_of_slots_no_longer_in_use_go_first() -> None:
    gone: set[int] = set()
    index = Index(60_000, lambda slots: ~np.isin(slots, list(gone)), 0)
    rng = np.random.default_rng(3)
    lists = [rng.integers(1, 1 << 64, (100, 2), np.uint64) for _ in range(100)]
    for slot, prints in enumerate(lists, 1):
        index.hook(prints, chunks_of(slot, 0, len(prints)))
        gone |= {slot - 8}
    index.check()
    assert index.mask == 0
    assert (index.chunks(lists[-1]) == 100 << 8).all()


def test_a_hook_leads_to_the_chunk_of_the_list() -> None:
    index, prints = Index(AMPLE, all_in_use, 0), prints_of(range(1, 601))
    index.hook(prints[:300], chunks_of(5, 0, 300))
    index.hook(prints[300:], chunks_of(5, 300, len(prints) - 300))
    assert index.chunks(prints).tolist() == [5 << 8 | number // 256 for number in range(600)]


def test_a_key_alone_is_no_confirmation() -> None:
    index, prints = Index(AMPLE, all_in_use, 0), prints_of([1, 2])
    index.remember(prints, places_of(7, 2))
    forged = prints.copy()
    forged[0, 1] ^= np.uint64(1)
    assert index.find(forged).tolist() == [0, *places_of(7, 2).tolist()[1:]]


def test_places_become_map_entries() -> None:
    place = np.array([3 << 32 | 0x123456 << 8 | 0x7F], np.uint64)
    assert map_entries(place, np.array([9], np.uint64)).tolist() == [pack_entry(9, 0x123456, 0x7F)]


def test_bytes_become_fingerprints() -> None:
    assert parse_prints(bytearray(range(32))).tobytes() == bytes(range(32))


@given(st.lists(st.integers(0, 9), max_size=30), st.sets(st.integers(0, 29)))
def test_a_block_that_equals_an_earlier_one_of_its_batch_points_there(numbers: list[int], known: set[int]) -> None:
    places = np.array([1 << 32 if at in known else 0 for at in range(len(numbers))], np.uint64)
    expected, first = places.tolist(), dict[int, int]()
    for at, number in enumerate(numbers):
        if at not in known and number:
            origin = first.setdefault(number, at)
            expected[at] = SAME_BATCH << 32 | origin << 8 if origin != at else 0
    within_batch(prints_of(numbers), places)
    assert places.tolist() == expected


def place(container: int, unit: int) -> int:
    return container << 32 | unit << 8


@pytest.mark.parametrize(("blocks", "places", "shared"), [
    ([], [], ""),
    ([5], [place(1, 1)], "0"),
    ([5, 6], [place(1, 1), place(1, 1) + 1], "11"),
    ([5, 7], [place(1, 1), place(1, 1) + 1], "00"),
    ([5, 6], [place(1, 1), place(2, 1)], "00"),
    ([5, 6], [place(1, 2), place(1, 1)], "00"),
    ([5, 6], [place(1, 1), place(1, 4)], "00"),
    ([5, 6, 7], [place(1, 1), place(1, 3), 0], "110"),
    ([5, 6, 7, 8], [0, place(1, 1), 0, place(1, 2)], "0000"),
    ([5, 6, 7, 8], [place(1, 1), place(1, 2), place(9, 9), place(1, 3)], "1100"),
    ([1, 2, 3, 4, 5, 6], [place(1, 1), place(1, 1) + 1, place(1, 1) + 2, place(9, 9), *[place(1, 2)] * 2], "111111"),
])  # fmt: skip
def test_only_runs_are_shared(blocks: list[int], places: list[int], shared: str) -> None:
    mask = worth_sharing(np.array(blocks, np.int64), np.array(places, np.uint64), 2)
    assert "".join(str(int(kept)) for kept in mask) == shared
