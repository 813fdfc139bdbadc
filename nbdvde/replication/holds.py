"""Having something done while all groups of an image stand still (see `assembly`), from the node that wants it."""

from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import cast

import trio

from nbdvde.errors import DetachedError, MovedError, NbdvdeError, QuorumError
from nbdvde.replication.assembly import Assembly
from nbdvde.replication.lane import Lane
from nbdvde.replication.operations import Begin, GiveUp, Hold, Operation
from nbdvde.replication.together import together

_PAUSE_S = 0.05
"""Between two tries, while another node holds the groups."""
_HOLD_S = 5.0
"""After this the leader gives a hold up whose node does not."""
_LOOK_S = 0.5


class Holds:
    """Those that a node has begun, or looks after as it leads `default`."""

    def __init__(
        self, assembly: Assembly, main: Lane, sharing: Callable[[], Awaitable[Iterable[Lane]]], nursery: trio.Nursery
    ) -> None:
        """`main` is that of `default`; `sharing` waits for those of all other groups that have a part of the disks."""
        self._assembly, self._main, self._sharing, self._nursery = assembly, main, sharing, nursery

    async def call(self, make: Callable[[int], Operation], growth: int) -> object:
        """Have an operation of `default` done, under a hold if there are several groups; its result.

        `growth`: see `Lane.propose`.
        """
        while self._assembly.routing.alone:
            try:
                return await self._main.propose(make(0), growth=growth)
            except MovedError:
                await self._main.barrier()
        return await self.under_hold(make, growth)

    async def under_hold(self, make: Callable[[int], Operation], growth: int = 0) -> object:
        """`make` the operation with the number of its hold. Raises NbdvdeError."""
        hold = await self._begin(growth)
        try:
            await self._main.barrier()  # of the groups that there are then none comes or goes before that is over
            with trio.move_on_after(_HOLD_S) as patience:
                await self._hold(hold)
            if patience.cancelled_caught:
                raise QuorumError("cluster", "not all groups have a leader", "see nbdvde cluster groups")
            return await self._main.propose(make(hold), growth=growth)
        except BaseException:
            self._nursery.start_soon(self._give_up, hold)
            raise

    async def _hold(self, hold: int) -> None:
        """Have all groups stand still that do not."""
        lanes = [lane for lane in await self._sharing() if lane.machine.held < hold]
        await together([partial(lane.propose, Hold(hold)) for lane in lanes])

    async def _begin(self, growth: int) -> int:
        """Where there is room: making some takes longer than all should stand still."""
        while True:
            try:
                if hold := cast(int, await self._main.propose(Begin(), growth=growth)):
                    return hold
            except DetachedError:  # one that nobody knows of is given up
                pass
            await trio.sleep(_PAUSE_S)

    async def _give_up(self, hold: int) -> None:
        while self._assembly.settled < hold:
            try:
                await self._main.propose(GiveUp(hold))
            except DetachedError:
                await trio.sleep(_PAUSE_S)

    async def watch(self) -> None:
        """While this node leads, give up what nobody ends; for ever."""
        seen, since = 0, trio.current_time()
        while True:
            await trio.sleep(_LOOK_S)
            if self._assembly.holding != seen or not self._main.group.is_leader:
                seen, since = self._assembly.holding, trio.current_time()
            elif seen and trio.current_time() - since > _HOLD_S:
                with trio.move_on_after(_HOLD_S), suppress(NbdvdeError):  # what `default` agreed on may wait for it
                    await self._hold(seen)
                await self._give_up(seen)
