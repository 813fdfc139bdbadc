"""A metrics log: a ring of blocks for each tier, from samples as they came to windows of a day.

    block 0 = header (samples u64 | capacity u64 | threshold f64 | zero 8) | four tiers
    tier    = width u64 | start u64 | blocks u64 | head u64 | tail u64

Positions (head, tail) count the blocks of a ring for ever; block `start + position % blocks` of the region holds one.
When a ring is filled up to the threshold, its oldest quarter is taken together in windows of the next tier, whatever
metrics and times lie in it; of the last tier the oldest blocks are given up. So no order of samples breaks the cap.
Every step is one change of the region: counts are never lost or doubled by a crash.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Self, TypeAlias

import numpy as np

from nbdvde.engine.layout import BLOCK
from nbdvde.engine.regions.directory import Slot
from nbdvde.engine.regions.samples import FORM, SAMPLE, SAMPLES_PER_BLOCK, Contents, Rows, Samples, Windows
from nbdvde.engine.regions.sketch import Integers

_HEADER = struct.Struct("<QQd8s")
_TIER = struct.Struct("<QQQQQ")
MINUTE_NS, HOUR_NS, DAY_NS = 60 * 10**9, 3600 * 10**9, 86400 * 10**9
WIDTHS_NS = (0, MINUTE_NS, HOUR_NS, DAY_NS)
"""Of the windows of each tier; 0 stands for samples as they came."""
_EIGHTHS = (1, 2, 2)
"""Parts of the capacity of all tiers but the last, which has the rest: 20 metrics for a year, whatever they measure."""
CAPACITY, CAPACITY_MIN, CAPACITY_MAX = 32 << 20, 256 << 10, 1 << 30
"""Bytes. All of it is held in memory once somebody asks."""
THRESHOLD, THRESHOLD_MIN, THRESHOLD_MAX = 0.8, 0.25, 0.95

Read: TypeAlias = Callable[[int, int], bytes]
"""Answers so many blocks of the region, from one on."""


class Change(NamedTuple):
    """What of the region is to be written, all or nothing."""

    blocks: dict[int, bytes]
    holes: list[tuple[int, int]]
    """(start, stop) of blocks that hold nothing any more."""


@dataclass(frozen=True, slots=True)
class Ring:
    """Where a tier lies. Blocks."""

    width_ns: int
    start: int
    blocks: int
    head: int = 0
    """Position of the oldest block."""
    tail: int = 0
    """Position behind the newest block."""

    @property
    def used(self) -> int:
        """Blocks."""
        return self.tail - self.head

    def place(self, position: int) -> int:
        """The block of the region that has this position."""
        return self.start + position % self.blocks

    def runs(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """The blocks of the region, (start, stop), that have the positions [first, stop)."""
        while first < stop:
            end = min(stop, first - first % self.blocks + self.blocks)
            yield self.place(first), self.place(first) + end - first
            first = end

    def pack(self) -> bytes:
        return _TIER.pack(self.width_ns, self.start, self.blocks, self.head, self.tail)


@dataclass(frozen=True, slots=True)
class Tier:
    """A ring, and what it holds."""

    ring: Ring
    contents: Contents
    per_block: Integers
    """Records in each block in use, oldest first."""

    def filled(self, threshold: float) -> bool:
        """Whether its oldest blocks are to be taken together."""
        return self.ring.used > threshold * self.ring.blocks

    def oldest(self) -> tuple[int, Contents]:
        """How many blocks are taken together at a time, and what is in them."""
        blocks = min(self.ring.used, max(1, self.ring.blocks // 4))
        return blocks, self.contents.part(np.arange(int(self.per_block[:blocks].sum())))

    def without(self, blocks: int) -> Self:
        """Without the oldest blocks."""
        gone = int(self.per_block[:blocks].sum())
        ring = replace(self.ring, head=self.ring.head + blocks)
        rest = self.contents.part(np.arange(gone, len(self.contents)))
        return replace(self, ring=ring, contents=rest, per_block=self.per_block[blocks:])

    def adding(self, contents: Contents, numbers: list[int]) -> Self:
        """With so many blocks more, and the records in them."""
        ring = replace(self.ring, tail=self.ring.tail + len(numbers))
        per_block = np.concatenate([self.per_block, np.array(numbers, np.int64)])
        return replace(self, ring=ring, contents=self.contents.joined(contents), per_block=per_block)


@dataclass(frozen=True, slots=True)
class History:
    """The whole log; changing it makes a new one."""

    capacity: int
    """Bytes."""
    threshold: float
    """Part of a ring that is in use before its oldest blocks are taken together."""
    tiers: tuple[Tier, ...]
    samples: int = 0
    """That it has, those in windows included."""
    generation: int = 0

    @classmethod
    def create(cls, capacity: int, threshold: float) -> tuple[Self, Change]:
        """An empty one, within the limits above, and what is to be written of it."""
        made = cls(capacity, threshold, tuple(_empty(ring) for ring in _rings(capacity // BLOCK)), generation=1)
        return made, Change({0: made._first()}, [])

    # Changes

    def adding(self, rows: Rows) -> tuple[Self, Change, int]:
        """With samples more: as many of `rows` as there is room for before `stepped` must be asked, one at least.

        Answers how many these are. Rows are of dtype SAMPLE, and valid.
        """
        raw = self.tiers[0]
        free = (raw.ring.blocks - raw.ring.used) * SAMPLES_PER_BLOCK
        begun = int(raw.per_block[-1]) % SAMPLES_PER_BLOCK if raw.ring.used else 0
        room = free + (SAMPLES_PER_BLOCK - begun) % SAMPLES_PER_BLOCK
        added = Samples(rows[:room])
        assert len(added), "stepped was asked"
        last = raw.contents.part(np.arange(len(raw.contents) - begun, len(raw.contents)))
        before = replace(
            raw, ring=replace(raw.ring, tail=raw.ring.tail - (begun > 0)),
            per_block=raw.per_block[: len(raw.per_block) - (begun > 0)],
        )  # fmt: skip
        bodies = last.joined(added).bodies()
        tier = before.adding(added, [count for _, count in bodies])
        return *self._changed({0: tier}, self.samples + len(added), before.ring, bodies, []), len(added)

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks in use."""
        return (1 + sum(tier.ring.used for tier in self.tiers)) * BLOCK

    @property
    def is_due(self) -> bool:
        """Whether `stepped` has something to do."""
        return any(tier.filled(self.threshold) for tier in self.tiers[:-1])

    def stepped(self) -> tuple[Self, Change] | None:
        """With the oldest blocks of a tier taken together, if one is filled; to be asked until there is no more."""
        for number, tier in enumerate(self.tiers[:-1]):
            if tier.filled(self.threshold):
                return self._taken_together(number)
        return None

    def _taken_together(self, number: int) -> tuple[Self, Change]:
        tier = self.tiers[number]
        blocks, oldest = tier.oldest()
        ring = tier.ring
        holes = list(ring.runs(ring.head, ring.head + blocks))
        if number == len(self.tiers) - 1:
            left = {number: tier.without(blocks)}
            return self._changed(left, self.samples - oldest.count, ring, [], holes)
        following = self.tiers[number + 1]
        windows = oldest.windows().grouped(following.ring.width_ns)
        bodies = windows.bodies()
        if following.ring.used + len(bodies) > following.ring.blocks:
            return self._taken_together(number + 1)
        added = following.adding(windows, [count for _, count in bodies])
        changed = {number: tier.without(blocks), number + 1: added}
        return self._changed(changed, self.samples, following.ring, bodies, holes)

    def _changed(
        self, tiers: dict[int, Tier], samples: int, ring: Ring, bodies: list[tuple[bytes, int]],
        holes: list[tuple[int, int]],
    ) -> tuple[Self, Change]:  # fmt: skip
        """With other tiers; `bodies` come behind what `ring` had before."""
        every = tuple(tiers.get(number, tier) for number, tier in enumerate(self.tiers))
        after = replace(self, tiers=every, samples=samples, generation=self.generation + 1)
        blocks = {ring.place(ring.tail + at): FORM.block(body, after.generation) for at, (body, _) in enumerate(bodies)}
        return after, Change({0: after._first(), **blocks}, holes)

    def _first(self) -> bytes:
        header = _HEADER.pack(self.samples, self.capacity, self.threshold, bytes(8))
        return FORM.block(header + b"".join(tier.ring.pack() for tier in self.tiers), self.generation)

    # Loading

    @classmethod
    def load(cls, read: Read) -> Self:
        """That which a region holds. Raises DamageError."""
        head = Head.unpack(read(0, 1))
        tiers = tuple(_loaded(ring, read, head.generation) for ring in head.rings)
        if sum(tier.contents.count for tier in tiers) != head.samples:
            raise FORM.damage(f"counts {head.samples} samples and holds others")
        return cls(head.capacity, head.threshold, tiers, head.samples, head.generation)


class Head(NamedTuple):
    """What block 0 says."""

    samples: int
    capacity: int
    threshold: float
    rings: tuple[Ring, ...]
    generation: int

    @classmethod
    def unpack(cls, block: bytes) -> Self:
        """That of a block. Raises DamageError."""
        body, generation = FORM.opened(block)
        samples, capacity, threshold, zero = _HEADER.unpack_from(body)
        at = range(_HEADER.size, _HEADER.size + len(WIDTHS_NS) * _TIER.size, _TIER.size)
        rings = tuple(Ring(*_TIER.unpack_from(body, offset)) for offset in at)
        sound = CAPACITY_MIN <= capacity <= CAPACITY_MAX and THRESHOLD_MIN <= threshold <= THRESHOLD_MAX
        places = [replace(ring, head=0, tail=0) for ring in rings]
        sound = sound and not capacity % BLOCK and places == _rings(capacity // BLOCK)
        sound = sound and all(ring.head <= ring.tail <= ring.head + ring.blocks for ring in rings)
        if not sound or zero.strip(b"\0") or body[at.stop :].strip(b"\0"):
            raise FORM.damage("has a header that makes no sense")
        return cls(samples, capacity, threshold, rings, generation)

    def runs(self) -> list[tuple[int, int]]:
        """(start, stop) of the blocks in use behind this one."""
        return [run for ring in self.rings for run in ring.runs(ring.head, ring.tail)]


def _rings(blocks: int) -> list[Ring]:
    """Where the tiers of a region of so many blocks lie."""
    sizes = [(blocks - 1) * part // 8 for part in _EIGHTHS]
    sizes.append(blocks - 1 - sum(sizes))
    starts = [1 + sum(sizes[:number]) for number in range(len(sizes))]
    return [Ring(width, start, size) for width, start, size in zip(WIDTHS_NS, starts, sizes, strict=True)]


def _empty(ring: Ring) -> Tier:
    return Tier(ring, Windows.none() if ring.width_ns else Samples(np.zeros(0, SAMPLE)), np.zeros(0, np.int64))


def _loaded(ring: Ring, read: Read, generation: int) -> Tier:
    kind: type[Contents] = Windows if ring.width_ns else Samples
    bodies = []
    for start, stop in ring.runs(ring.head, ring.tail):
        blocks = read(start, stop - start)
        for at in range(0, len(blocks), BLOCK):
            body, found = FORM.opened(blocks[at : at + BLOCK])
            if found > generation:
                raise FORM.damage("has a block that is newer than the first")
            bodies.append(body)
    contents, per_block = kind.parse(bodies)
    if ring.width_ns and (contents.starts % np.uint64(ring.width_ns)).any():
        raise FORM.damage("has a window that begins beside its place")
    return Tier(ring, contents, per_block)


def flaws(read: Callable[[int], bytes], slot: Slot) -> Iterator[str]:
    """What is wrong with a metrics log, for `verify.VERIFIERS`. Raises DamageError."""

    def several(first: int, count: int) -> bytes:
        return b"".join(read(first + number) for number in range(count))

    history = History.load(several)
    if history.capacity // BLOCK != slot.blocks:
        yield f"says {history.capacity // BLOCK} blocks, and the directory {slot.blocks}"
