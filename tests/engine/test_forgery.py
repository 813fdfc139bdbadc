"""Images by somebody who can seal anything, as anybody can without encryption: a clean error, and soon."""

import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from unittest import mock

import pytest

from nbdvde.disk import BLOCK
from nbdvde.engine.access import format_storage, open_storage
from nbdvde.engine.changes import applying
from nbdvde.engine.check import check_storage
from nbdvde.engine.extent import Decoder
from nbdvde.engine.groups import Change
from nbdvde.engine.layout import (
    DATA_START,
    HEADER_BYTES,
    HOLE,
    KIND_LOG,
    KIND_META,
    LINK_BYTES,
    STATE_OPEN,
    SUPERBLOCKS,
    TAG_BYTES,
    Domain,
    GroupHeader,
    Kind,
    Link,
    LogPoint,
    Record,
    Root,
    Segment,
    TableEntry,
    UnitRef,
    VolumeEntry,
    pack_entry,
)
from nbdvde.engine.lbamap import LEAF_BLOCKS, LbaMap, height_for
from nbdvde.engine.metadata import deflate
from nbdvde.engine.recovery import load, read_superblocks
from nbdvde.engine.replay import Replay
from nbdvde.engine.segments import Segments, State
from nbdvde.engine.space import FreeSpace
from nbdvde.engine.versions import FANOUT, Leaf
from nbdvde.errors import DamageError, PoisonedError
from tests.crash.oracle import master_of
from tests.crash.recording import RecordingStorage

SEGMENT = 64 << 10
CHAIN = bytes(32)


def made() -> RecordingStorage:
    storage = RecordingStorage()
    format_storage(storage, 64 << 20, None, segment_bytes=SEGMENT)
    return storage


def log_segment(storage: RecordingStorage) -> State:
    segments = load(storage, master_of).segments
    state = segments.new(KIND_LOG, SEGMENT, bytes(32))
    storage.allocate(0, state.segment.end)
    return state


def accepted(storage: RecordingStorage, state: State) -> int:
    """How many transactions a replay of a log that begins in this segment takes."""
    segments = Segments(storage, load(storage, master_of).keyring, FreeSpace(DATA_START, 1 << 40), SEGMENT)
    segments.adopt(TableEntry(state.segment, None, 0, 0, 0, KIND_LOG))
    return len(list(Replay(segments, LogPoint(state.segment, 0, 0, 1, CHAIN), 1).transactions()))


def put_group(storage: RecordingStorage, state: State, extents: int, blocks: int) -> None:
    """A group of so many extents that claim so many blocks each, and hold nothing."""
    sealed = [state.sealer.seal(unit, Kind.EXTENT, b"", blocks=blocks) for unit in range(1, extents + 1)]
    items = tuple((len(extent), blocks) for extent in sealed)
    record = Record(1, 1, 1, True, CHAIN, items, (), ((0, extents * blocks),)).pack()
    unpadded = HEADER_BYTES + len(record) + TAG_BYTES + sum(map(len, sealed))
    record = record.ljust(len(record) + -unpadded % BLOCK, b"\0")
    length = unpadded + -unpadded % BLOCK
    header = GroupHeader(0, extents, len(record) + TAG_BYTES, length, 1, 0)
    storage.write(state.segment.offset, [
        state.sealer.seal(0, Kind.HEADER, header.pack(), domain=Domain.HEADER),
        state.sealer.seal(0, Kind.RECORD, record),
        *sealed,
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("extents", "blocks", "taken"), [(1, 256, 1), (4, 64, 1), (1, 257, 0), (5, 64, 0), (64, 256, 0)]
)
def test_a_group_places_no_more_blocks_than_one_can_have(extents: int, blocks: int, taken: int) -> None:
    storage = made()
    state = log_segment(storage)
    put_group(storage, state, extents, blocks)
    assert accepted(storage, state) == taken


def test_a_log_that_leads_back_to_itself_ends() -> None:
    storage = made()
    state = log_segment(storage)
    link = state.sealer.seal(0, Kind.LINK, Link(0, 0, 1, 0, CHAIN, state.segment).pack(), domain=Domain.LINK)
    storage.write(state.segment.end - LINK_BYTES, [link, link])
    with pytest.raises(DamageError, match="leads back"):
        accepted(storage, state)


def test_a_link_to_a_segment_larger_than_any_is_not_followed() -> None:
    storage = made()
    state = log_segment(storage)
    large = Segment(9, 1 << 31, state.segment.sequence + 1, 0, bytes(32))
    link = state.sealer.seal(0, Kind.LINK, Link(0, 0, 9, 0, CHAIN, large).pack(), domain=Domain.LINK)
    storage.write(state.segment.end - LINK_BYTES, [link, link])
    with mock.patch.object(storage, "read", side_effect=storage.read) as read:
        assert accepted(storage, state) == 0
    assert max(call.args[1] for call in read.mock_calls) == SEGMENT


def test_a_table_of_false_entries_does_not_fill_the_memory() -> None:
    """Eight times 11,000 entries of zeroes: each table is 100 bytes in the image."""
    storage = made()
    superblock, keyring = read_superblocks(storage)[0], load(storage, master_of).keyring
    segment = replace(superblock.root, length=4 * BLOCK)
    sealer = keyring.sealer(segment)
    tables = [sealer.seal(number, Kind.TABLE, deflate(bytes(1 << 20))) for number in range(1, 9)]
    root = sealer.seal(0, Kind.ROOT, deflate(Root((), tuple(map(len, tables)), 2, (0,) * 16).pack()))
    storage.allocate(0, segment.end)
    storage.write(segment.offset, [root, *tables])
    forged = replace(superblock, root=segment, root_length=len(root)).pack(keyring.superblock_key())
    storage.write(SUPERBLOCKS[superblock.sequence % 2], [forged])
    tracemalloc.start()
    try:
        with pytest.raises(DamageError, match="segment table"):
            load(storage, master_of)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


def forged(storage: RecordingStorage, size: int, mapped: int, root: UnitRef | None, *segments: TableEntry) -> None:
    """Have both superblocks lead to a catalogue with one disk, and a table with some segments."""
    superblock, keyring = read_superblocks(storage)[0], load(storage, master_of).keyring
    sealer = keyring.sealer(superblock.root)
    volume = VolumeEntry(1, "disk", size, height_for(-(-size // BLOCK)), mapped, root)
    table = sealer.seal(1, Kind.TABLE, deflate(b"".join(entry.pack() for entry in segments)))
    first = sealer.seal(0, Kind.ROOT, deflate(Root((volume,), (len(table),), 99, (0,) * 16).pack()))
    storage.write(superblock.root.offset, [first, table])
    for at, offset in enumerate(SUPERBLOCKS):
        block = replace(superblock, root_length=len(first), sequence=2 + at, disks=(("disk", size),))
        storage.write(offset, [block.pack(keyring.superblock_key())])


def map_segment(storage: RecordingStorage) -> State:
    segments = load(storage, master_of).segments
    state = segments.new(KIND_META, SEGMENT, bytes(32))
    storage.allocate(0, state.segment.end)
    return state


def put_units(storage: RecordingStorage, state: State, units: Sequence[tuple[int, bytes]]) -> list[UnitRef]:
    """Metadata units, one after the other."""
    refs = []
    for kind, data in units:
        sealed = state.sealer.seal(state.units, kind, deflate(data))
        refs.append(UnitRef(state.segment.slot, state.units, state.used, len(sealed)))
        storage.write(state.segment.offset + state.used, [sealed])
        state.units += 1
        state.used += len(sealed)
    return refs


def nodes_of_nodes(storage: RecordingStorage, state: State, size: int) -> UnitRef:
    """A map in which each node names the one below 256 times."""
    [ref] = put_units(storage, state, [(Kind.LEAF, bytes(8 * LEAF_BLOCKS))])
    for _ in range(height_for(size // BLOCK)):
        [ref] = put_units(storage, state, [(Kind.NODE, ref.pack() * FANOUT)])
    return ref


def test_nodes_that_stand_in_many_places_are_damage_and_check_ends() -> None:
    storage = made()
    state = map_segment(storage)
    root = nodes_of_nodes(storage, state, 1 << 60)
    forged(storage, 1 << 60, 0, root, TableEntry(state.segment, None, state.used, state.units, 9, KIND_META))
    report = check_storage(storage, master_of)
    assert any("two places" in error.what for error in report.errors)


def test_a_node_that_names_itself_is_damage_and_check_ends() -> None:
    storage = made()
    state = map_segment(storage)
    packed = deflate(bytes(FANOUT * UnitRef.SIZE))
    for _ in range(9):  # until its length is what it says
        ref = UnitRef(state.segment.slot, 0, 0, len(packed) + TAG_BYTES)
        packed = deflate(ref.pack() * FANOUT)
    assert put_units(storage, state, [(Kind.NODE, ref.pack() * FANOUT)]) == [ref]
    forged(storage, 1 << 60, 0, ref, TableEntry(state.segment, None, state.used, state.units, 9, KIND_META))
    report = check_storage(storage, master_of)
    assert any("two places" in error.what for error in report.errors)


def put_zeroes(storage: RecordingStorage, state: State, zeroes: tuple[int, int, bool]) -> None:
    """A group that zeroes a range, and superblocks under which it counts."""
    record = Record(1, 1, 1, True, CHAIN, (), (zeroes,), ()).pack()
    record = record.ljust(BLOCK - HEADER_BYTES - TAG_BYTES, b"\0")
    header = GroupHeader(0, 0, len(record) + TAG_BYTES, BLOCK, 1, 0)
    storage.write(state.segment.offset, [
        state.sealer.seal(0, Kind.HEADER, header.pack(), domain=Domain.HEADER),
        state.sealer.seal(0, Kind.RECORD, record),
    ])  # fmt: skip
    keyring = load(storage, master_of).keyring
    for offset, superblock in zip(SUPERBLOCKS, reversed(read_superblocks(storage)), strict=True):
        point = LogPoint(state.segment, 0, 0, 1, CHAIN)
        block = replace(superblock, epoch=1, state=STATE_OPEN, log=point)
        storage.write(offset, [block.pack(keyring.superblock_key())])


@pytest.mark.parametrize("allocated", [True, False])
def test_a_log_that_zeroes_more_than_one_can_does_not_fill_the_memory(
    allocated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 1 << 50
    monkeypatch.setattr("nbdvde.engine.recovery._ZEROED_LEAVES", 4096)
    storage = made()
    meta = map_segment(storage)
    root = nodes_of_nodes(storage, meta, size)
    log = State(replace(meta.segment, slot=2, offset=meta.segment.end, sequence=50), KIND_LOG, meta.sealer)
    forged(storage, size, 0, root, TableEntry(meta.segment, None, meta.used, meta.units, 9, KIND_META))
    log.sealer = load(storage, master_of).keyring.sealer(log.segment)
    storage.allocate(0, log.segment.end)
    put_zeroes(storage, log, (0, size // BLOCK, allocated))
    tracemalloc.start()
    try:
        with pytest.raises(DamageError, match="zeroes more than a log can"):
            load(storage, master_of)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20


async def test_a_count_of_mapped_blocks_that_is_too_low() -> None:
    lbamap = LbaMap(LEAF_BLOCKS, None, 1)
    lbamap.install_leaf(0, Leaf("Q", [pack_entry(7, 1, 0)] * LEAF_BLOCKS))
    with pytest.raises(DamageError, match="mapped"):
        lbamap.fill(0, LEAF_BLOCKS, HOLE)


@pytest.mark.parametrize("blocks", [1, LEAF_BLOCKS])
def test_a_count_of_live_blocks_that_is_too_low(blocks: int) -> None:
    storage = made()
    segments = load(storage, master_of).segments
    old, new = (segments.new(KIND_LOG, SEGMENT, bytes(32)) for _ in range(2))
    lbamap = LbaMap(LEAF_BLOCKS, None, LEAF_BLOCKS)
    lbamap.install_leaf(0, Leaf("Q", [pack_entry(old.segment.slot, 1, 0)] * LEAF_BLOCKS))
    with pytest.raises(DamageError, match="counts less in use"):
        list(applying(segments, lbamap, Change((), range(blocks), [pack_entry(new.segment.slot, 1, 0)] * blocks)))


async def test_a_count_of_live_units_that_is_too_low() -> None:
    storage = made()
    state = map_segment(storage)
    [leaf] = put_units(storage, state, [(Kind.LEAF, bytes(8 * LEAF_BLOCKS))])
    [root] = put_units(storage, state, [(Kind.NODE, leaf.pack() + bytes((FANOUT - 1) * UnitRef.SIZE))])
    forged(storage, 64 << 20, 1 << 63, root, TableEntry(state.segment, None, state.used, state.units, 1, KIND_META))
    image = await open_storage(storage, None)
    await image.disk().write(0, memoryview(b"x" * BLOCK))
    with pytest.raises(PoisonedError, match="counts less in use"):
        await image.close()


@pytest.mark.parametrize("level", [-1, 23, 99])
def test_an_impossible_compression_level(level: int) -> None:
    storage = made()
    superblock, keyring = read_superblocks(storage)[0], load(storage, master_of).keyring
    block = replace(superblock, compression=level).pack(keyring.superblock_key())
    storage.write(SUPERBLOCKS[superblock.sequence % 2], [block])
    with pytest.raises(DamageError, match="impossible compression level"):
        load(storage, master_of)


@pytest.mark.parametrize("extent_bytes", [0, 100, (1 << 20) + BLOCK])
def test_an_impossible_extent_size(extent_bytes: int) -> None:
    storage = made()
    superblock, keyring = read_superblocks(storage)[0], load(storage, master_of).keyring
    forged = replace(superblock, extent_bytes=extent_bytes).pack(keyring.superblock_key())
    storage.write(SUPERBLOCKS[superblock.sequence % 2], [forged])
    with pytest.raises(DamageError, match="impossible extent size"):
        load(storage, master_of)


def test_an_extent_that_holds_nothing() -> None:
    with pytest.raises(DamageError, match="empty"):
        Decoder().frame(b"", 1, 0)


@pytest.mark.parametrize("blocks", [1, LEAF_BLOCKS])
def test_overwriting_what_points_at_no_segment(blocks: int) -> None:
    storage = made()
    segments = load(storage, master_of).segments
    state = segments.new(KIND_LOG, SEGMENT, bytes(32))
    lbamap = LbaMap(LEAF_BLOCKS)
    lbamap.install_leaf(0, Leaf("Q", [pack_entry(77, 1, 0)] * LEAF_BLOCKS))
    entries = [pack_entry(state.segment.slot, 1, 0)] * blocks
    with pytest.raises(DamageError, match="slot 77"):
        list(applying(segments, lbamap, Change((), range(blocks), entries)))


@pytest.mark.parametrize(("counted", "sound"), [(0, False), (1, False), (2, True), (3, True)])
def test_check_takes_counts_as_upper_bounds(counted: int, sound: bool) -> None:
    storage = made()
    state = map_segment(storage)
    [leaf] = put_units(storage, state, [(Kind.LEAF, bytes(8 * LEAF_BLOCKS))])
    [root] = put_units(storage, state, [(Kind.NODE, leaf.pack() + bytes((FANOUT - 1) * UnitRef.SIZE))])
    entry = TableEntry(state.segment, None, state.used, state.units, counted, KIND_META)
    forged(storage, 64 << 20, 0, root, entry)
    errors = check_storage(storage, master_of).errors
    assert (errors == []) is sound
    assert all("live, the maps use 2" in error.what for error in errors)
