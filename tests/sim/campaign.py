"""Runs of a cluster, each with a world of its own that its seed decides."""

from random import Random

from nbdvde.raft.settings import Settings
from tests.sim.cluster import Cluster, Faults, Violation

TICKS = 700
_HEALING, _PROOF = 150, 100


def world(seed: int) -> tuple[Faults, Settings, int]:
    """Faults, settings and number of voters of a run."""
    random = Random(seed)
    choice = random.choice
    faults = Faults(
        loss=choice((0, 0.05, 0.3)), doubled=choice((0, 0.1)), delay=(1, choice((1, 3, 8))),
        sync=(0, choice((0, 1, 4, 10))), crashes=choice((0, 0.01, 0.08)), downtime=choice((3, 40)),
        partitions=choice((0, 0.01, 0.04)),
        compaction=choice((0, 0.05)), transfers=choice((0, 0.01)), changes=choice((0, 0.02)),
        rates=choice(((1.0,), (0.5, 1.0, 2.0), (0.5, 2.0))),
    )  # fmt: skip
    return faults, Settings(heartbeat=2, election=10, quiet=choice((0, 0, 12))), choice((3, 3, 5, 1))


def run_seed(seed: int, ticks: int = TICKS) -> Cluster:
    """A run with faults, and then one without, in which writes must go on. Raises Violation."""
    faults, settings, voters = world(seed)
    cluster = Cluster(seed, faults, settings, voters)
    cluster.run(ticks)
    cluster.heal()
    cluster.run(_HEALING)
    before = cluster.acknowledged
    cluster.run(_PROOF)
    if cluster.acknowledged == before:
        raise Violation("nothing is written though nothing fails any more")
    return cluster
