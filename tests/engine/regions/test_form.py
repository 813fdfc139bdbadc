"""Regions: records come back as they went, and no byte of a block changes unnoticed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdvde.engine.layout import BLOCK
from nbdvde.engine.regions.form import GENERATION_MAX, Form
from nbdvde.errors import DamageError

FORM = Form("TEST", 6, 130)
PER_BLOCK = 31


def unpacked(blocks: list[bytes]) -> tuple[bytes, list[bytes], int]:
    return FORM.unpack(lambda number: blocks[number], lambda header: int.from_bytes(header[:4], "little"))


def packed(records: list[bytes], generation: int = 1) -> list[bytes]:
    return FORM.pack(len(records).to_bytes(4, "little") + b"hi", records, generation)


@given(count=st.integers(0, 4 * PER_BLOCK), generation=st.integers(0, GENERATION_MAX), data=st.data())
@settings(max_examples=40)
def test_records_come_back(count: int, generation: int, data: st.DataObject) -> None:
    filling = data.draw(st.binary(min_size=130, max_size=130))
    records = [number.to_bytes(2, "big") + filling[2:] for number in range(count)]
    blocks = packed(records, generation)
    assert all(len(block) == BLOCK for block in blocks)
    assert len(blocks) == FORM.blocks(count)
    assert unpacked(blocks) == (count.to_bytes(4, "little") + b"hi", records, generation)


@pytest.mark.parametrize("count", [0, 30, PER_BLOCK, PER_BLOCK + 1, 2 * PER_BLOCK, 2 * PER_BLOCK + 1])
def test_full_blocks_come_back(count: int) -> None:
    records = [bytes([number]) * 130 for number in range(count)]
    assert unpacked(packed(records))[1] == records


def test_every_flipped_byte_is_noticed() -> None:
    blocks = packed([bytes([number]) * 130 for number in range(40)])
    for number, block in enumerate(blocks):
        for at in range(BLOCK):
            flipped = [*blocks]
            flipped[number] = block[:at] + bytes([block[at] ^ 0x10]) + block[at + 1 :]
            with pytest.raises(DamageError, match="region TEST"):
                unpacked(flipped)


def test_blocks_of_two_generations_do_not_go_together() -> None:
    records = [bytes(130)] * 40
    with pytest.raises(DamageError, match="two generations"):
        unpacked([packed(records, 1)[0], packed(records, 2)[1]])


def test_a_block_of_another_region_is_none_of_this_one() -> None:
    other = Form("ELSE", 6, 130).pack((0).to_bytes(6, "little"), [], 1)
    with pytest.raises(DamageError, match="another type"):
        unpacked(other)


def test_bytes_behind_the_records_are_looked_at() -> None:
    more = packed([b"x" * 130] * 3)
    fewer = FORM.pack((2).to_bytes(4, "little") + b"hi", [b"x" * 130] * 3, 1)
    assert len(unpacked(more)[1]) == 3
    with pytest.raises(DamageError, match="not zero"):
        unpacked(fewer)


def test_a_header_that_tells_of_more_is_damage() -> None:
    short = FORM.pack((3).to_bytes(4, "little") + b"hi", [], 1)
    with pytest.raises(DamageError, match="checksum"):
        FORM.unpack(lambda number: short[number] if number < 1 else b"", lambda _: PER_BLOCK + 9)
