"""Every state a crash may leave, from the record of a storage (fault model: recording.py)."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.crash.recording import SECTOR, Change, Event, FailedSync, Mark, Sync, Write, applied

Window = tuple[int, int]


@dataclass
class Epoch:
    """What was done between two syncs, after what failed syncs left in doubt."""

    base: bytes
    """The image at the earlier sync."""
    changes: list[Change]
    windows: list[list[Window]]
    """For each number of changes done, what the workload knew meanwhile."""

    def windows_from(self, done: int) -> set[Window]:
        """Everything the workload may have known when a state arose that needs the first `done` changes."""
        return {window for windows in self.windows[done:] for window in windows}


@dataclass(frozen=True)
class Crash:
    """One state: the changes that survived, and the windows it has to fit."""

    epoch: int
    what: str
    image: bytes
    windows: frozenset[Window]


def epochs(base: bytes, events: Sequence[Event]) -> Iterator[Epoch]:
    """Split a record at its syncs. The first event is a mark."""
    window = (0, 0)
    epoch, doubtful = Epoch(base, [], [[]]), 0
    for event in events:
        match event:
            case Mark(low, high):
                window = (low, high)
                epoch.windows[-1].append(window)
            case FailedSync():
                doubtful = len(epoch.changes)
            case Sync():
                yield epoch
                kept = epoch.changes[:doubtful]
                done: list[list[tuple[int, int]]] = [[] for _ in kept]
                epoch = Epoch(applied(epoch.base, epoch.changes[doubtful:]), kept, [*done, [window]])
            case _:
                epoch.changes.append(event)
                epoch.windows.append([window])
    yield epoch


def crashes(base: bytes, events: Sequence[Event], rng: random.Random, budget: int, torn: int) -> Iterator[Crash]:
    """States of every epoch: up to `budget` subsets (all of them when they are no more), and `torn` torn ones.

    Every prefix is among the subsets.
    """
    for number, epoch in enumerate(epochs(base, events)):
        count = len(epoch.changes)
        for mask in _masks(count, rng, budget):
            chosen = [change for i, change in enumerate(epoch.changes) if mask >> i & 1]
            windows = frozenset(epoch.windows_from(mask.bit_length()))
            yield Crash(number, f"changes {mask:#x} of {count}", applied(epoch.base, chosen), windows)
        yield from _torn(number, epoch, rng, torn)


def _masks(count: int, rng: random.Random, budget: int) -> Iterator[int]:
    """Subsets as bit masks: all, or the most telling ones and a sample."""
    if 1 << count <= budget:
        yield from range(1 << count)
        return
    full = (1 << count) - 1
    telling = [(1 << n) - 1 for n in range(count + 1)]
    telling += [prefix & ~(1 << n) for prefix in (full, telling[-2], telling[-3]) for n in range(count)]
    telling += [1 << n for n in range(count)]
    yield from telling
    for _ in range(budget - len(telling)):
        mask = rng.getrandbits(count)
        if rng.random() < 0.6:  # most survive
            mask |= rng.getrandbits(count)
        yield mask & ((1 << rng.randint(1, count)) - 1)


def _torn(number: int, epoch: Epoch, rng: random.Random, samples: int) -> Iterator[Crash]:
    places = [i for i, change in enumerate(epoch.changes) if isinstance(change, Write) and len(change.data) > SECTOR]
    if not places:
        return
    for place, _ in zip(itertools.cycle(places), range(samples), strict=False):
        unit = rng.choice((SECTOR, 8 * SECTOR))
        keep, done = _others(epoch.changes, place, rng)
        chosen: list[Change] = []
        for i, change in enumerate(epoch.changes):
            torn_too = i != place and keep[i] and isinstance(change, Write) and rng.random() < 0.1
            if isinstance(change, Write) and (i == place or torn_too):
                chosen += _part(change.pieces(unit), rng)
            elif keep[i]:
                chosen.append(change)
        windows = frozenset(epoch.windows_from(done))
        yield Crash(number, f"change {place} torn at {unit}", applied(epoch.base, chosen), windows)


def _others(changes: Sequence[Change], place: int, rng: random.Random) -> tuple[list[bool], int]:
    """Which of the other changes survive, and how many changes had been issued."""
    match rng.randrange(3):
        case 0:
            keep = [i <= place for i in range(len(changes))]
        case 1:
            keep = [True] * len(changes)
        case _:
            keep = [rng.random() < 0.5 for _ in changes]
            keep[place] = True
    return keep, max(i for i, kept in enumerate(keep) if kept) + 1


def _part(pieces: list[Write], rng: random.Random) -> list[Write]:
    """A prefix, a suffix, or some of the pieces."""
    cut = rng.randint(0, len(pieces))
    match rng.randrange(4):
        case 0:
            return pieces[:cut]
        case 1:
            return pieces[cut:]
        case 2:
            return [piece for piece in pieces if rng.random() < 0.5]
        case _:
            return [piece for i, piece in enumerate(pieces) if i != cut]
