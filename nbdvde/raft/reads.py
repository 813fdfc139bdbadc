"""Reads that wait until the leader knows that it still was one when they came (ReadIndex, 6.4)."""

from collections import deque

import msgspec

from nbdvde.raft.messages import NodeId


class Asked(msgspec.Struct, frozen=True):
    """A read."""

    reader: NodeId
    """Who asked: the leader itself, or a follower."""
    key: int
    """By which the reader knows it."""


class Reads:
    """Those of a leader. All that come before the next round of questions share it."""

    def __init__(self) -> None:
        self.round = 0
        """Of the latest questions."""
        self._next: list[tuple[int, Asked]] = []
        self._asking: deque[tuple[int, list[tuple[int, Asked]]]] = deque()

    def add(self, index: int, asked: Asked) -> None:
        """A read came while everything up to `index` was committed."""
        self._next.append((index, asked))

    @property
    def is_due(self) -> bool:
        """Whether a round has to begin."""
        return bool(self._next)

    def begin(self) -> int:
        """Begin a round; answers its number."""
        self.round += 1
        if self._next:
            self._asking.append((self.round, self._next))
            self._next = []
        return self.round

    def answered(self, round_: int) -> list[tuple[int, Asked]]:
        """A majority answered a round: (index, read) of those that are settled."""
        settled: list[tuple[int, Asked]] = []
        while self._asking and self._asking[0][0] <= round_:
            settled += self._asking.popleft()[1]
        return settled

    def unsettled(self) -> list[Asked]:
        """Those that wait."""
        return [asked for _, reads in self._asking for _, asked in reads] + [asked for _, asked in self._next]
