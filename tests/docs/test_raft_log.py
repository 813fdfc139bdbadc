"""docs/raft-log.md against the code, and the bytes of a small log against tests/vectors/raft-log.json."""

import json
from pathlib import Path
from typing import Any

import pytest
from xxhash import xxh3_64_intdigest

from nbdvde.raft import records
from nbdvde.raft.filelog import FileLog, Sizes
from nbdvde.raft.messages import Entry, EntryKind, HardState, Members, Snapshot
from nbdvde.raft.records import Draft, Head, Kind, State, pack_twin
from tests.docs.tables import tables
from tests.docs.test_format import _places, _raw
from tests.raft.simdisk import SimDirectory, Write

TABLES = tables("raft-log.md")
UUID = bytes(range(1, 17))
MEMBERS = Members(frozenset({1, 2}), frozenset({3}))
HEADER = Draft(Kind.ENTRY, 0x01020304, 0x1112131415161718, 0x191A1B1C1D1E1F20, b"data", 2).header(
    0x05060708, 0x2122232425262728, 0x292A2B2C2D2E2F30, 0x3132333435363738, last=True
)
HEADER_NAMES = {name: getattr(HEADER, name) for name in HEADER.__struct_fields__}
STATE = State(
    "name", Snapshot(1, 2, MEMBERS), 0x1112131415161718, 0x191A1B1C1D1E1F20,
    HardState(0x2122232425262728, 0x292A2B2C2D2E2F30, 0x3132333435363738), unsure=True,
)  # fmt: skip
GROUP = STATE.draft(1).payload
SEGMENT = Head(0x1112131415161718, 0x01020304, UUID, unsure=True).draft().payload
PART = pack_twin(bytes(600), 0x1112131415161718, 0x01020304, 0x2122232425262728)

# Table: (its struct formats joined, its bytes in a sample, values by name)
STRUCTS: dict[str, tuple[str, bytes, dict[str, Any]]] = {
    "record": (records._HEADER.format, HEADER.pack(), HEADER_NAMES),
    "segment": (records._HEAD.format, SEGMENT, {
        "magic": b"NBDVRAFT", "version": 1, "features": 0, "next_group": 0x01020304, "flags": 1,
        "segment": 0x1112131415161718, "uuid": UUID,
    }),
    "group": (records._STATE.format, GROUP[:44], {
        "last_index": STATE.last_index, "last_term": STATE.last_term, "term": STATE.hard.term, "vote": STATE.hard.vote,
        "commit": STATE.hard.commit, "flags": 1, "name_length": 4,
    }),
    "part": (records._PART.format, PART[512:544], {
        "batch": 0x1112131415161718, "start": 0x01020304, "number": 1, "parts": 2, "used": 120,
        "check": xxh3_64_intdigest(PART[512:536] + bytes(480), 0x2122232425262728 + 512),
    }),
}  # fmt: skip


def test_every_table_is_compared() -> None:
    assert {name.removeprefix("table ") for name in TABLES} == STRUCTS.keys() | {"constants", "kinds"}


@pytest.mark.parametrize("name", STRUCTS)
def test_fields_are_where_the_table_says(name: str) -> None:
    form, sample, values = STRUCTS[name]
    rows = TABLES[f"table {name}"]
    assert [(int(offset), int(length)) for offset, length, *_ in rows] == _places(form)
    assert int(rows[-1][0]) + int(rows[-1][1]) == len(sample)
    for offset, length, field, *_ in rows:
        data = sample[int(offset) :][: int(length)]
        assert data == (bytes(int(length)) if field == "zero" else _raw(values[field], int(length))), field


def test_checks_are_what_the_table_says() -> None:
    assert HEADER.check == xxh3_64_intdigest(HEADER.pack()[:56], 0x3132333435363738)
    assert HEADER.digest == xxh3_64_intdigest(b"data")


def test_constants() -> None:
    for name, value, _ in TABLES["constants"]:
        assert getattr(records, name.strip("`")) == int(value), name


def test_kinds() -> None:
    documented = {name: int(value) for name, value, *_ in TABLES["kinds"]}
    assert documented == {name: value for name, value in vars(Kind).items() if name.isupper()}


def small_log() -> SimDirectory:
    """A log with a record of every kind."""
    directory = SimDirectory()
    log = FileLog(directory, Sizes(1 << 18), lambda count: bytes(range(count)))
    store, gone = log.create("default", Snapshot(4, 1, MEMBERS)), log.create("gone", Snapshot())
    log.remove("gone")
    change = Members(frozenset({1, 2, 3})).pack()
    store.append([Entry(2, 5, EntryKind.EMPTY), Entry(2, 6, EntryKind.MEMBERS, change), Entry(2, 7, data=b"seven")])
    store.append([Entry(2, 8, data=b"eight"), Entry(2, 9, data=b"nine")])
    store.save(HardState(2, 1, 6))
    assert gone.last_index == 0
    _sync(log)
    store.truncate_from(9)
    store.compact_to(Snapshot(5, 2, MEMBERS))
    store.view.places.spoil(7)
    store.mend([Entry(2, 7, data=b"seven")])
    _sync(log)
    log.create("other", Snapshot()).reset(Snapshot(9, 3, MEMBERS))
    store.settle(HardState(5, 0, 6))
    _sync(log)
    return directory


def _sync(log: FileLog) -> None:
    work = log.take()
    assert work
    work()


def test_the_bytes_of_a_small_log_are_pinned() -> None:
    written = [event for event in small_log().events if isinstance(event, Write)]
    found = [{"file": write.number, "offset": write.offset, "bytes": write.data.hex()} for write in written]
    path = Path(__file__).parent.parent / "vectors" / "raft-log.json"
    assert found == json.loads(path.read_text())
    kinds = {kind for write in written for kind in range(1, 10) if bytes([kind]) in write.data[4::64]}
    assert kinds == set(range(1, 10))


def test_the_pinned_bytes_are_read() -> None:
    path = Path(__file__).parent.parent / "vectors" / "raft-log.json"
    content = {1: bytearray(1 << 15)}
    for write in json.loads(path.read_text()):
        data = bytes.fromhex(write["bytes"])
        content[write["file"]][write["offset"] : write["offset"] + len(data)] = data
    log = FileLog(SimDirectory({1: bytes(content[1])}), Sizes(1 << 18))
    store, other = log.group("default"), log.group("other")
    assert store
    assert other
    assert (store.hard, store.snapshot.index, store.last_index) == (HardState(5, 0, 6), 5, 8)
    assert [store.get(index).data for index in (7, 8)] == [b"seven", b"eight"]
    assert Members.unpack(store.get(6).data) == Members(frozenset({1, 2, 3}))
    assert other.snapshot == Snapshot(9, 3, MEMBERS)
    assert not log.notes
