"""What happens to messages between machines."""

from random import Random

import msgspec

from nbdvde.raft.messages import (
    Append,
    AppendReply,
    AskRead,
    BeatReply,
    Body,
    Elect,
    Install,
    Message,
    NodeId,
    ReadReply,
    VoteReply,
)
from tests.sim.faults import Faults


class Network:
    """Links, each in one direction."""

    def __init__(self, random: Random, faults: Faults) -> None:
        self._random = random.random
        self.faults = faults
        self.cut: set[tuple[NodeId, NodeId]] = set()
        """Links that lose everything."""
        self.clogged: dict[tuple[NodeId, NodeId], int] = {}
        """Until when links deliver nothing, without losing it."""
        self.older: set[NodeId] = set()
        """Machines of an older version."""
        self.sent = self.lost = self.doubled = self.translated = 0

    def arrivals(self, message: Message, now: int) -> tuple[int, ...]:
        """When a message comes, maybe twice, maybe never."""
        self.sent += 1
        faults, random = self.faults, self._random
        link = message.sender, message.receiver
        if link in self.cut or (faults.loss and random() < faults.loss):
            self.lost += 1
            return ()
        if self.clogged:
            now = max(now, self.clogged.get(link, 0))
        at = now + 1 + int(random() * faults.delay)
        if faults.doubled and random() < faults.doubled:
            self.doubled += 1
            return at, at + int(random() * 4 * faults.delay)
        return (at,)

    def translated_for(self, message: Message) -> Message | None:
        """As it is after an older version has written or read it; None: that does not know such messages."""
        if message.sender not in self.older and message.receiver not in self.older:
            return message
        self.translated += 1
        body = older(message.body)
        return Message(message.sender, message.receiver, body) if body else None


class _Vote(msgspec.Struct, array_like=True, tag=1):
    term: int
    last_index: int
    last_term: int
    pre: bool


class _Beat(msgspec.Struct, array_like=True, tag=5):
    term: int
    commit: int
    round: int


_Older = _Vote | VoteReply | Append | AppendReply | _Beat | BeatReply | Install
_UNKNOWN = (Elect, AskRead, ReadReply)
_newer: msgspec.msgpack.Decoder[Body] = msgspec.msgpack.Decoder(Body)
_decoder = msgspec.msgpack.Decoder(_Older)
_encode = msgspec.msgpack.Encoder().encode


def older(body: Body) -> Body | None:
    """A message through a version without handing over, reads by followers, and silence.

    What it knows are the fields up to a point: what a newer version adds at the end it skips when it reads, and leaves
    out when it writes, so that the newer one takes the default. Kinds that it does not know it drops. So a field that
    is added later must do no harm where it is not known; what promises depend on must be there from the beginning.
    """
    if isinstance(body, _UNKNOWN):
        return None
    return _newer.decode(_encode(_decoder.decode(_encode(body))))
