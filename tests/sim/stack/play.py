"""Runs of the whole stack, each of which its seed decides: server, sessions, engine, Raft, and clients that speak NBD.

What a run looks at: what clients read and wrote fits together, block by block; nothing acknowledged is lost; a fenced
writer changes nothing; all nodes hold the same in the end, disks, snapshots and what they note; and everything goes on
when nothing fails any more.
"""

import hashlib
import logging
from dataclasses import dataclass

import trio

from tests.sim.stack.clock import Clock
from tests.sim.stack.images import FIRST, blank
from tests.sim.stack.misfortunes import Misfortunes
from tests.sim.stack.universe import deterministic
from tests.sim.stack.world import World

TIME_S = 12.0
"""Of virtual time with misfortunes."""


@dataclass(frozen=True, slots=True)
class Run:
    """What came of a seed."""

    acknowledged: int
    """Blocks whose change was."""
    reads: int
    fenced: int
    counts: dict[str, int]
    trace: list[str]

    @property
    def digest(self) -> str:
        """Of all that happened."""
        return hashlib.blake2b("\n".join(self.trace).encode(), digest_size=16).hexdigest()


def run_seed(seed: int, time_s: float = TIME_S, trace: list[str] | None = None) -> Run:
    """One run. Raises Violation, or what a machine ended with; `trace` is told what happens."""
    for node in (0, *FIRST):
        blank(node)
    logging.disable(logging.CRITICAL)
    try:
        with deterministic(seed) as chance:
            world = World(chance)
            world.trace = world.trace if trace is None else trace
            with world.watch.watching():
                trio.run(_live, world, time_s, clock=Clock())
    finally:
        logging.disable(logging.NOTSET)
    history = world.history
    return Run(history.acknowledged, history.reads, history.fenced, dict(sorted(world.counts.items())), world.trace)


async def _live(world: World, time_s: float) -> None:
    async with trio.open_nursery() as world.nursery:
        await world.begin()
        misfortunes = Misfortunes(world)
        await misfortunes.run(time_s)
        misfortunes.mend()
        await world.rest()
        world.nursery.cancel_scope.cancel()
