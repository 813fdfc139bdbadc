"""The streams of disks."""

from collections.abc import AsyncGenerator, Sequence

import msgspec

from nbdvde.admin.calls import Call, Feed
from nbdvde.admin.everywhere import found, make
from nbdvde.admin.streamappends import ENTRIES_MAX, appends_to
from nbdvde.disk import BLOCK
from nbdvde.engine.image import Image
from nbdvde.engine.managed.stream import READ, Stream
from nbdvde.engine.regions.stream import INCREMENT, StreamPolicy
from nbdvde.errors import FullError, UsageError


class StreamRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A stream."""

    disk: str | None = None
    """That has it; the first disk without."""


class CreateStream(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A stream to be made. Bytes, multiples of 4096."""

    capacity: int
    disk: str | None = None
    policy: str = "overwrite"
    """overwrite, reject or wait."""
    increment: int = INCREMENT * BLOCK


class AppendEntries(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Entries to be appended, of 4096 bytes at most."""

    entries: list[bytes]
    disk: str | None = None
    wait: bool = True
    """Wait for room when the stream is full and its policy is to wait; without, be refused."""


class Positions(msgspec.Struct, frozen=True):
    """Where they are, in this order."""

    positions: list[int]


class ReadEntries(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What to read."""

    disk: str | None = None
    start: int | None = None
    """Position of the first entry; without, or when it is gone, the oldest one."""
    last: int | None = None
    """Instead: so many of the newest."""
    count: int | None = None
    """Entries at most."""
    follow: bool = False
    """Wait for further ones."""


class Entry(msgspec.Struct, frozen=True):
    """An entry."""

    position: int
    data: bytes


class AdvanceTail(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Entries before `position` are no longer needed."""

    position: int
    disk: str | None = None


class StreamInfo(msgspec.Struct, frozen=True):
    """The state of a stream. Bytes."""

    disk: str
    policy: str
    capacity: int
    allocated: int
    allocation: float
    """Part of the capacity that is allocated, 0 to 1."""
    increment: int
    head: int
    """Position of the next entry."""
    tail: int
    """Position of the oldest one."""
    entries: int


async def _stream(image: Image, disk: str | None) -> Stream:
    return await image.regions.get(Stream, image.disk(disk))


def described(stream: Stream) -> StreamInfo:
    """A stream as it is now."""
    ring = stream.ring
    return StreamInfo(
        stream.disk.name, ring.policy.name.lower(), ring.capacity * BLOCK, ring.allocated * BLOCK,
        round(ring.allocated / ring.capacity, 6), ring.increment * BLOCK, stream.head, stream.tail,
        stream.head - stream.tail,
    )  # fmt: skip


def _blocks(what: str, size: int) -> int:
    if size % BLOCK:
        raise UsageError(f"{what} {size}", f"is not a multiple of {BLOCK}")
    return size // BLOCK


async def create(image: Image, request: CreateStream) -> StreamInfo:
    """Make the stream of a disk."""
    name = request.policy.upper()
    if name not in StreamPolicy.__members__:
        raise UsageError(f"policy {request.policy}", "is unknown", "use overwrite, reject or wait")
    stream = await Stream.create(
        image.regions, image.disk(request.disk), _blocks("capacity", request.capacity), policy=StreamPolicy[name],
        increment=_blocks("increment", request.increment),
    )  # fmt: skip
    return described(stream)


async def append(image: Image, request: AppendEntries) -> Positions:
    """Append entries; durable then."""
    stream = await _stream(image, request.disk)
    return Positions(await stream.append_many(request.entries, wait=request.wait))


async def read(image: Image, request: ReadEntries) -> AsyncGenerator[Entry, None]:
    """Entries of a stream, in order."""
    for what, value in (("start", request.start), ("last", request.last), ("count", request.count)):
        if value is not None and value < 0:
            raise UsageError(f"{what} {value}", "is less than 0")
    stream = await _stream(image, request.disk)
    if request.start is not None and not request.follow:
        stream.refuse_beyond(request.start)
    position = stream.tail if request.start is None else request.start
    position = position if request.last is None else max(stream.tail, stream.head - request.last)
    end, left = stream.head, request.count
    while left != 0:
        if request.follow:
            await stream.wait(position)
        elif position >= end:
            return
        most = READ if left is None else min(READ, left)
        found = await stream.read(position, most if request.follow else min(most, end - position))
        for at, data in found:
            yield Entry(at, data)
        position = found[-1][0] + 1 if found else max(position, stream.tail)
        left = None if left is None else left - len(found)


async def status(image: Image, request: StreamRequest) -> StreamInfo:
    """The state of a stream."""
    return described(await _stream(image, request.disk))


async def advance(image: Image, request: AdvanceTail) -> StreamInfo:
    """Give up the entries before a position, and the space they take."""
    stream = await _stream(image, request.disk)
    await stream.advance_read_tail(request.position)
    return described(stream)


async def reset(image: Image, request: StreamRequest) -> StreamInfo:
    """Give up all entries of a stream; positions go on."""
    stream = await _stream(image, request.disk)
    await stream.reset()
    return described(stream)


async def delete(image: Image, request: StreamRequest) -> StreamInfo:
    """Give up a stream."""
    stream = await _stream(image, request.disk)
    await stream.delete()
    return described(stream)


async def append_everywhere(image: Image, request: AppendEntries) -> Positions:
    """The same on all nodes of a cluster; of more than 1 MiB only the first parts, when a later one is refused."""
    stream = await found(image, lambda: _stream(image, request.disk))
    disk = stream.disk.name

    async def propose(entries: Sequence[bytes]) -> Sequence[int]:
        return (await make(APPEND, image, AppendEntries(list(entries), disk, wait=False))).positions

    most = min(ENTRIES_MAX, stream.ring.capacity)
    positions: list[int] = []
    for at in range(0, len(request.entries), most):
        part = request.entries[at : at + most]
        while True:
            try:
                positions += await appends_to(image, disk).append(part, propose)
                break
            except FullError:
                if not request.wait or stream.ring.policy is not StreamPolicy.WAIT:
                    raise
                await stream.wait_for_room(len(part))
    return Positions(positions)


CREATE = Call("stream/create", CreateStream, StreamInfo, create)
APPEND = Call("stream/append", AppendEntries, Positions, append, everywhere=append_everywhere)
READ_ENTRIES = Feed("stream/read", ReadEntries, Entry, read)
STATUS = Call("stream/status", StreamRequest, StreamInfo, status, changes=False)
ADVANCE = Call("stream/advance", AdvanceTail, StreamInfo, advance)
RESET = Call("stream/reset", StreamRequest, StreamInfo, reset)
DELETE = Call("stream/delete", StreamRequest, StreamInfo, delete)
CALLS = (CREATE, APPEND, READ_ENTRIES, STATUS, ADVANCE, RESET, DELETE)
