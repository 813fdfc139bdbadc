"""What the groups of the log are made of, and where they come to lie in maps and indexes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nbdvde.disk import BLOCK, Buffer
from nbdvde.engine.buffer import Generation
from nbdvde.engine.layout import FRAME_BLOCKS, HEADER_BYTES, TAG_BYTES, Record, pack_entry, pack_index
from nbdvde.engine.segments import State

_EXTENT_OVERHEAD = 4 + TAG_BYTES
_ZERO_PAGE = bytes(BLOCK)


@dataclass(frozen=True, slots=True)
class Change:
    """What a transaction does to the map of a volume, zeroes first."""

    zeroes: Sequence[tuple[int, int, bool]]
    """(first block, blocks, allocated)."""
    blocks: Sequence[int]
    entries: Sequence[int]


@dataclass(frozen=True, slots=True)
class Part:
    """What one group has of a transaction."""

    blocks: Sequence[int] = ()
    zeroes: Sequence[tuple[int, int, bool]] = ()
    shared: tuple[int, int] = (0, 0)
    """Start and stop among the blocks that become references."""


def runs_of(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """(first, count) of the consecutive runs in ascending block numbers."""
    if not blocks:
        return []
    if blocks[-1] - blocks[0] == len(blocks) - 1:
        return [(blocks[0], len(blocks))]
    numbers = np.array(blocks, np.uint64)
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    starts = [0, *breaks.tolist()]
    stops = [*breaks.tolist(), len(blocks)]
    return [(blocks[start], stop - start) for start, stop in zip(starts, stops, strict=True)]


def worst_group(blocks: int, extents: int, zeroes: int, shared: int = 0) -> int:
    """Bytes that a group of so many blocks takes at most."""
    record = Record.packed_bytes(extents, zeroes, blocks, shared) + TAG_BYTES
    total = HEADER_BYTES + record + blocks * BLOCK + extents * _EXTENT_OVERHEAD
    return -(-total // BLOCK) * BLOCK


def enter(state: State, position: int, extents: Sequence[bytes], chunks: Sequence[Sequence[int]]) -> None:
    """Enter a group into its segment's index."""
    assert state.index is not None, "the open segment has its index"
    state.index.append(0)
    position += state.used
    for sealed, blocks in zip(extents, chunks, strict=True):
        state.index.append(pack_index(position, len(sealed), len(blocks)))
        state.blocks += len(blocks)
        position += len(sealed)


def entries_of(slot: int, first: int, chunks: Sequence[Sequence[int]]) -> list[int]:
    """Map entries of the blocks of a group, whose extents have the units from `first` on."""
    entries: list[int] = []
    for unit, blocks in enumerate(chunks, first):
        base = pack_entry(slot, unit, 0)
        entries.extend(range(base, base + len(blocks)))
    return entries


def frames_of(written: Generation, blocks: Sequence[int]) -> list[Buffer]:
    """What some blocks hold, in frames of four."""
    pages = [written.blocks[block] for block in blocks]
    return [written.frame(blocks[at], pages[at : at + FRAME_BLOCKS]) for at in range(0, len(pages), FRAME_BLOCKS)]


def without_zeroes(written: Generation) -> tuple[list[int], list[tuple[int, int, bool]]]:
    """Blocks to store in ascending order, and the zeroed ranges with the blocks that hold only zeroes."""
    blocks = written.blocks
    kept = sorted(blocks)
    empty = [block for block in kept if not blocks[block][0] and bytes(blocks[block]) == _ZERO_PAGE]
    ranges = [(start, stop - start, allocated) for start, stop, allocated in written.zeroes or ()]
    if empty:
        gone = set(empty)
        kept = [block for block in kept if block not in gone]
        ranges += [(start, count, False) for start, count in runs_of(empty)]
    return kept, ranges
