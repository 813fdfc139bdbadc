"""The blocks of regions are pinned by tests/vectors/regions.json, which the documents alone have made."""

import json
from pathlib import Path

import pytest

from nbdvde.engine.regions import stream, vault
from nbdvde.engine.regions.directory import FORM, WINDOW, Directory, Slot
from nbdvde.engine.regions.pages import Pages
from tests.engine.regions.passports import KEY, NOW

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "regions.json").read_text())
_UNKNOWN = Slot(int.from_bytes(b"NEW!", "little"), 3 * WINDOW, WINDOW, 99, 5)
_STREAM = Slot(int.from_bytes(b"STRE", "little"), WINDOW, 4097, 1)


def _vault() -> list[bytes]:
    names = [b"passport" + number.to_bytes(8, "big") for number in range(10)]
    about = bytes(range(16))
    records = [vault.Record(id_, about, 8, 4, NOW, NOW + 7, NOW, "é" * 64, "ñ" * 128).signed_with(KEY) for id_ in names]
    records.append(vault.Record(bytes([1]) * 16, names[0], vault.EVENT, vault.VERIFIED, NOW + 1, issuer="auditor"))
    revoked = vault.Record(bytes([2]) * 16, names[9], vault.EVENT, vault.REVOKED, NOW + 2, notes="mistake")
    packed = [record.pack() for record in (*records, revoked.signed_with(KEY))]
    _, blocks = Pages(vault.FORM, b"").adding(vault.header(10), packed)
    return [blocks[number] for number in sorted(blocks)]


MADE = {
    "directory": [Directory((_STREAM, _UNKNOWN), 7).pack()],
    "vault": _vault(),
    "stream": [
        stream.FORM.block(stream.Ring(5, 5, 10, 7, 3, stream.StreamPolicy.REJECT).pack(), 4),
        stream.FORM.block(stream.with_lengths(bytes(4), 2, (1, 0, 4096)), 4),
    ],
}  # fmt: skip


def kept(name: str) -> list[bytes]:
    """The blocks of a vector."""
    return [
        bytes.fromhex(block["body"]).ljust(4080, b"\0") + bytes.fromhex(block["trailer"]) for block in VECTORS[name]
    ]


def test_every_vector_is_compared():
    assert VECTORS.keys() == MADE.keys()


@pytest.mark.parametrize("name", MADE)
def test_blocks_are_what_the_documents_say(name: str):
    assert MADE[name] == kept(name)


def test_what_a_newer_version_made_stays_as_it_is():
    [block] = kept("directory")
    changed = Directory.unpack(lambda _: block).adding(FORM, 1, 1).removing(FORM)
    assert changed.slots == (_STREAM, _UNKNOWN)
