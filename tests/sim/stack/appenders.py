"""Clients that append to the stream and the WORM region of a disk, and read them, by calls and by NBD."""

from collections.abc import Awaitable
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from nbdvde.admin import wormcalls
from nbdvde.disk import BLOCK
from nbdvde.errors import NbdErrno
from nbdvde.protocol.constants import Command
from tests.sim.stack.history import Violation
from tests.sim.stack.journal import Append
from tests.sim.stack.life import Life
from tests.sim.stack.regions import CERTAIN, DISK, Regions, UnknownError, call
from tests.sim.stack.users import LOST, Refused, Talker, entered

if TYPE_CHECKING:
    from tests.sim.stack.world import World

_PATIENCE_S = 6.0
_REFUSALS = {NbdErrno.ENOSPC, NbdErrno.EPERM, NbdErrno.EINVAL}


class Appender:
    """One client."""

    def __init__(self, world: "World", regions: Regions, name: str) -> None:
        self._world, self._random, self._regions, self._name = world, world.random, regions, name

    async def run(self) -> None:
        """Append and read until the world comes to rest."""
        while not self._world.resting:
            await trio.sleep(self._random.random())
            if life := self._world.any_life():
                await (self._use_stream(life) if self._random.random() < 0.5 else self._use_worm(life))

    async def _use_stream(self, life: Life) -> None:
        regions, random = self._regions, self._random
        if not regions.has_stream:
            return
        if random.random() < 0.7:
            entries = [regions.stream.fresh(random.choice((8, 40, 4096))) for _ in range(random.randint(1, 4))]
            await regions.to_stream(life, entries, wait=random.random() < 0.5)
        else:
            await self._told("stream read", regions.read_stream(life))

    async def _use_worm(self, life: Life) -> None:
        regions, draw = self._regions, self._random.random()
        if not regions.has_worm:
            return
        with regions.using_worm():
            if draw < 0.4:
                await regions.to_worm(life, regions.worm.fresh(self._random.choice((8, 4096, 9000))))
            elif draw < 0.7:
                await self._told("WORM region used by NBD", self._visit(life))
            else:
                await self._told("WORM region read", regions.read_worm(life))

    async def _told(self, what: str, reading: Awaitable[None]) -> None:
        with suppress(*CERTAIN, UnknownError, Refused, *LOST):
            await reading
            self._world.counts[what] += 1

    async def _visit(self, life: Life) -> None:
        """Write at the mark of the WORM region, and read something that is there."""
        mark = (await call(life, wormcalls.RETENTION, wormcalls.WormRequest(DISK))).mark // BLOCK
        talk = await entered(life, self._name, f"{DISK}/worm", _PATIENCE_S)
        try:
            with trio.fail_after(_PATIENCE_S):
                await self._write(talk, mark)
                await self._read(talk)
                await talk.send(Command.DISC)
        finally:
            talk.wire.abort()

    async def _write(self, talk: Talker, mark: int) -> None:
        """Several at once, one behind the other."""
        journal, waiting = self._regions.worm, dict[int, tuple[Append, int]]()
        for cookie in range(1, self._random.randint(2, 4)):
            entry = journal.fresh(BLOCK * self._random.choice((1, 1, 2)))
            waiting[cookie] = journal.begin([entry]), mark
            await talk.send(Command.WRITE, mark * BLOCK, cookie=cookie, payload=entry)
            mark += len(entry) // BLOCK
        while waiting:
            reply = await talk.reply()
            append, at = waiting.pop(reply.cookie)
            if not reply.error:
                journal.done(append, [at])
            elif reply.error in _REFUSALS:
                journal.refused(append)
            else:
                raise Violation(f"a write to the WORM region was answered with error {reply.error}")

    async def _read(self, talk: Talker) -> None:
        sample = self._regions.worm.sample(self._random.randrange(1 << 20))
        if sample:
            at, entry = sample
            reply = await talk.ask(Command.READ, at * BLOCK, len(entry))
            if reply.error or reply.bytes != entry:
                raise Violation(f"a read of the WORM region at {at} was answered with {reply.error} {reply.message}")
