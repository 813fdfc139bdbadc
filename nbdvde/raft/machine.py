"""What a group applies its entries to."""

from collections.abc import Sequence
from typing import Protocol

from nbdvde.raft.messages import Entry, NodeId, Snapshot


class Machine(Protocol):
    """The replicated state. An exception that leaves one of its functions, but for `install`, ends the node."""

    @property
    def applied(self) -> Snapshot:
        """What the state contains when the node starts: up to which entry, of which term, and the members then."""

    async def apply(self, entries: Sequence[Entry]) -> Sequence[object]:
        """Apply entries, of all kinds, in order, each once; a result for each of the first ones, at least one.

        The others come again. A result that is an exception is raised to whoever proposed the entry.
        """

    async def durable(self) -> Snapshot:
        """Have the state outlast a crash without the log; up to where it does. Entries are applied meanwhile."""

    async def install(self, source: NodeId, snapshot: Snapshot) -> Snapshot:
        """Have the state of another node, as of the snapshot or newer, durably; which one. Nothing else happens then.

        Raises NbdvdeError when that node cannot give it; it is tried again later.
        """
