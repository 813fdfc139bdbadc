"""Comparing the replicas in the background, from time to time, while one of the nodes leads."""

import logging
import math
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
"""After a failure."""


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
    """See above. Whatever compares counts, by whichever node and for whatever reason."""

    def __init__(self, replica: "Replica", every_s: float, rate: int) -> None:
        """A pass begins so long after the last comparison, and goes on at so many bytes a second at most."""
        self._replica, self._every_s, self._rate = replica, every_s, rate
        self.found = Scrubbed()

    async def run(self) -> None:
        """For ever."""
        due_s = trio.current_time() + min(_FIRST_S, self._every_s)
        while True:
            await trio.sleep_until(due_s)
            if not self._replica.group.is_leader:
                due_s = trio.current_time() + min(_AGAIN_S, self._every_s)
            elif (next_s := self._latest_s + self._every_s) > trio.current_time():
                due_s = next_s
            else:
                due_s = await self._pass()

    @property
    def _latest_s(self) -> float:
        """When anything was compared last."""
        lanes = self._replica.lanes.values()
        return max((lane.machine.comparisons.latest_s for lane in lanes), default=-math.inf)

    async def _pass(self) -> float:
        """Compare everything; when the next one is due."""
        try:
            async with aclosing(verify(self._replica, repair=True, chunks=_CHUNKS)) as lines:
                async for line in lines:
                    self._note(line)
                    await trio.sleep(_STEP / self._rate)
        except NbdvdeError as error:
            _log.warning("comparing the replicas is put off: %s", error.message)
            return trio.current_time() + _AGAIN_S
        return trio.current_time() + self._every_s

    def _note(self, line: Verified) -> None:
        self.found.compared_bytes += line.done - (line.done - 1) // _STEP * _STEP
        for difference in line.differences:
            self.found.differences += 1
            self.found.repaired += difference.repaired
            where = f"disk {difference.disk}, offset {difference.offset}"
            nodes = ", ".join(map(str, difference.nodes))
            outcome = "was repaired" if difference.repaired else "stays: see nbdvde cluster verify"
            _log.error("%s: differs on nodes %s, and %s", where, nodes, outcome)
