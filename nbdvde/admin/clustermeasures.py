"""What replication of an image is measured by."""

from typing import TYPE_CHECKING

import msgspec

from nbdvde.engine.image import Image
from nbdvde.replication.registry import replica_of

if TYPE_CHECKING:  # commands that ask a server need nothing of what replicates, which takes 70 ms to import
    from nbdvde.replication.replica import Replica


class ClusterMeasures(msgspec.Struct, frozen=True):
    """A node's part in the cluster that replicates an image."""

    node: int
    role: str
    """leader, follower, candidate or pre-candidate."""
    leader: int
    """0 for none."""
    term: int
    elections: int
    """How often it asked for votes since it began."""
    nodes: int
    """That belong to the cluster."""
    connected: int
    """Others that it has a connection to."""
    committed: int
    """Index of the last entry that a majority has, as far as it knows."""
    applied: int
    """Index of the last entry that is in its image."""
    log_bytes: int
    """Of entries that it keeps for others."""
    behind: int | None
    """Entries that the slowest of the others lacks, as the leader knows."""
    received_bytes: int
    """That it took over from another node to catch up, the last time."""
    compared_bytes: int
    """Of disks, that it had compared on all nodes in the background since it began."""
    differences: int
    """Chunks of them that were not the same everywhere."""
    repaired: int
    """Of these, those that are now."""
    problem: str
    """What keeps it from taking part, if anything does."""


def cluster_measures(image: Image) -> ClusterMeasures | None:
    """Those of an image, if it is replicated."""
    replica = replica_of(image)
    if replica is None:
        return None
    seen, machine, taker = replica.group.status(), replica.machine, replica.taker
    scrubbed = replica.scrubbing and replica.scrubbing.found
    others = [node for node in seen.members if node != replica.node.number]
    return ClusterMeasures(
        replica.node.number, seen.role, seen.leader, seen.term, seen.elections, len(list(seen.members)),
        sum(map(replica.node.is_connected, others)), seen.commit, machine.applied.index, seen.log_bytes,
        max((seen.last - match for match in seen.matches.values()), default=None),
        taker.received if taker else 0, scrubbed.compared_bytes if scrubbed else 0,
        scrubbed.differences if scrubbed else 0, scrubbed.repaired if scrubbed else 0, _problem_of(replica),
    )  # fmt: skip


def _problem_of(replica: "Replica") -> str:
    """What keeps a node from taking part, if anything does."""
    if replica.problem:
        return replica.problem
    if not replica.group.status().leader:
        return "there is no leader"
    return "it is taking over what another node has" if replica.incomplete else ""


def cluster_problem(image: Image) -> str:
    """What keeps a replicated image from being used, if anything does."""
    found = cluster_measures(image)
    return found.problem if found else ""
