"""Who makes the regions of a disk, and gives up what is no longer needed."""

from typing import TYPE_CHECKING

import trio

from nbdvde.admin import streamcalls, wormcalls
from nbdvde.disk import BLOCK
from nbdvde.errors import NoSpaceError, RefusedError, UsageError
from tests.sim.stack.history import Violation
from tests.sim.stack.life import Life
from tests.sim.stack.regions import CERTAIN, DISK, STREAM_ENTRIES, WORM_BLOCKS, Regions, UnknownError, call

if TYPE_CHECKING:
    from tests.sim.stack.world import World

_SECOND_NS = 10**9
_PAUSE_S = 0.2


class Keeper:
    """One, who does one thing after the other."""

    def __init__(self, world: "World", regions: Regions) -> None:
        self._world, self._random, self._regions = world, world.random, regions
        self._first_s = self._random.uniform(1, 4)
        """For which a WORM region is retained in the beginning."""
        self._born_s = 0.0
        """It was not there before."""
        self._retained_s = 0.0
        """From then on, at least."""

    async def run(self) -> None:
        """Until the world comes to rest."""
        deeds = (self._advance, self._extend, self._give_up)
        while not self._world.resting:
            if life := self._world.any_life():
                if not self._regions.has_stream:
                    await self._make_stream(life)
                elif not self._regions.has_worm:
                    await self._make_worm(life)
                else:
                    await self._random.choices(deeds, (4, 1, 2))[0](life)
            await trio.sleep(1.5 * self._random.random())

    def _done(self, what: str) -> None:
        self._world.counts[what] += 1
        self._world.note(what)

    async def _make_stream(self, life: Life) -> None:
        request = streamcalls.CreateStream(STREAM_ENTRIES * BLOCK, DISK, self._regions.policy, BLOCK)
        try:
            await call(life, streamcalls.CREATE, request)
        except RefusedError:  # nobody knew that it was made
            pass
        except (NoSpaceError, UnknownError):
            return
        self._regions.has_stream = True
        self._done("streams made")

    async def _make_worm(self, life: Life) -> None:
        request = wormcalls.CreateWorm(WORM_BLOCKS * BLOCK, int(self._first_s * _SECOND_NS), DISK)
        try:
            await call(life, wormcalls.CREATE, request)
        except RefusedError:
            pass
        except (NoSpaceError, UnknownError):
            return
        self._retained_s = self._first_s
        self._regions.has_worm = True
        self._done("WORM regions made")

    async def _advance(self, life: Life) -> None:
        stream = self._regions.stream
        position = self._random.randint(stream.tail, stream.head)
        stream.give_up(position)
        try:
            told = await call(life, streamcalls.ADVANCE, streamcalls.AdvanceTail(position, DISK))
        except (*CERTAIN, UnknownError):
            return
        stream.gave_up(told.tail)
        self._done("streams advanced")

    async def _extend(self, life: Life) -> None:
        longer_s = self._retained_s + 1
        try:
            await call(life, wormcalls.EXTEND, wormcalls.ExtendRetention(int(longer_s * _SECOND_NS), DISK))
        except (*CERTAIN, UnknownError):
            return
        self._retained_s = longer_s
        self._done("WORM regions extended")

    async def _give_up(self, life: Life) -> None:
        """The WORM region, if that may be."""
        self._regions.has_worm = False
        while self._regions.busy:  # noqa: ASYNC110 - nobody tells of it
            await trio.sleep(_PAUSE_S)
        try:
            await call(life, wormcalls.DELETE, wormcalls.WormRequest(DISK))
        except UsageError:  # nobody knew that it was given up
            self._is_gone()
        except CERTAIN:
            self._regions.has_worm = True
            self._done("WORM regions retained")
        except UnknownError:
            self._regions.has_worm = self._regions.may_end = True  # clients find out
        else:
            self._is_gone()

    def _is_gone(self) -> None:
        now_s = trio.current_time()
        if now_s - self._born_s < self._retained_s:
            raise Violation(f"a WORM region is gone after less than {now_s - self._born_s} s, not {self._retained_s}")
        self._born_s = now_s
        self._regions.may_end = False
        self._regions.worm.begin_again()
        self._done("WORM regions given up")
