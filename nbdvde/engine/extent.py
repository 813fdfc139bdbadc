"""The plaintext of an extent: up to 256 blocks, compressed in frames so that one block is cheap to read.

    codec u8 | 0 u8 | dictionary u16 | ends u32 x frames | frames

A frame holds four blocks (the last one fewer); `ends[i]` is where frame i ends, counted from the first
frame's start. A frame whose length equals its blocks is stored as it is. Codec 0 has neither ends nor
frames, only the blocks. Where `dictionary` is not 0 it names what the frames are compressed with.
"""

import struct
from array import array
from collections.abc import Callable, Sequence
from itertools import accumulate, chain, islice

import zstandard

from nbdvde.disk import BLOCK, Buffer
from nbdvde.engine.dictionaries import Choice, Dictionaries
from nbdvde.engine.layout import EXTENT_BLOCKS_MAX, FRAME_BLOCKS
from nbdvde.errors import DamageError

STORED, ZSTD = 0, 1
_HEAD = struct.Struct("<BBH")
FRAME_BYTES = FRAME_BLOCKS * BLOCK
_KEEP_BELOW = 0.95
"""A result of 95 % of the input or more is not worth decompressing."""
WITH_DICTIONARY = 3
"""Level with a dictionary at least: level 1 hardly looks at one (8 % saved of Python sources in 4 KiB, here 16 %)."""
SMALL_BLOCKS = FRAME_BLOCKS
"""Blocks up to which an extent may be compressed with a dictionary: in longer ones it saves nothing."""
_AT_HAND = 8
"""Dictionaries that a thread keeps ready."""
_MANY = 8
"""Frames from which on one call for all is faster than a call for each."""
LEVELS = {"fastest": 1, "optimal": 3, "smallest": 19, "none": 0}


class Compressor:
    """Encodes extents at one level. Not for use by two threads at a time."""

    def __init__(self, level: int, dictionaries: Dictionaries | None = None) -> None:
        self._zstd = zstandard.ZstdCompressor(level=level, write_checksum=False) if level else None
        self._level, self._dictionaries = max(level, WITH_DICTIONARY), dictionaries or Dictionaries()
        self._with: dict[bytes, zstandard.ZstdCompressor] = {}
        """By content: a number may come again, with another one."""

    def encode(self, extents: Sequence[Sequence[Buffer]], choice: Choice | None = None) -> list[bytes]:
        """Plaintext of each of the given extents, lists of frames; small ones with the dictionary of the choice."""
        if self._zstd is None:
            return [_stored(frames) for frames in extents]
        if choice is not None:
            long = iter(self.encode([frames for frames in extents if len(frames) > 1]))
            return [self._small(frames, choice) if len(frames) == 1 else next(long) for frames in extents]
        packed = iter(self.pack([frame for frames in extents for frame in frames]))
        return [_assemble(frames, list(islice(packed, len(frames)))) for frames in extents]

    def assemble(
        self, extents: Sequence[Sequence[Buffer]], packed: Sequence[Sequence[bytes]], choice: Choice | None = None
    ) -> list[bytes]:
        """As `encode`, of frames that are packed already; what is tried with a dictionary is packed once more."""
        return [
            self._small(frames, choice) if choice is not None and len(frames) == 1 else _assemble(frames, small)
            for frames, small in zip(extents, packed, strict=True)
        ]

    def _small(self, frames: Sequence[Buffer], choice: Choice) -> bytes:
        """An extent of one frame."""
        if candidates := choice.candidates():
            [plain] = self.pack([*frames])
            packed = {number: self.compress_with(number, frames[0]) for number in candidates}
            if len(plain) < len(frames[0]) * _KEEP_BELOW:  # else it says nothing
                choice.learn(len(plain), {number: len(data) for number, data in packed.items()})
            number = min(packed, key=lambda number: len(packed[number]))
            if len(packed[number]) < len(plain):
                return _assemble(frames, [packed[number]], number)
            return _assemble(frames, [plain])
        if choice.best:
            return _assemble(frames, [self.compress_with(choice.best, frames[0])], choice.best)
        return _assemble(frames, self.pack([*frames]))

    def compress(self, frame: Buffer) -> bytes:
        """A frame, compressed without a dictionary."""
        assert self._zstd is not None, "the level is not none"
        return self._zstd.compress(frame)

    def compress_with(self, number: int, frame: Buffer) -> bytes:
        """A frame, compressed with a dictionary."""
        content = self._dictionaries.content(number)
        compressor = self._with.get(content)
        if compressor is None:
            if len(self._with) >= _AT_HAND:
                del self._with[next(iter(self._with))]
            dictionary = zstandard.ZstdCompressionDict(content)
            compressor = zstandard.ZstdCompressor(level=self._level, dict_data=dictionary, write_checksum=False)
            self._with[content] = compressor
        return compressor.compress(frame)

    def pack(self, frames: list[Buffer]) -> list[bytes]:
        """Frames, compressed without a dictionary; the level is not none.

        Many at once in one call: released for 13 µs at a time, the interpreter lock never reaches another thread.
        """
        assert self._zstd is not None, "the level is not none"
        if len(frames) < _MANY:
            return [self.compress(frame) for frame in frames]
        segments = self._zstd.multi_compress_to_buffer(frames)
        return [segments[number].tobytes() for number in range(len(frames))]


def _assemble(frames: Sequence[Buffer], packed: Sequence[Buffer], dictionary: int = 0) -> bytes:
    """One extent of its frames, each as it is or compressed, whichever pays."""
    kept = [small if len(small) < len(raw) * _KEEP_BELOW else raw for raw, small in zip(frames, packed, strict=True)]
    ends = list(accumulate(map(len, kept)))
    if ends[-1] >= sum(map(len, frames)) * _KEEP_BELOW:
        return _stored(frames)
    return b"".join((_HEAD.pack(ZSTD, 0, dictionary), struct.pack(f"<{len(ends)}I", *ends), *kept))


def _stored(frames: Sequence[Buffer]) -> bytes:
    return b"".join((_HEAD.pack(STORED, 0, 0), *frames))


_ZSTD_HEAD = struct.Struct("<IBH")
_ZSTD_MAGIC, _ONE_SEGMENT_SIZE_U16, _SIZE_BASE = 0xFD2FB528, 0x60, 256
_RAW, _REPEATED, _LAST = 0 << 1, 1 << 1, 1
"""RFC 8878, sections 3.1.1.1 and 3.1.1.2: frames and blocks of zstd."""


def _zstd_block(kind: int) -> bytes:
    return (kind | BLOCK << 3).to_bytes(3, "little")


_ZERO_BLOCK = [_zstd_block(_REPEATED | last) + b"\0" for last in (0, _LAST)]
_RAW_BLOCK = [_zstd_block(_RAW | last) for last in (0, _LAST)]


def without_blocks(plain: bytes, used: Sequence[bool]) -> bytes:
    """The plaintext of an extent that is not compressed, with zeroes instead of the blocks that are not used.

    Its frames are written down without asking the compressor, which finds nothing in the others.
    """
    view = memoryview(plain)[_HEAD.size :]
    frames = [
        _without_blocks(view[at * BLOCK : (at + FRAME_BLOCKS) * BLOCK], used[at : at + FRAME_BLOCKS])
        for at in range(0, len(used), FRAME_BLOCKS)
    ]
    ends = accumulate(sum(map(len, frame)) for frame in frames)
    return b"".join((_HEAD.pack(ZSTD, 0, 0), struct.pack(f"<{len(frames)}I", *ends), *chain.from_iterable(frames)))


def _without_blocks(frame: memoryview, used: Sequence[bool]) -> list[Buffer]:
    if all(used):
        return [frame]
    pieces: list[Buffer] = [_ZSTD_HEAD.pack(_ZSTD_MAGIC, _ONE_SEGMENT_SIZE_U16, len(frame) - _SIZE_BASE)]
    for at, is_used in enumerate(used):
        is_last = at == len(used) - 1
        pieces += (_RAW_BLOCK[is_last], frame[at * BLOCK : (at + 1) * BLOCK]) if is_used else (_ZERO_BLOCK[is_last],)
    return pieces


def _tables() -> list[tuple[Callable[[bytes, int], tuple[int, ...]], int]]:
    """For each number of blocks: what reads the ends, and where the frames begin."""
    formats = [struct.Struct(f"<{-(-blocks // FRAME_BLOCKS)}I") for blocks in range(EXTENT_BLOCKS_MAX + 1)]
    return [(table.unpack_from, _HEAD.size + table.size) for table in formats]


_TABLES = _tables()


def is_compressed(plain: bytes) -> bool:
    """Whether the extent is held in compressed frames."""
    return plain[0] == ZSTD


def dictionary_of(plain: bytes) -> int:
    """Number of the dictionary that an extent needs, 0 for none."""
    return int.from_bytes(plain[2:4], "little")


class Decoder:
    """Decodes extents; the plaintext is authentic, so what does not parse is a newer format. One per thread."""

    def __init__(self, dictionaries: Dictionaries | None = None) -> None:
        self._zstd = zstandard.ZstdDecompressor()
        self._dictionaries = dictionaries or Dictionaries()
        self._with: dict[bytes, zstandard.ZstdDecompressor] = {}

    def frame(self, plain: bytes, blocks: int, frame: int) -> bytes:
        """The blocks of one frame, joined."""
        data, length = self._stored(plain, blocks, frame)
        return data if len(data) == length else self._inflate(data, length, self._decompressor(plain))

    def many(self, wanted: Sequence[tuple[bytes, int, int]]) -> list[Buffer]:
        """Frames, each given as to `frame`: those without a dictionary in one call.

        With two threads at it a frame at a time, which takes 2 µs, they wait for the interpreter lock: 6.2 µs a block
        instead of 0.5.
        """
        found: list[Buffer] = []
        packed, lengths = list[int](), array("Q")
        for plain, blocks, frame in wanted:
            data, length = self._stored(plain, blocks, frame)
            if len(data) != length and dictionary_of(plain):
                data = self._inflate(data, length, self._decompressor(plain))
            elif len(data) != length:
                packed.append(len(found))
                lengths.append(length)
            found.append(data)
        if packed:
            frames = [found[at] for at in packed]
            try:
                inflated = self._zstd.multi_decompress_to_buffer(frames, decompressed_sizes=lengths.tobytes())
            except zstandard.ZstdError:
                raise _not_decompressed() from None
            for number, at in enumerate(packed):
                found[at] = memoryview(inflated[number])  # type: ignore[arg-type] # a buffer, unknown to its stub
        return found

    def _stored(self, plain: bytes, blocks: int, frame: int) -> tuple[bytes, int]:
        """A frame as it is stored, and the length of its blocks; it is compressed if that is another one."""
        left = blocks - frame * FRAME_BLOCKS
        length = FRAME_BYTES if left >= FRAME_BLOCKS else left * BLOCK
        if not plain:
            raise DamageError("extent", "is empty", "run nbdvde check")
        if plain[0] == ZSTD:
            unpack_ends, base = _TABLES[min(blocks, EXTENT_BLOCKS_MAX)]
            if blocks > EXTENT_BLOCKS_MAX or len(plain) < base:
                raise DamageError("extent", "is shorter than its table", "run nbdvde check")
            ends = unpack_ends(plain, _HEAD.size)
            return plain[base + ends[frame - 1] if frame else base : base + ends[frame]], length
        if plain[0] != STORED:
            raise DamageError("extent", f"has the unknown codec {plain[0]}", "use a newer nbdvde")
        start = _HEAD.size + frame * FRAME_BYTES
        return _checked(plain[start : start + length], length), length

    def frames(self, plain: bytes, blocks: int) -> list[bytes]:
        """All frames in order."""
        return [self.frame(plain, blocks, frame) for frame in range((blocks + FRAME_BLOCKS - 1) // FRAME_BLOCKS)]

    def _decompressor(self, plain: bytes) -> zstandard.ZstdDecompressor:
        if not dictionary_of(plain):
            return self._zstd
        content = self._dictionaries.content(dictionary_of(plain))
        decompressor = self._with.get(content)
        if decompressor is None:
            if len(self._with) >= _AT_HAND:
                del self._with[next(iter(self._with))]
            dictionary = zstandard.ZstdCompressionDict(content)
            decompressor = self._with[content] = zstandard.ZstdDecompressor(dict_data=dictionary)
        return decompressor

    @staticmethod
    def _inflate(frame: bytes, length: int, decompressor: zstandard.ZstdDecompressor) -> bytes:
        try:
            if zstandard.frame_content_size(frame) == length:  # or it might fill the memory
                return _checked(decompressor.decompress(frame), length)
        except zstandard.ZstdError:
            pass
        raise _not_decompressed()


def _not_decompressed() -> DamageError:
    return DamageError("extent", "a frame cannot be decompressed", "run nbdvde check")


def _checked(data: bytes, length: int) -> bytes:
    if len(data) != length:
        raise DamageError("extent", "a frame has the wrong length", "run nbdvde check")
    return data
