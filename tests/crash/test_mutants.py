"""The tests notice faults: each deliberate one in the engine makes a detector fail."""

from collections.abc import Callable

import pytest

from tests.crash.campaign import PROFILES, Effort, Failure, Tally, run_seed
from tests.crash.mutants import EQUIVALENT, MUTANTS, Mutant


def crash() -> None:
    """A part of what test_crash looks at."""
    tally = Tally()
    for seed in range(3):
        for name in PROFILES:
            run_seed(seed, Effort(subsets=256), tally, name)


def either_superblock() -> None:
    """As `crash`, opening with the older superblock whenever there are two."""
    with EQUIVALENT.applied():
        crash()


DETECTORS: dict[str, Callable[[], None]] = {"crash": crash, "either superblock": either_superblock}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_is_noticed(mutant: Mutant) -> None:
    with mutant.applied(), pytest.raises((Failure, AssertionError)):
        DETECTORS[mutant.found_by]()
