"""The plaintext of an extent: up to 256 blocks, compressed in frames so that one block is cheap to read.

    codec u8 | 0 u8 | dictionary u16 | ends u32 x frames | frames

A frame holds four blocks (the last one fewer); `ends[i]` is where frame i ends, counted from the first
frame's start. A frame whose length equals its blocks is stored as it is. Codec 0 has neither ends nor
frames, only the blocks.
"""

import struct
from collections.abc import Sequence

import zstandard

from nbdvde.disk import BLOCK, Buffer
from nbdvde.engine.layout import FRAME_BLOCKS
from nbdvde.errors import DamageError

STORED, ZSTD = 0, 1
_HEAD = struct.Struct("<BBH")
FRAME_BYTES = FRAME_BLOCKS * BLOCK
_KEEP_BELOW = 0.95
"""A result of 95 % of the input or more is not worth decompressing (REQUIREMENTS.md, B4)."""
LEVELS = {"fastest": 1, "optimal": 3, "smallest": 19, "none": 0}


class Compressor:
    """Encodes extents at one level. Not for use by two threads at a time."""

    def __init__(self, level: int) -> None:
        self._zstd = zstandard.ZstdCompressor(level=level, write_checksum=False) if level else None

    def encode(self, pages: Sequence[Buffer]) -> bytes:
        """Plaintext of an extent of the given 4096-byte blocks."""
        data = b"".join(pages)
        if self._zstd is None:
            return _stored(data)
        frames, ends, end = [], [], 0
        for start in range(0, len(data), FRAME_BYTES):
            raw = data[start : start + FRAME_BYTES]
            packed = self._zstd.compress(raw)
            frame = packed if len(packed) < len(raw) * _KEEP_BELOW else raw
            end += len(frame)
            frames.append(frame)
            ends.append(end)
        if end >= len(data) * _KEEP_BELOW:
            return _stored(data)
        return b"".join((_HEAD.pack(ZSTD, 0, 0), struct.pack(f"<{len(ends)}I", *ends), *frames))


def _stored(data: bytes) -> bytes:
    return _HEAD.pack(STORED, 0, 0) + data


_ENDS = {frames: struct.Struct(f"<{frames}I") for frames in range(1, 65)}


def is_compressed(plain: bytes) -> bool:
    """Whether the extent is held in compressed frames."""
    return plain[0] == ZSTD


class Decoder:
    """Decodes extents; the plaintext is authentic, so what does not parse is a newer format. One per thread."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor()

    def frame(self, plain: bytes, blocks: int, frame: int) -> bytes:
        """The blocks of one frame, joined."""
        first = frame * FRAME_BLOCKS
        length = min(FRAME_BLOCKS, blocks - first) * BLOCK
        codec = plain[0]
        if codec == STORED:
            start = _HEAD.size + first * BLOCK
            return plain[start : start + length]
        if codec != ZSTD:
            raise DamageError("extent", f"has the unknown codec {codec}", "use a newer nbdvde")
        table = _ENDS[(blocks + FRAME_BLOCKS - 1) // FRAME_BLOCKS]
        ends = table.unpack_from(plain, _HEAD.size)
        base = _HEAD.size + table.size
        return self._inflate(plain[base + (ends[frame - 1] if frame else 0) : base + ends[frame]], length)

    def frames(self, plain: bytes, blocks: int) -> list[bytes]:
        """All frames in order."""
        return [self.frame(plain, blocks, frame) for frame in range((blocks + FRAME_BLOCKS - 1) // FRAME_BLOCKS)]

    def _inflate(self, frame: bytes, length: int) -> bytes:
        if len(frame) == length:
            return frame
        data = self._zstd.decompress(frame)
        if len(data) != length:
            raise DamageError("extent", "a frame has the wrong length", "run nbdvde check")
        return data
