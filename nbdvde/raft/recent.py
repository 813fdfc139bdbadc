"""The newest entries of all groups, and those read last, in memory."""

from collections import deque
from collections.abc import Iterable

from nbdvde.raft.messages import Entry

Cache = dict[int, Entry]
"""Entries of one group by index."""


class Recent:
    """What all caches have together, up to a number of bytes; those that are not durable yet stay beyond it."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._order: deque[tuple[Cache, Entry, int]] = deque()
        self.bytes = 0
        """That entries here take, with those that a cache does not have any more."""

    def add(self, cache: Cache, entries: Iterable[Entry], round_: int) -> None:
        """Keep entries, at least until `shrink` is told of their round."""
        for entry in entries:
            cache[entry.index] = entry
            self._order.append((cache, entry, round_))
            self.bytes += entry.size

    def shrink(self, durable: int) -> None:
        """Let the oldest ones go, if they are of a round up to `durable`."""
        order = self._order
        while self.bytes > self._max_bytes and order and order[0][2] <= durable:
            cache, entry, _ = order.popleft()
            self.bytes -= entry.size
            if cache.get(entry.index) is entry:
                del cache[entry.index]


def trim(cache: Cache, first: int, last: int) -> None:
    """Forget entries outside of a range; no more of them are looked at than there are."""
    for index in [index for index in cache if not first <= index <= last]:
        del cache[index]
