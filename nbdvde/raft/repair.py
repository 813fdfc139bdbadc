"""A member whose log is damaged, until others have brought back what it lacks.

Entries that are damaged are known by index and term: whoever has those has the same data. When all other voters are
there, sure of what they have, and none has an entry, it was never committed: a majority had it on disk otherwise, and
no more than a minority has rot. That happens when all of them lose power at once, each in the middle of a write.

Of a member that is unsure the newest entries may be lost, or its term and vote. It takes part again when there is
nothing left that it could have promised: every other voter has said, after this node was started, what its term is and
how its log ends, and the log here has come as far as any of them. A candidate has its term on disk before it asks for
votes, so no vote was given in a higher one. What was committed with this node's help is in the log of another voter,
and then in the one that is furthest, or that of a leader elected since, which is no shorter. Voters who are unsure
themselves do not count: when half of all promises may be lost, no one can tell, and a person has to decide.
"""

from collections.abc import Awaitable, Callable, Sequence

import msgspec

from nbdvde.errors import NetworkError
from nbdvde.raft.core import Core
from nbdvde.raft.messages import Entry, HardState, Members, NodeId, Snapshot
from nbdvde.raft.store import LogStore

STATE, ENTRIES = 1 << 16, (1 << 16) + 1
"""Kinds of questions between nodes."""
REPAIR_BYTES = 1 << 20
"""Of entries in an answer; one always is."""

Ask = Callable[[NodeId, int, bytes], Awaitable[bytes]]
"""Ask a node. Raises NetworkError."""


class Wanted(msgspec.Struct, frozen=True, array_like=True):
    """A question: which entries of a group, or with none of them, how its log ends."""

    group: str
    start: int = 0
    stop: int = 0


class Ending(msgspec.Struct, frozen=True, array_like=True):
    """What a voter has promised."""

    term: int
    last_term: int
    last_index: int
    snapshot: Snapshot
    """What the state has, and the log not any more."""
    members: Members
    sure: bool


def ending(core: Core, store: LogStore) -> Ending:
    """Of this node."""
    return Ending(core.term, core.log.last_term, core.log.last_index, store.snapshot, core.members, not store.unsure)


class Repair:
    """Of one group."""

    def __init__(self, group: str, core: Core, store: LogStore, ask: Ask) -> None:
        self._group, self._core, self._store, self._ask = group, core, store, ask
        self._endings: dict[NodeId, Ending] = {}
        self.state: tuple[NodeId, Snapshot] | None = None
        """Who has in its state what is damaged here, and not in its log any more."""

    @property
    def is_done(self) -> bool:
        """Whether nothing is missing, as soon as the log is durable."""
        return not (self._store.damaged or self._store.unsure)

    async def step(self) -> None:
        """Do what can be done now."""
        self.state = None
        for gap in self._store.damaged:
            await self._mend(gap)
        if self._store.unsure:
            await self._settle()

    async def _mend(self, gap: range) -> None:
        question = msgspec.msgpack.encode(Wanted(self._group, gap.start, gap.stop))
        unheard = self._others()
        for node in sorted(unheard):
            try:
                answer = await self._ask(node, ENTRIES, question)
                self._store.mend(msgspec.msgpack.decode(answer, type=Sequence[Entry]))
            except (NetworkError, msgspec.MsgspecError):
                continue
            found = await self._ending(node)
            if found and found.snapshot.index >= gap.start:
                self.state = node, found.snapshot
            elif found and found.sure:
                unheard -= {node}
        if self._others() and not unheard and any(gap.start in left for left in self._store.damaged):
            self._core.forget(gap.start)

    async def _settle(self) -> None:
        for node in sorted(self._others() - set(self._endings)):
            found = await self._ending(node)
            if found and found.sure:
                self._endings[node] = found
        if self._is_level():
            self._promise()

    async def _ending(self, node: NodeId) -> Ending | None:
        try:
            answer = await self._ask(node, STATE, msgspec.msgpack.encode(Wanted(self._group)))
            return msgspec.msgpack.decode(answer, type=Ending)
        except (NetworkError, msgspec.MsgspecError):
            return None

    def _others(self) -> set[NodeId]:
        """The other voters, of all members that anybody knows."""
        known = [self._core.members, *(found.members for found in self._endings.values())]
        voters = {node for members in known for node in members.voters | members.outgoing}
        return voters - {self._core.node}

    def _is_level(self) -> bool:
        core, endings = self._core, self._endings
        if not endings or self._others() - set(endings):
            return False
        furthest = max((found.last_term, found.last_index) for found in endings.values())
        here = core.log.term(core.log.persisted) or 0, core.log.persisted
        return here >= furthest and core.term >= max(found.term for found in endings.values())

    def _promise(self) -> None:
        """Whoever may have had the vote of this term: nobody else gets it."""
        core = self._core
        core.vote = core.vote or core.leader or core.node
        self._store.settle(HardState(core.term, core.vote, core.commit))
