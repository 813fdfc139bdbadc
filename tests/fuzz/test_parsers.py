"""What anyone can write into a file, signed with the key an unencrypted image gives away, makes clean errors."""

from collections.abc import Callable
from contextlib import suppress

import pytest
import zstandard
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdvde.engine import layout
from nbdvde.engine.dictionaries import FORM, Table
from nbdvde.engine.extent import Compressor, Decoder
from nbdvde.engine.layout import (
    BLOCK,
    FRAME_BLOCKS,
    MAGIC,
    VERSION,
    Link,
    LogPoint,
    Record,
    Root,
    Segment,
    Superblock,
    TableEntry,
)
from nbdvde.engine.lbamap import parse_leaf
from nbdvde.engine.metadata import UNIT_MAX, deflate, inflate
from nbdvde.engine.versions import Node
from nbdvde.errors import DamageError, NbdvdeError

PARSERS: dict[str, Callable[[bytes], object]] = {
    "record": Record.unpack,
    "root": Root.unpack,
    "link": Link.unpack,
    "segment": Segment.unpack,
    "table entry": TableEntry.unpack,
    "log point": LogPoint.unpack,
    "leaf": parse_leaf,
    "node": Node,
    "metadata": inflate,
    "superblock": Superblock.unpack,
}


def harmless(parse: Callable[[bytes], object], data: bytes) -> None:
    with suppress(NbdvdeError):
        parse(data)


@pytest.mark.parametrize("name", PARSERS)
@given(data=st.binary(max_size=600))
@settings(max_examples=200, deadline=None)
def test_random_bytes_parse_or_are_damage(name: str, data: bytes) -> None:
    harmless(PARSERS[name], data)


@given(fields=st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 70), min_size=30, max_size=120))
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("name", ["record", "root", "link", "table entry"])
def test_plausible_numbers_parse_or_are_damage(name: str, fields: list[int]) -> None:
    harmless(PARSERS[name], b"".join(field.to_bytes(4, "little") for field in fields))


@given(body=st.binary(max_size=1000), version=st.sampled_from([VERSION, VERSION, 2, 0]))
@settings(max_examples=300, deadline=None)
def test_a_superblock_with_a_right_checksum_parses_or_is_refused(body: bytes, version: int) -> None:
    block = (MAGIC + version.to_bytes(2, "little") + body).ljust(layout._CHECKSUM_AT, b"\0")
    harmless(Superblock.unpack, block + blake3(block).digest() + bytes(32))


@given(
    data=st.binary(min_size=1, max_size=3 * BLOCK),
    blocks=st.integers(1, 256) | st.integers(1, 65535),
    codec=st.sampled_from([0, 1, 1, 2]),
)
@settings(max_examples=300, deadline=None)
def test_an_extent_decodes_to_its_length_or_is_damage(data: bytes, blocks: int, codec: int) -> None:
    try:
        frames = Decoder().frames(bytes([codec]) + data[1:], blocks)
    except DamageError:
        return
    assert sum(map(len, frames)) == blocks * BLOCK


@given(flips=st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 255)), min_size=1, max_size=4))
def test_an_extent_with_changed_bytes_decodes_to_its_length_or_is_damage(flips: list[tuple[int, int]]) -> None:
    pages = [(bytes([n]) * 2000 + b"text %d" % n * 400)[:BLOCK] for n in range(9)]
    frames = [b"".join(pages[at : at + FRAME_BLOCKS]) for at in range(0, 9, FRAME_BLOCKS)]
    plain = bytearray(Compressor(1).encode([frames])[0])
    for at, mask in flips:
        plain[at % len(plain)] ^= mask
    try:
        frames = Decoder().frames(bytes(plain), 9)
    except DamageError:
        return
    assert sum(map(len, frames)) == 9 * BLOCK


@given(
    count=st.integers(0, 70) | st.integers(0, 2**32 - 1),
    reserved=st.sampled_from([bytes(12), bytes(12), b"x" * 12]),
    entries=st.lists(st.lists(st.integers(0, 2**16 - 1), min_size=34, max_size=34), max_size=70),
)
@settings(max_examples=200, deadline=None)
def test_a_sound_region_of_dictionaries_parses_or_is_damage(
    count: int, reserved: bytes, entries: list[list[int]]
) -> None:
    records = [b"".join(number.to_bytes(2, "little") for number in entry) for entry in entries]
    blocks = FORM.pack(count.to_bytes(4, "little") + reserved, records, 1)
    harmless(lambda _: Table.unpack(lambda number: blocks[number] if number < len(blocks) else b""), b"")


def test_what_would_fill_the_memory_is_damage() -> None:
    huge = zstandard.ZstdCompressor().compress(bytes(UNIT_MAX + 1))
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 20))
    for frame in (huge, unsized, deflate(b"x")[:-1], b""):
        with pytest.raises(DamageError):
            inflate(frame)
    plain = b"\1\0\0\0" + len(huge).to_bytes(4, "little") + huge
    with pytest.raises(DamageError):
        Decoder().frames(plain, 1)
