"""A replicated disk as clients see it: changes go through its group, reads through the image once they may."""

import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

import trio

from nbdvde.disk import Buffer, Disk, Done, Piece
from nbdvde.engine.volume import Volume
from nbdvde.errors import DetachedError, NbdvdeError
from nbdvde.replication.operations import Action, Change
from nbdvde.replication.routing import STRIPE, pieces
from nbdvde.replication.together import together

_LINGER_S = 5.0
"""So long requests of a client whose connection has ended wait for the cluster."""
_WRITE_MAX = 1 << 20
"""Bytes of a write in one entry; longer ones take several."""


class Attachment:
    """Clients of this node that use a disk, from when the first of them came."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.open = True
        """Whether others may join."""
        self.over = False
        """Whether the disk was taken over."""
        self._aborts: list[Callable[[], None]] = []

    def join(self, abort: Callable[[], None]) -> None:
        """A client comes; `abort` ends its connection."""
        self._aborts.append(abort)

    def leave(self, abort: Callable[[], None], *, clean: bool) -> None:
        """A client goes. What it asked for may be on its way unless it goes clean: nobody may join the others then."""
        self._aborts.remove(abort)
        self.open = self.open and clean and bool(self._aborts)

    @property
    def clients(self) -> int:
        """How many use it."""
        return len(self._aborts)

    def end(self) -> None:
        """The disk was taken over: end all connections."""
        self.open, self.over = False, True
        for abort in self._aborts:
            abort()


class Ways(Protocol):
    """How a disk reaches its group."""

    async def put(self, change: Change) -> None:
        """Have a change made: durable, and seen by every later read. Raises DetachedError, NbdvdeError."""

    def begin(self, change: Change, done: Done) -> None:
        """As `put`, of a write that fits into one entry; `done` is told of the end."""

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """Call a function after a while, if the node runs then."""

    async def barrier(self, disk: str = "", offset: int = 0, length: int = 0) -> None:
        """Wait until what is in the image of a range is everything that was answered before this call.

        Without a disk: of everything.
        """

    @property
    def taken(self) -> int:
        """How often the image began to become what that of another node is: what was read meanwhile is nothing."""

    def release(self, disk: str, attachment: Attachment) -> None:
        """The last client has gone, and nothing of any is on its way."""

    async def attach(self, disk: str, abort: Callable[[], None]) -> Attachment:
        """A client comes; whoever used the disk before, elsewhere or on a connection that broke, no longer does."""


class ReplicatedDisk(Disk):
    """A disk of the image of this node, or how one client uses it."""

    def __init__(self, name: str, find: Callable[[], Volume], ways: Ways, attachment: Attachment | None = None) -> None:
        """`find` answers what it is in the image."""
        self.name, self.read_only = name, False
        self._find, self._ways, self._attachment = find, ways, attachment
        self._abort: Callable[[], None] | None = None
        self._size = 0
        self._under_way: set[trio.CancelScope] = set()
        """What is worked at for the client,"""
        self._begun: dict[Done, None] = {}
        """and the writes of it that were begun."""
        self._ending_s = math.inf
        """When that is given up."""

    @property
    def size(self) -> int:  # type: ignore[override]
        """As it is here; of a disk that is gone, as it was."""
        with suppress(NbdvdeError):
            self._size = self._find().size
        return self._size

    @property
    def contexts(self) -> tuple[str, ...]:
        try:
            return self._find().contexts
        except NbdvdeError:  # it is gone
            return super().contexts

    async def attach(self, abort: Callable[[], None]) -> Disk:
        told = self.size
        used = ReplicatedDisk(self.name, self._find, self._ways, await self._ways.attach(self.name, abort))
        used._abort = abort
        try:
            await self._ways.barrier()
            if self.size != told:
                raise DetachedError(f"disk {self.name}", "has another size than this node knew", "connect again")
        except BaseException:  # nobody else would let go of it
            used.detach(clean=True)
            raise
        return used

    def falter(self) -> None:
        if self._attachment:
            self._attachment.open = False
        self._ending_s = trio.current_time() + _LINGER_S
        for scope in self._under_way:
            scope.deadline = self._ending_s
        if self._begun:
            self._ways.later(_LINGER_S, self._give_up)

    def _give_up(self) -> None:
        for done in tuple(self._begun):
            done(self._unheard())

    def detach(self, *, clean: bool) -> None:
        if self._attachment and self._abort:
            self._attachment.leave(self._abort, clean=clean)
            if clean and not self._attachment.clients:
                self._ways.release(self.name, self._attachment)

    def bind(self, context: str) -> str:
        return self._find().bind(context)

    def read_nowait(self, offset: int, length: int) -> Sequence[Piece] | None:
        return None

    async def read(self, offset: int, length: int) -> Sequence[Piece]:
        while True:
            await self._hearing(self._ways.barrier(self.name, offset, length))
            volume, taken = self._find(), self._ways.taken
            pieces = volume.read_nowait(offset, length)
            if pieces is None:
                pieces = await volume.read(offset, length)
            if taken == self._ways.taken:
                return pieces

    async def status(self, context: str, offset: int, length: int, max_extents: int) -> list[tuple[int, int]]:
        while True:
            await self._hearing(self._ways.barrier(self.name, offset, length))
            taken = self._ways.taken
            found = await self._find().status(context, offset, length, max_extents)
            if taken == self._ways.taken:
                return found

    def write_nowait(self, offset: int, data: memoryview, *, owned: bool) -> bool:
        return False

    async def write(self, offset: int, data: memoryview, *, owned: bool = False) -> None:
        if _is_one(offset, len(data)):
            await self._change(Action.WRITE, offset, len(data), data)
            return
        await together(
            [
                partial(self._change, Action.WRITE, start, length, data[start - offset : start - offset + length])
                for start, length in pieces(offset, len(data), _WRITE_MAX)
            ]
        )

    def begin_write(self, offset: int, data: memoryview, done: Done) -> bool:
        if not _is_one(offset, len(data)) or (self._attachment and self._attachment.over):
            return False

        def ended(failure: Exception | None) -> None:
            if ended in self._begun:
                del self._begun[ended]
                done(failure)

        self._begun[ended] = None
        self._ways.begin(self._changed(Action.WRITE, offset, len(data), data), ended)
        return True

    def zero_nowait(self, offset: int, length: int, *, allocate: bool) -> bool:
        return False

    async def zero(self, offset: int, length: int, *, allocate: bool = False) -> None:
        await self._change(Action.ZERO if allocate else Action.TRIM, offset, length)

    async def _change(self, action: Action, offset: int, length: int, data: Buffer = b"") -> None:
        attachment = self._attachment
        if attachment and attachment.over:
            raise DetachedError(f"disk {self.name}", "was taken over by another client", "connect again")
        await self._hearing(self._ways.put(self._changed(action, offset, length, data)))

    def _changed(self, action: Action, offset: int, length: int, data: Buffer) -> Change:
        epoch = self._attachment.epoch if self._attachment else 0
        return Change(self.name, epoch, action, offset, length, data)

    async def _hearing(self, work: Awaitable[None]) -> None:
        """Wait for something as long as somebody may hear of it. Raises DetachedError when nobody does."""
        with trio.CancelScope(deadline=self._ending_s) as scope:
            self._under_way.add(scope)
            try:
                await work
            finally:
                self._under_way.remove(scope)
        if scope.cancelled_caught:
            raise self._unheard()

    def _unheard(self) -> DetachedError:
        return DetachedError(f"disk {self.name}", "its cluster did not answer in time", "connect again")

    def flush_nowait(self, mark: int) -> bool:
        return True  # a change is answered when a majority has it on disk

    async def flush(self, mark: int | None = None, *, alone: bool = False) -> None: ...


def _is_one(offset: int, length: int) -> bool:
    """Whether a write fits into one entry."""
    return length <= _WRITE_MAX and offset // STRIPE == (offset + length - 1) // STRIPE
