"""What maps hold at the moments when they are copied, or written: versions, each a few leaves over an earlier one.

In the image a version is a tree: nodes of 256 references to units one level below, leaves at level 0. Units are never
rewritten, so trees have in common what is equal. Pure: loading is the caller's (`Missing`, `Version.install`).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from nbdvde.engine.layout import LOST_SLOT, NO_REF, UnitRef
from nbdvde.errors import DamageError

FANOUT = 256
_FANOUT_SHIFT = 8
if TYPE_CHECKING:
    Leaf: TypeAlias = array[int]
else:
    Leaf = array
"""512 entries of typecode 'Q'."""
Entries = npt.NDArray[np.uint64]
LOST_NODE = UnitRef(LOST_SLOT, 0, 0, 1).pack() * FANOUT
"""What stands for a damaged node: reading below it is an error until it is written over."""


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

    def __init__(self, tree: Version, level: int, index: int, ref: UnitRef) -> None:
        self.tree, self.level, self.index, self.ref = tree, level, index, ref


def descend(
    height: int, root: UnitRef | None, level: int, index: int, node_at: Callable[[int, int, UnitRef], Node]
) -> UnitRef | None:  # fmt: skip
    """Where a tree has a node, or at level 0 a leaf; None when it has none there, or is not so large."""
    if index >> _FANOUT_SHIFT * (height - level):
        return None
    ref = root
    for above in range(height, level, -1):
        if ref is None:
            return None
        shift = _FANOUT_SHIFT * (above - level)
        ref = node_at(above, index >> shift, ref).get(index >> (shift - _FANOUT_SHIFT) & (FANOUT - 1))
    return ref


class Version:
    """What a map held at some moment, in common to the maps that were copied from it then. It holds that for ever.

    Until a checkpoint has written it, it is `leaves` over the version `below`; from then on a tree in the image.
    """

    __slots__ = ("below", "height", "leaves", "nodes", "protected", "root", "shared")

    def __init__(
        self, height: int, root: UnitRef | None = None, *, below: Version | None = None,
        leaves: dict[int, Leaf] | None = None, protected: int = 0,
    ) -> None:  # fmt: skip
        self.height, self.root, self.below, self.leaves = height, root, below, leaves or {}
        self.protected = protected
        """Units that it replaces are counted as garbage if their segments have this sequence or a later one."""
        self.shared: bool = below is not None and below.below is not None and below.shared
        """Whether its units will have several maps as owners; as long as it is not written."""
        self.nodes: dict[tuple[int, int], Node] = {}
        """Of the tree, as far as they are in memory."""

    def chain(self) -> Iterator[Version]:
        """Itself and the versions below that no checkpoint has written yet, newest first."""
        version = self
        while version.below is not None:
            yield version
            version = version.below

    @property
    def tree(self) -> Version:
        """The first of them that is in the image."""
        version = self
        while version.below is not None:
            version = version.below
        return version

    def join(self, orphans: Sequence[Version]) -> None:
        """Take in the versions directly below, newest first, which nothing else stands on."""
        leaves: dict[int, Leaf] = {}
        for version in (*reversed(orphans), self):
            leaves.update(version.leaves)
        self.leaves, self.below = leaves, orphans[-1].below

    def settle(self, root: UnitRef | None, nodes: dict[tuple[int, int], Node]) -> None:
        """A checkpoint has written it, and the one below before, with these new nodes."""
        assert self.below is not None, "it was not written before"
        # Of two versions the newer one is read more. The other one loads what it needs.
        self.nodes, self.below.nodes = self.below.nodes, {}
        self.nodes.update(nodes)
        self.root, self.below, self.leaves = root, None, {}

    # Of a tree in the image. All may raise Missing.

    def find(self, level: int, index: int) -> UnitRef | None:
        """Where the image keeps a node, or at level 0 a leaf."""
        return descend(self.height, self.root, level, index, self._node)

    def _node(self, level: int, index: int, ref: UnitRef) -> Node:
        node = self.nodes.get((level, index))
        if node is None:
            raise Missing(self, level, index, ref)
        return node

    def install(self, level: int, index: int, data: bytes) -> Node:
        """Hand in a node that `Missing` asked for."""
        return self.nodes.setdefault((level, index), Node(data))

    def collect(
        self, level: int, index: int, ref: UnitRef | None, first: int, last: int, limit: int, found: list[int]
    ) -> None:  # fmt: skip
        """Add the numbers of leaves in [first, last] below a reference, until there are `limit`."""
        if ref is None or len(found) >= limit:
            return
        if level == 0:
            if first <= index <= last:  # not so for the only leaf of a map without nodes, perhaps
                found.append(index)
            return
        node, shift = self._node(level, index, ref), _FANOUT_SHIFT * (level - 1)
        low, high = max(index * FANOUT, first >> shift), min(index * FANOUT + FANOUT - 1, last >> shift)
        for child in range(low, high + 1):
            self.collect(level - 1, child, node.get(child - index * FANOUT), first, last, limit, found)

    def compare(
        self, other: Version, level: int, index: int, leaves: range, limit: int, found: list[int]
    ) -> None:  # fmt: skip
        """Add the numbers of leaves of a range that differ below a node, until there are `limit`."""
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
                self.compare(other, level - 1, child, leaves, limit, found)

    def _children(self, level: int, index: int) -> Entries:
        """The references in a node, two numbers each; of a tree that is as tall as one likes."""
        children = np.zeros((FANOUT, 2), np.uint64)
        if level > self.height:
            children[0] = index == 0
            return children
        if (ref := self.find(level, index)) is None:
            return children
        return np.frombuffer(self._node(level, index, ref).data, np.uint64).reshape(FANOUT, 2)


def unwritten(heads: Iterable[Version]) -> list[Version]:
    """The versions that a checkpoint has to write for maps that have these, each behind the one below it.

    Those that no map has, and only one version stands on, are joined with it. No checkpoint is being written.
    """
    order: dict[Version, int] = {}
    """How many stand on it; a map is two."""
    for head in heads:
        chain = list(takewhile(lambda version: version not in order, head.chain()))
        order.update(dict.fromkeys(reversed(chain), 0))
        if head in order:
            order[head] += 2
    for version in order:
        if version.below in order:
            order[version.below] += 1
    needed = [version for version, users in order.items() if users != 1]
    for version in needed:
        orphans, below = [], version.below
        while below is not None and order.get(below) == 1:
            orphans.append(below)
            below = below.below
        if orphans:
            version.join(orphans)
    return needed
