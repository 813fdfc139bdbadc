"""What nodes of a group say to each other, and what its log holds.

Terms after Ongaro, "Consensus: Bridging Theory and Practice" (2014): the section is named where a message has one.
"""

from collections.abc import Iterator
from typing import TypeAlias

import msgspec

NodeId: TypeAlias = int
"""A member of a group; never used again for another one, not even for the same machine with an empty disk."""
ENTRY_BYTES = 24
"""What an entry costs besides its data, in messages and in the accounts of flow control."""


class EntryKind:
    """What the data of an entry is."""

    NORMAL, EMPTY, MEMBERS = range(3)


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One entry of the log."""

    term: int
    index: int
    kind: int = EntryKind.NORMAL
    data: bytes = b""

    @property
    def size(self) -> int:
        """Bytes that it counts for."""
        return ENTRY_BYTES + len(self.data)


class HardState(msgspec.Struct, frozen=True, array_like=True):
    """What a node must never forget (3.8): durable before any message that depends on it leaves."""

    term: int = 0
    vote: NodeId = 0
    commit: int = 0
    """A hint: what was known to be committed; it may be older."""


class Members(msgspec.Struct, frozen=True, array_like=True):
    """Who belongs to a group (4.2.1): voters decide, learners only receive.

    In the middle of a change (4.3), while `outgoing` has anybody, both sets of voters have to agree.
    """

    voters: frozenset[NodeId]
    learners: frozenset[NodeId] = frozenset()
    outgoing: frozenset[NodeId] = frozenset()
    """The voters before the change."""
    learners_next: frozenset[NodeId] = frozenset()
    """Of `outgoing`: who is a learner when the change is over."""
    auto_leave: bool = False
    """Whether the leader ends the change by itself once it is committed."""

    def __iter__(self) -> Iterator[NodeId]:
        return iter(sorted(self.voters | self.learners | self.outgoing))

    def __contains__(self, node: NodeId) -> bool:
        return node in self.voters or node in self.learners or node in self.outgoing

    @property
    def quorums(self) -> tuple[frozenset[NodeId], frozenset[NodeId]]:
        """The sets of voters that each have to agree."""
        return self.voters, self.outgoing

    def votes(self, node: NodeId) -> bool:
        """Whether a node is a voter of either set."""
        return node in self.voters or node in self.outgoing

    def pack(self) -> bytes:
        """As the data of an entry."""
        sets = (self.voters, self.learners, self.outgoing, self.learners_next)
        return msgspec.msgpack.encode((*map(sorted, sets), self.auto_leave))

    @classmethod
    def unpack(cls, data: bytes) -> "Members":
        """From the data of an entry."""
        return msgspec.msgpack.decode(data, type=cls)


class Snapshot(msgspec.Struct, frozen=True, array_like=True):
    """What stands for the log up to an entry; the state itself goes another way."""

    index: int = 0
    term: int = 0
    members: Members = Members(frozenset())


class Vote(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """RequestVote (3.4), or with `pre` the question whether it would be granted (9.6)."""

    term: int
    last_index: int
    last_term: int
    pre: bool = False
    forced: bool = False
    """The leader asked for it: who hears from a leader grants it all the same (3.10)."""


class VoteReply(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """The answer; of a granted pre-vote with the term that was asked for."""

    term: int
    granted: bool
    pre: bool = False


class Append(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """AppendEntries (3.5)."""

    term: int
    previous: int
    previous_term: int
    entries: tuple[Entry, ...]
    commit: int


class AppendReply(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """Which entries are there, durably; or that the previous one is not."""

    term: int
    ok: bool
    index: int
    """Of the last entry that is there; if not ok, `previous` of the question."""
    hint: int = 0
    """If not ok: the last entry that may agree."""
    hint_term: int = 0
    counts: bool = True
    """Whether the sender promises to keep them. Who is mute does not, and may lack what it had acknowledged before."""


class Beat(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """A sign of life of the leader; it also asks whether it is still one (6.4)."""

    term: int
    commit: int
    """No more than what the receiver is known to have."""
    round: int
    quiet: bool = False
    """Nothing happens: no further ones come until something does."""


class BeatReply(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """The answer, with the round of the question."""

    term: int
    round: int
    """0 of who is mute: it may have known of another leader."""


class Install(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """The log no longer has what the receiver lacks (5): it has to take over the state up to here."""

    term: int
    snapshot: Snapshot


class Elect(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """TimeoutNow: the receiver becomes leader if it can (3.10)."""

    term: int


class AskRead(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """A follower asks the leader up to where it must apply before it reads (6.4)."""

    term: int
    key: int


class ReadReply(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """The answer."""

    term: int
    key: int
    index: int


Body: TypeAlias = Vote | VoteReply | Append | AppendReply | Beat | BeatReply | Install | Elect | AskRead | ReadReply


class Message(msgspec.Struct, frozen=True, array_like=True):
    """A message between two members of a group."""

    sender: NodeId
    receiver: NodeId
    body: Body
