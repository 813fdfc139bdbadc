"""The blocks of regions are pinned by tests/vectors/regions.json, which the documents alone have made."""

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from nbdvde.engine.regions import anon, stream, vault, worm
from nbdvde.engine.regions.directory import FORM, WINDOW, Directory, Slot
from nbdvde.engine.regions.pages import Pages
from nbdvde.engine.regions.samples import FORM as MTRK
from nbdvde.engine.regions.samples import Sample, Samples, rows_of
from nbdvde.engine.regions.tiers import History
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


_MINUTE = 60 * 10**9


def metrics() -> list[bytes]:
    """The log of the vector, in the places where its rings have got to."""
    made = History.create(256 << 10, 0.75)[0]
    found = rows_of([Sample(7, 1_700_000_000 * 10**9, -2.5), Sample(65535, 1, 1e300, 6)])
    raw, minutes, *others = made.tiers
    raw = replace(raw, ring=replace(raw.ring, head=9, tail=9))
    made = replace(made, tiers=(raw, minutes, *others), generation=1)
    values = [-1.0, *[0.0] * 300, 10.0]
    old = rows_of([Sample(7, 28_333_333 * _MINUTE + 5, value) for value in values])
    windows = Samples(old).windows().grouped(_MINUTE)
    [(window, _)] = windows.bodies()
    made = replace(made, tiers=(raw, minutes.adding(windows, [1]), *others), samples=302, generation=2)
    _, change, _ = made.adding(found)
    first, sample = change.blocks.values()
    return [first, sample, MTRK.block(window, 2)]


def _anon() -> list[bytes]:
    subjects, keys = (b"subject of these", b"subject of those"), (bytes([1]) * 32, bytes([2]) * 32)
    table = anon.Table()
    for number in range(1, 41):
        subject, key = subjects[number % 2], keys[number % 2]
        token, digest = sha256(b"%d" % number).digest(), anon.hash_of(key, b"value %d" % number)
        table.append(anon.Record(token[:16], subject, 1, digest, token, NOW + number))
    table.flag(subjects[1])
    table.append(anon.proof(keys[1], subjects[1], table.by_subject(subjects[1]), table.chain, NOW + 99))
    blocks = table.blocks([1])
    return [blocks[number] for number in sorted(blocks)]


def _worm() -> list[bytes]:
    pages, ledger, header = Pages(worm.FORM, b""), worm.Ledger(), worm.Header.new(16, 10**9, NOW)
    for time, data in ((0, b""), (7, b"hello"), (9, b"")):
        header = replace(header, retention_ns=0 if time == 9 else 10**9, records=header.records + 1, clock_ns=time)
        digest = sha256(data).digest() if data else header.rules
        ledger, stored = ledger.taking(worm.Record(header.mark, NOW + time, len(data), digest))
        header = replace(header, mark=ledger.mark)
        pages, blocks = pages.adding(header.pack(), [stored])
    return [blocks[0]]


MADE = {
    "metrics": metrics(),
    "directory": [Directory((_STREAM, _UNKNOWN), 7).pack()],
    "vault": _vault(),
    "worm": _worm(),
    "stream": [
        stream.FORM.block(stream.Ring(5, 5, 10, 7, 3, stream.StreamPolicy.REJECT).pack(), 4),
        stream.FORM.block(stream.with_lengths(bytes(4), 2, (1, 0, 4096)), 4),
    ],
    "anon": _anon(),
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
