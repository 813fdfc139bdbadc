"""Comparing the replicas in the background, from time to time, while one of the nodes leads."""

import logging
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from nbdvde.errors import NbdvdeError
from nbdvde.replication.compare import CHUNK
from nbdvde.replication.verification import Verified, verify

if TYPE_CHECKING:
    from nbdvde.replication.replica import Replica

_log = logging.getLogger(__name__)
_CHUNKS = 2
"""Compared by one entry: some 5 ms in which nothing else is applied."""
_STEP = _CHUNKS * CHUNK
_FIRST_S = 3600.0
"""After the start of a node: whoever ran before may not have come to its end."""
_AGAIN_S = 600.0
"""Between two looks whether a pass is due, and after a failure."""


@dataclass(slots=True)
class Scrubbed:
    """What was found since the node began."""

    compared_bytes: int = 0
    """Of disks, holes included."""
    differences: int = 0
    """Chunks that were not the same everywhere."""
    repaired: int = 0
    """Of these, those that are now."""


class Scrubbing:
    """See above. Whoever has compared everything counts, whichever node asked for that and for whatever reason."""

    def __init__(self, replica: "Replica", every_s: float, rate: int) -> None:
        """A pass begins so long after the end of the last one, and goes on at so many bytes a second at most."""
        self._replica, self._every_s, self._rate = replica, every_s, rate
        self.found = Scrubbed()

    async def run(self) -> None:
        """For ever."""
        due_s = trio.current_time() + min(_FIRST_S, self._every_s)
        pause_s = min(_AGAIN_S, self._every_s)
        while True:
            await trio.sleep_until(due_s)
            now_s, made = trio.current_time(), [lane.machine.comparisons for lane in self._replica.lanes.values()]
            next_s = max(found.whole_s for found in made) + self._every_s
            is_under_way = now_s - max(found.latest_s for found in made) < pause_s
            if next_s <= now_s and self._replica.group.is_leader and not is_under_way:
                await self._pass()
                now_s = trio.current_time()
            due_s = next_s if next_s > now_s else now_s + pause_s

    async def _pass(self) -> None:
        """Compare everything."""
        try:
            async with aclosing(verify(self._replica, repair=True, chunks=_CHUNKS)) as lines:
                async for line in lines:
                    self._note(line)
                    await trio.sleep(_STEP / self._rate)
        except NbdvdeError as error:
            _log.warning("comparing the replicas is put off: %s", error.message)

    def _note(self, line: Verified) -> None:
        self.found.compared_bytes += line.done - (line.done - 1) // _STEP * _STEP
        for difference in line.differences:
            self.found.differences += 1
            self.found.repaired += difference.repaired
            where = f"disk {difference.disk}, offset {difference.offset}"
            nodes = ", ".join(map(str, difference.nodes))
            outcome = "was repaired" if difference.repaired else "stays: see nbdvde cluster verify"
            _log.error("%s: differs on nodes %s, and %s", where, nodes, outcome)
