"""Maps say what dictionaries would, across copies, checkpoints, eviction and reloading."""

import random
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from hypothesis import given
from hypothesis import strategies as st

from nbdvde.engine.layout import ALLOCATED_ZERO, HOLE, LOST, UnitRef
from nbdvde.engine.lbamap import LEAF_BLOCKS, LbaMap, height_for, is_hole, parse_leaf, uniform_leaf
from nbdvde.engine.versions import FANOUT, Missing, Node, Version, unwritten

T = TypeVar("T")
BLOCKS = LEAF_BLOCKS * FANOUT * 3
spots = st.sampled_from([0, 1, 511, 512, 513, LEAF_BLOCKS * FANOUT, BLOCKS - 40]) | st.integers(0, BLOCKS - 40)
STEPS = st.lists(
    st.tuples(st.sampled_from("aaaazzcddefgrx"), st.integers(0, 9), spots, st.integers(1, 30), st.booleans()),
    max_size=40,
)


class Disk:
    """A map, and what it should hold."""

    def __init__(self, lbamap: LbaMap, model: dict[int, int]) -> None:
        self.map, self.model = lbamap, model


class Stored:
    """Maps with an image of units under them."""

    def __init__(self) -> None:
        self.disks = [Disk(LbaMap(BLOCKS), {})]
        self.units: dict[UnitRef, bytes] = {}
        self.planned: list[Version] = []
        """Versions of the checkpoint that is being written."""

    def put(self, data: bytes) -> UnitRef:
        ref = UnitRef(1, len(self.units), 0, 1)
        self.units[ref] = data
        return ref

    def asked(self, ask: Callable[[], T]) -> T:
        while True:
            try:
                return ask()
            except Missing as node:
                node.tree.install(node.level, node.index, self.units[node.ref])

    def load(self, lbamap: LbaMap, number: int) -> None:
        if lbamap.held(number) is None:
            ref = self.asked(partial(lbamap.leaf_ref, number))
            lbamap.install_leaf(number, parse_leaf(self.units[ref]) if ref else uniform_leaf(HOLE))

    def plan(self) -> None:
        """Begin a checkpoint."""
        for disk in self.disks:
            disk.map.seal()
        self.planned = unwritten(disk.map.base for disk in self.disks)

    def write(self) -> None:
        """End it."""
        trees: dict[Version, UnitRef | None] = {}
        written = []
        for version in self.planned:
            assert version.below
            root, height, nodes = trees.get(version.below, version.below.root), version.below.height, {}
            while height < version.height:
                height += 1
                if root is not None:
                    nodes[height, 0] = node = Node()
                    node.set(0, root)
                    root = self.put(bytes(node.data))
            changes = {n: None if is_hole(leaf) else self.put(leaf.tobytes()) for n, leaf in version.leaves.items()}
            trees[version] = root = self.changed(height, 0, root, changes, nodes) if changes else root
            written.append((version, root, nodes))
        for version, root, nodes in written:
            version.settle(root, nodes)
        self.planned = []

    def changed(
        self, level: int, index: int, ref: UnitRef | None, changes: dict[int, UnitRef | None],
        nodes: dict[tuple[int, int], Node],
    ) -> UnitRef | None:  # fmt: skip
        """The new reference of a node below which leaves changed."""
        if level == 0:
            return changes[index]
        nodes[level, index] = node = Node(self.units[ref] if ref else None)
        for child in {number // FANOUT ** (level - 1) for number in changes}:
            below = {n: ref for n, ref in changes.items() if n // FANOUT ** (level - 1) == child}
            node.set(child % FANOUT, self.changed(level - 1, child, node.get(child % FANOUT), below, nodes))
        return None if node.is_empty() else self.put(bytes(node.data))

    def reopen(self) -> None:
        self.plan()
        self.write()
        for disk in self.disks:
            root, mapped, height = disk.map.root, disk.map.mapped, disk.map.height
            disk.map = LbaMap(disk.map.blocks, root, mapped, height=height)

    def check(self) -> None:
        for disk in self.disks:
            assert disk.map.mapped == sum(entry > ALLOCATED_ZERO for entry in disk.model.values())
            present = self.asked(partial(disk.map.stored_leaves, 0, BLOCKS // LEAF_BLOCKS - 1, BLOCKS))
            used = {block // LEAF_BLOCKS for block, entry in disk.model.items() if entry}
            assert used <= {*present, *disk.map.in_memory()}
            assert self.asked(partial(disk.map.stored_leaves, 0, BLOCKS, 2)) == present[:2]
            assert self.asked(partial(disk.map.stored_leaves, 1, BLOCKS, BLOCKS)) == [leaf for leaf in present if leaf]
            for block, entry in disk.model.items():
                self.load(disk.map, block // LEAF_BLOCKS)
                assert disk.map.lookup(block) == entry

    def step(self, what: str, which: int, start: int, length: int, flag: bool, entry: int) -> None:
        disk = self.disks[which % len(self.disks)]
        lbamap, model = disk.map, disk.model
        touched = range(start // LEAF_BLOCKS, (start + length - 1) // LEAF_BLOCKS + 1)
        if what == "a":
            for number in touched:
                self.load(lbamap, number)
            blocks, entries = list(range(start, start + length)), list(range(entry, entry + length))
            assert lbamap.assign(blocks, entries) == [model.get(block, HOLE) for block in blocks]
            model.update(zip(blocks, entries, strict=True))
        elif what == "z":
            stop = min(start + length, (start // LEAF_BLOCKS + 1) * LEAF_BLOCKS)
            self.load(lbamap, start // LEAF_BLOCKS)
            value = ALLOCATED_ZERO if flag else HOLE
            zeroed = lbamap.fill(start, stop, value).tolist()
            assert zeroed == [old for block in range(start, stop) if (old := model.get(block, HOLE)) > LOST]
            model.update(dict.fromkeys(range(start, stop), value))
        elif what == "c" and not self.planned:
            self.plan()
        elif what == "d" and flag:  # or it fails
            self.write()
        elif what == "d":
            self.planned = []
        elif what == "e":
            lbamap.bound(0)
        elif what == "f":
            self.disks.append(Disk(lbamap.fork(7), dict(model)))
        elif what == "g":
            lbamap.resize(BLOCKS * FANOUT if flag else BLOCKS)
        elif what == "r" and not self.planned:
            self.reopen()
        elif what == "x" and len(self.disks) > 1:
            self.disks.remove(disk)


@given(steps=STEPS)
def test_maps_are_dictionaries(steps: list[tuple[str, int, int, int, bool]]) -> None:
    stored = Stored()
    for count, step in enumerate(steps, 1):
        stored.step(*step, entry=count << 16)
    stored.check()
    stored.planned = []
    stored.plan()
    stored.write()
    for disk in stored.disks:
        disk.map.forget()
        assert not disk.map.in_memory()
    stored.check()


def test_heights() -> None:
    assert [height_for(blocks) for blocks in (1, 512, 513, 512 * 256, 512 * 256 + 1)] == [0, 0, 1, 1, 2]
    assert height_for((1 << 63) // 4096) == 6


def test_a_version_does_not_change() -> None:
    lbamap = LbaMap(512)
    lbamap.install_leaf(0, uniform_leaf(HOLE))
    lbamap.assign([1], [99])
    assert lbamap.seal() == 1
    taken = lbamap.base.leaves
    lbamap.assign([1], [100])
    lbamap.fill(2, 3, ALLOCATED_ZERO)
    assert (taken[0][1], taken[0][2]) == (99, HOLE)
    assert (lbamap.lookup(1), lbamap.lookup(2)) == (100, ALLOCATED_ZERO)
    lbamap.bound(0)
    assert lbamap.lookup(1) == 100, "dirty leaves stay"


def test_a_copy_holds_what_is_newest_below_it() -> None:
    live = LbaMap(512)
    live.install_leaf(0, uniform_leaf(HOLE))
    copies = []
    for entry in (97, 98, 99):
        live.assign([1], [entry])
        copies.append(live.fork(7))
    found = [leaf[1] for copy in copies if (leaf := copy.held(0))]
    assert found == [97, 98, 99]


def test_each_unwritten_leaf_is_written_once_however_many_copies_there_are() -> None:
    stored, rng = Stored(), random.Random(1)
    live = stored.disks[0].map
    for count in range(200):
        stored.step("a", 0, rng.randrange(BLOCKS), 1, True, entry=count + 1 << 16)
        stored.disks.append(Disk(live.fork(7), dict(stored.disks[0].model)))
    stored.plan()
    assert sum(len(version.leaves) for version in stored.planned) == 200
    del stored.disks[1:]
    stored.plan()
    assert len(stored.planned) == 1, "what no map is in is written with what stands on it"
    stored.write()
    stored.check()


def test_who_owns_a_version_alone() -> None:
    live = LbaMap(512)
    live.install_leaf(0, uniform_leaf(HOLE))
    assert not live.fork(5).base.shared, "nothing is to be written"
    live.assign([1], [99])
    live.seal()
    assert not live.base.shared
    live.fork(6)
    assert live.base.shared
    live.assign([1], [100])
    live.seal()
    assert live.base.shared, "what is below is shared"
    assert (live.base.protected, live.protected) == (6, 6)
    for version in unwritten([live.base]):
        version.settle(UnitRef(1, 1, 1, 1), {})
    live.assign([1], [101])
    live.seal()
    assert not live.base.shared
