"""A connection between two nodes: what it carries, in both directions, and signs of life."""

from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from nbdvde.disk import Buffer
from nbdvde.errors import NetworkError
from nbdvde.raft.wire import Beats, Frame, Hello, Incoming, Outgoing, WireError

_SEND_BYTES = 1 << 18
"""Of what waits, at a time: what becomes urgent meanwhile waits for no more."""


class Wire(Protocol):
    """Bytes in and out, as `nbdvde.transport.Transport`. Errors are trio.BrokenResourceError."""

    async def receive(self, targets: Sequence[memoryview], /) -> int: ...
    async def readable(self) -> None: ...
    def send_nowait(self, buffers: Sequence[Buffer], /) -> Sequence[Buffer]: ...
    async def send(self, buffers: Sequence[Buffer], /) -> None: ...
    def abort(self) -> None: ...
    def close(self) -> None: ...


class Link:
    """One connection. It owns the wire."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._incoming, self._outgoing = Incoming(), Outgoing()
        self._early: list[Frame] = []
        """Frames that came together with the hello."""
        self._left: Sequence[Buffer] = ()
        """What the kernel has not taken."""
        self._wake, self._room = trio.Event(), trio.Event()
        self._silence = 0
        self._drained = False
        """Whether everything that had come was received."""
        self._is_over = False
        self._said = False
        """Whether anything was sent since the last tick."""

    async def hello(self, mine: Hello) -> Hello:
        """Say hello; what the other side says. Raises NetworkError."""
        self.send(mine)
        try:
            await self._wire.send(self._outgoing.take(_SEND_BYTES))
        except trio.BrokenResourceError as error:
            raise _broken(error) from None
        while not self._early:
            self._early = await self._received()
        first = self._early.pop(0)
        if not isinstance(first, Hello):
            raise WireError("what a node says", "does not begin with a hello")
        return first

    async def run(self, deliver: Callable[[Sequence[Frame]], None]) -> NetworkError:
        """Hand out what comes, send what is to be sent, until the connection ends; why it did."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send)
            try:
                deliver(self._early)
                while True:
                    frames = await self._received()
                    self._silence = 0
                    deliver(frames)
                    if not self._drained:
                        await trio.lowlevel.checkpoint()  # whoever floods us must not hold up the others
            except NetworkError as error:
                nursery.cancel_scope.cancel()
                return error
            finally:
                self._is_over = True
                self._has_room()

    def send(self, frame: Frame) -> bool:
        """Have a frame sent, at the latest with the next `flush`; False when too much waits. Raises WireError."""
        self._said = True
        return self._outgoing.put(frame)

    def flush(self) -> None:
        """Send what waits, as far as the kernel takes it; a task sends the rest."""
        if self._outgoing and not self._left:
            try:
                self._left = self._wire.send_nowait(self._outgoing.take(_SEND_BYTES))
            except trio.BrokenResourceError:
                self._wire.abort()  # who receives sees the end
                return
            self._has_room()
        if self._outgoing or self._left:
            self._wake.set()

    async def send_when_room(self, frame: Frame) -> None:
        """As `send` and `flush`, waiting while too much waits. Raises NetworkError when it is over."""
        while not self._is_over:
            if self.send(frame):
                self.flush()
                await trio.lowlevel.checkpoint()  # the kernel may take all that somebody has to say, for ever
                return
            self.flush()
            await self._room.wait()
        raise NetworkError("connection of a node", "ended")

    def tick(self, patience: int) -> None:
        """A unit of time has passed: give a sign of life; end when none came for so many units."""
        self._silence += 1
        if self._silence > patience:
            self._wire.abort()
        elif not self._said:
            self.send(Beats(()))
            self.flush()
        self._said = False

    def abort(self) -> None:
        """End it: `run` returns."""
        self._wire.abort()

    def close(self) -> None:
        """Close the wire."""
        self._wire.close()

    async def _received(self) -> list[Frame]:
        target = self._incoming.target()
        try:
            if self._drained:
                await self._wire.readable()
            count = await self._wire.receive([target])
        except trio.BrokenResourceError as error:
            raise _broken(error) from None
        if not count:
            raise NetworkError("connection of a node", "ended")
        self._drained = count < len(target)
        return self._incoming.received(count)

    async def _send(self) -> None:
        while True:
            if not self._left and not self._outgoing:
                self._wake = trio.Event()
                await self._wake.wait()
            self._left = self._left or self._outgoing.take(_SEND_BYTES)
            try:
                await self._wire.send(self._left)
            except trio.BrokenResourceError:
                self._wire.abort()  # who receives sees the end
                return
            self._left = ()
            self._has_room()
            await trio.lowlevel.checkpoint()

    def _has_room(self) -> None:
        self._room.set()
        self._room = trio.Event()


def _broken(error: trio.BrokenResourceError) -> NetworkError:
    return NetworkError("connection of a node", str(error).lower() or "broke")
