"""The WORM regions of disks."""

from collections.abc import AsyncGenerator
from contextlib import suppress

import msgspec
import trio

from nbdvde.admin.calls import Call, Feed
from nbdvde.admin.everywhere import make
from nbdvde.disk import BLOCK
from nbdvde.engine.image import Image
from nbdvde.engine.managed.worm import Worm
from nbdvde.engine.regions.worm import Record
from nbdvde.errors import NbdvdeError, UsageError
from nbdvde.moment import now_ns
from nbdvde.replication.regionexport import APPEND as APPEND_PATH
from nbdvde.replication.regionexport import AppendData
from nbdvde.replication.registry import replica_of

_PART = 1 << 20


class WormRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A WORM region."""

    disk: str | None = None
    """That has it; the first disk without."""


class CreateWorm(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A WORM region to be made."""

    capacity: int
    """Bytes, a multiple of 4096."""
    retention_ns: int
    """Nanoseconds of the retention clock; 0 is for ever."""
    disk: str | None = None


class ExtendRetention(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A longer retention, from the creation on."""

    retention_ns: int
    disk: str | None = None


class WormRecord(msgspec.Struct, frozen=True):
    """An append."""

    offset: int
    """In the export. Bytes."""
    length: int
    time_ns: int
    """Since 1970, as the retention clock has it."""
    sha256: str


class WormData(msgspec.Struct, frozen=True):
    """A part of what was appended, in order."""

    data: bytes


class WormInfo(msgspec.Struct, frozen=True):
    """The state of a WORM region. Bytes and nanoseconds."""

    disk: str
    capacity: int
    mark: int
    """Where the next append goes."""
    records: int
    """Appends."""
    created_ns: int
    """Since 1970."""
    clock_ns: int
    """Since the creation, as long as the image was open for writing."""
    retention_ns: int
    """From the creation on, 0 for ever."""
    left_ns: int | None
    """Of that; None is for ever."""


async def _worm(image: Image, disk: str | None) -> Worm:
    return await image.regions.get(Worm, image.disk(disk))


def described(worm: Worm) -> WormInfo:
    """A WORM region as it is now."""
    header = worm.header
    return WormInfo(
        worm.disk.name, header.capacity * BLOCK, header.mark * BLOCK, worm.appends, header.created_ns, worm.clock_ns,
        header.retention_ns, worm.left_ns,
    )  # fmt: skip


def _told(record: Record) -> WormRecord:
    return WormRecord(record.block * BLOCK, record.length, record.time_ns, record.sha256.hex())


async def create(image: Image, request: CreateWorm) -> WormInfo:
    """Make the WORM region of a disk."""
    if request.capacity % BLOCK:
        raise UsageError(f"capacity {request.capacity}", f"is not a multiple of {BLOCK}")
    worm = await Worm.create(
        image.regions, image.disk(request.disk), request.capacity // BLOCK, request.retention_ns, now_ns()
    )
    return described(worm)


async def append(image: Image, request: AppendData) -> WormRecord:
    """Append data at the mark; durable then."""
    return _told(await (await _worm(image, request.disk)).append(request.data, request.block))


async def records(image: Image, request: WormRequest) -> AsyncGenerator[WormRecord, None]:
    """The appends, in order."""
    for record in await (await _worm(image, request.disk)).records():
        yield _told(record)


async def content(image: Image, request: WormRequest) -> AsyncGenerator[WormData, None]:
    """What was appended, in order, verified."""
    worm = await _worm(image, request.disk)
    for record in await worm.records():
        data = await worm.content(record)
        for at in range(0, len(data), _PART):
            yield WormData(data[at : at + _PART])


async def verify(image: Image, request: WormRequest) -> WormInfo:
    """Verify the log and all data."""
    worm = await _worm(image, request.disk)
    await worm.verify()
    return described(worm)


async def retention(image: Image, request: WormRequest) -> WormInfo:
    """The state of a WORM region."""
    return described(await _worm(image, request.disk))


async def extend(image: Image, request: ExtendRetention) -> WormInfo:
    """Retain it longer."""
    worm = await _worm(image, request.disk)
    await worm.extend(request.retention_ns)
    return described(worm)


async def delete(image: Image, request: WormRequest) -> WormInfo:
    """Give up a WORM region whose retention has ended."""
    worm = await _worm(image, request.disk)
    info = described(worm)
    await worm.delete()
    return info


async def tend(image: Image, request: WormRequest) -> WormInfo:
    """Store the retention clock."""
    worm = await _worm(image, request.disk)
    await worm.tend()
    return described(worm)


async def keep_clocks(image: Image, period_s: float) -> None:
    """Have the nodes of a cluster agree on the retention clocks again and again, as the one that leads has them."""
    replica = replica_of(image)
    assert replica is not None, "it is replicated"
    while True:
        await trio.sleep(period_s)
        for disk in list(image.volumes.disks) if replica.group.leader == replica.node.number else ():
            if image.regions.loaded(Worm, disk.number):
                with suppress(NbdvdeError):  # it is tried again
                    await make(TEND, image, WormRequest(disk.name))


CREATE = Call("worm/create", CreateWorm, WormInfo, create)
APPEND = Call(APPEND_PATH, AppendData, WormRecord, append)
LIST = Feed("worm/list", WormRequest, WormRecord, records)
EXPORT = Feed("worm/export", WormRequest, WormData, content)
VERIFY = Call("worm/verify", WormRequest, WormInfo, verify, changes=False)
RETENTION = Call("worm/retention", WormRequest, WormInfo, retention, changes=False)
EXTEND = Call("worm/extend", ExtendRetention, WormInfo, extend)
DELETE = Call("worm/delete", WormRequest, WormInfo, delete)
TEND = Call("worm/tend", WormRequest, WormInfo, tend)
"""Nobody asks for it: all nodes of a cluster have to agree on the clock."""
CALLS = (CREATE, APPEND, LIST, EXPORT, VERIFY, RETENTION, EXTEND, DELETE)
