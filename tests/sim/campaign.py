"""Runs of a simulated world, each of which its seed decides."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from operator import gt

from tests.sim.faults import TICK, plan
from tests.sim.history import Violation
from tests.sim.misfortunes import Misfortunes
from tests.sim.world import World

TICKS = 700
"""With faults."""
WRITES = 100
"""That are acknowledged in a run, each of a block."""
_PATIENCE, _LOOK = 600, 8
"""Ticks in which a group without faults must recover, and between two looks whether it has."""


@dataclass(frozen=True, slots=True)
class Run:
    """What came of a seed."""

    ticks: int
    writes: int
    reads: int
    counts: dict[str, int]
    digest: str
    """Of all that happened, and of the order."""


def run_seed(seed: int, ticks: int = TICKS) -> Run:
    """A run with faults, and then one without, in which everybody recovers. Raises Violation."""
    world = World(seed, plan(seed))
    misfortunes = Misfortunes(world)
    world.run(ticks * TICK)
    misfortunes.heal()
    _recover(world)
    return _result(world)


def _recover(world: World) -> None:
    """Writes go on, enough are acknowledged, and in the end everybody has the same."""
    before = _acknowledged(world)
    _await(world, lambda: world.acknowledged >= WRITES and all(map(gt, _acknowledged(world), before)), "is written")
    world.clients_rest = True
    _await(world, lambda: all(group.is_whole for group in world.groups), "brings everybody what others have")
    for group in world.groups:
        group.check()


def _acknowledged(world: World) -> list[int]:
    return [group.history.acknowledged for group in world.groups]


def _await(world: World, done: Callable[[], bool], what: str) -> None:
    until = world.now + _PATIENCE * TICK
    while not done():
        if world.now >= until:
            raise Violation(f"nothing {what}, though nothing fails any more")
        world.run(world.now + _LOOK * TICK)


def _result(world: World) -> Run:
    network = world.network
    counts = dict(sorted(world.counts.items()))
    counts |= {"messages": network.sent, "lost": network.lost, "doubled": network.doubled}
    counts |= {"translated": network.translated}
    counts |= {"elections": sum(len(group.history.leaders) for group in world.groups)}
    committed = [[(entry.term, entry.data) for entry in group.history.committed] for group in world.groups]
    trace = repr((world.now, counts, committed, world.random.getstate()))
    digest = hashlib.blake2b(trace.encode(), digest_size=16).hexdigest()
    reads = sum(group.history.reads for group in world.groups)
    return Run(world.now // TICK, world.acknowledged, reads, counts, digest)
