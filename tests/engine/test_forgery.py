"""Images by somebody who can seal anything, as anybody can without encryption: a clean error, and soon."""

import tracemalloc
from dataclasses import replace
from unittest import mock

import pytest

from nbdvde.disk import BLOCK
from nbdvde.engine.access import format_storage
from nbdvde.engine.changes import applying
from nbdvde.engine.extent import Decoder
from nbdvde.engine.layout import (
    DATA_START,
    HEADER_BYTES,
    KIND_LOG,
    LINK_BYTES,
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
    pack_entry,
)
from nbdvde.engine.lbamap import LEAF_BLOCKS, LbaMap, Leaf
from nbdvde.engine.log import Change
from nbdvde.engine.metadata import deflate
from nbdvde.engine.recovery import load, read_superblocks
from nbdvde.engine.replay import Replay
from nbdvde.engine.segments import Segments, State
from nbdvde.engine.space import FreeSpace
from nbdvde.errors import DamageError
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
