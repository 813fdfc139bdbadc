"""Appending to a stream that all nodes of a cluster have: many who do share entries of the log."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import trio

from nbdvde.engine.image import Image
from nbdvde.errors import FullError, NbdvdeError
from nbdvde.replication.batches import unknown

ENTRIES_MAX = 256
"""In an entry of the log: 1 MiB."""
Propose = Callable[[Sequence[bytes]], Awaitable[Sequence[int]]]
"""Has all nodes append entries; answers their positions. Raises NbdvdeError."""


@dataclass(eq=False, slots=True)
class _Waiting:
    """Somebody's entries, and what became of them."""

    entries: Sequence[bytes]
    outcome: Sequence[int] | NbdvdeError | None = None


class Appends:
    """Those to one stream. Whoever comes while others' entries are on their way waits, and goes with who waits then."""

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []
        self._turn = trio.Lock()

    async def append(self, entries: Sequence[bytes], propose: Propose) -> Sequence[int]:
        """Append `ENTRIES_MAX` entries at most, all or none; their positions. Raises NbdvdeError."""
        mine = _Waiting(entries)
        self._waiting.append(mine)
        try:
            async with self._turn:
                if mine.outcome is None:
                    await _settle(self._take(), propose)
        finally:
            if mine in self._waiting:
                self._waiting.remove(mine)
        assert mine.outcome is not None, "it was settled"
        if isinstance(mine.outcome, NbdvdeError):
            raise type(mine.outcome)(*mine.outcome.args)
        return mine.outcome

    def _take(self) -> list[_Waiting]:
        """Who goes together, in the order in which they came."""
        taken, count = list[_Waiting](), 0
        while self._waiting and (not taken or count + len(self._waiting[0].entries) <= ENTRIES_MAX):
            taken.append(self._waiting.pop(0))
            count += len(taken[-1].entries)
        return taken


async def _settle(together: Sequence[_Waiting], propose: Propose) -> None:
    try:
        positions = await propose([entry for one in together for entry in one.entries])
        at = 0
        for one in together:
            one.outcome = positions[at : at + len(one.entries)]
            at += len(one.entries)
    except FullError as error:
        if len(together) == 1:
            together[0].outcome = error
        for one in together if len(together) > 1 else ():  # there may be room for some
            await _settle([one], propose)
    except NbdvdeError as error:
        for one in together:
            one.outcome = error
    finally:
        for one in together:
            one.outcome = unknown() if one.outcome is None else one.outcome


_APPENDS: WeakKeyDictionary[Image, dict[str, Appends]] = WeakKeyDictionary()
"""Nothing in there has its image: it would be kept for ever."""


def appends_to(image: Image, disk: str) -> Appends:
    """Those to the stream of a disk, always the same."""
    return _APPENDS.setdefault(image, {}).setdefault(disk, Appends())
