"""What the cleaner writes: the extents of a segment that are in use, without the blocks that are not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nbdvde.disk import BLOCK
from nbdvde.engine.extent import Compressor, Decoder
from nbdvde.engine.layout import FRAME_BLOCKS, unpack_index
from nbdvde.errors import DamageError

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


def without_dead(plain: bytes, blocks: int, used: Used, decoder: Decoder, compressor: Compressor) -> bytes:
    """The plaintext of an extent with zeroes for the blocks not in use; as it was when that is no shorter."""
    if used.all():
        return plain
    frames = decoder.frames(plain, blocks)
    kept = [_blanked(frame, used[at * FRAME_BLOCKS :]) for at, frame in enumerate(frames)]
    [packed] = compressor.encode([kept])
    if len(packed) >= len(plain) or decoder.frames(packed, blocks) != kept:
        return plain
    return packed


def _blanked(frame: bytes, used: Used) -> bytes:
    blocks = range(len(frame) // BLOCK)
    return b"".join(frame[at * BLOCK : (at + 1) * BLOCK] if used[at] else bytes(BLOCK) for at in blocks)
