"""Calls about an image that a cluster replicates: all nodes make a change, and who is read is up to date."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import trio

from nbdvde.disk import Disk
from nbdvde.engine.image import Image
from nbdvde.engine.managed.worm import Worm
from nbdvde.engine.volume import Volume
from nbdvde.errors import InUseError, QuorumError, RefusedError, UsageError
from nbdvde.moment import NO_CLOCK, RetentionClock
from nbdvde.replication.registry import replica_of

if TYPE_CHECKING:
    from nbdvde.admin.calls import Call

Q = TypeVar("Q")
A = TypeVar("A")
_PATIENCE_S = 30.0
"""So long somebody who reads waits for a leader."""


async def make(call: "Call[Q, A]", image: Image, request: Q) -> A:
    """Have all nodes make a change, as this call asks for it; the answer. Raises NbdvdeError."""
    replica = replica_of(image)
    assert replica is not None, "the caller looked"
    asked: Any = request  # each of these names a disk

    async def name() -> str:
        return image.disk(asked.disk).name

    named = msgspec.structs.replace(asked, disk=await found(image, name))
    packed = msgspec.msgpack.encode(named)
    answer = await replica.call(call.path, packed, clock(image, named.disk))
    return msgspec.json.decode(answer, type=call.answer)


async def found(image: Image, look: Callable[[], Awaitable[A]]) -> A:
    """What `look` finds in an image that may not know yet what another node was told. Raises NbdvdeError."""
    try:
        return await look()
    except UsageError:
        await caught_up(image)
        return await look()


def clock(image: Image, disk: str) -> RetentionClock:
    """The retention clock of a disk, as it is here."""
    try:
        worm = image.regions.loaded(Worm, image.disk(disk).number)
    except UsageError:
        return NO_CLOCK
    return worm.clock if worm else NO_CLOCK


async def caught_up(image: Image) -> None:
    """Wait until an image holds all that was answered before; at once when it is not replicated.

    Raises RefusedError while it holds half of what another node has, QuorumError without a leader.
    """
    replica = replica_of(image)
    if replica is None:
        return
    if replica.incomplete:
        why = "is taking over what another node has"
        raise RefusedError(f"image {image.path}", why, "wait for that, or ask another node")
    with trio.move_on_after(_PATIENCE_S) as waiting:
        await replica.barrier()
    if waiting.cancelled_caught:
        raise QuorumError(f"image {image.path}", "no majority of its cluster answers", "see nbdvde cluster status")


async def undisturbed(image: Image, look: Callable[[], Awaitable[A]]) -> A:
    """What `look` finds in an image that is caught up, and not becoming what another node has. Raises NbdvdeError."""
    while True:
        await caught_up(image)
        before = taken(image)
        found = await look()
        if before == taken(image):
            return found


def taken(image: Image) -> int:
    """How often an image began to become what that of another node is: what was read meanwhile is nothing."""
    replica = replica_of(image)
    return replica.taken if replica else 0


def shown(image: Image, disk: Volume) -> Disk:
    """A disk as exports show it."""
    replica = replica_of(image)
    return replica.disk(disk.name) if replica and not disk.read_only else disk


@asynccontextmanager
async def written(image: Image, disk: Volume) -> AsyncIterator[Disk]:
    """A disk for somebody who changes it, on all nodes if it is replicated. Raises InUseError, NbdvdeError."""
    replica = replica_of(image)
    if replica is None or disk.read_only:
        yield disk
        return
    await caught_up(image)
    if replica.machine.epochs.get(disk.name, (0, 0))[1]:
        raise InUseError(f"disk {disk.name}", "clients use it", "disconnect them first")
    used = await replica.disk(disk.name).attach(_nobody)
    clean = False
    try:
        yield used
        clean = True
    finally:
        used.detach(clean=clean)


def _nobody() -> None:
    """There is no connection to be ended: what is taken over meanwhile fails."""
