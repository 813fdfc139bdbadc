"""The map says what a dictionary would, across checkpoints, eviction and reloading."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from hypothesis import given
from hypothesis import strategies as st

from nbdvde.engine.layout import ALLOCATED_ZERO, HOLE, LOST, UnitRef
from nbdvde.engine.lbamap import FANOUT, LEAF_BLOCKS, LbaMap, Leaf, Missing, Node, height_for, is_hole, uniform_leaf

T = TypeVar("T")
BLOCKS = LEAF_BLOCKS * FANOUT * 3
spots = st.sampled_from([0, 1, 511, 512, 513, LEAF_BLOCKS * FANOUT, BLOCKS - 40]) | st.integers(0, BLOCKS - 40)
STEPS = st.lists(st.tuples(st.sampled_from("aaazzzcer"), spots, st.integers(1, 30), st.booleans()), max_size=30)


class Stored:
    """A map with an image of units under it."""

    def __init__(self) -> None:
        self.map = LbaMap(BLOCKS)
        self._units: dict[UnitRef, bytes] = {}

    def _put(self, data: bytes) -> UnitRef:
        ref = UnitRef(1, len(self._units), 0, 1)
        self._units[ref] = data
        return ref

    def asked(self, ask: Callable[[], T]) -> T:
        while True:
            try:
                return ask()
            except Missing as node:
                self.map.install_node(node.level, node.index, self._units[node.ref])

    def load(self, number: int) -> None:
        ref = self.asked(lambda: self.map.leaf_ref(number))
        leaf: Leaf = uniform_leaf(HOLE)
        if ref:
            leaf = type(leaf)("Q", self._units[ref])
        self.map.install_leaf(number, leaf)

    def checkpoint(self, fail: bool) -> None:
        lbamap = self.map
        taken = lbamap.freeze()
        if fail:
            lbamap.unfreeze(taken)
            return
        refs = {number: None if is_hole(leaf) else self._put(leaf.tobytes()) for number, leaf in taken.items()}
        nodes: dict[tuple[int, int], Node] = {}
        for level in range(1, lbamap.height + 1):
            above: dict[int, UnitRef | None] = {}
            for index in {number // FANOUT for number in refs}:
                node, _ = self.asked(partial(lbamap.node_copy, level, index))
                for child, ref in refs.items():
                    if child // FANOUT == index:
                        node.set(child % FANOUT, ref)
                nodes[level, index] = node
                above[index] = None if node.is_empty() else self._put(bytes(node.data))
            refs = above
        lbamap.thaw(refs.get(0, lbamap.root), nodes)

    def reopen(self) -> None:
        self.checkpoint(fail=False)
        self.map = LbaMap(BLOCKS, self.map.root, self.map.mapped)


@given(steps=STEPS)
def test_the_map_is_a_dictionary(steps: list[tuple[str, int, int, bool]]) -> None:
    stored, next_entry = Stored(), 1 << 16
    model: dict[int, int] = {}
    for what, start, length, flag in steps:
        touched = range(start // LEAF_BLOCKS, (start + length - 1) // LEAF_BLOCKS + 1)
        if what == "a":
            for number in touched:
                stored.load(number)
            blocks = list(range(start, start + length))
            entries = list(range(next_entry, next_entry + length))
            replaced = stored.map.assign(blocks, entries)
            assert list(replaced) == [model.get(block, HOLE) for block in blocks]
            model.update(zip(blocks, entries, strict=True))
            next_entry += length
        elif what == "z":
            stop = min(start + length, (start // LEAF_BLOCKS + 1) * LEAF_BLOCKS)
            stored.load(start // LEAF_BLOCKS)
            value = ALLOCATED_ZERO if flag else HOLE
            zeroed = stored.map.fill(start, stop, value).tolist()
            before = [model.get(block, HOLE) for block in range(start, stop)]
            assert zeroed == [entry for entry in before if entry > LOST]
            model.update(dict.fromkeys(range(start, stop), value))
        elif what == "c":
            stored.checkpoint(flag)
        elif what == "e":
            stored.map.bound(0)
        else:
            stored.reopen()
        assert stored.map.mapped == sum(entry > ALLOCATED_ZERO for entry in model.values())
    for leaf in range(BLOCKS // LEAF_BLOCKS):
        stored.asked(partial(stored.map.leaf_ref, leaf))
    present = stored.asked(lambda: stored.map.stored_leaves(0, BLOCKS // LEAF_BLOCKS - 1, BLOCKS))
    assert {block // LEAF_BLOCKS for block, entry in model.items() if entry} <= {*present, *stored.map.leaves}
    assert stored.asked(lambda: stored.map.stored_leaves(0, BLOCKS, 2)) == present[:2]
    assert stored.asked(lambda: stored.map.stored_leaves(1, BLOCKS, BLOCKS)) == [leaf for leaf in present if leaf]
    for block, entry in model.items():
        stored.load(block // LEAF_BLOCKS)
        assert stored.map.lookup(block) == entry


def test_heights() -> None:
    assert [height_for(blocks) for blocks in (1, 512, 513, 512 * 256, 512 * 256 + 1)] == [0, 0, 1, 1, 2]
    assert height_for((1 << 63) // 4096) == 6


def test_a_frozen_leaf_does_not_change() -> None:
    lbamap = LbaMap(512)
    lbamap.install_leaf(0, uniform_leaf(HOLE))
    lbamap.assign([1], [99])
    taken = lbamap.freeze()
    lbamap.assign([1], [100])
    lbamap.fill(2, 3, ALLOCATED_ZERO)
    assert (taken[0][1], taken[0][2]) == (99, HOLE)
    assert (lbamap.lookup(1), lbamap.lookup(2)) == (100, ALLOCATED_ZERO)
    lbamap.bound(0)
    assert lbamap.lookup(1) == 100, "dirty leaves stay"
