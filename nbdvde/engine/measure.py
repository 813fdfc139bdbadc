"""Where the bytes of an image went: what `df` tells, from the mark."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from nbdvde.engine.catalogue import SEPARATOR
from nbdvde.engine.layout import (
    BLOCK,
    DATA_START,
    KIND_META,
    Superblock,
    TableEntry,
    VolumeEntry,
    reserve_of,
)
from nbdvde.engine.mark import Tree, Usage, cell_bytes, mark
from nbdvde.engine.report import DiskUsage, SpaceReport
from nbdvde.engine.segments import Segments

_CELLS_BYTES = 256 << 20
"""What one pass over the maps may take: 1 TiB of data takes one, in full extents and with up to 254 volumes."""


@dataclass(slots=True)
class _Sums:
    """What the passes add up."""

    blocks: int = 0
    """Blocks in use, each once."""
    compressed: int = 0
    """Their part of the sealed extents."""
    garbage: int = 0
    exclusive: dict[int, int] = field(default_factory=dict)
    """Blocks that only one volume uses, by its number."""


def measure(
    segments: Segments, superblock: Superblock, volumes: Sequence[VolumeEntry], entries: Sequence[TableEntry],
    written: int, file_bytes: int,
) -> SpaceReport:  # fmt: skip
    """The space report of a checkpoint with these volumes and segments; blocks. Raises DamageError."""
    trees = [Tree(volume.volume, volume.height, volume.root) for volume in volumes]
    sums = _Sums()
    slots = max((entry.segment.slot for entry in entries), default=0) + 1
    indexes = [ref for entry in entries for ref in entry.refs]
    owners = [volume.volume for volume in volumes]
    for part in passes(entries, superblock.extent_bytes // BLOCK, len(owners)):
        usage = Usage({entry.segment.slot: entry.units for entry in part}, superblock.extent_bytes // BLOCK, owners)
        counts = mark(trees, indexes, segments.read_unit, slots, usage)
        for entry in part:
            _add(sums, segments, entry, usage)
    for entry in entries:
        if entry.kind == KIND_META:
            sums.garbage += entry.used * max(0, entry.units - counts[entry.segment.slot]) // max(1, entry.units)
    in_use = DATA_START + segments.kept_bytes + superblock.root.length + sum(entry.segment.length for entry in entries)
    logical = sum(volume.mapped for volume in volumes if not volume.region) * BLOCK
    own = sum(sums.exclusive.get(volume.volume, 0) for volume in volumes if volume.region)
    unique = (sums.blocks - own) * BLOCK
    return SpaceReport(
        superblock.capacity or None, file_bytes, logical, written, unique, max(0, logical - unique),
        sums.compressed, sums.garbage, reserve_of(superblock.capacity),
        in_use - sums.compressed - sums.garbage, round(sums.compressed / (superblock.capacity or in_use), 4),
        [_disk(volume, volumes, sums) for volume in volumes],
    )  # fmt: skip


def passes(entries: Sequence[TableEntry], blocks: int, owners: int = 0) -> Iterator[list[TableEntry]]:
    """Segments with extents, as many at a time as fit into the memory when so many owners are told apart."""
    part: list[TableEntry] = []
    cells, most = 0, _CELLS_BYTES // cell_bytes(owners)
    for entry in entries:
        if entry.kind == KIND_META:
            continue
        if part and cells + entry.units * blocks > most:
            yield part
            part, cells = [], 0
        part.append(entry)
        cells += entry.units * blocks
    yield part


def _add(sums: _Sums, segments: Segments, entry: TableEntry, usage: Usage) -> None:
    index = np.array(segments.index(segments.find(entry.segment.slot))[: entry.units], np.uint64)
    sealed, held = (index >> np.uint64(24) & np.uint64(0xFFFFFF)).astype(np.int64), (index >> np.uint64(48)).astype(int)
    used = usage.of(entry.segment.slot).sum(axis=1)
    compressed = int((sealed * np.minimum(used, held) // np.maximum(held, 1)).sum())
    sums.blocks += int(used.sum())
    sums.compressed += compressed
    sums.garbage += int(sealed.sum()) - compressed
    owners = usage.owners(entry.segment.slot)
    for owner, blocks in zip(*np.unique(owners[owners > 0], return_counts=True), strict=True):
        sums.exclusive[int(owner)] = sums.exclusive.get(int(owner), 0) + int(blocks)


def _disk(volume: VolumeEntry, volumes: Sequence[VolumeEntry], sums: _Sums) -> DiskUsage:
    parent = next((other.name + SEPARATOR for other in volumes if other.volume == volume.parent), "")
    parent = "region " if volume.region else parent
    logical, exclusive = volume.mapped * BLOCK, sums.exclusive.get(volume.volume, 0) * BLOCK
    return DiskUsage(parent + volume.name, volume.size, logical, exclusive, logical - exclusive)
