"""Clients that speak NBD: each reads and writes blocks of a disk, and comes back when its connection ends."""

import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from nbdvde.errors import NbdErrno
from nbdvde.protocol.constants import Command, CommandFlag, Option, OptionReply
from tests.protocol.client import Reply, Talk, info_data
from tests.sim.stack.history import BLOCK, Disk, Session, Violation
from tests.sim.stack.life import Life
from tests.sim.stack.register import Op
from tests.sim.stack.universe import STRIPE
from tests.sim.stack.wires import Unreachable, Wire

if TYPE_CHECKING:
    from tests.sim.stack.world import World

BLOCKS = (0, 1, 2, 3, 300, 301, 302, 520)
"""Where requests begin: in three chunks of what is compared."""
SPREAD = (0, 4, 300, 304, 520)
"""One in each stripe of those."""
USED = tuple(sorted({block for first in BLOCKS for block in range(first, first + 3)}))
_ANSWER_S = 1.0, 7.0
"""After which clients take a connection for dead: from the most to the least impatient."""
_REFUSALS = {NbdErrno.ENOSPC, NbdErrno.EPERM, NbdErrno.EINVAL}
"""Errors that say that nothing was done."""
LOST = (EOFError, trio.BrokenResourceError, trio.TooSlowError, Unreachable)
"""What ends a connection."""


class Refused(Exception):
    """A client is not let in."""


@dataclass(slots=True)
class _Asked:
    """A request."""

    blocks: range
    begun: int
    ops: Sequence[Op]
    """Empty for what only reads."""
    command: Command


def page(value: int) -> bytes:
    """A block that says what it is."""
    return value.to_bytes(8, "little") * (BLOCK // 8)


def value_of(block: bytes) -> int:
    """What a block says. Raises Violation."""
    value: int
    (value,) = struct.unpack_from("<Q", block)
    if block != page(value):
        raise Violation("a block holds parts of several writes")
    return value


def values_of(blocks: Sequence[int], data: bytes) -> dict[int, int]:
    """The same of several."""
    return {block: value_of(data[at * BLOCK : (at + 1) * BLOCK]) for at, block in enumerate(blocks)}


class User:
    """One client, of a disk, at times with two connections."""

    def __init__(self, world: "World", name: str, disk: Disk, *, rival: bool = False) -> None:
        """A `rival` comes now and then only."""
        self._world, self._random, self.name, self.disk = world, world.random, name, disk
        self._rival = rival
        self._unanswered: dict[int, int] = {}
        """Blocks and values of which it does not know whether they were written."""
        self._cookie = 0
        self._answer_s = self._random.uniform(*_ANSWER_S)

    async def run(self) -> None:
        """Use the disk until the world comes to rest, or the disk to its end."""
        while not self._world.resting and not self.disk.doomed:
            life = self._world.any_life()
            if life:
                with suppress(*LOST, Refused):
                    await self._visit(life)
            await trio.sleep((3.0 if self._rival else 0.3) * self._random.random())

    async def _visit(self, life: Life) -> None:
        session = Session(life.node)
        talk = await self._enter(life, session)
        async with trio.open_nursery() as nursery:
            if self._random.random() < 0.4:
                nursery.start_soon(self._join, life)
            with suppress(*LOST, Refused):
                again, self._unanswered = self._unanswered, {}
                for block, value in again.items() if self._random.random() < 0.7 else ():
                    await self._batch(talk, session, [self._write(session, range(block, block + 1), value)])
                await self._use(talk, session)
            talk.wire.abort()
        self._world.note(f"{self.name} leaves {life.name}")

    async def _join(self, life: Life) -> None:
        """A second connection: the first may have ended already, so what fences that need not fence this one."""
        session = Session(life.node)
        with suppress(*LOST, Refused):
            talk = await self._enter(life, session)
            try:
                await self._use(talk, session)
            finally:
                talk.wire.abort()

    async def _enter(self, life: Life, session: Session) -> "Talker":
        history = self._world.history
        begun = history.moment()
        talk = await entered(life, self.name, self.disk.name, self._answer_s)
        if self.disk.doomed:
            talk.wire.abort()
            raise Refused
        history.fence(self.disk, begun, life.node)
        session.granted = min(session.granted, history.moment())
        self._world.note(f"{self.name} enters {self.disk.name} at {life.name}")
        return talk

    async def _use(self, talk: "Talker", session: Session) -> None:
        random = self._random
        for _ in range(random.randint(3, 12) if self._rival else random.randint(5, 60)):
            if self._world.resting or self.disk.doomed:
                break
            batch = [self._request(session) for _ in range(random.choice((1, 1, 2, 4)))]
            await self._batch(talk, session, batch)
            await trio.sleep(random.random() * random.choice((0.01, 0.4, 1.2)))
        if random.random() < 0.7:
            await talk.send(Command.DISC)

    # Requests

    def _request(self, session: Session) -> "tuple[_Asked, bytes, int]":
        random = self._random
        first = random.choice(BLOCKS)
        blocks = range(first, min(first + random.choice((1, 1, 2, 3)), self.disk.blocks))
        if not blocks:
            blocks = range(1)
        draw = random.random()
        if draw < 0.5:
            return self._write(session, blocks)
        if draw < 0.85:
            return _Asked(blocks, self._world.history.moment(), (), Command.READ), b"", 0
        if draw < 0.9:
            return _Asked(blocks, self._world.history.moment(), (), Command.FLUSH), b"", 0
        command = Command.TRIM if draw < 0.95 else Command.WRITE_ZEROES
        ops = self._world.history.begin(self.disk, session, dict.fromkeys(blocks, 0))
        flags = CommandFlag.NO_HOLE if command == Command.WRITE_ZEROES and random.random() < 0.5 else 0
        return _Asked(blocks, 0, ops, command), b"", int(flags)

    def _write(self, session: Session, blocks: range, value: int = 0) -> "tuple[_Asked, bytes, int]":
        values = {block: value or self._world.history.fresh() for block in blocks}
        ops = self._world.history.begin(self.disk, session, values)
        flags = CommandFlag.FUA if self._random.random() < 0.3 else 0
        return _Asked(blocks, 0, ops, Command.WRITE), b"".join(map(page, values.values())), int(flags)

    async def _batch(self, talk: "Talker", session: Session, batch: "Sequence[tuple[_Asked, bytes, int]]") -> None:
        """Ask for several things at once, and wait for the answers. Raises what ends the connection."""
        waiting: dict[int, _Asked] = {}
        try:
            with trio.fail_after(self._answer_s):
                for asked, payload, flags in batch:
                    self._cookie += 1
                    waiting[self._cookie] = asked
                    offset, length = asked.blocks.start * BLOCK, len(asked.blocks) * BLOCK
                    if asked.command == Command.FLUSH:
                        offset = length = 0
                    given = {"payload": payload} if asked.command == Command.WRITE else {}
                    await talk.send(asked.command, offset, length, cookie=self._cookie, flags=flags, **given)
                while waiting:
                    reply = await talk.reply()
                    self._answered(waiting.pop(reply.cookie), reply)
        except (EOFError, trio.BrokenResourceError):
            session.ended = True
            raise
        finally:
            for asked in waiting.values():
                if asked.command == Command.WRITE:
                    self._unanswered |= {block: op.value for block, op in zip(asked.blocks, asked.ops, strict=True)}

    def _answered(self, asked: _Asked, reply: Reply) -> None:
        history = self._world.history
        if reply.error:
            if reply.error not in _REFUSALS:
                raise Violation(f"{self.name}: {asked.command.name} was answered with error {reply.error}")
            if len({block * BLOCK // STRIPE for block in asked.blocks}) == 1:
                history.refused(self.disk, asked.ops)
            else:  # a part of it may be done
                history.given_up(self.disk, asked.ops)
            self._world.counts["refused"] += 1
            self._world.note(f"{self.name}: {asked.command.name} {asked.blocks} refused: {reply.error} {reply.message}")
        elif asked.command == Command.READ:
            history.read(self.disk, asked.begun, values_of(asked.blocks, reply.bytes))
        else:
            history.done(self.disk, asked.ops)


class Talker(Talk):
    """A conversation by way of a wire."""

    def __init__(self, wire: Wire) -> None:
        super().__init__(wire)
        self.wire = wire


async def entered(life: Life, caller: str, export: str, patience_s: float) -> Talker:
    """A client of an export. Raises Refused, or what ends a connection."""
    talk = Talker(await life.connect(caller))
    try:
        with trio.fail_after(patience_s):
            await talk.greet()
            talk.structured = True
            await talk.option(Option.STRUCTURED_REPLY)
            answer = (await talk.option(Option.GO, info_data(export)))[-1][0]
        if answer != OptionReply.ACK:
            raise Refused
    except BaseException:
        talk.wire.abort()
        raise
    return talk


async def write_through(world: "World", life: Life, disk: Disk) -> None:
    """Write to each stripe, for sure, unless the disk comes to its end."""
    user = User(world, f"last-{life.node}-{disk.name}", disk)
    while not disk.doomed:
        session = Session(life.node)
        with suppress(*LOST, Refused):
            talk = await user._enter(life, session)
            blocks = [block for block in SPREAD if block < disk.blocks]
            await user._batch(talk, session, [user._write(session, range(block, block + 1)) for block in blocks])
            await talk.send(Command.DISC)
            talk.wire.abort()
            return
        await trio.sleep(0.1)


def contents_of(blocks: Mapping[int, bytes]) -> dict[int, int]:
    """What blocks hold."""
    return {block: value_of(data) for block, data in blocks.items()}
