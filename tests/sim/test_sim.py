"""Seeds of the simulated world, and the proof that a seed tells everything."""

import subprocess
import sys

import pytest

from tests.sim.campaign import TICKS, WRITES, run_seed

SEEDS, PART = 1000, 100


@pytest.mark.parametrize("first", range(0, SEEDS, PART))
def test_seeds(first: int) -> None:
    for seed in range(first, first + PART):
        run = run_seed(seed)
        assert run.ticks >= TICKS
        assert run.writes >= WRITES


def test_the_same_seed_gives_the_same_run_in_any_process() -> None:
    seeds = range(12)
    ask = f"from tests.sim.campaign import run_seed; print(*[run_seed(seed).digest for seed in {seeds!r}])"
    for hash_seed in "1", "2":
        environment = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)}
        found = subprocess.run(
            [sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True, timeout=60
        )
        assert found.stdout.split() == [run_seed(seed).digest for seed in seeds]


def test_other_seeds_give_other_runs() -> None:
    assert len({run_seed(seed).digest for seed in range(12)}) == 12
