"""The plaintext of an extent: up to 256 blocks, compressed in frames so that one block is cheap to read.

    codec u8 | 0 u8 | dictionary u16 | ends u32 x frames | frames

A frame holds four blocks (the last one fewer); `ends[i]` is where frame i ends, counted from the first
frame's start. A frame whose length equals its blocks is stored as it is. Codec 0 has neither ends nor
frames, only the blocks.
"""

import struct
from collections.abc import Callable, Sequence
from itertools import accumulate, islice

import zstandard

from nbdvde.disk import BLOCK, Buffer
from nbdvde.engine.layout import EXTENT_BLOCKS_MAX, FRAME_BLOCKS
from nbdvde.errors import DamageError

STORED, ZSTD = 0, 1
_HEAD = struct.Struct("<BBH")
FRAME_BYTES = FRAME_BLOCKS * BLOCK
_KEEP_BELOW = 0.95
"""A result of 95 % of the input or more is not worth decompressing."""
_MANY = 8
"""Frames from which on one call for all is faster than a call for each."""
LEVELS = {"fastest": 1, "optimal": 3, "smallest": 19, "none": 0}


class Compressor:
    """Encodes extents at one level. Not for use by two threads at a time."""

    def __init__(self, level: int) -> None:
        self._zstd = zstandard.ZstdCompressor(level=level, write_checksum=False) if level else None

    def encode(self, extents: Sequence[Sequence[Buffer]]) -> list[bytes]:
        """Plaintext of each of the given extents, lists of frames."""
        if self._zstd is None:
            return [_stored(frames) for frames in extents]
        packed = iter(self._compress([frame for frames in extents for frame in frames]))
        return [_assemble(frames, list(islice(packed, len(frames)))) for frames in extents]

    def _compress(self, frames: list[Buffer]) -> list[bytes]:
        """Many at once in one call: released for 13 µs at a time, the interpreter lock never reaches another thread."""
        assert self._zstd is not None, "the level is not none"
        if len(frames) < _MANY:
            return [self._zstd.compress(frame) for frame in frames]
        segments = self._zstd.multi_compress_to_buffer(frames)
        return [segments[number].tobytes() for number in range(len(frames))]


def _assemble(frames: Sequence[Buffer], packed: Sequence[Buffer]) -> bytes:
    """One extent of its frames, each as it is or compressed, whichever pays."""
    kept = [small if len(small) < len(raw) * _KEEP_BELOW else raw for raw, small in zip(frames, packed, strict=True)]
    ends = list(accumulate(map(len, kept)))
    if ends[-1] >= sum(map(len, frames)) * _KEEP_BELOW:
        return _stored(frames)
    return b"".join((_HEAD.pack(ZSTD, 0, 0), struct.pack(f"<{len(ends)}I", *ends), *kept))


def _stored(frames: Sequence[Buffer]) -> bytes:
    return b"".join((_HEAD.pack(STORED, 0, 0), *frames))


def _tables() -> list[tuple[Callable[[bytes, int], tuple[int, ...]], int]]:
    """For each number of blocks: what reads the ends, and where the frames begin."""
    formats = [struct.Struct(f"<{-(-blocks // FRAME_BLOCKS)}I") for blocks in range(EXTENT_BLOCKS_MAX + 1)]
    return [(table.unpack_from, _HEAD.size + table.size) for table in formats]


_TABLES = _tables()


def is_compressed(plain: bytes) -> bool:
    """Whether the extent is held in compressed frames."""
    return plain[0] == ZSTD


class Decoder:
    """Decodes extents; the plaintext is authentic, so what does not parse is a newer format. One per thread."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor()

    def frame(self, plain: bytes, blocks: int, frame: int) -> bytes:
        """The blocks of one frame, joined."""
        left = blocks - frame * FRAME_BLOCKS
        length = FRAME_BYTES if left >= FRAME_BLOCKS else left * BLOCK
        if not plain:
            raise DamageError("extent", "is empty", "run nbdvde check")
        if plain[0] == ZSTD:
            unpack_ends, base = _TABLES[min(blocks, EXTENT_BLOCKS_MAX)]
            if blocks > EXTENT_BLOCKS_MAX or len(plain) < base:
                raise DamageError("extent", "is shorter than its table", "run nbdvde check")
            ends = unpack_ends(plain, _HEAD.size)
            return self._inflate(plain[base + ends[frame - 1] if frame else base : base + ends[frame]], length)
        if plain[0] != STORED:
            raise DamageError("extent", f"has the unknown codec {plain[0]}", "use a newer nbdvde")
        start = _HEAD.size + frame * FRAME_BYTES
        return _checked(plain[start : start + length], length)

    def frames(self, plain: bytes, blocks: int) -> list[bytes]:
        """All frames in order."""
        return [self.frame(plain, blocks, frame) for frame in range((blocks + FRAME_BLOCKS - 1) // FRAME_BLOCKS)]

    def _inflate(self, frame: bytes, length: int) -> bytes:
        if len(frame) == length:
            return frame
        try:
            if zstandard.frame_content_size(frame) == length:  # or it might fill the memory
                return _checked(self._zstd.decompress(frame), length)
        except zstandard.ZstdError:
            pass
        raise DamageError("extent", "a frame cannot be decompressed", "run nbdvde check")


def _checked(data: bytes, length: int) -> bytes:
    if len(data) != length:
        raise DamageError("extent", "a frame has the wrong length", "run nbdvde check")
    return data
