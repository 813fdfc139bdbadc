"""Regions that grow: every record comes back in order, whatever was added when."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdvde.engine.regions.form import ROOM, Form
from nbdvde.engine.regions.pages import Pages
from nbdvde.errors import DamageError

FORM = Form("TEST", 8, 0)


def length(body: bytes, at: int) -> int:
    """Records begin with their length."""
    return int.from_bytes(body[at : at + 2], "little")


def record(size: int, filling: int = 255) -> bytes:
    return size.to_bytes(2, "little") + bytes([filling]) * (size - 2)


class Region:
    """The blocks as an image would hold them."""

    def __init__(self) -> None:
        self.pages, blocks = Pages(FORM, bytes(8)).adding(b"header00", [])
        self.blocks = dict(blocks)

    def add(self, *records: bytes) -> set[int]:
        self.pages, changed = self.pages.adding(b"header%02d" % (self.pages.generation % 100), records)
        self.blocks |= changed
        return set(changed)

    def load(self) -> Pages:
        return Pages.load(FORM, self.blocks.__getitem__, self.pages.blocks, length)


@given(st.lists(st.lists(st.integers(3, 1500), max_size=8), max_size=12))
def test_records_come_back(batches: list[list[int]]) -> None:
    region, added = Region(), list[bytes]()
    for number, sizes in enumerate(batches):
        records = [record(size, number + 1) for size in sizes]
        region.add(*records)
        added += records
    loaded = region.load()
    assert loaded == region.pages
    assert [found for _, found in loaded.records(region.blocks.__getitem__, length)] == added
    assert set(region.blocks) == set(range(loaded.blocks))


def test_only_the_first_and_the_last_blocks_change() -> None:
    region = Region()
    whole = record(ROOM)
    assert region.add(record(100)) == {0}
    assert region.add(whole) == {0, 1}
    assert region.add(whole, whole, record(3)) == {0, 2, 3, 4}
    assert region.add(record(3)) == {0, 4}


def test_a_record_that_does_not_end_is_damage() -> None:
    region = Region()
    region.blocks[0] = FORM.block(b"header00" + record(100) + (5000).to_bytes(2, "little"), 1)
    with pytest.raises(DamageError, match="longer than its block"):
        region.load()


def test_bytes_behind_the_records_are_damage() -> None:
    region = Region()
    region.blocks[0] = FORM.block(b"header00" + record(100) + bytes(10) + b"x", 1)
    with pytest.raises(DamageError, match="not zero"):
        region.load()


def test_a_block_newer_than_the_first_is_damage() -> None:
    region = Region()
    region.add(record(3000), record(3000))
    old = region.pages
    region.add(record(100))
    with pytest.raises(DamageError, match="newer than the first"):
        list(old.records(region.blocks.__getitem__, length))
