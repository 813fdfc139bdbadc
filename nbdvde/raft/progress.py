"""How far a follower is, as its leader knows, and what may be sent to it."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from nbdvde.raft.messages import NodeId, Snapshot


@dataclass(slots=True)
class Progress:
    """Of one follower. It is asked one question at a time until one is answered well; then entries stream."""

    next: int
    """Index of the next entry to send."""
    match: int = 0
    """Up to here it has what the leader has."""
    counts: bool = True
    """Whether it promises to keep that."""
    streaming: bool = False
    waiting: bool = False
    """While not streaming: whether a question is on its way."""
    installing: Snapshot | None = None
    """The state that it takes over meanwhile."""
    active: bool = True
    """Whether it was heard of since the leader last counted."""
    round: int = 0
    """Latest round of signs of life that it answered."""
    _window: deque[tuple[int, int]] = field(default_factory=deque)
    """(last index, bytes) of what is on its way."""
    _bytes: int = 0

    def may_send(self, window_bytes: int) -> bool:
        """Whether a message with entries may leave."""
        return self._bytes < window_bytes if self.streaming else not self.waiting

    def sent(self, last: int, size: int) -> None:
        """A message with entries up to `last`, so many bytes of them, has left."""
        if self.streaming:
            self.next = last + 1
            if size:
                self._window.append((last, size))
                self._bytes += size
        else:
            self.waiting = True

    @property
    def kept(self) -> int:
        """Up to here it counts for a majority."""
        return self.match if self.counts else 0

    def promises(self, counts: bool, index: int) -> bool:
        """It answers with a promise, or without: then it has only entries up to an index for sure.

        Whether it promises what it has, and did not before.
        """
        again = counts and not self.counts
        self.counts = counts
        if not counts:
            self.match = min(self.match, index)
        return again

    def acknowledged(self, index: int) -> bool:
        """It has everything up to an index; whether that is news."""
        news = index > self.match
        self.match = max(self.match, index)
        self.next = max(self.next, index + 1)
        if self.installing and self.match >= self.installing.index:
            self.installing = None
        if not self.installing:
            self.streaming = True
        while self._window and self._window[0][0] <= index:
            self._bytes -= self._window.popleft()[1]
        return news

    def refused(self, index: int, following: int) -> bool:
        """It lacks the entry before those that were sent from `index + 1` on; the next try begins at `following`.

        Whether that is news: an answer to an older question is not.
        """
        if index <= self.match or (not self.streaming and index != self.next - 1):
            return False
        self.probe()
        self.next = max(min(index, following), self.match + 1)
        return True

    def probe(self) -> None:
        """Ask before more is sent: something was lost."""
        self.streaming = self.waiting = False
        self.next = self.match + 1
        self._window.clear()
        self._bytes = 0

    def install(self, snapshot: Snapshot) -> None:
        """It takes over a state."""
        self.probe()
        self.installing = snapshot


def of_members(members: Iterable[NodeId], known: Mapping[NodeId, Progress], following: int) -> dict[NodeId, Progress]:
    """Those of members: as they were known, and of new ones as who has everything before the index `following`."""
    return {node: known.get(node) or Progress(following) for node in members}
