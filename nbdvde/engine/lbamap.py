"""Logical block to sealed extent: a radix tree of immutable leaves, held in memory as far as it is used.

A leaf maps 512 blocks (2 MiB) to u64 entries: 0 a hole, 1 an allocated zero, 2 lost, else
`slot << 40 | unit << 16 | block in the extent`. A node holds 256 references to units one level below.
In the image both are sealed units that are never rewritten; a checkpoint writes new copies of what changed,
up to the root. Pure: loading is the caller's (`leaf_ref`, `install_leaf`, `install_node`).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nbdvde.engine.layout import ALLOCATED_ZERO, LOST, UnitRef
from nbdvde.engine.versions import FANOUT, Entries, Leaf, Version
from nbdvde.errors import DamageError

LEAF_BLOCKS = 512
LEAF_SHIFT = 9
_EMPTY_LEAF = bytes(LEAF_BLOCKS * 8)


def height_for(blocks: int) -> int:
    """Levels of nodes above the leaves that a disk of so many blocks needs."""
    leaves, height = max(1, -(-blocks // LEAF_BLOCKS)), 0
    while leaves > 1:
        leaves, height = -(-leaves // FANOUT), height + 1
    return height


_HOLES = array("Q", _EMPTY_LEAF)
_ZEROES = array("Q", [ALLOCATED_ZERO]) * LEAF_BLOCKS
_ZEROES_BYTES = _ZEROES.tobytes()
LOST_LEAF = LOST.to_bytes(8, "little") * LEAF_BLOCKS
"""What stands for a damaged leaf: reading from it is an error until it is written over."""


def uniform_leaf(value: int) -> Leaf:
    """The leaf of holes, or of allocated zeroes: one object for all, copied when it is written to."""
    return _ZEROES if value == ALLOCATED_ZERO else _HOLES


def parse_leaf(data: bytes) -> Leaf:
    """A leaf from its unit's plaintext."""
    if len(data) != LEAF_BLOCKS * 8:
        raise DamageError("map leaf", f"has {len(data)} bytes", "run nbdvde check")
    if data == _ZEROES_BYTES:
        return _ZEROES
    return _HOLES if data == _EMPTY_LEAF else array("Q", data)


_NONE: Entries = np.zeros(0, np.uint64)


class LbaMap:
    """The map of one volume: what changed since it had the version `base`, and what that holds.

    `leaves` holds leaves in memory, by number, oldest first; all `dirty` ones are there.
    """

    def __init__(
        self, blocks: int, root: UnitRef | None = None, mapped: int = 0, *, height: int = 0, protected: int = 0,
        base: Version | None = None,
    ) -> None:  # fmt: skip
        self.blocks = blocks
        self.height = max(height, height_for(blocks))
        self.base = base or Version(self.height, root)
        self.mapped = mapped
        """Blocks with an extent behind them; more than there are once some were lost."""
        self.leaves: dict[int, Leaf] = {}
        self.dirty: dict[int, Leaf] = {}
        """Leaves that are of this map alone, changed in place."""
        self.protected = protected
        """What segments of a lower sequence hold may be in use by another volume, too: it is not counted down."""

    # Versions

    def seal(self) -> int:
        """Have what changed in a version; answers how many leaves and nodes more, about, are to be written for it."""
        if not self.dirty and self.height == self.base.height:
            return 0
        changed = len(self.dirty)
        self.base = Version(self.height, below=self.base, leaves=self.dirty, protected=self.protected)
        self.dirty = {}
        return changed + self.height

    def fork(self, sequence: int) -> LbaMap:
        """Another map of the same contents; both may change from now on. Segments from `sequence` on are not used yet.

        O(1), whatever the size, and whatever is unwritten.
        """
        self.seal()
        self.base.shared = self.base.below is not None
        self.protected = sequence
        return LbaMap(self.blocks, None, self.mapped, height=self.height, protected=sequence, base=self.base)

    @property
    def root(self) -> UnitRef | None:
        """Of the tree in the image."""
        return self.base.tree.root

    @property
    def changed(self) -> int:
        """Leaves that no checkpoint has written yet; those that several versions have count several times."""
        return len(self.dirty) + sum(len(version.leaves) for version in self.base.chain())

    def unwritten(self) -> set[int]:
        """Numbers of the leaves that no checkpoint has written yet."""
        return set(self.dirty).union(*(version.leaves for version in self.base.chain()))

    def in_memory(self) -> set[int]:
        """Numbers of the leaves that `held` gives."""
        return self.unwritten().union(self.leaves)

    def held(self, number: int) -> Leaf | None:
        """A leaf that need not be loaded; it is among `leaves` then."""
        leaf = self.leaves.get(number)
        if leaf is None:
            leaf = next((v.leaves[number] for v in self.base.chain() if number in v.leaves), None)
            if leaf is not None:
                self.leaves[number] = leaf
        return leaf

    def forget(self) -> None:
        """Have nothing in memory that the image has as well."""
        self.leaves = dict(self.dirty)
        if self.base.below is None:
            self.base.nodes = {}

    def resize(self, blocks: int) -> None:
        """Map so many blocks; what lies beyond holds nothing."""
        self.blocks = blocks
        self.height = max(self.height, height_for(blocks))

    def lookup(self, block: int) -> int | None:
        """Entry of a block, or None when its leaf is not in memory."""
        leaf = self.leaves.get(block >> LEAF_SHIFT)
        return None if leaf is None else leaf[block & (LEAF_BLOCKS - 1)]

    def leaf_ref(self, number: int) -> UnitRef | None:
        """Where the image keeps a leaf that is not held, None when it is all holes. Raises Missing."""
        return self.base.tree.find(0, number)

    def install_leaf(self, number: int, leaf: Leaf) -> Leaf:
        """Hand in a loaded leaf; one that came in the meantime stays."""
        return self.leaves.setdefault(number, leaf)

    def bound(self, limit: int) -> None:
        """With more than `limit` leaves at hand that did not change, forget the oldest down to seven eighths."""
        if len(self.leaves) - len(self.dirty) <= limit:
            return
        clean = [number for number in self.leaves if number not in self.dirty]
        for number in clean[: len(clean) - limit * 7 // 8]:
            del self.leaves[number]

    def touch(self, number: int) -> None:
        """Have a leaf in memory written by the next checkpoint, though nothing of it changes."""
        self._writable(number)

    def _writable(self, number: int) -> Leaf:
        leaf = self.dirty.get(number)
        if leaf is None or leaf is _HOLES or leaf is _ZEROES:
            leaf = self.dirty[number] = self.leaves[number] = self.leaves[number][:]
        return leaf

    def assign(self, blocks: Sequence[int], entries: Sequence[int]) -> list[int]:
        """Map each block to the entry of an extent; answers the entries replaced. Their leaves are in memory.

        The blocks are distinct and ascending; a run inside a leaf is copied as one.
        """
        replaced: list[int] = []
        at = 0
        while at < len(blocks):
            first = blocks[at]
            stop = bisect_left(blocks, (first >> LEAF_SHIFT) + 1 << LEAF_SHIFT, at)
            leaf = self._writable(first >> LEAF_SHIFT)
            if blocks[stop - 1] - first == stop - at - 1:
                low = first & (LEAF_BLOCKS - 1)
                replaced += leaf[low : low + stop - at]
                leaf[low : low + stop - at] = array("Q", entries[at:stop])
            else:
                for block, entry in zip(blocks[at:stop], entries[at:stop], strict=True):
                    replaced.append(leaf[block & (LEAF_BLOCKS - 1)])
                    leaf[block & (LEAF_BLOCKS - 1)] = entry
            at = stop
        self._map(len(entries) - sum(entry > LOST for entry in replaced))
        return replaced

    def _map(self, blocks: int) -> None:
        self.mapped += blocks
        if self.mapped < 0:
            raise DamageError("catalogue", "counts fewer mapped blocks than there are", "run nbdvde check")

    def fill(self, start: int, stop: int, value: int) -> Entries:
        """Zero every block of [start, stop) inside one leaf in memory; answers the entries of extents replaced."""
        number, low = start >> LEAF_SHIFT, start & (LEAF_BLOCKS - 1)
        leaf = self.leaves[number]
        if leaf is uniform_leaf(value):
            return _NONE
        whole = stop - start == LEAF_BLOCKS
        if whole and (leaf is _HOLES or leaf is _ZEROES):
            self._replace(number, uniform_leaf(value))
            return _NONE
        replaced = np.frombuffer(leaf, np.uint64)[low : low + stop - start].copy()
        if not (replaced != value).any():
            return _NONE
        if whole:
            self._replace(number, uniform_leaf(value))
        else:
            np.frombuffer(self._writable(number), np.uint64)[low : low + stop - start] = value
        replaced = replaced[replaced > LOST]
        self._map(-len(replaced))
        return replaced

    def lose(self, number: int, blocks: npt.NDArray[np.bool_]) -> None:
        """Have these blocks of a leaf in memory read as errors. `mapped` stays as it is."""
        np.frombuffer(self._writable(number), np.uint64)[blocks] = LOST

    def _replace(self, number: int, leaf: Leaf) -> None:
        self.leaves[number] = self.dirty[number] = leaf

    def stored_leaves(self, first: int, last: int, limit: int) -> list[int]:
        """Numbers of the first leaves in [first, last] that the image holds, `limit` at most.

        Raises Missing for a node that has to be loaded first. Cost follows what is there, not the range.
        """
        tree, found = self.base.tree, list[int]()
        tree.collect(tree.height, 0, tree.root, first, last, limit, found)
        return found

    def differing_leaves(self, other: LbaMap, first: int, last: int, limit: int) -> list[int]:
        """Numbers of the first leaves in [first, last] that two maps hold in different units, `limit` at most.

        Changes that only the memory has are not seen. Raises Missing, of either map. What they share costs nothing.
        """
        one, two, found = self.base.tree, other.base.tree, list[int]()
        if (one.height, one.root) != (two.height, two.root):
            one.compare(two, max(one.height, two.height), 0, range(first, last + 1), limit, found)
        return found


def is_hole(leaf: Leaf) -> bool:
    """Whether no block of the leaf is mapped."""
    return leaf.tobytes() == _EMPTY_LEAF
