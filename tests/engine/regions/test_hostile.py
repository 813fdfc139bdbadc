"""Vaults, tables and pages of keys that somebody made up, with every checksum right: they parse, or are damage."""

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nbdvde
from nbdvde.engine.layout import BLOCK
from nbdvde.engine.managed.vault import CAPACITY_MAX, Vault
from nbdvde.engine.regions import anon, vault
from nbdvde.engine.regions.form import ROOM
from nbdvde.engine.subjectkeys import PAGE_ENTRIES, Page
from nbdvde.errors import DamageError
from tests.engine.regions.passports import passport
from tests.engine.regions.test_anon import mapping

flips = st.lists(st.tuples(st.integers(0, ROOM - 1), st.integers(0, 255)), max_size=6)


def changed(body: bytes, places: list[tuple[int, int]]) -> bytes:
    made = bytearray(body.ljust(ROOM, b"\0"))
    for at, byte in places:
        made[at] = byte
    return bytes(made)


@given(flips)
def test_vaults(places: list[tuple[int, int]]) -> None:
    body = changed(vault.header(3) + b"".join(passport(number).pack() for number in (1, 2, 3)), places)
    with suppress(DamageError):
        _, ledger = vault.load(lambda _: vault.FORM.block(body, 1), 1)
        assert all(entry.passport.pack() in body for entry in ledger.query())


@given(flips)
def test_tables(places: list[tuple[int, int]]) -> None:
    table = anon.Table([mapping(number) for number in (1, 2, 3)])
    body = changed(table.blocks([])[0][:ROOM], places)
    with suppress(DamageError):
        loaded = anon.load(lambda _: anon.FORM.block(body, 1), 1)
        list(loaded.flaws())
        assert loaded.blocks([])[0][:ROOM] == body


@given(st.binary(min_size=4048, max_size=4048))
def test_pages(data: bytes) -> None:
    with suppress(DamageError):
        assert len(Page.unpack(data).entries) <= PAGE_ENTRIES


async def test_a_region_that_claims_to_be_huge_is_damage(tmp_path: Path) -> None:
    nbdvde.create_image(tmp_path / "i", 1 << 20, secret=None)
    async with nbdvde.open_image(tmp_path / "i") as image:
        area = await image.regions.area(image.disk())
        blocks = CAPACITY_MAX // BLOCK + 1
        await area.create(Vault.FORM, blocks, {0: Vault.FORM.block(vault.header(0), 1)}, blocks)
        with pytest.raises(DamageError, match="larger than it can be"):
            await image.regions.get(Vault, image.disk())
