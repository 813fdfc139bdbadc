"""Seeds of the simulated group, and the proof that a seed tells everything."""

import pytest

from tests.sim.campaign import run_seed

SEEDS = 40


@pytest.mark.parametrize("seed", range(SEEDS))
def test_seed(seed: int) -> None:
    assert run_seed(seed).acknowledged


def test_the_same_seed_gives_the_same_run() -> None:
    first, second = run_seed(7), run_seed(7)
    assert first.counts == second.counts
    assert first.committed == second.committed
