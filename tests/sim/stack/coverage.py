"""What has to happen in a campaign: seeds that never do it look at nothing of it."""

from collections.abc import Mapping, Sequence

COVERED_SEEDS = 300
"""By then all of it has happened."""
_FAULTS = (
    "away", "clients_cut", "crash", "distance", "failing_disk", "full_image", "full_log", "isolated", "one_way",
    "partition", "power", "replace", "slow_disk", "stop", "transfer",
)  # fmt: skip
_CHANGES = (
    "disks/clone", "disks/create", "disks/delete", "disks/resize",
    "snapshots/create", "snapshots/delete", "snapshots/rollback",
)  # fmt: skip
_OF_GROUPS = (
    "groups added", "groups removed", "groups ended", "other groups under a hold", "other groups refused",
    "holds", "holds given up", "holds refused while there is one", "too late for their hold",
    "requests along several groups", "sent again by another table",
    "states of several groups taken over", "states taken over by who knows of a hold",
)  # fmt: skip
_OF_REGIONS = (
    "streams made", "streams advanced", "stream read", "appended to streams", "read from streams",
    "WORM regions made", "WORM regions extended", "WORM regions retained", "WORM regions given up",
    "WORM region read", "WORM region used by NBD", "appended to WORM regions", "read from WORM regions",
    "states with regions taken over", "regions changed while they were copied", "changes of regions met again",
)  # fmt: skip
EXPECTED = (
    "refused", "taken over", *_FAULTS, *(f"{name} during a hold" for name in _FAULTS),
    *_CHANGES, *(f"{name} under a hold" for name in _CHANGES), *_OF_GROUPS, *_OF_REGIONS,
)  # fmt: skip


def missed(counts: Mapping[str, int]) -> Sequence[str]:
    """What never happened."""
    return [name for name in EXPECTED if not counts.get(name)]
