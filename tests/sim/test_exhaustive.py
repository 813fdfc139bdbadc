"""Everything that can happen to three nodes, within bounds small enough to come to an end."""

import pytest

from tests.crash.mutants import Mutant
from tests.raft.mutants import MUTANTS
from tests.sim.exhaustive import Bounds, Search

SMALL = Bounds(terms=2, entries=0, beats=0, crashes=0)
"""Two leaders, each with the entry that begins its term."""
CERTAIN = {"a vote is given twice", "anybody can be elected"}


def test_nothing_that_can_happen_to_three_nodes_is_wrong() -> None:
    assert Search(SMALL).run().complete


@pytest.mark.parametrize("mutant", [one for one in MUTANTS if one.name in CERTAIN], ids=lambda mutant: mutant.name)
def test_a_fault_is_found_without_luck(mutant: Mutant) -> None:
    with mutant.applied(), pytest.raises(AssertionError):
        Search(SMALL).run()
