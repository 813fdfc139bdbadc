"""Dictionaries of an image that is optimized: whether its small extents hold enough for them, and training from those.

Only what disks and snapshots use is looked at, as a dictionary keeps pieces of what it is trained from.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np

from nbdvde import workers
from nbdvde.disk import BLOCK
from nbdvde.engine.checkpointer import Checkpointer
from nbdvde.engine.dictchange import Keep, train_each
from nbdvde.engine.dictusers import small_units
from nbdvde.engine.extent import SMALL_BLOCKS, Decoder
from nbdvde.engine.layout import SLOT_SHIFT, UNIT_SHIFT, Kind, unpack_index
from nbdvde.engine.pace import Pace, Progress
from nbdvde.engine.report import ClassReport
from nbdvde.engine.segments import Segments, State
from nbdvde.engine.training import SIZE, Trained, Trainer
from nbdvde.engine.uses import NEVER, Uses
from nbdvde.errors import DamageError

SAMPLES = 4096
"""Extents that are trained from: in a class or two that is a hundred times what a dictionary takes."""
_BATCH = 64
"""Extents between two points where the work may be ended."""
_INDEX_BYTES = 8
T = TypeVar("T")


class _Extent(NamedTuple):
    unit: int
    position: int
    length: int
    blocks: int


@dataclass(slots=True)
class Lesson:
    """What came of it: class by class, or why there is nothing to train for."""

    classes: list[ClassReport] = field(default_factory=list)
    note: str = ""


class Learning:
    """Trains once for what an image holds in small extents."""

    def __init__(
        self, segments: Segments, checkpointer: Checkpointer, uses: Uses, decoder: Decoder, pace: Pace
    ) -> None:
        """`uses` has been told of all disks and snapshots, and of nothing else."""
        self._segments, self._checkpointer, self._uses = segments, checkpointer, uses
        self._decoder, self._pace = decoder, pace

    async def run(self, states: Sequence[State], trainer: Trainer, keep: Keep, progress: Progress) -> Lesson:
        """Train for the small extents of these segments; `keep` registers what pays. Ends cleanly when cancelled."""
        counts: list[int] = []
        stored = contents = 0
        for number, state in enumerate(states):
            progress(number, 3 * len(states))
            small = await self._looked_into(state, self._small)
            await self._pace.spend(len(small) * _INDEX_BYTES)
            counts.append(len(small))
            stored += sum(extent.length for extent in small)
            contents += sum(extent.blocks for extent in small) * BLOCK
        if stored <= SIZE:
            return Lesson(note=f"extents of up to {SMALL_BLOCKS * BLOCK >> 10} KiB take no more than one would")
        samples = await self._sample(states, counts, progress)

        async def keep_what_pays(trained: Trained) -> int | str:
            of_class = contents * trained.samples / len(samples)
            saved = of_class * (trained.known_bytes - trained.trained_bytes) / trained.raw_bytes
            return await keep(trained) if saved > len(trained.content) else "saves less than it takes"

        classes = await train_each(trainer.by_class(samples), keep_what_pays)
        return Lesson(classes, "" if classes else "nothing that could be compressed better was found")

    async def _sample(self, states: Sequence[State], counts: Sequence[int], progress: Progress) -> list[bytes]:
        """The contents of extents at random, the same each time."""
        chance = random.Random(0)  # noqa: S311 - no secret
        ends = np.cumsum(counts)
        chosen = np.array(sorted(chance.sample(range(int(ends[-1])), min(SAMPLES, int(ends[-1])))))
        samples: list[bytes] = []
        for number, state in enumerate(states):
            first = int(ends[number]) - counts[number]
            wanted = chosen[(chosen >= first) & (chosen < ends[number])] - first
            for part in range(0, len(wanted), _BATCH):
                progress(len(states) + number, 3 * len(states))
                contents = await self._looked_into(
                    state, partial(self._contents, wanted[part : part + _BATCH].tolist())
                )
                await self._pace.spend(sum(map(len, contents)))
                samples += contents
        chance.shuffle(samples)
        return samples

    async def _looked_into(self, state: State, work: Callable[[State], list[T]]) -> list[T]:
        """What there is to find in a segment: nothing when it was replaced meanwhile, or is damaged."""
        with self._checkpointer.reading():
            if self._segments.states.get(state.segment.slot) is not state:
                return []
            try:
                return await workers.run(work, state)
            except DamageError:  # reading reports it, and `check`
                return []

    def _small(self, state: State) -> list[_Extent]:
        """The small extents in use of a segment."""
        index = self._segments.index(state)
        units = np.array(small_units(index), np.uint64)
        first = np.uint64(state.segment.slot << SLOT_SHIFT) | units << np.uint64(UNIT_SHIFT)
        used = [self._uses.of(first | np.uint64(block)) != NEVER for block in range(SMALL_BLOCKS)]
        return [_Extent(unit, *unpack_index(index[unit])) for unit in units[np.any(used, axis=0)].tolist()]

    def _contents(self, wanted: Sequence[int], state: State) -> list[bytes]:
        """Of some of the small extents of a segment, by their place among those."""
        small = self._small(state)
        return [self._content(state, small[place]) for place in wanted]

    def _content(self, state: State, extent: _Extent) -> bytes:
        sealed = self._segments.read(state.segment.offset + extent.position, extent.length)
        plain = state.sealer.open(extent.unit, Kind.EXTENT, sealed, blocks=extent.blocks)
        return self._decoder.frame(plain, extent.blocks, 0)
