"""What the maps of an image use: references by segment, and for chosen segments the blocks in use, and by whom.

All trees are walked at once, level by level, so that a unit is read once however many of them share it. Beside
the references of one level (24 bytes each) memory is bounded by the segments that are looked at (`Usage`).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from nbdvde.engine.layout import LOST, LOST_SLOT, SLOT_SHIFT, UNIT_SHIFT, Kind, UnitRef
from nbdvde.engine.lbamap import LEAF_BLOCKS, parse_leaf
from nbdvde.engine.versions import Entries, Node
from nbdvde.errors import DamageError

Owners: TypeAlias = npt.NDArray[np.int32]
ReadUnit: TypeAlias = Callable[[UnitRef, int], bytes]
"""Plaintext of a metadata unit of a kind (layout.Kind); raises DamageError."""
_NODES_AT_ONCE = 2048
_LEAVES_AT_ONCE = 128
_UNITS, _BLOCKS = (1 << (SLOT_SHIFT - UNIT_SHIFT)) - 1, (1 << UNIT_SHIFT) - 1


class Tree(NamedTuple):
    """A map in the image. `owner` is any number from 1 on; trees of one owner count as one."""

    owner: int
    height: int
    root: UnitRef | None


@dataclass(frozen=True, slots=True)
class _Refs:
    """References to units of one level, with the lowest and the highest owner of the trees that lead there."""

    refs: npt.NDArray[np.uint32]
    """Rows of slot, unit, position, sealed length."""
    low: Owners
    high: Owners

    def __len__(self) -> int:
        return len(self.refs)

    def distinct(self) -> "_Refs":
        """Each unit once, in the order of slots and units."""
        if not len(self):
            return self
        keys = self.refs[:, 0].astype(np.uint64) << np.uint64(32) | self.refs[:, 1]
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
        low, high = np.minimum.reduceat(self.low[order], starts), np.maximum.reduceat(self.high[order], starts)
        return _Refs(self.refs[order[starts]], low, high)

    def parts(self, size: int) -> Iterator["_Refs"]:
        for at in range(0, len(self), size):
            yield _Refs(self.refs[at : at + size], self.low[at : at + size], self.high[at : at + size])

    def units(self) -> Iterator[UnitRef]:
        return (UnitRef(*row) for row in self.refs.tolist())


def _joined(parts: Sequence[_Refs]) -> _Refs:
    if not parts:
        return _Refs(np.zeros((0, 4), np.uint32), np.zeros(0, np.int32), np.zeros(0, np.int32))
    return _Refs(
        np.concatenate([part.refs for part in parts]),
        np.concatenate([part.low for part in parts]),
        np.concatenate([part.high for part in parts]),
    )


class Takes(Protocol):
    """What is told of every map entry of an extent."""

    def add(self, entries: Entries, low: Owners, high: Owners) -> None:
        """Take in map entries of extents, with the owners of each. Raises DamageError."""


def cell_bytes(owners: int) -> int:
    """Bytes that `Usage` takes for a block that so many owners may have."""
    return np.min_scalar_type(owners + 1).itemsize


class Usage:
    """For some log segments: which block of which unit is in use, and by whom if it is one owner alone."""

    def __init__(self, units: dict[int, int], blocks: int, owners: Collection[int] = ()) -> None:
        """`units` are the units of each slot; an extent has `blocks` blocks at most. Only `owners` are told apart."""
        self.blocks = blocks
        self._owners = np.array(sorted(owners), np.int32)
        self._several = len(self._owners) + 1
        """In place of the owner, of whom the lowest is 1; 0 is nobody."""
        sizes = np.zeros(max(units, default=0) + 2, np.int64)  # one more, which stands for all slots beyond
        sizes[list(units)] = list(units.values())
        self._looked_at = np.zeros(len(sizes), np.bool_)
        self._looked_at[list(units)] = True
        self._sizes, self._starts = sizes, np.cumsum(sizes) - sizes
        self._cells = np.zeros(int(sizes.sum()) * blocks, np.min_scalar_type(self._several))

    def add(self, entries: Entries, low: Owners, high: Owners) -> None:
        """Take in map entries of extents, with the owners of each. Raises DamageError."""
        slots = np.minimum(entries >> np.uint64(SLOT_SHIFT), np.uint64(len(self._sizes) - 1)).astype(np.intp)
        wanted = _those(self._looked_at[slots])
        slots, entries = slots[wanted], entries[wanted]
        units = (entries >> np.uint64(UNIT_SHIFT) & np.uint64(_UNITS)).astype(np.int64)
        blocks = (entries & np.uint64(_BLOCKS)).astype(np.int64)
        if (units >= self._sizes[slots]).any() or (blocks >= self.blocks).any():
            raise DamageError("map", "points at what is no block of an extent", "run nbdvde check")
        self._note((self._starts[slots] + units) * self.blocks + blocks, self._codes(low[wanted], high[wanted]))

    def _codes(self, low: Owners, high: Owners) -> npt.NDArray[np.intp]:
        if not len(self._owners):
            return np.ones(len(low), np.intp)
        return np.where(low == high, np.searchsorted(self._owners, low) + 1, self._several)

    def _note(self, cells: npt.NDArray[np.int64], codes: npt.NDArray[np.intp]) -> None:
        """Few owners meet in one call: so each at a time is faster than numpy's `at`, by a factor of five."""
        for code in np.flatnonzero(np.bincount(codes)).tolist():
            part = cells[_those(codes == code)]
            before = self._cells[part]
            self._cells[part] = np.where((before == 0) | (before == code), code, self._several)

    def __contains__(self, slot: int) -> bool:
        """Whether the segment is looked at."""
        return slot < len(self._looked_at) and bool(self._looked_at[slot])

    def of(self, slot: int) -> npt.NDArray[np.bool_]:
        """Whether a block is in use: rows are the units of the segment, columns the blocks of an extent."""
        return self._rows(slot) > 0

    def owners(self, slot: int) -> Owners:
        """As `of`: who alone uses a block, -1 where several do, or it is not told, 0 where nobody does."""
        names: Owners = np.array([0, *self._owners.tolist(), -1], np.int32)
        owners: Owners = names[self._rows(slot)]
        return owners

    def _rows(self, slot: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        start, units = int(self._starts[slot]), int(self._sizes[slot])
        rows: npt.NDArray[np.unsignedinteger[Any]] = self._cells[start * self.blocks : (start + units) * self.blocks]
        return rows.reshape(units, self.blocks)


def mark(
    trees: Iterable[Tree], indexes: Iterable[UnitRef], read: ReadUnit, slots: int, usage: "Takes | None" = None
) -> list[int]:  # fmt: skip
    """References to the units (metadata) and blocks (log) of each slot below `slots`.

    One counts as often as distinct nodes, leaves and roots name it. `indexes` are used as well, and not read.
    `usage` takes in the blocks. Blocks; raises DamageError.
    """
    counts = np.zeros(slots, np.int64)
    _count(counts, np.array([index.slot for index in indexes], np.int64))
    roots = _roots(trees)
    refs = _joined([])
    for level in range(max(roots, default=0), -1, -1):
        refs = _joined([refs, *roots.get(level, [])]).distinct()
        if level:
            refs = _joined([_children(part, read, counts).distinct() for part in refs.parts(_NODES_AT_ONCE)])
    for part in refs.parts(_LEAVES_AT_ONCE):
        _leaves(part, read, counts, usage)
    for level_roots in roots.values():
        _count(counts, _joined(level_roots).refs[:, 0])
    return counts.tolist()


def _roots(trees: Iterable[Tree]) -> dict[int, list[_Refs]]:
    """References to the roots, by their level."""
    rows: dict[int, list[tuple[int, int, int, int, int]]] = {}
    for tree in trees:
        if root := tree.root:
            row = root.slot, root.unit, root.position, root.length, tree.owner
            rows.setdefault(tree.height, []).append(row)
    roots = {}
    for level, found in rows.items():
        table = np.array(found, np.uint32)
        owners = table[:, 4].astype(np.int32)
        roots[level] = [_Refs(table[:, :4], owners, owners)]
    return roots


def _count(counts: npt.NDArray[np.int64], slots: npt.NDArray[Any]) -> None:
    """Add references; those to what was lost are none."""
    slots = slots[slots != LOST_SLOT].astype(np.int64)
    if len(slots) and int(slots.max()) >= len(counts):
        raise DamageError("map", f"points at segment slot {slots.max()}, which is not in use", "run nbdvde check")
    counts += np.bincount(slots, minlength=len(counts))


def _children(nodes: _Refs, read: ReadUnit, counts: npt.NDArray[np.int64]) -> _Refs:
    """What distinct nodes refer to."""
    tables = [np.frombuffer(Node(read(ref, Kind.NODE)).data, np.uint32).reshape(-1, 4) for ref in nodes.units()]
    refs = np.concatenate(tables)
    there = np.flatnonzero((refs[:, 3] != 0) & (refs[:, 0] != LOST_SLOT))
    _count(counts, refs[there, 0])
    children = len(tables[0])
    return _Refs(refs[there], nodes.low.repeat(children)[there], nodes.high.repeat(children)[there])


def _those(mask: npt.NDArray[np.bool_]) -> slice | npt.NDArray[np.intp]:
    """An index to what the mask has: to all of it without a copy."""
    return slice(None) if mask.all() else np.flatnonzero(mask)


def _leaves(leaves: _Refs, read: ReadUnit, counts: npt.NDArray[np.int64], usage: "Takes | None") -> None:
    entries = np.concatenate([np.frombuffer(parse_leaf(read(ref, Kind.LEAF)), np.uint64) for ref in leaves.units()])
    there = _those(entries > LOST)
    _count(counts, entries[there] >> np.uint64(SLOT_SHIFT))
    if usage is not None:
        low, high = leaves.low.repeat(LEAF_BLOCKS)[there], leaves.high.repeat(LEAF_BLOCKS)[there]
        usage.add(entries[there], low, high)
