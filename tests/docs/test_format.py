"""docs/format.md against the code: every offset, length, name and constant of its tables."""

import dataclasses
import re
import struct
from typing import Any

import pytest
import xxhash
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from nbdvde.engine import dictionaries, extent, keys, layout, sealing, subjectkeys
from nbdvde.engine.layout import (
    GroupHeader,
    Link,
    LogPoint,
    Operation,
    Record,
    Root,
    Segment,
    Superblock,
    TableEntry,
    UnitRef,
)  # fmt: skip
from nbdvde.engine.layout import VolumeEntry as Volume
from nbdvde.engine.regions import anon, directory, samples, stream, tiers, vault, worm
from tests.docs.tables import tables

TABLES = tables("format.md")
UUID, MASTER, MAC_KEY = bytes(range(1, 17)), bytes(range(101, 133)), bytes(range(32))
SALT, CHAIN = bytes(range(33, 65)), bytes(range(65, 97))
SEGMENT = Segment(0x01020304, 0x05060000, 0x1112131415161718, 0x2122232425262000, SALT)
REF = UnitRef(0x31323334, 0x35363738, 0x393A3B3C, 0x3D3E3F40)
POINT = LogPoint(SEGMENT, 0x41424344, 0x45464748, 0x494A4B4C4D4E4F50, CHAIN)
HEADER = GroupHeader(0x01020304, 0x05060708, 0x090A0B0C, 0x0D0E0F00, 0x1112131415161718, 0x191A1B1C1D1E1F20)
ENTRY = TableEntry(SEGMENT, REF, 0x51525354, 0x55565758, 0x595A5B5C, 2, 0x5D5E5F, 0x61626364, 0x65666768)
ENTRY_NAMES = {"segment": SEGMENT.pack()[:56], "prints": bytes((0x5F, 0x5E, 0x5D))}
LINK = Link(0x01020304, 0x05060708, 0x1112131415161718, 0x191A1B1C1D1E1F20, CHAIN, SEGMENT)
VOLUME = Volume(
    0x01020304, "disk", 0x1112131415161718, 0x05060708, 0x191A1B1C1D1E1F20, REF, 0x51525354, 0x2122232425262728,
    0x292A2B2C2D2E2F30, 0x31323334, 0x41424344, 0x61626364, 0x71727374,
)  # fmt: skip
ROOT = Root((VOLUME,) * 3, (5, 6), 0x1112131415161718, tuple(range(0x70, 0x80)), 0x21222324, 0x31323334)
OPERATION = Operation(3, 0x01020304, 0x05060708, 0x1112131415161718, 0x191A1B1C1D1E1F20, "disk", 0x41424344, 0x45464748)
RECORD = Record(
    0x1112131415161718,
    0x191A1B1C1D1E1F20,
    0x01020304,
    True,
    CHAIN,
    ((1, 2),) * 3,
    ((3, 4, True),) * 4,
    ((5, 6),) * 5,
    ((7, 8, 9),) * 6,
)
SUPERBLOCK = Superblock(
    UUID, 0x1112131415161718, 0x191A1B1C1D1E1F20, 1, 19, 0x81828384, 0x85868788, 1, 0x2122232425262728,
    0x292A2B2C2D2E2F30, SEGMENT, 0x91929394, POINT, (("disk", 0xA1A2A3A4A5A6A7A8), ("e", 512)), 0xB1B2B3B4B5B6B7B8,
)  # fmt: skip
SUPERBLOCK_BYTES = SUPERBLOCK.pack(MAC_KEY)
COST = keys.Cost(0x400, 3, 2)
SLOT = keys.Slot(keys.Kind.KEYFILE, COST, keys.Fresh(SALT, UUID[:12], 0x1112131415161718), "label", bytes(range(48)))
AREA = keys.KeyArea(UUID, 0x1112131415161718, (None, SLOT, *(None,) * 14), CHAIN)
_AREA_BYTES = AREA.to_bytes()


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _header(record: Record) -> dict[str, Any]:
    counts = {"extents": len(record.extents), "zeroes": len(record.zeroes), "runs": len(record.runs)} | {
        "references": len(record.references)
    }
    return _fields(record) | counts | {"flags": int(record.final)}


SUPERBLOCK_NAMES = _fields(SUPERBLOCK) | {
    "magic": b"NBDVDE\r\n", "header_length": 296, "incompatible": 0, "autoclear": 0, "disk_count": 2, "disk_bytes": 23,
    "checksum": blake3(SUPERBLOCK_BYTES[:4032]).digest(), "mac": blake3(SUPERBLOCK_BYTES[:4064], key=MAC_KEY).digest(),
}  # fmt: skip
AREA_NAMES = _fields(AREA) | {
    "magic": b"NBDVKEYS", "version": 1, "slots": 16, "entries": bytes(256) + SLOT.pack() + bytes(256 * 14),
    "checksum": blake3(_AREA_BYTES[:32736]).digest(),
}  # fmt: skip
SLOT_NAMES = {
    "kind": 2, "kdf": 1, "cipher": 1, "label_length": 5, "memory_kib": 0x400, "iterations": 3, "lanes": 2,
    "created_ns": 0x1112131415161718, "salt": SALT, "label": b"label", "nonce": UUID[:12], "wrapped": bytes(range(48)),
}  # fmt: skip


class _Spy(sealing.Keyring):
    """Stands in for a keyring and its ciphers, and keeps what they are called with."""

    def __init__(self) -> None:
        super().__init__(bytes(32), UUID, 1)
        self.seen: tuple[bytes, bytes] = (b"", b"")

    def cipher(self, salt: bytes, identity: bytes) -> sealing.Aead:
        return self

    def encrypt(self, nonce: bytes, data: Any, aad: bytes, /) -> bytes:
        self.seen = (nonce, aad)
        return bytes(data)

    decrypt = encrypt


def _sealed() -> tuple[bytes, bytes]:
    spy = _Spy()
    sealing.Sealer(spy, bytes(32), sealing._IDENTITY.pack(UUID, 0x01020304, 0x1112131415161718)).seal(
        0x2122232425262728, 7, bytes(0x1000), blocks=0x0304, domain=2
    )
    return spy.seen


NONCE, AAD = _sealed()
NONCE_NAMES = {"domain": 2, "number": 0x2122232425262728}
AAD_NAMES = NONCE_NAMES | {
    "uuid": UUID, "slot": 0x01020304, "sequence": 0x1112131415161718, "kind": 7, "blocks": 0x0304, "length": 0x1010,
}  # fmt: skip
SLOT_AAD_NAMES = {"uuid": UUID, "number": 1, "slot": SLOT.pack()[:128]}
NAMED = {"name_length": 4, "name": b"disk"}
DISK_NAMES = {"size": 0xA1A2A3A4A5A6A7A8, "name_length": 4}
RECORD_ITEMS = RECORD.pack()[72:]

DICT_ENTRY = dictionaries.Entry(0x0102, 0, 32, 3, 0x2ABC, 0x1112131415161718, 0x2122232425262728, bytes(range(32)))
DIRECTORY_SLOT = directory.Slot(0x01020304, 2 << 34, 0x1112131415, 0x010203, 0x05060708)
DIRECTORY_BLOCK = directory.Directory((DIRECTORY_SLOT,), 5).pack()
[DICT_BLOCK] = dictionaries.Table([DICT_ENTRY], 0x01020304).pack()

PASSPORT = vault.Record(
    UUID, SALT[:16], 0x0102, 0x0304, 0x1112131415161718, 0x191A1B1C1D1E1F20, 0x2122232425262728, "issuer"
)
RING = stream.Ring(0x0102030405, 0x0102030404, 0x1112131415161718, 0x1112131415161716, 2, stream.StreamPolicy.WAIT)
RING_NAMES = _fields(RING) | {"entries": 2}
RINGS = tiers.Head.unpack(tiers.History.create(tiers.CAPACITY, 0.5)[1].blocks[0]).rings
METRICS = samples.FORM.opened(tiers.History.create(tiers.CAPACITY, 0.5)[1].blocks[0])[0]
SAMPLE = samples.rows_of([samples.Sample(0x0102, 0x1112131415161718, 1.5, 3)])
WINDOW = samples.Samples(SAMPLE).windows().grouped(8)
WINDOW_NAMES = {name: WINDOW.rows[0][name].tobytes() for name in samples.WINDOW.names or ()} | {"width": 1}

MAPPING = anon.Record(UUID, SALT[:16], 0x0102, CHAIN, SALT, 0x1112131415161718, 0x0304)
HEAD = subjectkeys.Head(
    UUID, 0x1112131415161718, (0x2122232000, 0x3132333000), 0x010203, CHAIN, subjectkeys.Erasure(0x01020304, bytes(108))
)
SUBJECT_HEAD = HEAD.pack(MASTER, SALT)
PAGE = subjectkeys.Page(0x1112131415161718, (subjectkeys.Entry(0x01020304, UUID, CHAIN),))


def _unsealed(head: bytes) -> bytes:
    cipher = AESGCM(sealing.derive(MASTER, head[64:96], b"nbdvde subject vault" + UUID))
    return cipher.decrypt(bytes(12), head[96:256], head[:64])


WORM_HEADER = worm.Header(5, 0x01020304, 0x1112131415161718, 0x191A1B1C1D1E1F20, 7, 0x2122232425262728)
WORM_RECORD = worm.Record(0x0102030405060708, 0x1112131415161718, 0x21222324, bytes(range(32)))
WORM_STORED = WORM_RECORD.chained(CHAIN)
WORM_NAMES = _fields(WORM_RECORD) | {"chain": WORM_STORED[52:]}

# Table: (its struct formats joined, its bytes in a sample, values by name)
STRUCTS: dict[str, tuple[str, bytes, dict[str, Any]]] = {
    "superblock": (layout._SUPER.format, SUPERBLOCK_BYTES[:296], SUPERBLOCK_NAMES),
    "superblock-end": ("<32s32s", SUPERBLOCK_BYTES[4032:], SUPERBLOCK_NAMES),
    "disk": (layout._DISK.format, SUPERBLOCK_BYTES[296:305], DISK_NAMES),
    "segment": (layout._SEGMENT.format, SEGMENT.pack(), _fields(SEGMENT)),
    "log-point": (layout._LOG_POINT.format, POINT.pack(), _fields(POINT)),
    "unit-ref": (layout._REF.format, REF.pack(), _fields(REF)),
    "nonce": (sealing._NONCE.format, NONCE, NONCE_NAMES),
    "aad": (sealing._IDENTITY.format + sealing._AAD.format[1:], AAD, AAD_NAMES),
    "key-area": (keys._HEADER.format + "4096s28352x32s32s", _AREA_BYTES, AREA_NAMES),
    "key-slot": (keys._SLOT.format, SLOT.pack(), SLOT_NAMES),
    "key-slot-aad": (keys._AAD.format, SLOT._aad(UUID, 1), SLOT_AAD_NAMES),
    "root": ("<IIIIQQ128s", ROOT.pack()[: layout._ROOT.size], _fields(ROOT) | {
        "volumes": 3, "tables": 2, "entry_length": 160, "statistics": struct.pack("<16Q", *ROOT.statistics),
    }),
    "volume": (layout._VOLUME.format.replace("6xII", "6xI4x"), VOLUME.pack(), _fields(VOLUME) | NAMED),
    "table-entry": (layout._TABLE_ENTRY.format, ENTRY.pack(), _fields(ENTRY) | ENTRY_NAMES),
    "extent": ("<BxH", extent._assemble([bytes(4096)], [b"x"], 0x0102)[:4], {"codec": 1, "dictionary": 0x0102}),
    "region-trailer": ("<II8s", DICT_BLOCK[4080:], {
        "tag": b"DICT", "generation": 0x01020304, "xxh64": xxhash.xxh64_intdigest(DICT_BLOCK[:4088]),
    }),
    "region-directory": (directory._HEADER.format, DIRECTORY_BLOCK[:16], {"slots": 1}),
    "region-slot": (directory._SLOT.format, DIRECTORY_BLOCK[16:48], _fields(DIRECTORY_SLOT)),
    "stream-header": (stream._HEADER.format, RING.pack(), RING_NAMES),
    "worm-header": (worm._HEADER.format.replace("IIQ", "I4xQ"), WORM_HEADER.pack(), _fields(WORM_HEADER)),
    "worm-record": (worm._RECORD.format + "32s", WORM_STORED, WORM_NAMES),
    "dict-header": (dictionaries._HEADER.format, DICT_BLOCK[:16], {"dictionaries": 1}),
    "dict-entry": (dictionaries._ENTRY.format, DICT_BLOCK[16:84], _fields(DICT_ENTRY)),
    "vault-header": (vault._HEADER.format, vault.header(7), {"passports": 7}),
    "vault-record": (vault._HEAD.format, PASSPORT.pack()[:64], _fields(PASSPORT) | {"issuer_bytes": 6}),
    "metrics-header": (tiers._HEADER.format, METRICS[:32], {
        "samples": 0, "capacity": 32 << 20, "threshold": struct.pack("<d", 0.5),
    }),
    "metrics-tier": (tiers._TIER.format, METRICS[72:112], _fields(RINGS[1])),
    "metrics-sample": ("<HQ8sB", SAMPLE.tobytes(), {
        "metric": 0x0102, "time_ns": 0x1112131415161718, "value": struct.pack("<d", 1.5), "aggregation": 3,
    }),
    "metrics-window": ("<HBBHBBQQ8s8s8s", WINDOW.bodies()[0][0][:48], WINDOW_NAMES),
    "anon-header": (anon._HEADER.format, anon.Table([MAPPING]).blocks(())[0][:16], {"mappings": 1}),
    "anon-record": (anon._RECORD.format, MAPPING.pack(), _fields(MAPPING)),
    "subject-head": (subjectkeys._HEAD.format + "3808x32s", SUBJECT_HEAD, _fields(HEAD) | {
        "magic": b"NBDVSUBJ", "version": 1, "salt": SALT, "sealed": SUBJECT_HEAD[96:256],
        "offset_a": HEAD.offsets[0], "offset_b": HEAD.offsets[1], "checksum": blake3(SUBJECT_HEAD[:4064]).digest(),
    }),
    "subject-sealed": (subjectkeys._SEALED.format, _unsealed(SUBJECT_HEAD), {
        "vault_key": CHAIN, "disk": 0x01020304, "record": bytes(108),
    }),
    "subject-page": (subjectkeys._PAGE.format, PAGE.pack()[:16], {"generation": 0x1112131415161718, "count": 1}),
    "subject-entry": (subjectkeys._ENTRY.format, PAGE.pack()[16:72], PAGE.entries[0]._asdict()),
    "header": (layout._HEADER.format, HEADER.pack(), _fields(HEADER)),
    "record": ("<QQIIIIII32s", RECORD.pack()[:72], _header(RECORD)),
    "operation": (layout._OPERATION.format, OPERATION.pack(), _fields(OPERATION) | NAMED),
    "extent-item": (layout.EXTENT_ITEM.format, RECORD_ITEMS[:8], {"length": 1, "blocks": 2}),
    "zero-item": (layout.ZERO_ITEM.format, RECORD_ITEMS[24:40], {"start": 3, "count": 4 | 1 << 63}),
    "run-item": (layout.RUN_ITEM.format, RECORD_ITEMS[88:104], {"start": 5, "count": 6}),
    "reference-item": (layout.REFERENCE_ITEM.format, RECORD_ITEMS[168:192], {"start": 7, "entry": 8, "count": 9}),
    "link": (layout._LINK.format, LINK.pack()[:120], _fields(LINK)),
}  # fmt: skip
CHECKED_ELSEWHERE = {"constants", "kinds", "actions", "bits map-entry", "bits index-entry"}


def _places(form: str) -> list[tuple[int, int]]:
    """(offset, length) of every field and padding of a struct format."""
    places, offset = [], 0
    for count, code in re.findall(r"(\d*)([a-zA-Z])", form):
        repeat, length = (1, int(count or 1)) if code in "sx" else (int(count or 1), struct.calcsize("<" + code))
        for _ in range(repeat):
            places.append((offset, length))
            offset += length
    return places


def _raw(value: Any, length: int) -> bytes:
    if isinstance(value, int):
        return value.to_bytes(length, "little")
    return (value if isinstance(value, bytes) else value.pack()).ljust(length, b"\0")


def test_every_table_is_compared():
    assert {name.removeprefix("table ") for name in TABLES} == STRUCTS.keys() | CHECKED_ELSEWHERE


@pytest.mark.parametrize("name", STRUCTS)
def test_offsets_and_lengths_are_those_of_the_struct(name):
    rows = TABLES[f"table {name}"]
    first = int(rows[0][0])
    assert [(int(offset) - first, int(length)) for offset, length, *_ in rows] == _places(STRUCTS[name][0])


@pytest.mark.parametrize("name", STRUCTS)
def test_fields_are_where_the_table_says(name):
    _, sample, values = STRUCTS[name]
    rows = TABLES[f"table {name}"]
    first = int(rows[0][0])
    assert int(rows[-1][0]) + int(rows[-1][1]) - first == len(sample)
    for offset, length, field, *_ in rows:
        data = sample[int(offset) - first :][: int(length)]
        assert data == (bytes(int(length)) if field == "zero" else _raw(values[field], int(length))), field


@pytest.mark.parametrize(("name", "size"), [
    ("superblock", layout._SUPER.size), ("root", layout._ROOT.size), ("record", layout._RECORD.size),
    ("key-area", layout.KEY_AREA_BYTES), ("extent", extent._HEAD.size), ("volume", Volume.SIZE),
    ("table-entry", TableEntry.SIZE), ("dict-header", dictionaries.FORM.header_bytes),
    ("dict-entry", dictionaries.FORM.record_bytes), ("segment", Segment.SIZE), ("log-point", LogPoint.SIZE),
    ("unit-ref", UnitRef.SIZE),
])  # fmt: skip
def test_sizes(name, size):
    offset, length = map(int, TABLES[f"table {name}"][-1][:2])
    assert offset + length == size


def test_constants():
    for name, value, _ in TABLES["constants"]:
        assert getattr(layout, name.strip("`")) == int(value), name


def test_actions_of_operations():
    documented = {name: int(value) for name, value, *_ in TABLES["actions"]}
    assert documented == {name: value for name, value in vars(layout.Action).items() if name.isupper()}


def test_kinds_of_units():
    documented = {name: int(value) for name, value, *_ in TABLES["kinds"]}
    assert documented == {name: value for name, value in vars(layout.Kind).items() if name.isupper()}
    domains = {name: int(domain) for name, _, _, domain, _ in TABLES["kinds"]}
    assert domains == dict.fromkeys(documented, 0) | {"HEADER": layout.Domain.HEADER, "LINK": layout.Domain.LINK}


@pytest.mark.parametrize(("table", "pack"), [
    ("bits map-entry", lambda block, unit, slot: layout.pack_entry(slot, unit, block)),
    ("bits index-entry", layout.pack_index),
])  # fmt: skip
def test_bits(table, pack):
    rows = [tuple(map(int, bits.split("-"))) for bits, *_ in TABLES[table]]
    full = [(1 << (high - low + 1)) - 1 for low, high in rows]
    for number, (low, _) in enumerate(rows):
        values = [0] * len(rows)
        values[number] = full[number]
        assert pack(*values) == full[number] << low


def test_places_in_the_file():
    assert layout.SUPERBLOCKS == (0, 65536)
    assert layout.KEY_AREAS == (4096, 69632)
    assert subjectkeys.HEADS == (36864, 102400)
    assert SUPERBLOCK_BYTES[4028:4032] == bytes(4)
    assert keys._SLOTS_AT == 256
    assert (layout.HOLE, layout.ALLOCATED_ZERO) == (0, 1)
