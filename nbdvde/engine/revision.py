"""Blocks of a disk that are to lie elsewhere and hold what they hold: all that is needed to say so to the writer.

Between the moment in which somebody looked where blocks lie and the commit that moves them, clients write. So with the
commit lock held each block is looked at again: it moves only if its map entry is the one that was seen, and if both
segments, that it lay in and that it will lie in, are the ones that were seen. One of the same slot may be another by
now, with other data. What waits in the write buffer is no matter: it is committed afterwards.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nbdvde.disk import BLOCK, Buffer
from nbdvde.engine.buffer import Generation
from nbdvde.engine.duplicates import Split, references_to
from nbdvde.engine.layout import SLOT_SHIFT
from nbdvde.engine.segments import State
from nbdvde.engine.volume import Volume

_REFERENCE_COST = 64
"""Bytes of log that a reference takes at most, rounded up."""


def _never(state: State) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Revision:
    """Blocks, ascending, that lie in `old` entries. To be stored again (`pages`), or references (`new`)."""

    volume: Volume
    blocks: Sequence[int]
    old: Sequence[int]
    states: dict[int, State]
    """The segments that were seen, by slot."""
    pages: Sequence[Buffer] = ()
    new: Sequence[int] = ()
    may_refer_to: Callable[[State], bool] = _never
    """Asked of the segments of `new`, with the commit lock held."""

    @property
    def cost(self) -> int:
        """Bytes to reserve."""
        return len(self.pages) * BLOCK or BLOCK + len(self.new) * _REFERENCE_COST

    async def still(self) -> list[int]:
        """Numbers of the blocks that lie where they did, in the segment that it was. Raises DamageError."""
        holds = await self.volume.unchanged(self.blocks, self.old)
        return [at for at, entry in enumerate(self.old) if holds[at] and self._is_seen(entry)]

    def _is_seen(self, entry: int) -> bool:
        slot = entry >> SLOT_SHIFT
        return slot in self.states and self.volume.segments.states.get(slot) is self.states[slot]

    def stored(self, chosen: Sequence[int]) -> Generation:
        """The chosen blocks as if they had been written."""
        generation = Generation()
        generation.blocks = {self.blocks[at]: self.pages[at] for at in chosen}
        return generation

    def referring(self, chosen: Sequence[int]) -> Split | None:
        """References for those of the chosen blocks whose target may still be referred to, if there are any."""
        good = [at for at in chosen if self._is_seen(self.new[at])]
        good = [at for at in good if self.may_refer_to(self.states[self.new[at] >> SLOT_SHIFT])]
        return references_to([self.blocks[at] for at in good], [self.new[at] for at in good]) if good else None
