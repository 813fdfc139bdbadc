"""Changes of the disks and snapshots of an image, as commands and the control socket ask for them."""

from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Literal, Protocol, TypeVar

from nbdvde.admin.messages import VolumeInfo, VolumeRequest
from nbdvde.disk import Disk
from nbdvde.engine.catalogue import SEPARATOR
from nbdvde.engine.image import Image
from nbdvde.engine.volumes import Volumes
from nbdvde.errors import UsageError

Action = Literal[
    "disks/create", "disks/clone", "disks/resize", "disks/delete",
    "snapshots/create", "snapshots/delete", "snapshots/rollback",
]  # fmt: skip


T = TypeVar("T")


class Unused(Protocol):
    """Has no client use a disk meanwhile. Raises InUseError."""

    def __call__(self, disk: Disk, /, *, ending: bool = False) -> AbstractAsyncContextManager[None]:
        """With `ending` there will be no such disk any more."""


def at_rest(_disk: Disk, *, ending: bool = False) -> AbstractAsyncContextManager[None]:
    """Of an image that is not served, no disk has clients."""
    return nullcontext()


async def change(action: Action, request: VolumeRequest, image: Image, unused: Unused) -> VolumeInfo:
    """Do it, durably; answers what is there now, or was until now. Raises NbdvdeError."""
    volumes, name = image.volumes, request.name
    match action:
        case "disks/create":
            await volumes.create(name, _given(action, "size", request.size), request.dedup_with)
        case "disks/clone":
            await volumes.clone(_given(action, "source", request.source), name)
        case "disks/resize":
            await _resize(image, request, _given(action, "size", request.size), unused)
        case "snapshots/create":
            disk, _, snapshot = _snapshot_name(name)
            await volumes.snapshot(disk, snapshot)
        case "snapshots/rollback":
            disk, _, _ = _snapshot_name(name)
            async with unused(image.disk(disk)):
                await volumes.rollback(name)
        case "disks/delete" | "snapshots/delete":
            if action == "snapshots/delete":
                _snapshot_name(name)
            elif SEPARATOR in name:
                raise UsageError(f"snapshot {name}", "is no disk", "delete it with nbdvde snapshot delete")
            disk_gone = image.disk(name)
            info = _info(volumes, name)
            async with unused(disk_gone, ending=True):
                await volumes.delete(name)
            return info
    return _info(volumes, name)


async def _resize(image: Image, request: VolumeRequest, size: int, unused: Unused) -> None:
    """Clients of a disk that grows go on with the size they were told, or by force find the new one in coming back."""
    disk = image.disk(request.name)
    async with unused(disk) if size < disk.size or request.force else nullcontext():
        await image.volumes.resize(request.name, size, discard=request.discard)


def _given(action: Action, what: str, value: T | None) -> T:
    if value is None:
        raise UsageError(action.replace("/", " "), f"there is no {what}", f"give {what}")
    return value


def _snapshot_name(name: str) -> tuple[str, str, str]:
    parts = name.partition(SEPARATOR)
    if not parts[1]:
        raise UsageError(f"'{name}'", "does not name a snapshot", f"write it as DISK{SEPARATOR}NAME")
    return parts


def _info(volumes: Volumes, name: str) -> VolumeInfo:
    member = volumes.find(name)
    assert member is not None, "it was made, or found, just now"
    return VolumeInfo(name, member.size, member.created_ns)
