"""No crash, whatever it leaves, loses what was acknowledged or shows what never was."""

import pytest

from tests.crash.campaign import PROFILES, Effort, Tally, run_seed
from tests.crash.session import Session

STATES = 10_000
"""That a worker sees at least, whatever part of the profiles it has."""
EFFORT = Effort(subsets=64)
"""All subsets of six changes: 240 s of a core for 50,000 states. The campaign takes all of ten: 470 s for 91,000."""


@pytest.fixture(scope="module")
def tally() -> Tally:
    return Tally()


@pytest.mark.parametrize("name", PROFILES)
def test_every_crash_state_is_one_cut_of_the_history(name: str, tally: Tally) -> None:
    for seed in (1, 2):
        run_seed(seed, EFFORT, tally, name)


def test_requests_are_cancelled_half_way() -> None:
    assert sum(Session(seed, PROFILES["cancelled"]).run().cancelled for seed in range(8)) > 10


def test_enough_states_were_seen(tally: Tally) -> None:
    seed = 100
    while len(tally.distinct) < STATES:
        run_seed(seed, EFFORT, tally)
        seed += 1
    assert len(tally.distinct) >= STATES
