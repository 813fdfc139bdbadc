"""From extents to groups: the published values of the hash, even shares, and no more movement than needed."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdvde.errors import DamageError, UsageError
from nbdvde.raft.placement import SLOTS, Table, jump_hash, slot_of

SERIES = {  # go-jump's, generated with the reference code of the paper: buckets 1, 2, 3 ...
    1: [0, 0, 0, 0, 0, 0, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 17, 17],
    0xDEADBEEF: [0, 1, 2, 3, 3, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 16, 16, 16],
    0x0DDC0FFEEBADF00D: [0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 15, 15, 15, 15],
}
SINGLE = [  # Guava's consistentHash, and those of jump-consistent-hash
    (10863919174838991, 11, 6), (2016238256797177309, 11, 3), (1673758223894951030, 11, 5), (2, 100001, 80343),
    (2201, 100001, 22152), (2202, 100001, 15018), (256, 1024, 520), (42, 57, 43), (0xDEAD10CC, 666, 361),
    (0, 60, 0), (1, 60, 55), (2, 60, 46),
]  # fmt: skip
NAMES = st.sets(st.integers(0, 40).map("group {}".format), min_size=1, max_size=20)


@pytest.mark.parametrize(("key", "buckets", "expected"), SINGLE)
def test_published_values(key: int, buckets: int, expected: int) -> None:
    assert jump_hash(key, buckets) == expected


@pytest.mark.parametrize("key", SERIES)
def test_published_series(key: int) -> None:
    assert [jump_hash(key, buckets) for buckets in range(1, 20)] == SERIES[key]


def test_neighbouring_extents_are_spread() -> None:
    counts = Counter(slot_of(0x9E3779B97F4A7C15, extent) for extent in range(64 * SLOTS))
    assert len(counts) == SLOTS
    assert max(counts.values()) < 64 * 1.7


@given(NAMES)
def test_shares_differ_by_one_at_most(names: set[str]) -> None:
    counts = Table.of(names).groups
    assert set(counts) == names
    assert max(counts.values()) - min(counts.values()) <= 1


@given(NAMES, NAMES)
def test_no_more_moves_than_even_shares_need(before: set[str], after: set[str]) -> None:
    old = Table.of(before)
    new = old.spread(after)
    counts = new.groups
    assert new.version == old.version + 1
    assert set(counts) == after
    assert max(counts.values()) - min(counts.values()) <= 1
    gained = sum(max(0, count - old.groups.get(name, 0)) for name, count in counts.items())
    assert len(old.moved(new)) == gained
    least = sum(max(0, SLOTS // len(after) - old.groups.get(name, 0)) for name in after)
    assert gained <= max(least, sum(count for name, count in old.groups.items() if name not in after)) + len(after)


def test_spreading_again_moves_nothing() -> None:
    table = Table.of(["a", "b", "c"])
    assert not table.moved(table.spread(["c", "b", "a"]))


def test_any_group_can_go_and_only_its_slots_move() -> None:
    table = Table.of(["a", "b", "c", "default"])
    moved = table.moved(table.without("default"))
    assert moved == {slot for slot, name in enumerate(table.slots) if name == "default"}
    with pytest.raises(UsageError):
        Table.of(["a"]).without("a")


@given(NAMES)
def test_packing(names: set[str]) -> None:
    table = Table.of(names).spread(["x", *names])
    assert Table.unpack(table.pack()) == table


@pytest.mark.parametrize("names", [[], [""], ["x" * 65], [str(n) for n in range(1025)]])
def test_what_cannot_be_a_table_is_refused(names: list[str]) -> None:
    with pytest.raises(UsageError):
        Table.of(names)


@given(data=st.binary(max_size=60), at=st.integers(0, 1100), byte=st.integers(0, 255))
def test_any_bytes_are_a_table_or_damage(data: bytes, at: int, byte: int) -> None:
    packed = bytearray(Table.of(["a", "b"]).pack())
    packed[at % len(packed)] = byte
    for anything in (data, bytes(packed)):
        try:
            table = Table.unpack(anything)
        except DamageError:
            continue
        assert Table.unpack(table.pack()) == table
