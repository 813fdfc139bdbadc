"""Lives and crashes of images, seed by seed: `run_seed` explores one chain of sessions."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from tests.crash.oracle import Verdicts
from tests.crash.session import ABSENT, Pages, Profile, Session
from tests.crash.states import Crash, crashes

PROFILES = {
    "small": Profile(),
    "unflushed": Profile(weights={"write": 20, "zero": 4, "flush": 1}, stop=False, buffer_bytes=384 << 10),
    "synchronous": Profile(weights={"write": 8, "zero": 2, "flush": 10, "checkpoint": 1}, steps=30),
    "big": Profile(largest=200 << 10, buffer_bytes=512 << 10, steps=10, weights={"write": 8, "flush": 3}),
    "rolling": Profile(
        largest=60 << 10, level=0, buffer_bytes=128 << 10, weights={"write": 10, "flush": 4, "checkpoint": 1}
    ),
    "checkpoints": Profile(weights={"write": 8, "zero": 2, "flush": 2, "checkpoint": 6, "trim": 2}),
    "overwritten": Profile(
        size=48 << 10,
        largest=48 << 10,
        level=0,
        buffer_bytes=128 << 10,
        weights={"write": 10, "trim": 3, "flush": 3, "checkpoint": 4},
    ),
    "cleaned": Profile(
        weights={"write": 12, "zero": 4, "flush": 3, "checkpoint": 1, "clean": 4}, steps=40, buffer_bytes=64 << 10
    ),
    "cleaned snapshots": Profile(
        size=512 << 10,
        level=0,
        largest=48 << 10,
        buffer_bytes=64 << 10,
        steps=30,
        weights={"write": 14, "zero": 2, "flush": 3, "clean": 4, "snapshot": 2, "unsnapshot": 1, "rollback": 1},
    ),
    "cleaned and overwritten": Profile(
        size=256 << 10,
        level=0,
        largest=48 << 10,
        buffer_bytes=64 << 10,
        steps=40,
        weights={"write": 12, "zero": 2, "flush": 3, "clean": 3},
    ),
    "capacity": Profile(
        size=768 << 10,
        capacity=1 << 20,
        largest=40 << 10,
        steps=36,
        level=0,
        weights={"write": 16, "zero": 2, "trim": 1, "flush": 3},
    ),
    "wide": Profile(size=64 << 20, weights={"write": 10, "zero": 2, "flush": 3, "checkpoint": 2, "trim": 1}),
    "odd": Profile(size=(300 << 10) + 512, extent_bytes=4096),
    "plain": Profile(encrypted=False, level=0),
    "keys": Profile(weights={"write": 8, "keys": 6, "flush": 2, "checkpoint": 2}),
    "cancelled": Profile(
        cancel=0.8,
        largest=60 << 10,
        buffer_bytes=64 << 10,
        steps=40,
        weights={"write": 12, "zero": 3, "flush": 3, "read": 2},
    ),
    "stopping": Profile(steps=3, weights={"write": 4, "flush": 1, "zero": 1}),
    "failed sync": Profile(fault="sync", dedup=False, weights={"write": 10, "flush": 3, "checkpoint": 3}, steps=40),
    "failed write": Profile(fault="write", dedup=False, weights={"write": 10, "flush": 2, "checkpoint": 2}, steps=40),
    "full": Profile(
        limit=700 << 10, weights={"write": 10, "flush": 3, "checkpoint": 2, "trim": 1}, steps=40, largest=40 << 10
    ),
    "duplicates": Profile(
        repeated=0.8, level=0, steps=40, weights={"write": 12, "zero": 2, "trim": 1, "flush": 3, "checkpoint": 3}
    ),
    "dying duplicates": Profile(
        size=96 << 10,
        largest=48 << 10,
        level=0,
        repeated=0.7,
        steps=40,
        buffer_bytes=128 << 10,
        weights={"write": 12, "trim": 4, "flush": 5, "checkpoint": 6},
    ),
    "cleaned duplicates": Profile(
        repeated=0.8,
        steps=40,
        weights={"write": 12, "zero": 2, "trim": 2, "flush": 3, "clean": 3},
    ),
    "duplicates in snapshots": Profile(
        repeated=0.8,
        steps=40,
        weights={"write": 12, "trim": 2, "flush": 3, "checkpoint": 3, "snapshot": 2, "unsnapshot": 1, "rollback": 1},
    ),
    "dictionaries": Profile(
        words=True,
        repeated=0.3,
        steps=16,
        largest=12 << 10,
        weights={"write": 10, "zero": 2, "flush": 6, "checkpoint": 2, "dictionary": 6, "clean": 2},
    ),
    "optimized with dictionaries": Profile(
        words=True,
        cancel=0.2,
        overlap=True,
        steps=12,
        largest=12 << 10,
        weights={"write": 10, "flush": 5, "dictionary": 4, "optimize": 4},
    ),
    "failing dictionaries": Profile(
        fault="write",
        words=True,
        repeated=0.3,
        steps=16,
        largest=12 << 10,
        weights={"write": 10, "flush": 6, "checkpoint": 2, "dictionary": 6, "clean": 2},
    ),
    "streams": Profile(
        size=128 << 10, steps=8, weights={"write": 5, "flush": 1, "checkpoint": 1, "stream": 12, "clean": 1}
    ),
    "worm": Profile(
        size=128 << 10, steps=8, weights={"write": 5, "flush": 1, "checkpoint": 1, "worm": 12, "stream": 2, "clean": 1}
    ),
    "failing streams": Profile(
        fault="sync",
        size=128 << 10,
        steps=10,
        weights={"write": 5, "flush": 1, "checkpoint": 1, "stream": 8, "worm": 6},
    ),
    "failing snapshots": Profile(
        fault="sync",
        weights={"write": 10, "flush": 2, "checkpoint": 3, "snapshot": 3, "unsnapshot": 1, "rollback": 2, "clean": 2},
    ),
    "snapshots": Profile(
        weights={"write": 10, "zero": 2, "flush": 2, "checkpoint": 3, "snapshot": 3, "unsnapshot": 1, "rollback": 2}
    ),
    "old snapshots": Profile(
        size=48 << 10,
        largest=48 << 10,
        level=0,
        steps=40,
        weights={"write": 10, "trim": 3, "checkpoint": 5, "snapshot": 1, "unsnapshot": 1, "rollback": 1},
    ),
    "optimized": Profile(
        size=256 << 10,
        level=0,
        extent_bytes=64 << 10,
        cancel=0.2,
        buffer_bytes=64 << 10,
        steps=5,
        weights={"pieces": 8, "flush": 1, "optimize": 5, "snapshot": 1, "unsnapshot": 1, "rollback": 1},
    ),
}


@dataclass
class Failure(Exception):
    """A crash state that must not be."""

    seed: int
    profile: str
    session: int
    epoch: int
    state: str
    why: str

    def __str__(self) -> str:
        where = f"profile {self.profile}, session {self.session}, epoch {self.epoch}, {self.state}"
        return f"seed {self.seed}: {self.why} ({where}); replay: tools/crash_campaign.py --seed {self.seed}"


@dataclass
class Effort:
    """How hard to look."""

    subsets: int = 1024
    """Most subsets of an epoch: all of them up to ten changes."""
    torn: int = 12
    """Torn states of an epoch."""
    sessions: int = 3
    """Lives of an image, a crash or a stop between them."""


@dataclass
class Tally:
    """What was done so far."""

    seeds: int = 0
    sessions: int = 0
    states: int = 0
    distinct: set[bytes] = field(default_factory=set)


def profile_of(seed: int) -> str:
    """The kind of workload that a seed runs."""
    return list(PROFILES)[seed % len(PROFILES)]


def run_seed(seed: int, effort: Effort, tally: Tally, profile: str | None = None) -> None:
    """Explore a chain of sessions. Raises Failure at the first state that must not be."""
    name = profile or profile_of(seed)
    rng = random.Random(f"campaign {seed}")
    base, pages = b"", None
    for number in range(effort.sessions):
        ends = replace(PROFILES[name], stop=PROFILES[name].stop and rng.random() < 0.6)
        session = Session(seed * 16 + number, ends, base, pages).run()
        tally.sessions += 1
        base, pages = _explore(session, rng, effort, tally, Failure(seed, name, number, 0, "", ""))
    tally.seeds += 1


def _explore(
    session: Session, rng: random.Random, effort: Effort, tally: Tally, failure: Failure
) -> tuple[bytes, Pages | None]:  # fmt: skip
    """Judge every state of a session; answers one of them to go on from."""
    verdicts = Verdicts(session.versions, tally.distinct)
    survivor = session.storage.base
    for seen, crash in enumerate(_states(session, rng, effort), start=1):
        tally.states += 1
        if why := verdicts.judge(crash):
            failure.epoch, failure.state, failure.why = crash.epoch, crash.what, why
            raise failure
        if rng.random() * seen < 1 and verdicts.found(crash.image) != ABSENT:
            survivor = crash.image
    version = verdicts.version(survivor)
    if version is None or session.versions[version] == ABSENT:
        return b"", None
    return survivor, session.snapshots[version]


def _states(session: Session, rng: random.Random, effort: Effort) -> Iterator[Crash]:
    return crashes(session.storage.base, session.storage.events, rng, effort.subsets, effort.torn)
