"""Members of a group on machines: what a driver of the core does, in simulated time."""

from dataclasses import dataclass

from nbdvde.raft.core import Core, Ready
from nbdvde.raft.messages import Entry, Members, NodeId, Snapshot
from tests.sim.disk import Disk
from tests.sim.history import Seen, Write


@dataclass(slots=True)
class Machine:
    """A computer, with a clock of its own. Its number is that of its members, and goes with its disk."""

    number: NodeId
    period: int
    """Units of a tick of its clock."""
    up: bool = False
    dead: bool = False
    """Its disk was replaced: it comes back under another number."""
    life: int = 0
    """How often it was started or stopped."""
    slow: int = 0
    """Units that a sync takes more."""
    full: int = 0
    """Until when its disk takes nothing."""
    failing: bool = False
    """Its next sync fails."""


class Member:
    """Of one group, on one machine."""

    __slots__ = (
        "asked", "core", "disk", "durable", "machine", "node", "proposed", "seen", "state", "syncing", "to_apply",
    )  # fmt: skip

    def __init__(self, machine: Machine, start: Snapshot, at_hand: int) -> None:
        self.node, self.machine = machine.number, machine
        self.disk = Disk(start, at_hand)
        self.core: Core | None = None
        self.syncing: Ready | None = None
        self.state = self.durable = 0
        """Index up to which entries are applied, now and in what a crash leaves."""
        self.to_apply: list[Entry] = []
        self.seen = Seen()
        self.proposed: dict[tuple[int, int], Write] = {}
        """By index and term of the entry."""
        self.asked: list[tuple[int, int]] = []
        """(index, key) of reads that wait until so much is applied."""

    def stop(self) -> None:
        """Forget what is not on the disk."""
        self.core = self.syncing = None
        self.to_apply, self.proposed, self.asked = [], {}, []
        self.state = self.durable

    def configurations(self) -> list[Members]:
        """All that its log has, and the newest that it knows, written or not."""
        store = self.disk.store
        known = [store.snapshot.members, *(Members.unpack(entry.data) for entry in store.members())]
        return [*known, self.core.members] if self.core else known
