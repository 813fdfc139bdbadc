"""Connections between machines in virtual time: they take time, stop in one direction or both, break, and go on.

What was sent arrives in order, once, or not at all: late if the way was shut meanwhile, even when who sent it is gone.
"""

from collections import deque
from collections.abc import Sequence
from functools import partial
from random import Random

import trio

from nbdvde.disk import Buffer
from tests.sim.stack.clock import clock

_CAPACITY = 1 << 18
"""Bytes on their way in one direction."""
_PATIENCE_S = 3.0
"""Of who connects."""


class Unreachable(Exception):
    """There is nobody, or no way."""


class Wire:
    """One end of a connection: as `nbdvde.transport.Transport`, as `nbdvde.raft.link.Wire`, and as a stream of trio."""

    def __init__(self, net: "Net", here: str, there: str) -> None:
        self._net, self.here, self.there = net, here, there
        self.other = self
        self.gone = False
        """Whether nobody is at this end any more."""
        self.receiving = self.sending = False
        self.sent = 0
        self.due = 0.0
        """When the last of what is on its way here arrives."""
        self.held: deque[bytes | None] = deque()
        """What arrives when the way is open again; None is the end."""
        self._came, self._under_way = bytearray(), 0
        self._ended = self._reset = self._stopped = self._over = False
        self._news, self._room = trio.Event(), trio.Event()

    async def readable(self) -> None:
        while not self._came and not (self._ended or self._reset or self._stopped):
            self.receiving = True
            await self._news.wait()
            self.receiving = False

    async def receive(self, targets: Sequence[memoryview], /, *, poll: bool = False) -> int:
        await self.readable()
        if self._reset:
            raise trio.BrokenResourceError("reset")
        count = 0
        for target in targets:
            part = self._came[: len(target)]
            target[: len(part)] = part
            del self._came[: len(part)]
            count += len(part)
        self.other._under_way -= count
        self.other._room.set()
        return count

    def send_nowait(self, buffers: Sequence[Buffer], /) -> Sequence[Buffer]:
        if self._reset or self._over:
            raise trio.BrokenResourceError("broken")
        if self._under_way >= _CAPACITY:
            return buffers
        data = b"".join(buffers)
        self.sent += len(data)
        self._under_way += len(data)
        self._net.send(self.other, data)
        return ()

    async def send(self, buffers: Sequence[Buffer], /) -> None:
        while buffers := self.send_nowait(buffers):
            self.sending, self._room = True, trio.Event()
            await self._room.wait()
            self.sending = False

    async def send_all(self, data: bytes) -> None:
        await self.send([data])

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        target = bytearray(max_bytes or 4096)
        return bytes(target[: await self.receive([memoryview(target)])])

    def stop(self) -> None:
        self._stopped = True
        self._tell()

    async def finish(self, patience_s: float) -> None:
        self._end()
        with trio.move_on_after(patience_s):
            while self._stopped and not (self._ended or self._reset):
                await self._news.wait()

    async def aclose(self) -> None:
        self._end()
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        self._end()
        self._ended = True
        self._tell()

    def close(self) -> None:
        self.abort()
        self.gone = True

    def vanish(self, *, loud: bool) -> None:
        """The machine is off; `loud`: its system tells the other side."""
        self.gone = self._over = True
        if loud:
            self._net.send(self.other, None)

    def take(self, chunk: bytes | None) -> None:
        """Something arrives."""
        if self.gone:
            if chunk is not None and self._net.is_up(self.here):
                self.other._reset = True
                self.other._tell()
        elif chunk is None:
            self._ended = True
        else:
            self._came += chunk
        self._tell()

    def _end(self) -> None:
        if not self._over:
            self._over = True
            self._net.send(self.other, None)

    def _tell(self) -> None:
        self._room.set()
        self._news.set()
        self._news = trio.Event()


class Net:
    """All connections."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self.latency_s = 0.001
        self.shut: set[tuple[str, str]] = set()
        """From whom to whom nothing arrives."""
        self._up: set[str] = set()
        self._wires: dict[Wire, None] = {}

    def switch(self, machine: str, *, on: bool) -> None:
        (self._up.add if on else self._up.discard)(machine)

    def is_up(self, machine: str) -> bool:
        return machine in self._up

    async def connect(self, here: str, there: str) -> tuple[Wire, Wire]:
        """Both ends of a new connection. Raises Unreachable."""
        await trio.sleep(self._delay())
        if self.shut & {(here, there), (there, here)}:
            await trio.sleep(_PATIENCE_S)
            raise Unreachable(there)
        if there not in self._up:
            raise Unreachable(there)
        ours, theirs = Wire(self, here, there), Wire(self, there, here)
        ours.other, theirs.other = theirs, ours
        self._wires |= {ours: None, theirs: None}
        return ours, theirs

    def of(self, machine: str) -> list[Wire]:
        """The ends that a machine has."""
        return [wire for wire in self._wires if wire.here == machine and not wire.gone]

    def mend(self) -> None:
        """Open all ways; what waited arrives."""
        self.shut.clear()
        self._wires = {wire: None for wire in self._wires if not (wire.gone and wire.other.gone)}
        for wire in self._wires:
            held, wire.held = wire.held, deque()
            for chunk in held:
                self.send(wire, chunk)

    def send(self, target: Wire, chunk: bytes | None) -> None:
        """Have something arrive at an end, after all that was sent before."""
        if target.held:
            target.held.append(chunk)
            return
        target.due = max(target.due, trio.current_time() + self._delay())
        clock().at(target.due, partial(self._deliver, target, chunk))

    def _deliver(self, target: Wire, chunk: bytes | None) -> None:
        if target.held or (target.there, target.here) in self.shut:
            target.held.append(chunk)
        else:
            target.take(chunk)

    def _delay(self) -> float:
        return self.latency_s * (0.5 + self._random.random())
