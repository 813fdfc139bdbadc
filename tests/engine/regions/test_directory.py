"""The directory of regions: windows that do not overlap, and nothing of a newer version lost."""

import pytest

from nbdvde.engine.layout import MAX_DISK_BYTES
from nbdvde.engine.regions.directory import FORM, SLOTS_MAX, VOLUME_BYTES, WINDOW, Directory, Slot, kind_of
from nbdvde.engine.regions.form import Form
from nbdvde.errors import DamageError, RefusedError

ONE, TWO = Form("ONE1", 16, 32), Form("TWO2", 16, 32)


def read_back(directory: Directory) -> Directory:
    return Directory.unpack(lambda _: directory.pack())


def test_slots_come_back() -> None:
    directory = Directory().adding(ONE, 100, 1).adding(TWO, WINDOW, 7).using(ONE, 5)
    assert read_back(directory) == directory
    assert [(slot.name, slot.start, slot.blocks, slot.used) for slot in directory] == [
        ("ONE1", WINDOW, 100, 5), ("TWO2", 2 * WINDOW, WINDOW, 7),
    ]  # fmt: skip


def test_a_window_is_used_again_when_its_region_is_gone() -> None:
    directory = Directory().adding(ONE, 100, 1).adding(TWO, 100, 1).removing(ONE)
    assert [slot.start for slot in directory] == [2 * WINDOW]
    again = directory.adding(ONE, 100, 1).find(ONE)
    assert again is not None
    assert again.start == WINDOW


def test_people_are_told_of_regions_in_their_words() -> None:
    assert kind_of(Form("ANON", 16, 108).tag) == ("an", "anonymisation table", "nbdvde anon create")
    assert kind_of(ONE.tag) == ("a", "region ONE1", "")


def test_it_is_full_at_last() -> None:
    directory = Directory()
    for number in range(SLOTS_MAX):
        directory = directory.adding(Form(f"R{number:03}", 16, 32), WINDOW, 1)
    assert read_back(directory) == directory
    assert max(slot.start + slot.blocks for slot in directory) * 4096 <= VOLUME_BYTES <= MAX_DISK_BYTES
    with pytest.raises(RefusedError, match="no room for more"):
        directory.adding(ONE, 1, 1)


@pytest.mark.parametrize(
    "slot", [Slot(ONE.tag, 0, 1, 1), Slot(ONE.tag, 5, 1, 1), Slot(ONE.tag, WINDOW, 1, 2), Slot(ONE.tag, WINDOW, 0, 0)]
)
def test_a_slot_that_makes_no_sense_is_damage(slot: Slot) -> None:
    with pytest.raises(DamageError, match="a slot makes no sense"):
        read_back(Directory((slot,), 1))


def test_one_region_twice_is_damage() -> None:
    with pytest.raises(DamageError, match="one region twice"):
        read_back(Directory((Slot(ONE.tag, WINDOW, 1, 1), Slot(ONE.tag, 2 * WINDOW, 1, 1)), 1))


def test_another_header_is_damage() -> None:
    block = FORM.block((0).to_bytes(4, "little") + b"new fields!!", 1)
    with pytest.raises(DamageError, match="header"):
        Directory.unpack(lambda _: block)
