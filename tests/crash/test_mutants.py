"""The tests notice faults: each deliberate one in the engine makes a detector fail."""

from collections.abc import Callable

import pytest

from tests.crash.campaign import PROFILES, Effort, Tally, run_seed
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
    with mutant.applied():
        assert _fails(DETECTORS[mutant.found_by]), f"{mutant.found_by} noticed nothing"


def _fails(detector: Callable[[], None]) -> bool:
    try:
        detector()
    except Exception:  # the mutated engine may fail in any way
        return True
    return False
