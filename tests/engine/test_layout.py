"""Structures come back as they went, and their bytes are pinned by tests/vectors/structures.json."""

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from nbdvde.engine import layout, subjectkeys
from nbdvde.engine.dictionaries import FORM, Entry, Table
from nbdvde.engine.layout import (
    BLOCK,
    ENCRYPTION_AES_256_GCM,
    ENCRYPTION_NONE,
    Action,
    GroupHeader,
    Kind,
    Link,
    LogPoint,
    Operation,
    Record,
    Root,
    Segment,
    Superblock,
    TableEntry,
    UnitRef,
    VolumeEntry,
    pack_entry,
    pack_index,
)
from nbdvde.engine.sealing import Keyring, public_master
from nbdvde.errors import DamageError, ImageError

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "structures.json").read_text())
UUID, KEY = bytes(range(16)), bytes(range(32))
SEGMENT = Segment(3, 65536, 9, 131072, bytes(range(100, 132)))
REF = UnitRef(4, 5, 6000, 700)
POINT = LogPoint(SEGMENT, 8192, 7, 41, bytes(range(32)))
RECORD = Record(
    41,
    2,
    1,
    True,
    bytes(range(32)),
    ((4116, 4), (99, 1)),
    ((7, 1 << 40, True), (3, 2, False)),
    ((0, 4), (900, 1)),
    ((7, 3 << 40 | 5 << 16, 16), (99, 3 << 40 | 6 << 16 | 2, 1)),
)
SUPERBLOCK = Superblock(
    UUID, 6, 2, ENCRYPTION_AES_256_GCM, 3, 65536, 65536, layout.STATE_OPEN, 1_700_000_000_000_000_000, 0, SEGMENT, 300,
    POINT, (("disk", 1 << 30), ("a.b-c_9", 512)),
)  # fmt: skip
ROOT = Root(
    (VolumeEntry(1, "disk", 1 << 30, 2, 77, REF), VolumeEntry(2, "d2", 512, 0, 0, None, 1, 99, 12, 7, FORM.tag, 3, 1)),
    (100, 20), 12, (1,) * 8, 8, 300,
)  # fmt: skip
OPERATION = Operation(Action.CLONE, 9, 2, 1 << 30, 1_700_000_000_000_000_000, "copy", 5, 0x44434241)

DICTIONARIES = Table(
    [
        Entry(1 << 8 | n, 0, 32 + 2 * n, 2, 8000 + n, 1_700_000_000_000_000_000, 100, sha256(b"%d" % n).digest())
        for n in range(60)
    ],
    7,
)

SUBJECTS = subjectkeys.Head(
    UUID, 3, (131072, 196608), 16, bytes(range(200, 232)), subjectkeys.Erasure(7, bytes(range(108)))
)
PAGE = subjectkeys.Page(
    4, tuple(subjectkeys.Entry(7, bytes([number]) * 16, bytes([number + 9]) * 32) for number in (1, 2))
)

STRUCTURES: dict[str, bytes] = {
    "unit reference": REF.pack(),
    "segment": SEGMENT.pack(),
    "table entry": TableEntry(SEGMENT, REF, 40960, 12, 99, layout.KIND_LOG, 0x434142).pack(),
    "log point": POINT.pack(),
    "superblock": SUPERBLOCK.pack(bytes(32)),
    "group header": GroupHeader(7, 2, 500, 8192, 41, 40).pack(),
    "record": RECORD.pack(),
    "operation": Record(41, 2, 1, True, bytes(range(32)), (), (), (), (), OPERATION).pack(),
    "link": Link(8192, 7, 41, 40, bytes(range(32)), SEGMENT).pack(),
    "root": ROOT.pack(),
    "sealed unit": Keyring(KEY, UUID, ENCRYPTION_AES_256_GCM).sealer(SEGMENT).seal(5, Kind.EXTENT, b"text", blocks=2),
    "tagged unit": Keyring(public_master(UUID), UUID, ENCRYPTION_NONE).sealer(SEGMENT).seal(5, Kind.RECORD, b"text"),
    "map entry": pack_entry(3, 5, 255).to_bytes(8, "little"),
    "index entry": pack_index(40960, 4116, 256).to_bytes(8, "little"),
    "dictionaries": b"".join(DICTIONARIES.pack()),
    "subject head": SUBJECTS.pack(KEY, bytes(range(40, 72))),
    "subject page": SUBJECTS.seal(5, PAGE, bytes(range(80, 112))),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_bytes_of_each_structure_are_pinned(name: str) -> None:
    assert STRUCTURES[name].rstrip(b"\0").hex() == VECTORS[name]["bytes"]
    assert len(STRUCTURES[name]) == VECTORS[name]["length"]


def test_every_vector_is_tested() -> None:
    assert set(VECTORS) == set(STRUCTURES)


u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
hashes = st.binary(min_size=32, max_size=32)
blocks = st.integers(0, 1 << 19).map(lambda count: count * BLOCK)
segments = st.builds(Segment, u32, blocks, u64, blocks, hashes)
references = st.builds(UnitRef, u32, u32, u32, st.integers(1, 2**32 - 1))
points = st.builds(LogPoint, segments, u32, u32, u64, hashes)
names = st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True)
small = st.integers(0, 2**40)
operations = st.builds(Operation, st.integers(0, 255), u32, u32, u64, u64, names, u32, u32)
records = st.builds(
    Record, u64, u32, u32, st.booleans(), hashes, st.lists(st.tuples(u32, u32), max_size=5).map(tuple),
    st.lists(st.tuples(small, small, st.booleans()), max_size=5).map(tuple),
    st.lists(st.tuples(small, small), max_size=5).map(tuple),
    st.lists(st.tuples(small, small, u32), max_size=5).map(tuple), st.none() | operations,
)  # fmt: skip
volumes = st.builds(VolumeEntry, u32, names, u64, u32, u64, st.none() | references, u32, u64, u64, u32, u32)
roots = st.builds(
    Root, st.lists(volumes, max_size=3).map(tuple), st.lists(u32, max_size=4).map(tuple), u64,
    st.lists(u64, min_size=8, max_size=8).map(tuple), u64, u32,
)  # fmt: skip


@given(segment=segments, ref=references, point=points, record=records, root=roots)
def test_structures_come_back(segment: Segment, ref: UnitRef, point: LogPoint, record: Record, root: Root) -> None:
    entry = TableEntry(segment, ref, 1, 2, 3, layout.KIND_META, 4)
    link = Link(1, 2, 3, 4, point.chain, segment)
    header = GroupHeader(1, 2, 3, 4, 5, 6)
    pairs: list[tuple[Any, Any]] = [
        (segment, Segment), (ref, UnitRef), (point, LogPoint), (record, Record), (root, Root), (entry, TableEntry),
        (link, Link), (header, GroupHeader),
    ]  # fmt: skip
    for value, kind in pairs:
        assert kind.unpack(value.pack()) == value
    assert len(link.pack()) + layout.TAG_BYTES == BLOCK
    items = record.extents, record.zeroes, record.runs, record.references
    held = Record.packed_bytes(*map(len, items)) + (Operation.SIZE if record.operation else 0)
    assert held == len(record.pack())


@given(disks=st.lists(st.tuples(names, u64), max_size=80).map(tuple), sequence=u64, key=hashes)
def test_a_superblock_comes_back_with_the_disks_that_fit(
    disks: tuple[tuple[str, int], ...], sequence: int, key: bytes
) -> None:
    block = replace(SUPERBLOCK, disks=disks, sequence=sequence).pack(key)
    found = Superblock.unpack(block)
    assert found is not None
    assert found.sequence == sequence
    assert found.disks == disks[: len(found.disks)]
    assert len(found.disks) == len(disks) or len(disks) > 40
    assert Superblock.authentic(block, key)
    assert not Superblock.authentic(block, bytes(31) + b"x")


def test_newer_formats_are_refused_with_what_they_need() -> None:
    def altered(at: int, value: int) -> bytes:
        block = bytearray(SUPERBLOCK.pack(bytes(32)))
        block[at] = value
        block[layout._CHECKSUM_AT : layout._MAC_AT] = blake3(block[: layout._CHECKSUM_AT]).digest()
        return bytes(block)

    with pytest.raises(ImageError, match="format version 2"):
        Superblock.unpack(altered(8, 2))
    with pytest.raises(ImageError, match="incompatible feature 4, 5"):
        Superblock.unpack(altered(16, 63))
    assert Superblock.unpack(altered(24, 255)) is not None, "unknown compatible features do no harm"
    assert Superblock.unpack(b"\0" * BLOCK) is None
    assert Superblock.unpack(SUPERBLOCK.pack(bytes(32))[:-1]) is None


@pytest.mark.parametrize(
    "bad", [replace(SEGMENT, offset=1), replace(SEGMENT, length=1), replace(SEGMENT, offset=1 << 63)]
)
def test_segments_at_impossible_places_are_damage(bad: Segment) -> None:
    with pytest.raises(DamageError):
        Segment.unpack(bad.pack())
