"""Disks, snapshots and clones are what a model says, whatever is done to them in any order."""

import pytest

from tests.model.world import World


@pytest.mark.parametrize("seed", range(6))
def test_a_life_of_an_image(seed: int) -> None:
    World(seed).run(300)
