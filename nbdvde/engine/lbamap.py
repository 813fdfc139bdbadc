"""Logical block to sealed extent: a radix tree of immutable leaves, held in memory as far as it is used.

A leaf maps 512 blocks (2 MiB) to u64 entries: 0 a hole, 1 an allocated zero, 2 lost, else
`slot << 40 | unit << 16 | block in the extent`. A node holds 256 references to units one level below.
In the image both are sealed units that are never rewritten; a checkpoint writes new copies of what changed,
up to the root. Pure: loading is the caller's (`leaf_ref`, `install_leaf`, `install_node`).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from nbdvde.engine.layout import ALLOCATED_ZERO, LOST, LOST_SLOT, NO_REF, UnitRef
from nbdvde.errors import DamageError

LEAF_BLOCKS = 512
LEAF_SHIFT = 9
FANOUT = 256
_FANOUT_SHIFT = 8
_EMPTY_LEAF = bytes(LEAF_BLOCKS * 8)
if TYPE_CHECKING:
    Leaf: TypeAlias = array[int]
else:
    Leaf = array
"""512 entries of typecode 'Q'."""
Entries = npt.NDArray[np.uint64]


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
LOST_NODE = UnitRef(LOST_SLOT, 0, 0, 1).pack() * FANOUT
"""What stands for a damaged leaf or node: reading below it is an error until it is written over."""
UNWRITTEN = UnitRef(LOST_SLOT, 1, 0, 1)
"""Reference to a node that no checkpoint has written yet."""


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


class Node:
    """256 references as one bytearray."""

    __slots__ = ("data",)

    def __init__(self, data: bytes | None = None) -> None:
        if data is not None and len(data) != FANOUT * UnitRef.SIZE:
            raise DamageError("map node", f"has {len(data)} bytes", "run nbdvde check")
        self.data = bytearray(data if data is not None else FANOUT * NO_REF)

    def get(self, index: int) -> UnitRef | None:
        return UnitRef.unpack(self.data, index * UnitRef.SIZE)

    def set(self, index: int, ref: UnitRef | None) -> None:
        self.data[index * UnitRef.SIZE : (index + 1) * UnitRef.SIZE] = ref.pack() if ref else NO_REF

    def is_empty(self) -> bool:
        return not any(self.data)


class Missing(Exception):
    """A node has to be loaded before the answer is known."""

    def __init__(self, lbamap: LbaMap, level: int, index: int, ref: UnitRef) -> None:
        self.map, self.level, self.index, self.ref = lbamap, level, index, ref


class LbaMap:
    """The map of one volume.

    `leaves` holds the leaves in memory, by number, oldest first; dirty ones stay until a checkpoint wrote
    them. Changing a frozen leaf (one that a checkpoint is writing) replaces it by a copy.
    """

    def __init__(
        self, blocks: int, root: UnitRef | None = None, mapped: int = 0, *, height: int = 0, protected: int = 0
    ) -> None:
        self.blocks = blocks
        self.height = max(height, height_for(blocks))
        self.root = root
        self.mapped = mapped
        """Blocks with an extent behind them; more than there are once some were lost."""
        self.leaves: dict[int, Leaf] = {}
        self.dirty: set[int] = set()
        self.frozen: set[int] = set()
        self.shared: set[int] = set()
        """Leaves in memory that are the same objects in a fork: a change replaces them by a copy."""
        self.protected = protected
        """What segments of a lower sequence hold may be in use by another volume, too: it is not counted down."""
        self._nodes: dict[tuple[int, int], Node] = {}
        self.pending = False
        """Whether a checkpoint is writing this map, and will say so by `thaw` or `unfreeze`."""
        self._forks: list[LbaMap] = []
        """Maps that were forked off while a checkpoint was writing this one."""

    # Copies

    def fork(self, sequence: int) -> LbaMap:
        """Another map of the same contents; both may change from now on. Segments from `sequence` on are not used yet.

        O(changed leaves + nodes in memory), whatever the size.
        """
        other = LbaMap(self.blocks, self.root, self.mapped, height=self.height, protected=sequence)
        self.protected = sequence
        unwritten = self.dirty | self.frozen
        other.leaves = {number: self.leaves[number] for number in unwritten}
        other.dirty, other.frozen = set(self.dirty), set(self.frozen)
        other.shared = unwritten
        self.shared |= unwritten
        other._nodes = dict(self._nodes)
        if self.pending:
            other.pending = True
            self._forks.append(other)
        return other

    def forget(self) -> None:
        """Have nothing in memory that the image has as well."""
        self.bound(0)
        if not self.dirty and not self.frozen:
            self._nodes.clear()

    def resize(self, blocks: int) -> None:
        """Map so many blocks; what lies beyond holds nothing. No checkpoint is being written, and leaf 0 is dirty.

        A taller tree begins with a node in memory only, above the root: for the sake of leaf 0 it will be written.
        """
        assert not self.pending, "no checkpoint is being written"
        self.blocks = blocks
        while self.height < height_for(blocks):
            self.height += 1
            if self.root is not None:
                node = Node()
                node.set(0, self.root)
                self._nodes[self.height, 0] = node
                self.root = UNWRITTEN

    def lookup(self, block: int) -> int | None:
        """Entry of a block, or None when its leaf is not in memory."""
        leaf = self.leaves.get(block >> LEAF_SHIFT)
        return None if leaf is None else leaf[block & (LEAF_BLOCKS - 1)]

    def leaf_ref(self, number: int) -> UnitRef | None:
        """Where the image keeps a leaf, None when it is all holes. Raises Missing for a node on the way."""
        return self._find(0, number)

    def _find(self, level: int, index: int) -> UnitRef | None:
        """Where the image keeps a node, or at level 0 a leaf."""
        ref = self.root
        for above in range(self.height, level, -1):
            if ref is None:
                return None
            shift = _FANOUT_SHIFT * (above - level)
            ref = self._node(above, index >> shift, ref).get(index >> (shift - _FANOUT_SHIFT) & (FANOUT - 1))
        return ref

    def _node(self, level: int, index: int, ref: UnitRef) -> Node:
        node = self._nodes.get((level, index))
        if node is None:
            raise Missing(self, level, index, ref)
        return node

    def node_copy(self, level: int, index: int) -> tuple[Node, UnitRef | None]:
        """A copy of a node, and where the image keeps the original. Raises Missing."""
        ref = self._find(level, index)
        return (Node(), None) if ref is None else (Node(bytes(self._node(level, index, ref).data)), ref)

    def install_node(self, level: int, index: int, data: bytes) -> None:
        """Hand in a node that `Missing` asked for."""
        self._nodes.setdefault((level, index), Node(data))

    def install_leaf(self, number: int, leaf: Leaf) -> Leaf:
        """Hand in a loaded leaf; one that came in the meantime stays."""
        return self.leaves.setdefault(number, leaf)

    def bound(self, limit: int) -> None:
        """With more than `limit` clean leaves in memory, forget the oldest of them down to seven eighths."""
        if len(self.leaves) - len(self.dirty) - len(self.frozen) <= limit:
            return
        clean = [n for n in self.leaves if n not in self.dirty and n not in self.frozen]
        for number in clean[: len(clean) - limit * 7 // 8]:
            del self.leaves[number]
            self.shared.discard(number)

    def stored(self) -> tuple[int, UnitRef | None]:
        """Height and root of the tree that the image has: less tall than this map while a new top is unwritten."""
        height, root = self.height, self.root
        while root == UNWRITTEN:
            root = self._nodes[height, 0].get(0)
            height -= 1
        return height, root

    def touch(self, number: int) -> None:
        """Have a leaf in memory written by the next checkpoint, though nothing of it changes."""
        self._writable(number)

    def _writable(self, number: int) -> Leaf:
        leaf = self.leaves[number]
        if number in self.frozen or number in self.shared or leaf is _HOLES or leaf is _ZEROES:
            self.frozen.discard(number)
            self.shared.discard(number)
            leaf = self.leaves[number] = leaf[:]
        self.dirty.add(number)
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
        self.leaves[number] = leaf
        self.frozen.discard(number)
        self.shared.discard(number)
        self.dirty.add(number)

    def stored_leaves(self, first: int, last: int, limit: int) -> list[int]:
        """Numbers of the first leaves in [first, last] that the image holds, `limit` at most.

        Raises Missing for a node that has to be loaded first. Cost follows what is there, not the range.
        """
        found: list[int] = []
        self._collect(self.height, 0, self.root, first, last, limit, found)
        return found

    def _collect(
        self, level: int, index: int, ref: UnitRef | None, first: int, last: int, limit: int, found: list[int]
    ) -> None:  # fmt: skip
        if ref is None or len(found) >= limit:
            return
        if level == 0:
            if first <= index <= last:  # not so for the only leaf of a map without nodes, perhaps
                found.append(index)
            return
        node, shift = self._node(level, index, ref), _FANOUT_SHIFT * (level - 1)
        low, high = max(index * FANOUT, first >> shift), min(index * FANOUT + FANOUT - 1, last >> shift)
        for child in range(low, high + 1):
            self._collect(level - 1, child, node.get(child - index * FANOUT), first, last, limit, found)

    def differing_leaves(self, other: LbaMap, first: int, last: int, limit: int) -> list[int]:
        """Numbers of the first leaves in [first, last] that two maps hold in different units, `limit` at most.

        Changes that only the memory has are not seen. Raises Missing, of either map. What they share costs nothing.
        """
        found: list[int] = []
        if (self.height, self.root) != (other.height, other.root):
            self._compare(other, max(self.height, other.height), 0, range(first, last + 1), limit, found)
        return found

    def _compare(
        self, other: LbaMap, level: int, index: int, leaves: range, limit: int, found: list[int]
    ) -> None:  # fmt: skip
        if len(found) >= limit:
            return
        if level == 0:
            found.append(index)
            return
        shift = _FANOUT_SHIFT * (level - 1)
        low, high = max(index * FANOUT, leaves.start >> shift), min(index * FANOUT + FANOUT - 1, leaves[-1] >> shift)
        differing = (self._children(level, index) != other._children(level, index)).any(axis=1)
        for child in (np.flatnonzero(differing) + index * FANOUT).tolist():
            if low <= child <= high:
                self._compare(other, level - 1, child, leaves, limit, found)

    def _children(self, level: int, index: int) -> Entries:
        """The references in a node, two numbers each; of a tree that is as tall as one likes."""
        children = np.zeros((FANOUT, 2), np.uint64)
        if level > self.height:
            children[0] = index == 0
            return children
        if index >> _FANOUT_SHIFT * (self.height - level) or (ref := self._find(level, index)) is None:
            return children
        return np.frombuffer(self._node(level, index, ref).data, np.uint64).reshape(FANOUT, 2)

    # Checkpoint: freeze, write the leaves, then the nodes above them level by level.

    def freeze(self) -> dict[int, Leaf]:
        """The dirty leaves, which from now on are replaced, not changed. Call `thaw` when they are written."""
        assert not self.frozen, "one checkpoint at a time"
        self.frozen, self.pending = set(self.dirty), True
        taken = {number: self.leaves[number] for number in sorted(self.dirty)}
        self.dirty = set()
        return taken

    def thaw(self, root: UnitRef | None, nodes: dict[tuple[int, int], Node]) -> None:
        """The frozen leaves are in the image, under these new nodes; so they are for the forks made meanwhile."""
        self.frozen, self.pending = set(), False
        self.root = root
        self._nodes.update(nodes)
        for fork in self._forks:
            fork.thaw(root, nodes)
        self._forks = []

    def unfreeze(self, taken: Collection[int]) -> None:
        """The checkpoint failed: what it took is dirty again."""
        self.dirty.update(taken)
        self.frozen, self.pending = set(), False
        for fork in self._forks:
            fork.unfreeze(taken)
        self._forks = []


def is_hole(leaf: Leaf) -> bool:
    """Whether no block of the leaf is mapped."""
    return leaf.tobytes() == _EMPTY_LEAF
