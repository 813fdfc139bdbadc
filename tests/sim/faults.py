"""What may go wrong in a run: its seed chooses the kinds and how often they come.

Time is in units: two of them are a tick of a clock that runs evenly.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

from nbdvde.raft.settings import Settings

TICK = 2
"""Units."""
KINDS = (
    "crash", "power", "partition", "deaf", "clog", "slow disk", "full disk", "failing disk", "rot", "misdirected",
    "wipe", "transfer", "change", "group", "upgrade",
)  # fmt: skip

_CHANGE_LEADERS = ("crash", "partition", "deaf", "clog", "slow disk", "transfer", "upgrade")


@dataclass(frozen=True, slots=True)
class Faults:
    """How bad a world is. Probabilities are for each message, or for each step of a disk."""

    loss: float = 0.0
    doubled: float = 0.0
    delay: int = 2
    """Units that a message takes at most; who was sent later may arrive earlier."""
    sync: int = 0
    """Units that a sync takes at most."""
    lag: int = 0
    """Units that it takes at most to apply entries."""
    torn: float = 0.0
    """That a crash in the middle of a sync leaves a damaged entry."""
    at_hand: int = 0
    """Entries of a log that are in memory, others have to be loaded; 0: all are."""
    compaction: float = 0.0
    """That a node forgets what it has applied."""
    downtime: int = 40
    """Ticks that a node is down at most."""
    periods: tuple[int, ...] = (TICK,)
    """Units of a tick of a node's clock."""
    older: float = 0.0
    """That a node is of an older version."""
    every: Mapping[str, int] = field(default_factory=dict)
    """Kind: ticks between two of them on the average."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Of a run."""

    faults: Faults
    settings: Settings
    voters: int
    pace: int
    """Ticks between two things that clients do, on the average."""


def plan(seed: int) -> Plan:
    """Some kinds of faults, each more or less often: with all of them at once little would happen.

    With leases mostly those that make a new leader soon, and little that slows it down: what matters is done by clients
    before the lease of the old one would end.
    """
    random = Random(seed)
    choice = random.choice
    lease = random.random() < 0.2
    voters = choice((3, 3, 3, 3, 3, 3, 5, 1))
    every = {kind: choice((30, 90, 250)) for kind in KINDS if random.random() < 0.25}
    if lease:
        every = {kind: often for kind, often in every.items() if kind in _CHANGE_LEADERS}
        every |= {choice(_CHANGE_LEADERS): 30, choice(_CHANGE_LEADERS): 30}
    faults = Faults(
        loss=0 if lease else choice((0, 0, 0.02, 0.1, 0.3)), doubled=choice((0, 0, 0.1)),
        delay=choice((1, 2) if lease else (1, 2, 4, 12)), sync=choice((0, 0, 1) if lease else (0, 0, 1, 3, 12)),
        lag=0 if lease else choice((0, 0, 0, 8)), torn=choice((0, 0.5)), at_hand=choice((0, 0, 0, 3)),
        compaction=choice((0, 0, 0.05, 0.2)), downtime=choice((1, 3) if lease else (3, 40)),
        periods=choice(((TICK,), (TICK,), (1, TICK) if lease else (1, TICK, 2 * TICK))),
        older=choice((0, 0, 0, 0.5)), every=every,
    )  # fmt: skip
    heartbeat, election = choice(((3, 10), (5, 15), (5, 20)))
    small = random.random() < 0.25
    settings = Settings(
        heartbeat, election, quiet=0 if lease else choice((0, 0, 0, election)), lease=lease,
        message_bytes=100 if small else 1 << 20, window_bytes=300 if small else 8 << 20,
        apply_bytes=100 if small else 4 << 20, uncommitted_bytes=2000 if small else 64 << 20,
    )  # fmt: skip
    return Plan(faults, settings, voters, choice((5, 8, 12)))
