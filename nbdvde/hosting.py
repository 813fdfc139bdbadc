"""Images that are open, and the exports that show their disks; both may change while clients are served."""

import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import trio

from nbdvde.disk import Disk
from nbdvde.engine.access import open_image
from nbdvde.engine.image import Image
from nbdvde.engine.keys import Secret
from nbdvde.engine.managed.exported import RegionDisks
from nbdvde.errors import InUseError, NbdvdeError, RefusedError, UsageError
from nbdvde.exports import Access, Export, Exports
from nbdvde.inventory import Inventory
from nbdvde.memory import MemoryDisk
from nbdvde.protocol.constants import MAX_STRING
from nbdvde.replication.notes import refuse_if_member
from nbdvde.replication.regionexport import shown_through
from nbdvde.replication.replica import Replica
from nbdvde.server import Server

_log = logging.getLogger(__name__)
_FORCE = "disconnect them, or use --force"
TENDING_S = 60.0
"""Seconds after which a region notes again what it has to: at most so much of a retention clock is lost in a crash."""

Replicate: TypeAlias = Callable[[Image], AbstractAsyncContextManager["Replica | None"]]
"""What has an image take part in its cluster for as long as it is open, if it is to."""
Attend: TypeAlias = Callable[[Path], AbstractAsyncContextManager[Callable[[Image], Awaitable[None]]]]
"""What is around an image for as long as it is open; what it gives is called once the image is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSpec:
    """An export as it is asked for."""

    name: str
    image: Path | None = None
    """Where its disk is; None: in memory."""
    memory_bytes: int = 0
    """Size of a disk in memory."""
    disk: str | None = None
    """Which disk of the image, or snapshot; the first one without."""
    whole: bool = False
    """Its other disks are exports as well."""
    read_only: bool = False
    description: str = ""
    access: Access = field(default_factory=Access)
    file: Path | None = field(init=False)
    """What `image` led to when this was asked for, whatever becomes of links in it."""

    def __post_init__(self) -> None:
        """Raise UsageError when clients could not be told of it."""
        for what, text in (("export name", self.name), ("description", self.description)):
            try:
                raw = text.encode()
            except UnicodeEncodeError:
                raise UsageError(what, "is not valid UTF-8", "choose another") from None
            if len(raw) > MAX_STRING or b"\0" in raw:
                raise UsageError(what, f"is longer than {MAX_STRING} bytes, or holds a zero byte", "choose another")
        if not self.name:
            raise UsageError("export name", "is empty", "choose another; the default export has a name as well")
        object.__setattr__(self, "file", self.image and Path(os.path.realpath(self.image)))

    @property
    def shown(self) -> tuple[Path | None, str | None, int, bool]:
        """What clients would notice a change of."""
        return self.file, self.disk, self.memory_bytes, self.read_only


@asynccontextmanager
async def on_its_own(image: Image) -> AsyncIterator[None]:
    """Nothing is replicated. Raises RefusedError when the image belongs to a cluster."""
    await refuse_if_member(image)
    yield


class _OpenImage:
    """An image, and how many exports show it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.image: Image | None = None
        self.replica: Replica | None = None
        self.exports = 0
        self.failure: NbdvdeError | None = None
        """Of closing it."""
        self.closing, self.closed = trio.Event(), trio.Event()


class Host:
    """Opens what exports need, and closes what none needs any more."""

    def __init__(
        self, server: Server, exports: Exports, nursery: trio.Nursery, attend: Attend, memory: Mapping[str, int],
        replicate: Replicate = on_its_own,
    ) -> None:  # fmt: skip
        """Images are kept open by tasks in `nursery`; `memory` are the arguments of `open_image` about it."""
        self._replicate = replicate
        self._server, self._exports, self._nursery = server, exports, nursery
        self._attend, self._memory = attend, memory
        self._images: dict[Path, _OpenImage] = {}
        self._specs: dict[str, ExportSpec] = {}
        self._read: list[Disk] = []
        self._changing = trio.Lock()
        self._closed = False

    @property
    def specs(self) -> dict[str, ExportSpec]:
        """Of the exports there are, by name."""
        return dict(self._specs)

    @property
    def images(self) -> list[Image]:
        """Those that are open and stay so, in the order in which they were opened."""
        return [opened.image for opened in self._images.values() if opened.image and not opened.closing.is_set()]

    @property
    def exports(self) -> list[Export]:
        """The exports there are, snapshots left out that nobody uses."""
        return list(dict.fromkeys((*self._exports, *self._others(), *self._exports.used())))

    def _others(self) -> Iterator[Export]:
        for export in self._exports:
            if isinstance(export.kin, Inventory):
                found = map(self._exports.get, export.kin.disks(export))
                yield from (other for other in found if other is not None and other.base is export)

    async def add(self, spec: ExportSpec, secret: Callable[[], Secret | None], *, writable: bool | None = None) -> None:
        """Let clients use a further export; `secret` is called when its image is not open yet. Raises NbdvdeError.

        `writable`: whether the image is opened for writing, if not as this export needs it.
        """
        async with self._changing:
            if self._closed:
                raise RefusedError(f"export {spec.name}", "the server is stopping")
            if spec.name in self._specs:
                raise RefusedError(f"export {spec.name}", "exists already", "choose another name")
            opened = await self._image(spec, secret, not spec.read_only if writable is None else writable)
            disk = await self._disk(spec, opened)
            kin = _inventory(opened, whole=spec.whole) if opened else None
            self._exports.add(Export(spec.name, disk, spec.read_only, spec.description, spec.access, kin))
            self._specs[spec.name] = spec
            _log.debug("export %s added: %s", spec.name, spec.image or "in memory")

    async def remove(self, name: str, *, force: bool = False) -> None:
        """End an export; unless `force`, only when no client uses it. Raises RefusedError, InUseError, NbdvdeError.

        Cancelled, it is still done: half of it would leave an image open that nobody can ask to close.
        """
        async with self._changing:
            export, spec = self._exports.get(name), self._specs.get(name)
            if export is None or spec is None:
                raise RefusedError(f"export {name}", "does not exist")
            users = [used for used in self._exports.used() if export in (used, used.base)]
            if not force:
                _refuse_clients(f"export {name}", users)
            self._exports.remove(export)
            del self._specs[name]
            with trio.CancelScope(shield=True):
                await self._dismiss(users)
                await self._release(spec)
            _log.info("export %s removed", name)

    @contextmanager
    def reading(self, disk: Disk) -> Iterator[None]:
        """Let no `unused` begin for a disk meanwhile, without being a client. Raises InUseError."""
        if self._exports.is_held(disk):
            raise InUseError(f"disk {disk.name}", "is being changed", "try again later")
        self._read.append(disk)
        try:
            yield
        finally:
            self._read.remove(disk)

    @asynccontextmanager
    async def unused(
        self, disk: Disk, *, ending: bool = False, force: bool = False, hint: str = _FORCE
    ) -> AsyncIterator[None]:
        """Have no client use a disk meanwhile; unless `force`, only when none does. Raises InUseError.

        With `ending` the disk will be no more: then no export may have been asked for it either.
        """
        if disk in self._read or self._exports.is_held(disk):
            raise InUseError(f"disk {disk.name}", "is being copied or changed", "try again later")
        shown = next((export for export in self._exports if export.disk is disk), None) if ending else None
        if shown is not None:
            raise InUseError(f"disk {disk.name}", f"is served as export {shown.name}", "end it with ctl export-remove")
        with self._exports.holding(disk):
            users = [used for used in self._exports.used() if used.disk is disk or (ending and used.disk.owner is disk)]
            if not force:
                _refuse_clients(f"disk {disk.name}", users, hint)
            await self._dismiss(users)
            yield

    async def _dismiss(self, exports: list[Export]) -> None:
        """Disconnect the clients of some exports, all at once."""
        async with trio.open_nursery() as nursery:
            for export in exports:
                nursery.start_soon(self._server.dismiss, export)

    def adjust(self, spec: ExportSpec) -> None:
        """Give an export that shows the same as before another description and access rules, for new clients."""
        export = self._exports.get(spec.name)
        assert export is not None, "the caller looked"
        export.description, export.access = spec.description, spec.access
        self._specs[spec.name] = spec

    async def close(self) -> None:
        """Close every image; nobody is served any more. Raises NbdvdeError, when all the others are closed."""
        async with self._changing:
            self._closed = True
        images = list(self._images.values())
        for opened in images:
            opened.closing.set()
        for opened in images:
            await opened.closed.wait()
        for opened in images:
            if opened.failure:
                raise opened.failure

    async def _image(self, spec: ExportSpec, secret: Callable[[], Secret | None], writable: bool) -> _OpenImage | None:
        """The image of an export, counted as used once more."""
        if spec.image is None or spec.file is None:
            return None
        opened = self._images.get(spec.file)
        if opened is None:
            opened = _OpenImage(spec.image)
            await self._nursery.start(self._keep, opened, secret(), not writable)
            self._images[spec.file] = opened
        assert opened.image is not None, "it was opened"
        opened.exports += 1
        return opened

    async def _disk(self, spec: ExportSpec, opened: _OpenImage | None) -> Disk:
        """What an export shows. Raises RefusedError, UsageError; the image is not used then."""
        if opened is None or opened.image is None:
            return MemoryDisk(spec.memory_bytes, spec.name, read_only=spec.read_only)
        image = opened.image
        try:
            if image.read_only and not spec.read_only:
                raise RefusedError(f"export {spec.name}", "its image is open for reading only", "make it read-only too")
            disk = image.disk(spec.disk)
            return opened.replica.disk(disk.name) if opened.replica and not disk.read_only else disk
        except NbdvdeError:
            with trio.CancelScope(shield=True):
                await self._release(spec)
            raise

    async def _release(self, spec: ExportSpec) -> None:
        """Close the image of an export that has ended, if no other shows it."""
        if spec.file is None:
            return
        opened = self._images[spec.file]
        opened.exports -= 1
        if not opened.exports:
            opened.closing.set()
            await opened.closed.wait()
            del self._images[spec.file]
            if opened.failure:
                raise opened.failure

    async def _keep(
        self, opened: _OpenImage, secret: Secret | None, read_only: bool, task_status: trio.TaskStatus[None]
    ) -> None:
        """Have an image open from `task_status.started` until it is to be closed."""
        async with self._attend(opened.path) as attend:
            try:
                async with open_image(opened.path, key=secret, read_only=read_only, **self._memory) as image:
                    opened.image = image
                    async with self._replicate(image) as opened.replica:
                        await attend(image)
                        task_status.started()
                        async with trio.open_nursery() as nursery:
                            if opened.replica is None:
                                nursery.start_soon(image.regions.keep_tending, TENDING_S)
                            await opened.closing.wait()
                            nursery.cancel_scope.cancel()
            except NbdvdeError as error:
                if not opened.closing.is_set():
                    raise
                opened.failure = error
            finally:
                opened.closed.set()


def _inventory(opened: _OpenImage, *, whole: bool) -> Inventory:
    image, replica = opened.image, opened.replica
    assert image is not None, "it is open"
    regions = RegionDisks(image.regions)
    if replica is None:
        return Inventory(image.volumes, regions, whole=whole)
    return Inventory(image.volumes, regions, whole=whole, shown=replica.disk, up_to_date=shown_through(replica))


def _refuse_clients(what: str, users: list[Export], hint: str = _FORCE) -> None:
    if count := sum(export.clients for export in users):
        clients = "1 client uses" if count == 1 else f"{count} clients use"
        raise InUseError(what, f"{clients} it", hint)
