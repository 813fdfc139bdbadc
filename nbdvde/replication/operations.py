"""What an entry of a replicated image says, before it is sealed.

All integers are little-endian.

    entry    = kind u8 | body
    CHANGES  = disks u8 | (length u8 | name) for each | changes u16 | change for each | data of the writes, joined
    change   = action u8 | disk u8, which of the names | epoch u64 | offset u64 | length u64
    ATTACH   = node u32 | name
    CALL     = time u64, nanoseconds since 1970 | seed, 32 bytes | retention clock u64, nanoseconds | length u8 | path |
               request
    ENROL    = length u8 | address | name in its certificate
    DISMISS  = node u32
    COMPARE  = first chunk u64 | chunks u16 | name
    RELEASE  = epoch u64 | name
    REPAIR   = index u64 | chunk u64 | length u8 | name | data
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

import msgspec

from nbdvde.disk import Buffer
from nbdvde.errors import DamageError

_HEAD = struct.Struct("<BB")
_COUNT = struct.Struct("<H")
_CHANGE = struct.Struct("<BBQQQ")
_ATTACH = struct.Struct("<BI")
_CALL = struct.Struct("<BQ32sQB")
_COMPARE = struct.Struct("<BQH")
_RELEASE = struct.Struct("<BQ")
_REPAIR = struct.Struct("<BQQB")
CHANGES_MAX = 4096
"""Changes in an entry."""
NAMES_MAX = 255


class _Kind(IntEnum):
    CHANGES, ATTACH, CALL, ENROL, DISMISS, COMPARE, REPAIR, RELEASE = range(1, 9)


class Action(IntEnum):
    """What a change does to a range."""

    WRITE, TRIM, ZERO = 1, 2, 3
    """`ZERO` keeps the range allocated."""


_ACTIONS = {int(action): action for action in Action}


class Change(msgspec.Struct, frozen=True, gc=False):
    """A request of a client that changes a disk."""

    disk: str
    epoch: int
    """Of the client's attachment: it counts only as long as that is the latest one of the disk."""
    action: Action
    offset: int
    length: int
    data: Buffer = b""
    """Of a write, `length` bytes."""


@dataclass(frozen=True, slots=True)
class Attach:
    """Clients of a node use a disk from now on, and nobody who used it before."""

    disk: str
    node: int


@dataclass(frozen=True, slots=True)
class Release:
    """Nobody uses a disk any more, if this is still its epoch."""

    disk: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Call:
    """Anything else that changes the image, with all that it may depend on besides the image."""

    path: str
    """Of the control interface."""
    request: bytes
    time_ns: int
    seed: bytes
    clock_ns: int = 0
    """What the retention clock of the disk shows where this was asked for."""


@dataclass(frozen=True, slots=True)
class Enrol:
    """A node is to join the cluster; the result is its number."""

    address: str
    """`HOST:PORT`."""
    name: str
    """In its certificate."""


@dataclass(frozen=True, slots=True)
class Dismiss:
    """A node has left the cluster for good."""

    node: int


@dataclass(frozen=True, slots=True)
class Compare:
    """Every node is to tell what some chunks of a disk hold at this point, in hashes."""

    disk: str
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Repair:
    """What a chunk held when it was compared; it is written again unless anything has changed since."""

    disk: str
    compared: int
    """Index of the entry that compared it."""
    chunk: int
    data: Buffer


Operation: TypeAlias = Sequence[Change] | Attach | Release | Call | Enrol | Dismiss | Compare | Repair


def pack(operation: Operation) -> list[Buffer]:
    """An entry in pieces: changes, at most `CHANGES_MAX` and of `NAMES_MAX` disks, or something else."""
    match operation:
        case Attach(disk=disk, node=node):
            return [_ATTACH.pack(_Kind.ATTACH, node), disk.encode()]
        case Call(path=path, request=request, time_ns=time_ns, seed=seed, clock_ns=clock_ns):
            raw = path.encode()
            return [_CALL.pack(_Kind.CALL, time_ns, seed, clock_ns, len(raw)), raw, request]
        case Enrol(address=address, name=name):
            return [bytes((_Kind.ENROL, len(address.encode()))), address.encode(), name.encode()]
        case Dismiss(node=node):
            return [_ATTACH.pack(_Kind.DISMISS, node)]
        case Release(disk=disk, epoch=epoch):
            return [_RELEASE.pack(_Kind.RELEASE, epoch), disk.encode()]
        case Compare(disk=disk, first=first, count=count):
            return [_COMPARE.pack(_Kind.COMPARE, first, count), disk.encode()]
        case Repair(disk=disk, compared=compared, chunk=chunk, data=data):
            raw = disk.encode()
            return [_REPAIR.pack(_Kind.REPAIR, compared, chunk, len(raw)), raw, data]
    return _pack_changes(operation)


def _pack_changes(changes: Sequence[Change]) -> list[Buffer]:
    names = {name: number for number, name in enumerate(dict.fromkeys(change.disk for change in changes))}
    head = bytearray(_HEAD.pack(_Kind.CHANGES, len(names)))
    for raw in map(str.encode, names):
        head += bytes((len(raw),)) + raw
    head += _COUNT.pack(len(changes))
    for change in changes:
        head += _CHANGE.pack(change.action, names[change.disk], change.epoch, change.offset, change.length)
    return [head, *(change.data for change in changes if change.action == Action.WRITE)]


def unpack(entry: memoryview) -> Operation:
    """What an entry says; writes are views of it. Raises DamageError."""
    try:
        match entry[0]:
            case _Kind.CHANGES:
                return _unpack_changes(entry)
            case _Kind.ATTACH:
                return Attach(str(entry[_ATTACH.size :], "utf-8"), _ATTACH.unpack_from(entry)[1])
            case _Kind.CALL:
                _, time_ns, seed, clock_ns, length = _CALL.unpack_from(entry)
                body = entry[_CALL.size :]
                return Call(str(body[:length], "utf-8"), bytes(body[length:]), time_ns, seed, clock_ns)
            case _Kind.ENROL:
                stop = 2 + entry[1]
                return Enrol(str(entry[2:stop], "utf-8"), str(entry[stop:], "utf-8"))
            case _Kind.DISMISS:
                return Dismiss(_ATTACH.unpack(entry)[1])
            case _Kind.RELEASE:
                return Release(str(entry[_RELEASE.size :], "utf-8"), _RELEASE.unpack_from(entry)[1])
            case _Kind.COMPARE:
                _, first, count = _COMPARE.unpack_from(entry)
                return Compare(str(entry[_COMPARE.size :], "utf-8"), first, count)
            case _Kind.REPAIR:
                _, compared, chunk, length = _REPAIR.unpack_from(entry)
                stop = _REPAIR.size + length
                return Repair(str(entry[_REPAIR.size : stop], "utf-8"), compared, chunk, entry[stop:])
    except (struct.error, LookupError, ValueError) as error:
        raise _damage(str(error)) from None
    raise _damage(f"is of the unknown kind {entry[0]}")


def _unpack_changes(entry: memoryview) -> list[Change]:
    _, count = _HEAD.unpack_from(entry)
    at, names = _HEAD.size, list[str]()
    for _ in range(count):
        stop = at + 1 + entry[at]
        names.append(str(entry[at + 1 : stop], "utf-8"))
        at = stop
    (count,) = _COUNT.unpack_from(entry, at)
    records = at + _COUNT.size
    data = records + count * _CHANGE.size
    changes = []
    for number, disk, epoch, offset, length in _CHANGE.iter_unpack(entry[records:data]):
        action = _ACTIONS[number]
        stop = data + (length if action == Action.WRITE else 0)
        changes.append(Change(names[disk], epoch, action, offset, length, entry[data:stop]))
        data = stop
    if data != len(entry):
        raise _damage("is not as long as it says")
    return changes


def _damage(why: str) -> DamageError:
    return DamageError("entry of the replication log", why, "run nbdvde cluster verify")
