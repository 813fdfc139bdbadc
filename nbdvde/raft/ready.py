"""What a member asks its owner for."""

from collections.abc import Sequence

import msgspec

from nbdvde.errors import RefusedError
from nbdvde.raft.messages import Entry, HardState, Message, NodeId, Snapshot


class NotLeaderError(RefusedError):
    """Only the leader can do that."""


class Ready(msgspec.Struct, frozen=True):
    """What has to be done, in this order; then `Core.done` is told.

    1. Send `now`. 2. Take over the state of `install`, if any. 3. Have `entries` (they replace what the log has from
    their first index on) and `hard` in the store, durably. 4. Send `after`. 5. Apply `committed`; answer `reads`.
    """

    now: Sequence[Message]
    install: tuple[NodeId, Snapshot] | None
    """Whom to ask for the state, and which one; once more now and then until that is done."""
    hard: HardState | None
    entries: Sequence[Entry]
    after: Sequence[Message]
    committed: Sequence[Entry]
    reads: Sequence[tuple[int, int]]
    """(key, index): to be answered when everything up to the index is applied. Index -1: ask again."""
