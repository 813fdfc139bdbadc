"""What an entry of a replicated image says, before it is sealed.

All integers are little-endian.

    entry    = kind u8 | body
    CHANGES  = table u32, its version | disks u8 | (length u8 | name) for each | changes u16 | change for each |
               data of the writes, joined
    change   = action u8 | disk u8, which of the names | epoch u64 | offset u64 | length u64
    ATTACH   = node u32 | name
    FENCE    = node u32 | epoch u64 | name
    CALL     = hold u64 | time u64, nanoseconds since 1970 | seed, 32 bytes | creation u64 of a WORM region and
               retention clock u64, nanoseconds | length u8 | path | request
    BEGIN    = nothing
    HOLD     = hold u64
    GIVE_UP  = hold u64
    ARRANGE  = hold u64 | names of groups, each behind its length u8
    RETIRE   = names of groups, each behind its length u8
    ENROL    = length u8 | address | name in its certificate
    DISMISS  = node u32
    COMPARE  = table u32, its version | first chunk u64 | chunks u16 | name
    RELEASE  = epoch u64 | name
    REPAIR   = index u64 | chunk u64 | length u8 | name | data
"""

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

import msgspec

from nbdvde.disk import Buffer
from nbdvde.errors import DamageError
from nbdvde.moment import NO_CLOCK, RetentionClock

_CALL_BYTES = 64 << 10
"""That a call may take in an image besides what it brings."""
_FREEING = "/delete", "/advance", "/reset", "/tend", "/resize"
"""Ends of paths of calls that must go on when there is no space."""
_HEAD = struct.Struct("<BIB")
_COUNT = struct.Struct("<H")
_CHANGE = struct.Struct("<BBQQQ")
_ATTACH = struct.Struct("<BI")
_FENCE = struct.Struct("<BIQ")
_HOLD = struct.Struct("<BQ")
_CALL = struct.Struct("<BQQ32sQQB")
_COMPARE = struct.Struct("<BIQH")
_RELEASE = struct.Struct("<BQ")
_REPAIR = struct.Struct("<BQQB")
CHANGES_MAX = 4096
"""Changes in an entry."""
NAMES_MAX = 255


class _Kind(IntEnum):
    CHANGES, ATTACH, CALL, ENROL, DISMISS, COMPARE, REPAIR, RELEASE, FENCE, BEGIN, HOLD, GIVE_UP, ARRANGE, RETIRE = (
        range(1, 15)
    )


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
    table: int = 0
    """Version of the slot table by which it was sent to its group: under another one it comes to nothing."""


@dataclass(frozen=True, slots=True)
class Attach:
    """Clients of a node use a disk from now on, and nobody who used it before."""

    disk: str
    node: int


@dataclass(frozen=True, slots=True)
class Fence:
    """What `default` agreed on about who uses a disk, for another group."""

    disk: str
    epoch: int
    node: int


@dataclass(frozen=True, slots=True)
class Begin:
    """All groups are to stand still for one operation; the result is the number of that hold, 0 while there is one."""


@dataclass(frozen=True, slots=True)
class Hold:
    """A group, other than `default`, goes on when `default` has settled this hold."""

    hold: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Nothing will be done under this hold."""

    hold: int


@dataclass(frozen=True, slots=True)
class Arrange:
    """These groups share the disks from now on."""

    hold: int
    groups: tuple[str, ...]
    """Those that are new have names that no group ever had."""


@dataclass(frozen=True, slots=True)
class Retire:
    """These groups, which have no part of the disks any more, come to an end: all nodes know that they have none."""

    groups: tuple[str, ...]


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
    clock: RetentionClock = NO_CLOCK
    """The retention clock of the disk, where this was asked for."""
    hold: int = 0
    """Under which it is done, if it concerns all groups and there are several."""

    @property
    def growth(self) -> int:
        """Bytes that it may take in an image, about."""
        return 0 if self.path.endswith(_FREEING) else len(self.request) + _CALL_BYTES

    @property
    def concerns_all(self) -> bool:
        """Whether all groups have to stand still: what it is about is what they write."""
        return self.path.startswith(("disks/", "snapshots/"))


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
    table: int = 0
    """See `Change`."""


@dataclass(frozen=True, slots=True)
class Repair:
    """What a chunk held when it was compared; it is written again unless anything has changed since."""

    disk: str
    compared: int
    """Index of the entry that compared it."""
    chunk: int
    data: Buffer


Operation: TypeAlias = (
    Sequence[Change]
    | Attach
    | Fence
    | Release
    | Call
    | Enrol
    | Dismiss
    | Compare
    | Repair
    | Begin
    | Hold
    | GiveUp
    | Arrange
    | Retire
)


def pack(operation: Operation) -> list[Buffer]:
    """An entry in pieces: changes by one table, at most `CHANGES_MAX` and of `NAMES_MAX` disks, or something else."""
    match operation:
        case Attach(disk=disk, node=node):
            return [_ATTACH.pack(_Kind.ATTACH, node), disk.encode()]
        case Fence(disk=disk, epoch=epoch, node=node):
            return [_FENCE.pack(_Kind.FENCE, node, epoch), disk.encode()]
        case Call(path=path, request=request, time_ns=time_ns, seed=seed, clock=clock, hold=hold):
            raw = path.encode()
            return [_CALL.pack(_Kind.CALL, hold, time_ns, seed, *clock, len(raw)), raw, request]
        case Begin():
            return [bytes((_Kind.BEGIN,))]
        case Hold(hold=hold):
            return [_HOLD.pack(_Kind.HOLD, hold)]
        case GiveUp(hold=hold):
            return [_HOLD.pack(_Kind.GIVE_UP, hold)]
        case Arrange(hold=hold, groups=groups):
            return [_HOLD.pack(_Kind.ARRANGE, hold), _pack_names(groups)]
        case Retire(groups=groups):
            return [bytes((_Kind.RETIRE,)), _pack_names(groups)]
        case Enrol(address=address, name=name):
            return [bytes((_Kind.ENROL, len(address.encode()))), address.encode(), name.encode()]
        case Dismiss(node=node):
            return [_ATTACH.pack(_Kind.DISMISS, node)]
        case Release(disk=disk, epoch=epoch):
            return [_RELEASE.pack(_Kind.RELEASE, epoch), disk.encode()]
        case Compare(disk=disk, first=first, count=count, table=table):
            return [_COMPARE.pack(_Kind.COMPARE, table, first, count), disk.encode()]
        case Repair(disk=disk, compared=compared, chunk=chunk, data=data):
            raw = disk.encode()
            return [_REPAIR.pack(_Kind.REPAIR, compared, chunk, len(raw)), raw, data]
    return _pack_changes(operation)


def _pack_names(names: Iterable[str]) -> bytes:
    return b"".join(bytes((len(raw),)) + raw for raw in map(str.encode, names))


def _pack_changes(changes: Sequence[Change]) -> list[Buffer]:
    names = {name: number for number, name in enumerate(dict.fromkeys(change.disk for change in changes))}
    head = bytearray(_HEAD.pack(_Kind.CHANGES, changes[0].table, len(names)))
    head += _pack_names(names)
    head += _COUNT.pack(len(changes))
    for change in changes:
        head += _CHANGE.pack(change.action, names[change.disk], change.epoch, change.offset, change.length)
    return [head, *(change.data for change in changes if change.action == Action.WRITE)]


def unpack(entry: memoryview) -> Operation:
    """What an entry says; writes are views of it. Raises DamageError."""
    try:
        unpack_one = _UNPACK.get(entry[0])
        if unpack_one is not None:
            return unpack_one(entry)
    except (struct.error, LookupError, ValueError) as error:
        raise _damage(str(error)) from None
    raise _damage(f"is of the unknown kind {entry[0]}")


def _unpack_call(entry: memoryview) -> Call:
    _, hold, time_ns, seed, created_ns, shown_ns, length = _CALL.unpack_from(entry)
    body = entry[_CALL.size :]
    clock = RetentionClock(created_ns, shown_ns)
    return Call(str(body[:length], "utf-8"), bytes(body[length:]), time_ns, seed, clock, hold)


def _unpack_attach(entry: memoryview) -> Attach:
    return Attach(_rest(entry, _ATTACH.size), _ATTACH.unpack_from(entry)[1])


def _unpack_fence(entry: memoryview) -> Fence:
    _, node, epoch = _FENCE.unpack_from(entry)
    return Fence(_rest(entry, _FENCE.size), epoch, node)


def _unpack_release(entry: memoryview) -> Release:
    return Release(_rest(entry, _RELEASE.size), _RELEASE.unpack_from(entry)[1])


def _unpack_enrol(entry: memoryview) -> Enrol:
    stop = 2 + entry[1]
    return Enrol(str(entry[2:stop], "utf-8"), _rest(entry, stop))


def _unpack_compare(entry: memoryview) -> Compare:
    _, table, first, count = _COMPARE.unpack_from(entry)
    return Compare(_rest(entry, _COMPARE.size), first, count, table)


def _unpack_repair(entry: memoryview) -> Repair:
    _, compared, chunk, length = _REPAIR.unpack_from(entry)
    stop = _REPAIR.size + length
    return Repair(str(entry[_REPAIR.size : stop], "utf-8"), compared, chunk, entry[stop:])


def _unpack_arrange(entry: memoryview) -> Arrange:
    return Arrange(_HOLD.unpack_from(entry)[1], tuple(_unpack_names(entry, _HOLD.size)))


def _rest(entry: memoryview, start: int) -> str:
    return str(entry[start:], "utf-8")


def _unpack_names(entry: memoryview, at: int, count: int | None = None) -> list[str]:
    """So many names from `at` on, or all there are."""
    names = list[str]()
    while at < len(entry) if count is None else len(names) < count:
        stop = at + 1 + entry[at]
        names.append(str(entry[at + 1 : stop], "utf-8"))
        at = stop
    return names


def _unpack_changes(entry: memoryview) -> list[Change]:
    _, table, count = _HEAD.unpack_from(entry)
    names = _unpack_names(entry, _HEAD.size, count)
    at = _HEAD.size + sum(1 + len(name.encode()) for name in names)
    (count,) = _COUNT.unpack_from(entry, at)
    records = at + _COUNT.size
    data = records + count * _CHANGE.size
    changes = []
    for number, disk, epoch, offset, length in _CHANGE.iter_unpack(entry[records:data]):
        action = _ACTIONS[number]
        stop = data + (length if action == Action.WRITE else 0)
        changes.append(Change(names[disk], epoch, action, offset, length, entry[data:stop], table))
        data = stop
    if data != len(entry):
        raise _damage("is not as long as it says")
    return changes


def _damage(why: str) -> DamageError:
    return DamageError("entry of the replication log", why, "run nbdvde cluster verify")


_UNPACK: Mapping[int, Callable[[memoryview], Operation]] = {
    _Kind.CHANGES: _unpack_changes,
    _Kind.ATTACH: _unpack_attach,
    _Kind.FENCE: _unpack_fence,
    _Kind.RELEASE: _unpack_release,
    _Kind.CALL: _unpack_call,
    _Kind.ENROL: _unpack_enrol,
    _Kind.DISMISS: lambda entry: Dismiss(_ATTACH.unpack(entry)[1]),
    _Kind.COMPARE: _unpack_compare,
    _Kind.REPAIR: _unpack_repair,
    _Kind.BEGIN: lambda entry: Begin(),
    _Kind.HOLD: lambda entry: Hold(_HOLD.unpack(entry)[1]),
    _Kind.GIVE_UP: lambda entry: GiveUp(_HOLD.unpack(entry)[1]),
    _Kind.ARRANGE: _unpack_arrange,
    _Kind.RETIRE: lambda entry: Retire(tuple(_unpack_names(entry, 1))),
}
