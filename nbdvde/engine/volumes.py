"""The volumes of an open image: those in use as disks, and the operations that make, change and delete them.

An operation is logged behind everything written before it, and durable when it returns: a snapshot holds every write
that was acknowledged before it was asked for.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from weakref import WeakValueDictionary, finalize

import trio

from nbdvde.disk import BLOCK, Status
from nbdvde.engine.catalogue import SEPARATOR, Catalogue, Member
from nbdvde.engine.checkpointer import Checkpointer
from nbdvde.engine.layout import MAX_DISK_BYTES, MAX_VOLUMES, NAME, Action, Operation
from nbdvde.engine.reader import Reader
from nbdvde.engine.regions.form import Form
from nbdvde.engine.segments import Segments
from nbdvde.engine.volume import Volume
from nbdvde.engine.writer import Writer
from nbdvde.errors import RefusedError, UsageError
from nbdvde.moment import now_ns

_FREEING = (Action.DELETE, Action.ROLLBACK)
"""What must be possible in a full image."""

_LOOK_BYTES = 1 << 20
_RECENT = 16
"""Snapshots that are kept at hand when nobody uses them: as many as `qemu:allocation-depth` looks at."""


class Volumes:
    """Disks by name, snapshots by DISK@NAME. All may raise UsageError, RefusedError, NoSpaceError, PoisonedError."""

    def __init__(
        self, catalogue: Catalogue, segments: Segments, reader: Reader, checkpointer: Checkpointer, *, read_only: bool
    ) -> None:
        self._catalogue, self._segments, self._reader = catalogue, segments, reader
        self._checkpointer, self._read_only = checkpointer, read_only
        self._writer: Writer | None = None
        self._open: WeakValueDictionary[int, Volume] = WeakValueDictionary()
        """Snapshots that somebody uses: what is in memory of the others is forgotten."""
        self._recent: deque[Volume] = deque(maxlen=_RECENT)
        self._changing = trio.Lock()
        self.guard: Callable[[Volume], AbstractAsyncContextManager[None]] = lambda disk: nullcontext()
        """Is around whatever gives up something of a disk. Raises RefusedError when nothing of it may be."""
        self.given_up = 0
        """How many times a snapshot, a disk or what was in a disk was given up."""
        self.disks = [self._volume(member) for member in catalogue.disks]
        self._regions = {key: self._volume(member) for key, member in catalogue.regions.items()}
        self.written = [*self.disks, *self._regions.values()]
        """What commits write, in this order: regions of the image last, so that what they note of others is true."""
        self._sort()

    def _volume(self, member: Member) -> Volume:
        read_only = self._read_only or bool(member.parent)
        volume = Volume(
            member.number, self._catalogue.label(member), member.size, member.map, self._reader, self._segments,
            self._reading, read_only, _Snapshots(self, member),
        )  # fmt: skip
        if not read_only:
            volume.writer = self._writer
        return volume

    def _reading(self) -> AbstractContextManager[None]:
        return self._checkpointer.reading()

    def __iter__(self) -> Iterator[Member]:
        """Disks and snapshots, oldest first."""
        return (member for member in self._catalogue if not member.region)

    def __reversed__(self) -> Iterator[Member]:
        return (member for member in reversed(self._catalogue.members.values()) if not member.region)

    def snapshots(self, disk: Volume) -> Collection[Member]:
        """Of a disk, oldest first."""
        return self._catalogue.snapshots(self._catalogue.members[disk.number]).values()

    def find(self, label: str) -> Member | None:
        """What the catalogue says of a disk or a snapshot, if there is one of that name."""
        return self._catalogue.get(label)

    def attach(self, writer: Writer | None) -> None:
        """Let the disks be written, or no more."""
        self._writer = writer
        for volume in self.written:
            volume.writer = writer

    def get(self, label: str | None = None) -> Volume:
        """A disk or a snapshot by name, the first disk without."""
        member = self._catalogue.disks[0] if label is None and self.disks else self._catalogue.find(label or "")
        return self._snapshot(member) if member.parent else self._disk(member)

    def _snapshot(self, member: Member) -> Volume:
        volume = self._open.get(member.number)
        if volume is None:
            self._open[member.number] = volume = self._volume(member)
            finalize(volume, member.map.forget).atexit = False
        if volume not in self._recent:
            self._recent.append(volume)
        return volume

    def _disk(self, member: Member) -> Volume:
        return next(disk for disk in self.disks if disk.number == member.number)

    @property
    def version(self) -> int:
        """Changes with every operation."""
        return self._catalogue.version

    def domain_of(self, number: int) -> int:
        """Dedup domain of a volume, 0 when it takes no part."""
        return self._catalogue.members[number].domain

    def shares_with(self, disk: Volume) -> str | None:
        """Name of the oldest disk of its dedup domain, if it is of one."""
        domain = self.domain_of(disk.number)
        return next(other.name for other in self._catalogue.disks if other.domain == domain) if domain else None

    def siblings(self, member: Member) -> list[str]:
        """Names of the snapshots of a disk, or of the other ones of a snapshot's disk, oldest first."""
        disk = self._catalogue.disk_of(member)
        return [name for name, other in self._catalogue.snapshots(disk).items() if other is not member] if disk else []

    def sibling(self, member: Member, name: str) -> Volume | None:
        """One of those."""
        disk = self._catalogue.disk_of(member)
        other = self._catalogue.snapshots(disk).get(name) if disk else None
        return self.get(self._catalogue.label(other)) if other else None

    # Operations

    async def create(self, name: str, size: int, dedup_with: str | None = None) -> None:
        """Make an empty disk of `size` bytes. What it stores it shares with the disk `dedup_with`, or with none.

        Who can write one of two such disks learns from time and space whether the other has certain blocks.
        """
        check_size(size)
        async with self._changing:
            self._refuse_taken(name)
            number = self._catalogue.next_number
            domain = self._domain_for(number, dedup_with)
            await self._make(Operation(Action.CREATE, number, 0, size, now_ns(), name, domain))

    def _domain_for(self, number: int, dedup_with: str | None) -> int:
        if dedup_with is None:
            return number if any(disk.domain for disk in self._catalogue.disks) else 0
        domain = self._find_disk(dedup_with).domain
        if not domain:
            raise RefusedError(f"disk {dedup_with}", "takes no part in deduplication", "leave --dedup-with out")
        return domain

    def existing_region(self, form: Form, owner: int = 0) -> Volume | None:
        """The volume of a region of a disk, or of the image, if there is one."""
        return self._regions.get((form.tag, owner))

    async def region(self, form: Form, size: int, owner: int = 0) -> Volume:
        """The same, made with `size` bytes if there is none."""
        async with self._changing:
            if owner and owner not in self._catalogue.members:
                raise RefusedError("disk", "was deleted")
            if (form.tag, owner) not in self._regions:
                number, now = self._catalogue.next_number, now_ns()
                await self._make(Operation(Action.CREATE, number, owner, size, now, form.name, region=form.tag))
            return self._regions[form.tag, owner]

    async def snapshot(self, disk: str, name: str, *, created_ns: int | None = None) -> None:
        """Keep what a disk holds now, as DISK@NAME; of now, unless another time is given."""
        async with self._changing:
            member = self._find_disk(disk)
            self._refuse_taken(f"{disk}{SEPARATOR}{name}", name)
            number, now = self._catalogue.next_number, created_ns or now_ns()
            await self._make(Operation(Action.SNAPSHOT, number, member.number, 0, now, name))

    async def clone(self, source: str, name: str) -> None:
        """Make a disk that begins as a snapshot, or another disk, is now."""
        async with self._changing:
            member = self._catalogue.find(source)
            self._refuse_taken(name)
            number, now = self._catalogue.next_number, now_ns()
            await self._make(Operation(Action.CLONE, number, member.number, 0, now, name))

    async def delete(self, label: str) -> None:
        """Delete a snapshot, or a disk that has none. Nobody may use it any more."""
        async with self._changing:
            member = self._catalogue.find(label)
            if snapshots := self._catalogue.snapshots(member):
                held = f"{len(snapshots)} snapshots" if len(snapshots) > 1 else "a snapshot"
                raise RefusedError(f"disk {label}", f"has {held}", "delete what it has first")
            if not member.parent and len(self.disks) == 1:
                raise RefusedError(f"disk {label}", "is the only one of its image", "delete the image instead")
            async with nullcontext() if member.parent else self.guard(self._disk(member)):
                await self._operate(Operation(Action.DELETE, member.number), partial(self._drop, member))

    async def rollback(self, label: str) -> None:
        """Make a disk what it was when the snapshot was taken. What it holds now is lost; its snapshots stay."""
        async with self._changing:
            member = self._catalogue.find(label)
            if not member.parent:
                raise UsageError(f"disk {label}", "is no snapshot", f"name one as {label}{SEPARATOR}NAME")
            disk = self._disk(self._catalogue.members[member.parent])
            async with self.guard(disk), disk.exclusive():
                operation = Operation(Action.ROLLBACK, disk.number, member.number)
                await self._operate(operation, partial(self._roll_back, disk))

    async def resize(self, name: str, size: int, *, discard: bool = False) -> None:
        """Make a disk longer, or shorter, when nobody may be using it: with `discard` even if that cuts data off."""
        check_size(size)
        async with self._changing:
            disk = self._disk(self._find_disk(name))
            operation = Operation(Action.RESIZE, disk.number, 0, size)
            async with self.guard(disk) if size < disk.size else nullcontext(), disk.exclusive():
                if size < disk.size:
                    if not discard and await _holds_data(disk, size):
                        raise RefusedError(f"disk {name}", f"holds data beyond {size} bytes", "cut it with --discard")
                    await disk.cut(size)
                await self._operate(operation, partial(self._follow, disk))

    async def _make(self, operation: Operation) -> None:
        if len(self._catalogue.members) >= MAX_VOLUMES:
            raise RefusedError("image", f"has {MAX_VOLUMES} disks and snapshots, and no room for more", "delete some")
        await self._operate(operation, partial(self._appear, operation.number))

    async def _operate(self, operation: Operation, done: Callable[[], None]) -> None:
        if self._writer is None:
            raise RefusedError("image", "is open for reading only", "open it for writing")

        def apply() -> None:
            self._catalogue.apply(operation, self._segments.next_sequence)
            done()

        await self._writer.operate(operation, apply, freeing=operation.action in _FREEING)

    def _appear(self, number: int) -> None:
        member = self._catalogue.members[number]
        if member.parent:
            return
        volume = self._volume(member)
        self.written.append(volume)
        if member.region:
            self._regions[member.region, member.owner] = volume
        else:
            self.disks.append(volume)
        self._sort()

    def _sort(self) -> None:
        last = {volume.number for (_, owner), volume in self._regions.items() if not owner}
        self.written.sort(key=lambda volume: volume.number in last)

    def _drop(self, member: Member) -> None:
        self.given_up += 1
        if volume := self._open.pop(member.number, None):
            self._recent = deque((recent for recent in self._recent if recent is not volume), _RECENT)
        left = self._catalogue.members
        for volume in self.written:
            if volume.number not in left and self._writer is not None:
                self._writer.withdraw(volume.active.payload)  # written since the commit before
                volume.writer = None
        for volumes in (self.disks, self.written):
            volumes[:] = [volume for volume in volumes if volume.number in left]
        self._regions = {key: volume for key, volume in self._regions.items() if volume.number in left}

    def _roll_back(self, disk: Volume) -> None:
        self.given_up += 1
        self._follow(disk)

    def _follow(self, disk: Volume) -> None:
        member = self._catalogue.members[disk.number]
        disk.map, disk.size = member.map, member.size

    def _find_disk(self, name: str) -> Member:
        member = self._catalogue.find(name)
        if member.parent:
            raise UsageError(f"snapshot {name}", "cannot be changed", "make a disk of it with nbdvde clone")
        return member

    def _refuse_taken(self, label: str, name: str | None = None) -> None:
        check_name(label if name is None else name)
        if self._catalogue.get(label):
            raise RefusedError(label, "exists already", "choose another name")


@dataclass(frozen=True, slots=True)
class _Snapshots:
    """What a volume can be compared with (`status.History`)."""

    volumes: Volumes
    member: Member

    @property
    def version(self) -> int:
        return self.volumes.version

    def names(self) -> list[str]:
        return self.volumes.siblings(self.member)

    def volume(self, name: str) -> Volume | None:
        return self.volumes.sibling(self.member, name)


def check_name(name: str) -> None:
    """Raise UsageError unless a disk or snapshot can be called so."""
    if not NAME.fullmatch(name) or not name[0].isalnum():
        why = "is not 1 to 64 of A-Z a-z 0-9 . _ - with a letter or digit first"
        raise UsageError(f"name '{name}'", why, "choose another")


def check_size(size: int) -> None:
    """Raise UsageError unless a disk can have this size."""
    if size <= 0 or size % 512 or size > MAX_DISK_BYTES:
        raise UsageError(f"size {size}", "is not a multiple of 512 between 512 and 8 EiB - 512")


async def _holds_data(disk: Volume, size: int) -> bool:
    """Whether anything but zeroes lies behind the first `size` bytes: replicas may store those in different ways."""
    offset = -(-size // BLOCK) * BLOCK
    if size < offset and any(map(any, map(bytes, await disk.read(size, min(offset, disk.size) - size)))):
        return True
    while offset < disk.size:
        for length, status in await disk.status("base:allocation", offset, disk.size - offset, 64):
            for start in range(offset, offset + length, _LOOK_BYTES) if not status & Status.ZERO else ():
                pieces = await disk.read(start, min(_LOOK_BYTES, offset + length - start))
                if any(not isinstance(piece, int) and any(piece) for piece in pieces):
                    return True
            offset += length
    return False
