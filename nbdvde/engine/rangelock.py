"""Block-range lock: overlapping holders take turns in the order they came, others do not meet.

Pure: who has to wait is told by a callback. The number of holders is bounded by the requests in flight, so
the list of them is searched as it is; no object is kept per block.
"""

from collections.abc import Callable


class Claim:
    """A range [start, stop) of blocks that someone holds or waits for."""

    __slots__ = ("blockers", "granted", "start", "stop", "waiters")

    def __init__(self, start: int, stop: int, granted: Callable[[], None]) -> None:
        self.start, self.stop, self.granted = start, stop, granted
        self.blockers = 0
        self.waiters: list[Claim] = []

    def overlaps(self, start: int, stop: int) -> bool:
        return self.start < stop and start < self.stop


class RangeLock:
    """All claims of one disk."""

    def __init__(self) -> None:
        self._claims: list[Claim] = []

    def __bool__(self) -> bool:
        """Whether anyone holds or awaits anything."""
        return bool(self._claims)

    def is_free(self, start: int, stop: int) -> bool:
        """Whether no claim overlaps the blocks; O(claims)."""
        return not any(claim.overlaps(start, stop) for claim in self._claims)

    def claim(self, start: int, stop: int, granted: Callable[[], None]) -> Claim:
        """Claim the blocks. Granted at once when `blockers` is 0, else `granted` is called once it is."""
        claim = Claim(start, stop, granted)
        for earlier in self._claims:
            if earlier.overlaps(start, stop):
                earlier.waiters.append(claim)
                claim.blockers += 1
        self._claims.append(claim)
        return claim

    def release(self, claim: Claim) -> None:
        """Give a claim up, granted or not; whoever waited for nothing else is granted."""
        self._claims.remove(claim)
        for waiter in claim.waiters:
            waiter.blockers -= 1
            if waiter.blockers == 0 and waiter in self._claims:
                waiter.granted()

    def check(self) -> None:
        """Assert every invariant."""
        holders = [claim for claim in self._claims if claim.blockers == 0]
        for i, claim in enumerate(holders):
            assert not any(claim.overlaps(o.start, o.stop) for o in holders[i + 1 :]), "holders do not overlap"
        for claim in self._claims:
            blockers = sum(claim in other.waiters for other in self._claims)
            assert claim.blockers == blockers, "a claim waits for the earlier ones that overlap it"
