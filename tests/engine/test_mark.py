"""The mark against a plain walk of the same trees."""

import random
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from nbdvde.engine.layout import LOST, Kind, UnitRef, pack_entry
from nbdvde.engine.lbamap import LEAF_BLOCKS
from nbdvde.engine.mark import Tree, Usage, mark
from nbdvde.engine.versions import FANOUT, Node
from nbdvde.errors import DamageError

LOG, META = (1, 2, 3), (4, 5)
UNITS, BLOCKS = 40, 16


class Forest:
    """Random trees that share leaves and nodes."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.units: dict[UnitRef, tuple[int, bytes]] = {}
        self.read_units: Counter[UnitRef] = Counter()
        leaves = [self._leaf() for _ in range(6)]
        low = [self._node(leaves) for _ in range(4)]
        self.trees = [Tree(1, 0, leaves[0]), Tree(2, 1, low[0]), Tree(3, 1, None)]
        for owner in (1, 2, 4):
            self.trees.append(Tree(owner, 2, self._node(low)))
        self.trees.append(Tree(5, 2, self.trees[-1].root))

    def _put(self, kind: int, data: bytes) -> UnitRef:
        number = len(self.units)
        ref = UnitRef(self.rng.choice(META), number, number * 4096, len(data))
        self.units[ref] = kind, data
        return ref

    def _leaf(self) -> UnitRef:
        entries = np.zeros(LEAF_BLOCKS, np.uint64)
        for at in self.rng.sample(range(LEAF_BLOCKS), 30):
            entries[at] = pack_entry(self.rng.choice(LOG), self.rng.randrange(UNITS), self.rng.randrange(BLOCKS))
        entries[0], entries[1] = 1, LOST
        return self._put(Kind.LEAF, entries.tobytes())

    def _node(self, children: list[UnitRef]) -> UnitRef:
        node = Node()
        for child in self.rng.choices(children, k=5):
            node.set(self.rng.randrange(FANOUT), child)
        return self._put(Kind.NODE, bytes(node.data))

    def read(self, ref: UnitRef, kind: int) -> bytes:
        assert self.units[ref][0] == kind
        self.read_units[ref] += 1
        return self.units[ref][1]

    def children(self, ref: UnitRef) -> Iterator[UnitRef]:
        node = Node(self.units[ref][1])
        return (child for index in range(FANOUT) if (child := node.get(index)))

    def walk(self, ref: UnitRef, owner: int, owners: dict[UnitRef, set[int]]) -> None:
        owners.setdefault(ref, set()).add(owner)
        if self.units[ref][0] == Kind.NODE:
            for child in self.children(ref):
                self.walk(child, owner, owners)


@pytest.mark.parametrize("seed", range(8))
def test_counts_and_owners(seed: int) -> None:
    forest = Forest(seed)
    owners: dict[UnitRef, set[int]] = {}
    expected = Counter({META[0]: 1})
    for tree in forest.trees:
        if tree.root:
            forest.walk(tree.root, tree.owner, owners)
            expected[tree.root.slot] += 1
    blocks: dict[int, set[int]] = {}
    for ref, found in owners.items():
        if forest.units[ref][0] == Kind.NODE:
            expected.update(child.slot for child in forest.children(ref))
            continue
        for entry in np.frombuffer(forest.units[ref][1], np.uint64).tolist():
            if entry > LOST:
                expected[entry >> 40] += 1
                blocks.setdefault(entry, set()).update(found)
    wanted = LOG[:2]
    usage = Usage(dict.fromkeys(wanted, UNITS), BLOCKS, range(1, 6))
    counts = mark(forest.trees, [UnitRef(META[0], 9, 9, 9)], forest.read, 6, usage)
    assert dict(enumerate(counts)) == {slot: expected[slot] for slot in range(6)}
    assert set(forest.read_units.values()) == {1}, "each unit is read once"
    for slot in wanted:
        who = {pack_entry(slot, unit, block): int(usage.owners(slot)[unit, block])
               for unit in range(UNITS) for block in range(BLOCKS)}  # fmt: skip
        assert who == {entry: _alone(blocks.get(entry, set())) for entry in who}
        assert (usage.of(slot) == (usage.owners(slot) != 0)).all()


def _alone(owners: set[int]) -> int:
    return 0 if not owners else owners.copy().pop() if len(owners) == 1 else -1


def test_nothing_is_in_use_without_trees() -> None:
    assert mark([Tree(1, 3, None)], [], Forest(0).read, 3) == [0, 0, 0]


def test_foreign_blocks_are_damage() -> None:
    forest = Forest(1)
    with pytest.raises(DamageError, match="no block"):
        mark(forest.trees, [], forest.read, 6, Usage(dict.fromkeys(LOG, UNITS), 1))
    with pytest.raises(DamageError, match="not in use"):
        mark(forest.trees, [], forest.read, 3)
