"""Whether what was appended to a region, and what was read of it, fits together.

Each append is there once, or not at all if nobody was told that it is; all of it in one piece; behind everything that
was answered before it was asked for. What is there stays as it is, and is there until somebody asks for its end, or
something newer takes its place. Entries say what they are: they begin with a number that comes once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.sim.stack.history import History, Violation

_GENERATION = 1 << 32
"""Positions from one region to the next in its place."""


@dataclass(eq=False, slots=True)
class Append:
    """Some entries; moments are those of the history."""

    entries: Sequence[bytes]
    begun: int
    ended: float = math.inf
    """The first moment at which it is known to be done."""
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Known:
    """What was told of a region when something began to be read: that is the least that has to be there."""

    begun: int
    head: int
    tail: int


class Journal:
    """Of a region, and of those that take its place when it is given up."""

    def __init__(self, name: str, history: History, blocks: Callable[[bytes], int], capacity: int | None) -> None:
        """`blocks` says how many positions an entry takes; of more than `capacity` entries the oldest are replaced."""
        self.name, self._history, self._blocks, self._capacity = name, history, blocks, capacity
        self._appends: list[Append] = []
        self._owner: dict[bytes, tuple[Append, bytes]] = {}
        self._at: dict[int, bytes] = {}
        """Entries by position; entries are known by their numbers."""
        self._place: dict[bytes, int] = {}
        self._base = self.head = self.tail = 0
        """Where the positions of this generation begin; what is before `head` was appended, before `tail` is gone."""
        self.wanted_tail = 0
        """Somebody asked to give up what is before."""
        self.acknowledged = self.read = 0
        """Entries."""

    def fresh(self, size: int) -> bytes:
        """An entry of so many bytes, 8 at least."""
        number = self._history.fresh().to_bytes(8, "little")
        return (number * (size // 8 + 1))[:size]

    # Appending

    def begin(self, entries: Sequence[bytes]) -> Append:
        """Entries are to be appended."""
        append = Append(entries, self._history.moment())
        self._appends.append(append)
        for entry in entries:
            self._owner[entry[:8]] = append, entry
        return append

    def done(self, append: Append, positions: Sequence[int]) -> None:
        """They are, there."""
        self.acknowledged += len(append.entries)
        now = self._history.moment()
        for position, entry in zip(positions, append.entries, strict=True):
            self._see(self._base + position, entry, now)

    def refused(self, append: Append) -> None:
        """They are not, and will not be."""
        append.refused = True
        if any(entry[:8] in self._place for entry in append.entries):
            raise self._violation("has an append that was refused")

    # Reading

    @property
    def known(self) -> Known:
        """Something begins to be read."""
        return Known(self._history.moment(), self.head, self.tail)

    def saw(self, known: Known, found: Sequence[tuple[int, bytes]]) -> None:
        """All that there is, by position."""
        now, at = self._history.moment(), None
        for position, entry in found:
            if at not in (None, position):
                raise self._violation(f"has {position} behind what ends at {at}")
            at = position + self._blocks(entry)
            self._see(self._base + position, entry, now)
        self.read += len(found)
        gone = max(self.wanted_tail, self._overwritten)
        head = self._base + at if at is not None else gone
        if head < known.head:
            raise self._violation(f"ends at {head}, it was {known.head} before")
        first = self._base + found[0][0] if found else gone
        if not known.tail <= first <= gone:
            raise self._violation(f"begins at {first}, not between {known.tail} and {gone}")

    @property
    def _overwritten(self) -> int:
        """What is before may have been replaced by what is newer, or may be."""
        if self._capacity is None:
            return self._base
        unknown = [append for append in self._appends if append.ended == math.inf and not append.refused]
        return self.head - self._capacity + sum(len(append.entries) for append in unknown)

    def gave_up(self, position: int) -> None:
        """What is before is gone."""
        self.tail = max(self.tail, self._base + position)

    def give_up(self, position: int) -> None:
        """What is before is to go."""
        self.wanted_tail = max(self.wanted_tail, self._base + position)

    def sample(self, index: int) -> tuple[int, bytes] | None:
        """Position and entry of something of this generation."""
        here = [position for position in self._at if position >= self._base]
        if not here:
            return None
        position = here[index % len(here)]
        return position - self._base, self._owner[self._at[position]][1]

    def begin_again(self) -> None:
        """The region is gone, and another one takes its place."""
        self._base += _GENERATION
        self.head = self.tail = self.wanted_tail = self._base

    # The end

    def check(self) -> None:
        """Raise Violation unless all is in order and in one piece."""
        latest = 0
        for position, number in sorted(self._at.items()):
            append, entry = self._owner[number]
            if append.ended < latest:
                raise self._violation(f"has {position} behind what was asked for after it was answered")
            latest = max(latest, append.begun)
            nth = append.entries.index(entry) + 1
            follows = self._at.get(position + self._blocks(entry))
            if nth < len(append.entries) and follows not in (None, append.entries[nth][:8]):
                raise self._violation(f"has something else in the middle of an append, behind {position}")

    def _see(self, position: int, entry: bytes, now: int) -> None:
        number = entry[:8]
        append, wanted = self._owner.get(number, (None, b""))
        if append is None or entry != wanted:
            raise self._violation(f"has at {position} what nobody appended")
        if append.refused:
            raise self._violation(f"has at {position} an append that was refused")
        if self._at.setdefault(position, number) != number:
            raise self._violation(f"has something else at {position} than before")
        if self._place.setdefault(number, position) != position:
            raise self._violation(f"has at {position} what is at {self._place[number]}")
        append.ended = min(append.ended, now)
        self.head = max(self.head, position + self._blocks(entry))

    def _violation(self, why: str) -> Violation:
        return Violation(f"{self.name} {why}")
