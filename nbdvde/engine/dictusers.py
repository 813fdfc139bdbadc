"""Which dictionaries the stored extents need: found by looking at all that are small enough to have one."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from nbdvde.engine.extent import SMALL_BLOCKS, dictionary_of
from nbdvde.engine.layout import BLOCK, Kind, TableEntry, unpack_index
from nbdvde.engine.mark import Tree, Usage, mark
from nbdvde.engine.measure import passes
from nbdvde.engine.segments import Segments

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Users:
    """How many extents name a dictionary."""

    used: int = 0
    """Those that a disk or a snapshot holds."""
    stored: int = 0
    """All that are there: a duplicate may be made of any of them."""


def count_users(
    segments: Segments, trees: Sequence[Tree], entries: Sequence[TableEntry], extent_blocks: int, progress: Progress
) -> dict[int, Users]:
    """By number of the dictionary, of a checkpoint with these maps and segments; `progress` counts segments. Blocks.

    Raises DamageError: what cannot be read may need any.
    """
    indexes = [ref for entry in entries for ref in entry.refs]
    slots = max((entry.segment.slot for entry in entries), default=0) + 1
    found: dict[int, Users] = {}
    done = 0
    for part in passes(entries, extent_blocks):
        usage = Usage({entry.segment.slot: entry.units for entry in part}, extent_blocks)
        mark(trees, indexes, segments.read_unit, slots, usage)
        for entry in part:
            used = set(np.flatnonzero(usage.of(entry.segment.slot).any(axis=1)).tolist())
            for unit, number in _named(segments, entry):
                users = found.setdefault(number, Users())
                users.stored += 1
                users.used += unit in used
            done += 1
            progress(done, len(entries))
    return found


def _named(segments: Segments, entry: TableEntry) -> Iterable[tuple[int, int]]:
    """(unit, dictionary) of the extents of a segment that have one."""
    state = segments.find(entry.segment.slot)
    index = segments.index(state)[: entry.units]
    units = small_units(index)
    data = memoryview(segments.read(state.segment.offset, entry.used)) if units else memoryview(b"")
    for unit in units:
        position, length, blocks = unpack_index(index[unit])
        plain = state.sealer.open(unit, Kind.EXTENT, data[position : position + length], blocks=blocks)
        if number := dictionary_of(plain):
            yield unit, number


def small_units(index: Sequence[int]) -> list[int]:
    """Units of the extents in an index that may have a dictionary: of one frame, and compressed."""
    entries = np.array(index, np.uint64)
    blocks, sealed = entries >> np.uint64(48), entries >> np.uint64(24) & np.uint64(0xFFFFFF)
    return np.flatnonzero((blocks > 0) & (blocks <= SMALL_BLOCKS) & (sealed < blocks * np.uint64(BLOCK))).tolist()
