"""The blocks of regions are pinned by tests/vectors/regions.json, which the documents alone have made."""

import json
from pathlib import Path

import pytest

from nbdvde.engine.regions.directory import FORM, WINDOW, Directory, Slot

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "regions.json").read_text())
_UNKNOWN = Slot(int.from_bytes(b"NEW!", "little"), 3 * WINDOW, WINDOW, 99, 5)
_STREAM = Slot(int.from_bytes(b"STRE", "little"), WINDOW, 4097, 1)
MADE = {
    "directory": [Directory((_STREAM, _UNKNOWN), 7).pack()],
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
