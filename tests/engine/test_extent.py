"""Extents decode to what was encoded, whole and frame by frame, at every level."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdvde.disk import BLOCK
from nbdvde.engine.extent import STORED, Compressor, Decoder, is_compressed, without_blocks
from nbdvde.engine.layout import EXTENT_BLOCKS_MAX, FRAME_BLOCKS
from nbdvde.errors import DamageError

PAGES = [bytes(BLOCK), b"text " * 819 + b"\0", random.Random(1).randbytes(BLOCK), b"\xff" * BLOCK]
extents = st.lists(st.lists(st.sampled_from(PAGES), min_size=1, max_size=13), min_size=1, max_size=4)


def frames(pages: list[bytes]) -> list[bytes]:
    return [b"".join(pages[at : at + FRAME_BLOCKS]) for at in range(0, len(pages), FRAME_BLOCKS)]


@pytest.mark.parametrize("level", [0, 1, 19])
@given(pages=extents)
def test_extents_come_back(level: int, pages: list[list[bytes]]) -> None:
    decoder = Decoder()
    for plain, expected in zip(Compressor(level).encode(list(map(frames, pages))), pages, strict=True):
        assert len(plain) <= len(expected) * BLOCK + 4, "an extent never grows by more than its head"
        assert b"".join(decoder.frames(plain, len(expected))) == b"".join(expected)
        for number, frame in enumerate(frames(expected)):
            assert decoder.frame(plain, len(expected), number) == frame


@pytest.mark.parametrize("level", [0, 1])
@given(pages=extents, chosen=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=9))
def test_many_frames_at_once_are_what_each_is(
    level: int, pages: list[list[bytes]], chosen: list[tuple[int, int]]
) -> None:
    plains, decoder = Compressor(level).encode(list(map(frames, pages))), Decoder()
    wanted = [
        (plains[extent], len(pages[extent]), number)
        for extent, number in chosen
        if extent < len(plains) and number < len(frames(pages[extent]))
    ]
    assert list(map(bytes, decoder.many(wanted))) == [decoder.frame(*one) for one in wanted]


def test_a_frame_among_many_that_cannot_be_decompressed() -> None:
    (good,) = Compressor(1).encode([frames([b"x" * BLOCK] * 4)])
    for bad in (good[:-3], good[:8] + b"no frame at all", good[:8]):
        with pytest.raises(DamageError):
            Decoder().many([(good, 4, 0), (bad, 4, 0)])
    with pytest.raises(DamageError):
        Decoder().many([(good, 2, 0)])


@given(used=st.lists(st.booleans(), min_size=1, max_size=40))
def test_blocks_are_left_out_of_what_is_stored(used: list[bool]) -> None:
    pages = [random.Random(n).randbytes(BLOCK) for n in range(len(used))]
    (stored,) = Compressor(0).encode([frames(pages)])
    packed = without_blocks(stored, used)
    expected = [page if is_used else bytes(BLOCK) for page, is_used in zip(pages, used, strict=True)]
    assert b"".join(Decoder().frames(packed, len(used))) == b"".join(expected)
    assert len(packed) <= sum(used) * BLOCK + 30 * len(used)


def test_what_does_not_compress_is_stored() -> None:
    noise = [random.Random(n).randbytes(BLOCK) for n in range(8)]
    (stored,) = Compressor(1).encode([frames(noise)])
    assert stored[0] == STORED
    assert not is_compressed(stored)
    (packed,) = Compressor(1).encode([frames([b"x" * BLOCK] * EXTENT_BLOCKS_MAX)])
    assert is_compressed(packed)
    assert len(packed) < 8 * BLOCK
