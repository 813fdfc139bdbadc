"""What the cleaner writes: the extents of a segment that are in use, without the blocks that are not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nbdvde.disk import BLOCK
from nbdvde.engine.dedup import PRINT_BYTES, blocks_of
from nbdvde.engine.extent import Compressor, Decoder, is_compressed, without_blocks
from nbdvde.engine.layout import FRAME_BLOCKS, unpack_index
from nbdvde.errors import DamageError

_ZEROES = bytes(BLOCK)
Used = npt.NDArray[np.bool_]
"""Rows for the units of a segment, columns for the blocks of an extent."""


@dataclass(frozen=True, slots=True)
class Survivor:
    """An extent that is in use: its place in the old segment, and which of its blocks are used."""

    unit: int
    position: int
    length: int
    blocks: int
    used: Used


@dataclass(frozen=True, slots=True)
class Kept:
    """An extent as it goes into the new segment, with the number of blocks in use."""

    unit: int
    blocks: int
    used: int
    plain: bytes


def survivors(index: Sequence[int], used: Used) -> Iterator[Survivor]:
    """The extents in use of a segment. Raises DamageError for blocks in use that no extent has."""
    for unit in np.flatnonzero(used.any(axis=1)).tolist():
        position, length, blocks = unpack_index(index[unit])
        if used[unit, blocks:].any():
            raise DamageError("map", f"points past the end of unit {unit}", "run nbdvde check")
        yield Survivor(unit, position, length, blocks, used[unit, :blocks])


def kept_prints(prints: bytes, index: Sequence[int], used: Used) -> bytes:
    """Fingerprints of the extents in use, zeroes for blocks that are not: nothing may become a duplicate of those."""
    table = np.frombuffer(prints, np.uint8).reshape(-1, PRINT_BYTES)
    units, within = blocks_of(np.array(index, np.uint64))
    units, within = units[: len(table)], within[: len(table)]
    kept: npt.NDArray[np.uint8] = np.where(used[units, within][:, None], table[: len(units)], np.uint8(0))
    in_use: Used = np.asarray(used.any(axis=1))
    return kept[in_use[units]].tobytes()


def without_dead(extents: Sequence[tuple[bytes, Survivor]], decoder: Decoder, compressor: Compressor) -> list[bytes]:
    """Plaintexts of extents with zeroes for the blocks not in use; as they were where that is no shorter."""
    partly = [(plain, extent) for plain, extent in extents if is_compressed(plain) and not extent.used.all()]
    frames = [_blanked(decoder.frames(plain, extent.blocks), extent.used) for plain, extent in partly]
    packed = iter(compressor.encode(frames))
    return [min(plain, _replacement(plain, extent, packed), key=len) for plain, extent in extents]


def _replacement(plain: bytes, extent: Survivor, packed: Iterator[bytes]) -> bytes:
    if extent.used.all():
        return plain
    return next(packed) if is_compressed(plain) else without_blocks(plain, extent.used.tolist())


def _blanked(frames: Sequence[bytes], used: Used) -> list[bytes]:
    return [_blanked_frame(frame, used[at * FRAME_BLOCKS :].tolist()) for at, frame in enumerate(frames)]


def _blanked_frame(frame: bytes, used: Sequence[bool]) -> bytes:
    blocks = range(len(frame) // BLOCK)
    return b"".join(frame[at * BLOCK : (at + 1) * BLOCK] if used[at] else _ZEROES for at in blocks)
