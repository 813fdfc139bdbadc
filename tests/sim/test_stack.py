"""Seeds of the whole stack, and the proof that a seed tells everything; more of them: `tools/stack_campaign.py`."""

import os
import subprocess
import sys

import pytest

from tests.sim.stack.coverage import EXPECTED, missed
from tests.sim.stack.play import run_seed
from tests.sim.stack.register import Op, explained, span

SEEDS = 5


@pytest.mark.parametrize("seed", range(SEEDS))
def test_what_clients_see_fits_together(seed: int) -> None:
    run = run_seed(seed)
    assert run.acknowledged > 10
    assert run.reads > 10


def test_the_same_seed_gives_the_same_run_in_any_process() -> None:
    ask = "from tests.sim.stack.play import run_seed; print(run_seed(1, 2.0).digest)"
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)}
    found = subprocess.run(
        [sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.strip() == run_seed(1, 2.0).digest


def write(value: int, begun: int, ended: float = float("inf"), *, sure: bool = True) -> Op:
    return Op(value, begun, ended, sure=sure)


def read(value: int, begun: int, ended: int) -> Op:
    return Op(value, begun, ended, is_read=True, sure=True)


@pytest.mark.parametrize(
    "ops",
    [
        [write(1, 1, 2), read(1, 3, 4)],
        [write(1, 1, 4), read(0, 2, 3), read(1, 5, 6)],
        [write(1, 1, 9), write(2, 2, 8), read(2, 10, 11)],
        [write(1, 1, 9), write(2, 2, 8), read(1, 10, 11)],
        [write(1, 1, sure=False), read(0, 5, 6), read(1, 7, 8)],
        [write(1, 1, sure=False), read(0, 5, 6), read(0, 7, 8)],
        [write(1, 1, 6, sure=False), write(2, 2, 8), read(1, 3, 5), read(2, 9, 10)],
        [write(1, 1, 2), write(0, 3, sure=False), write(1, 4, 5), read(0, 6, 7), read(0, 8, 9)],
    ],
)
def test_what_can_be_explained(ops: list[Op]) -> None:
    assert explained(ops)


@pytest.mark.parametrize(
    "ops",
    [
        [write(1, 1, 2), read(0, 3, 4)],
        [write(1, 1, 2), write(2, 3, 4), read(1, 5, 6)],
        [write(1, 1, 2), write(2, 3, 9), read(2, 4, 5), read(1, 6, 7)],
        [write(1, 1, 4, sure=False), write(2, 5, 6), read(1, 7, 8)],  # fenced, and came all the same
        [write(1, 1, 2), read(3, 3, 4)],
        [write(1, 1, sure=False), write(2, 2, 3), read(1, 4, 5), read(2, 6, 7), read(1, 8, 9)],
    ],
)
def test_what_cannot(ops: list[Op]) -> None:
    assert not explained(ops)


@pytest.mark.parametrize(
    ("ops", "value", "found"),
    [
        ([write(1, 1, 2), write(2, 5, 8)], 1, (1, 8)),
        ([write(1, 1, 2), write(2, 5, 8)], 2, (5, float("inf"))),
        ([write(1, 1, 2), write(2, 5, 8)], 0, (0, 2)),
        ([write(1, 1, 6), write(2, 5, 8)], 1, (1, float("inf"))),  # who knows which came first
        ([write(1, 1, 2), write(2, 5, sure=False)], 1, (1, float("inf"))),
        ([write(1, 1, 2), write(2, 5, sure=False), read(2, 9, 10)], 1, (1, 10)),
        ([write(1, 1, 2), write(2, 3, 4), write(1, 7, 8), write(3, 9, 11)], 1, (1, 11)),
        ([write(1, 1, sure=False), write(2, 3, 4)], 1, (1, float("inf"))),
    ],
)
def test_when_a_block_held_something(ops: list[Op], value: int, found: tuple[float, float]) -> None:
    assert span(ops, value) == found


def test_what_never_happened_is_told() -> None:
    counts = dict.fromkeys(EXPECTED, 1)
    assert missed(counts) == []
    assert missed(counts | {"holds given up": 0}) == ["holds given up"]
