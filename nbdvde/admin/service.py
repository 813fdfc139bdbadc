"""What the control socket can do with a running server and its image."""

import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import trio

from nbdvde import workers
from nbdvde.admin import dictionarychange, volumechange
from nbdvde.admin.calls import Call, Feed, answer, feed, parse
from nbdvde.admin.catalog import CALLS
from nbdvde.admin.difference import Ranges, difference
from nbdvde.admin.http import Emit, Page, Routes
from nbdvde.admin.keychange import Action, apply
from nbdvde.admin.measures import Gauges, Measures, as_text, measures
from nbdvde.admin.messages import (
    AddExport,
    CheckLine,
    Client,
    CopyLine,
    CopyRequest,
    DictionaryLine,
    DictionaryReport,
    DictionaryRequest,
    DiffLine,
    DiffRequest,
    Done,
    ExportList,
    ExportStatus,
    Health,
    KeyList,
    KeyRequest,
    OptimizeLine,
    OptimizeRequest,
    Progress,
    Reloaded,
    RemoveExport,
    ScrubRequest,
    Status,
    VolumeInfo,
    VolumeRequest,
)
from nbdvde.disk import Disk
from nbdvde.engine.access import fresh, naming, placing
from nbdvde.engine.image import Image
from nbdvde.engine.keys import KeyArea
from nbdvde.engine.optimize import options_of
from nbdvde.engine.pace import check_rate
from nbdvde.engine.report import CheckReport, ImageInfo, SpaceReport
from nbdvde.engine.volumes import check_size
from nbdvde.errors import NbdvdeError, RefusedError, UsageError
from nbdvde.exports import Access, Export
from nbdvde.hosting import ExportSpec, Host
from nbdvde.replication.registry import refuse_if_replicated, replica_of
from nbdvde.server import Connection, Server
from nbdvde.transfer import copy_in, copy_out
from nbdvde.version import VERSION

PROGRESS_S = 0.1
"""Seconds between two lines of progress."""
PATHS = {
    "/metrics": ("GET", "exposition"),
    "/healthz": ("GET", "health"),
    "/readyz": ("GET", "readiness"),
    "/v1/openapi.json": ("GET", "openapi"),
    "/v1/status": ("GET", "status"),
    "/v1/metrics": ("GET", "metrics"),
    "/v1/info": ("GET", "info"),
    "/v1/df": ("POST", "df"),
    "/v1/check": ("POST", "check"),
    "/v1/scrub": ("POST", "scrub"),
    "/v1/optimize": ("POST", "optimize"),
    "/v1/import": ("POST", "import_"),
    "/v1/export": ("POST", "export"),
    "/v1/flush": ("POST", "flush"),
    "/v1/stop": ("POST", "stop"),
    "/v1/reload": ("POST", "reload"),
    "/v1/exports": ("GET", "exports"),
    "/v1/exports/add": ("POST", "add_export"),
    "/v1/exports/remove": ("POST", "remove_export"),
    "/v1/disks/create": ("POST", "create_disk"),
    "/v1/disks/clone": ("POST", "clone_disk"),
    "/v1/disks/resize": ("POST", "resize_disk"),
    "/v1/disks/delete": ("POST", "delete_disk"),
    "/v1/snapshots/create": ("POST", "create_snapshot"),
    "/v1/snapshots/delete": ("POST", "delete_snapshot"),
    "/v1/snapshots/rollback": ("POST", "roll_back"),
    "/v1/snapshots/diff": ("POST", "diff"),
    "/v1/dictionaries": ("GET", "dictionaries"),
    "/v1/dictionaries/train": ("POST", "train_dictionaries"),
    "/v1/dictionaries/replace": ("POST", "replace_dictionary"),
    "/v1/dictionaries/remove": ("POST", "remove_dictionary"),
    "/v1/keys": ("GET", "keys"),
    "/v1/keys/add": ("POST", "add_key"),
    "/v1/keys/remove": ("POST", "remove_key"),
    "/v1/keys/change": ("POST", "change_key"),
}
"""Path to method and name of the handler in `Service`."""
_log = logging.getLogger(__name__)
T = TypeVar("T")


class Serving(Protocol):
    """What the whole server can be told."""

    def stop(self) -> None:
        """Begin a clean stop, without waiting for its end; once more, do not wait for clients any longer."""

    async def reload(self) -> Reloaded:
        """Read the configuration again."""

    @property
    def is_ready(self) -> bool:
        """Whether clients are let in."""

    @property
    def admin(self) -> Sequence[str]:
        """URLs of the dashboard."""


class Service:
    """Handlers of the control interface."""

    def __init__(
        self,
        server: Server,
        image: Callable[[], Image | None],
        host: Host,
        addresses: Sequence[str],
        serving: Serving,
    ) -> None:
        """`image` tells which one is spoken of, if any; `addresses` are the URIs of the default export."""
        self._server, self._find_image, self._host, self._serving = server, image, host, serving
        self._addresses = list(addresses)
        self._started_s = trio.current_time()
        self._gauges = Gauges()

    def routes(self) -> Routes:
        """Paths, methods and handlers."""
        calls = {f"/v1/{call.path}": (call.method, partial(self._answer, call)) for call in CALLS}
        return {path: (method, getattr(self, name)) for path, (method, name) in PATHS.items()} | calls

    async def _answer(self, call: Call[Any, Any] | Feed[Any, Any], body: bytes, emit: Emit) -> object:
        image = self._the_image()
        return await (answer(call, image, body) if isinstance(call, Call) else feed(call, image, body, emit))

    @property
    def _image(self) -> Image | None:
        return self._find_image()

    async def exposition(self, body: bytes, emit: Emit) -> Page:
        """Counters, latencies and gauges in the text format of Prometheus."""
        return await workers.run(_exposition, await self.metrics(body, emit))

    async def openapi(self, body: bytes, emit: Emit) -> Page:
        """This interface as an OpenAPI 3.1 document."""
        return Page("application/json", await workers.run(_openapi))

    async def health(self, body: bytes, emit: Emit) -> Health:
        """Whether the process is alive, which it is when it answers, and what is wrong with its images."""
        return Health(True, self._problems())

    async def readiness(self, body: bytes, emit: Emit) -> Health | Page:
        """Whether clients are let in and every image works; status 503 if not."""
        problems = self._problems() if self._serving.is_ready else ["the server is starting or stopping"]
        health = Health(not problems, problems)
        return health if health.ok else Page("application/json", msgspec.json.encode(health) + b"\n", 503)

    def _problems(self) -> list[str]:
        return [f"{as_text(image.path)}: {image.poisoned}" for image in self._host.images if image.poisoned]

    async def status(self, body: bytes, emit: Emit) -> Status:
        """What is served, to whom, and since when."""
        server, image = self._server, self._image
        return Status(
            version=VERSION,
            pid=os.getpid(),
            uptime_s=round(trio.current_time() - self._started_s, 3),
            image=image.path if image else None,
            read_only=all(export.info.read_only for export in self._host.exports),
            exports=[export.name for export in self._host.exports],
            addresses=self._addresses,
            clients=[_client(connection) for connection in server.connections],
            metrics=server.metrics.snapshot(),
            failure=image.poisoned if image else None,
            admin=list(self._serving.admin),
        )

    async def metrics(self, body: bytes, emit: Emit) -> Measures:
        """Counters and latencies of the server, gauges of its images."""
        uptime_s = round(trio.current_time() - self._started_s, 3)
        return measures(self._server, self._host.exports, self._gauges.of(self._host.images), uptime_s)

    async def info(self, body: bytes, emit: Emit) -> ImageInfo:
        """The image, its disks and statistics."""
        return self._the_image().info()

    async def flush(self, body: bytes, emit: Emit) -> Done:
        """Make every write accepted so far durable."""
        if self._image:
            await self._image.flush()
        return Done()

    async def stop(self, body: bytes, emit: Emit) -> Done:
        """Begin a clean stop; once more, do not wait for clients any longer."""
        _log.info("stop asked for through the control socket")
        self._serving.stop()
        return Done()

    async def reload(self, body: bytes, emit: Emit) -> Reloaded:
        """Read the configuration again: exports, limits and TLS."""
        return await self._serving.reload()

    async def exports(self, body: bytes, emit: Emit) -> ExportList:
        """The exports."""
        specs = self._host.specs
        exports = self._host.exports
        return ExportList([_export_status(export, specs[(export.base or export).name]) for export in exports])

    async def add_export(self, body: bytes, emit: Emit) -> ExportList:
        """Serve a further disk."""
        asked = parse(body, AddExport)
        if (asked.image is None) == (asked.memory is None):
            raise UsageError(f"export {asked.name}", "needs either an image or memory")
        if asked.disk is not None and asked.image is None:
            raise UsageError(f"export {asked.name}", "is in memory, and has no disks to choose from")
        if asked.memory is not None:
            check_size(asked.memory)
        spec = ExportSpec(
            name=asked.name, image=Path(asked.image) if asked.image else None, memory_bytes=asked.memory or 0,
            disk=asked.disk, read_only=asked.read_only, description=asked.description,
            access=Access.parse(asked.addresses, asked.certificates, asked.connections),
        )  # fmt: skip
        await self._host.add(spec, lambda: asked.secret.secret() if asked.secret else None)
        return await self.exports(body, emit)

    async def remove_export(self, body: bytes, emit: Emit) -> ExportList:
        """End an export, and close its image when no other shows it."""
        asked = parse(body, RemoveExport)
        await self._host.remove(asked.name, force=asked.force)
        return await self.exports(body, emit)

    async def df(self, body: bytes, emit: Emit) -> SpaceReport:
        """Where the bytes of the image went."""
        return await self._the_image().space()

    async def check(self, body: bytes, emit: Emit) -> CheckLine:
        """Verify everything: lines of progress, then the report."""
        return CheckLine(report=await check(self._the_image(), emit))

    async def scrub(self, body: bytes, emit: Emit) -> CheckLine:
        """Verify everything, at so many bytes a second at most: lines of progress, then the report."""
        rate = check_rate(parse(body, ScrubRequest).rate)
        return CheckLine(report=await check(self._the_image(), emit, rate))

    async def optimize(self, body: bytes, emit: Emit) -> OptimizeLine:
        """Make the image smaller, at so many bytes a second at most: lines of progress, then the report."""
        asked, image = parse(body, OptimizeRequest), self._the_image()
        options = options_of(asked.passes, asked.level, check_rate(asked.rate), asked.memory)
        with naming(image.path):
            return OptimizeLine(report=await _watched(emit, lambda meter: image.optimize(options, meter)))

    async def import_(self, body: bytes, emit: Emit) -> CopyLine:
        """Copy a raw file into a disk: lines of progress, then `done`."""
        asked, disk = self._copying(body)
        refuse_if_replicated(self._the_image(), "an import")
        async with self._host.unused(disk, hint="disconnect them first"):
            _log.info("%s: disk %s is overwritten with %s", self._the_image().path, disk.name, asked.file)
            with placing(self._the_image().path):
                copied = await _watched(emit, lambda meter: copy_in(Path(asked.file), disk, meter))
        return CopyLine(done=True, disk=disk.name, bytes=copied)

    async def export(self, body: bytes, emit: Emit) -> CopyLine:
        """Copy a disk out to a raw file: lines of progress, then `done`."""
        asked, disk = self._copying(body)
        with self._host.reading(disk), placing(self._the_image().path):
            copied = await _watched(
                emit, lambda meter: copy_out(disk, Path(asked.file), meter, overwrite=asked.overwrite)
            )
        return CopyLine(done=True, disk=disk.name, bytes=copied)

    def _copying(self, body: bytes) -> tuple[CopyRequest, Disk]:
        asked = parse(body, CopyRequest)
        if not os.path.isabs(asked.file):
            raise UsageError(f"file {asked.file}", "is not an absolute path")
        return asked, self._the_image().disk(asked.disk)

    async def create_disk(self, body: bytes, emit: Emit) -> VolumeInfo:
        """Make the empty disk `name` of `size` bytes."""
        return await self._change_volumes("disks/create", body)

    async def clone_disk(self, body: bytes, emit: Emit) -> VolumeInfo:
        """Make the disk `name`, which begins as the snapshot or disk `source` is now."""
        return await self._change_volumes("disks/clone", body)

    async def resize_disk(self, body: bytes, emit: Emit) -> VolumeInfo:
        """Give the disk `name` another `size`; `discard` cuts off data."""
        return await self._change_volumes("disks/resize", body)

    async def delete_disk(self, body: bytes, emit: Emit) -> VolumeInfo:
        """Delete the disk `name`, which has no snapshots."""
        return await self._change_volumes("disks/delete", body)

    async def create_snapshot(self, body: bytes, emit: Emit) -> VolumeInfo:
        """Keep what a disk holds now as `name`, `DISK@NAME`."""
        return await self._change_volumes("snapshots/create", body)

    async def delete_snapshot(self, body: bytes, emit: Emit) -> VolumeInfo:
        """Delete the snapshot `name`, `DISK@NAME`."""
        return await self._change_volumes("snapshots/delete", body)

    async def roll_back(self, body: bytes, emit: Emit) -> VolumeInfo:
        """Make a disk what it was when its snapshot `name`, `DISK@NAME`, was taken."""
        return await self._change_volumes("snapshots/rollback", body)

    async def diff(self, body: bytes, emit: Emit) -> DiffLine:
        """Ranges in which a disk, or `until`, differs from its snapshot `since`: lines of `changes`, then `done`."""

        async def tell(found: Ranges) -> None:
            await emit(DiffLine(found))

        cut = await difference(self._the_image(), parse(body, DiffRequest), tell, self._host.reading)
        return DiffLine(cut=cut, done=True)

    async def _change_volumes(self, action: volumechange.Action, body: bytes) -> VolumeInfo:
        image, request = self._the_image(), parse(body, VolumeRequest)
        if replica := replica_of(image):
            done = msgspec.json.decode(await replica.call(action, body), type=VolumeInfo)
            _log.info("%s: %s %s on all nodes", image.path, action, done.name)
            return done
        with naming(image.path):
            done = await volumechange.change(action, request, image, partial(self._host.unused, force=request.force))
        _log.info("%s: %s %s%s", image.path, action, done.name, " by force" if request.force else "")
        return done

    async def dictionaries(self, body: bytes, emit: Emit) -> DictionaryReport:
        """The compression dictionaries."""
        return DictionaryReport(dictionarychange.listing(self._the_image().dictionaries.table))

    async def train_dictionaries(self, body: bytes, emit: Emit) -> DictionaryLine:
        """Train dictionaries from a disk, and keep what pays: lines of progress, then the report."""
        return await self._change_dictionaries("train", body, emit)

    async def replace_dictionary(self, body: bytes, emit: Emit) -> DictionaryLine:
        """Train the dictionary `id` anew: lines of progress, then the report."""
        return await self._change_dictionaries("replace", body, emit)

    async def remove_dictionary(self, body: bytes, emit: Emit) -> DictionaryLine:
        """Remove the dictionary `id`, which no data needs: lines of progress, then the report."""
        return await self._change_dictionaries("remove", body, emit)

    async def _change_dictionaries(self, action: dictionarychange.Action, body: bytes, emit: Emit) -> DictionaryLine:
        image, request = self._the_image(), parse(body, DictionaryRequest)
        with naming(image.path), ExitStack() as held:
            if action != "remove":
                held.enter_context(self._host.reading(image.disk(request.disk)))
            work = partial(dictionarychange.change, action, request, image)
            return DictionaryLine(report=await _watched(emit, work))

    async def keys(self, body: bytes, emit: Emit) -> KeyList:
        """The key slots in use."""
        image = self._encrypted_image()
        with naming(image.path):
            return KeyList((await workers.run(_key_area, image)).slots())

    async def add_key(self, body: bytes, emit: Emit) -> KeyList:
        """Let `new_secret` open the image too."""
        return await self._change_keys("add", body)

    async def remove_key(self, body: bytes, emit: Emit) -> KeyList:
        """Free a slot: the given one, or that of `secret`."""
        return await self._change_keys("remove", body)

    async def change_key(self, body: bytes, emit: Emit) -> KeyList:
        """Replace the secret of a slot by `new_secret`."""
        return await self._change_keys("change", body)

    async def _change_keys(self, action: Action, body: bytes) -> KeyList:
        image, request = self._encrypted_image(), parse(body, KeyRequest)
        with naming(image.path):
            await image.update_keys(lambda area: apply(action, request, area, fresh()))
        return KeyList((await workers.run(_key_area, image)).slots())

    def _the_image(self) -> Image:
        if self._image is None:
            raise RefusedError("disk in memory", "has no image to ask about")
        return self._image

    def _encrypted_image(self) -> Image:
        image = self._the_image()
        if not image.encrypted:
            raise RefusedError("image", "is not encrypted, it has no key slots", "make a new one with a key")
        return image


@cache
def _openapi() -> bytes:
    from nbdvde.admin import openapi  # noqa: PLC0415 - it describes this module

    return msgspec.json.encode(openapi.document())


def _exposition(found: Measures) -> Page:
    from nbdvde.admin import prometheus  # noqa: PLC0415 - takes 50 ms, and most servers are never asked

    return Page(prometheus.CONTENT_TYPE, prometheus.render(found))


def _client(connection: Connection) -> Client:
    export = connection.visitor.export
    return Client(connection.number, connection.peer, export.name if export else None)


def _export_status(export: Export, spec: ExportSpec) -> ExportStatus:
    info = export.info
    image = str(spec.image) if spec.image else None
    return ExportStatus(info.name, image, info.size, info.read_only, info.description, export.clients, export.disk.name)


def _key_area(image: Image) -> KeyArea:
    return image.key_area


class _StoppedError(Exception):
    """Raised in the thread of a check that nobody waits for any more."""


class _Meter:
    """The latest progress, set by the thread that checks."""

    def __init__(self) -> None:
        self.latest: Progress | None = None
        self.stopped = False

    def __call__(self, done: int, total: int) -> None:
        if self.stopped:
            raise _StoppedError
        self.latest = Progress(done, total)


async def check(image: Image, emit: Emit, rate: int | None = None) -> CheckReport:
    """Verify an image; a cancelled check ends at its next progress. Raises NbdvdeError."""
    return await _watched(emit, lambda meter: image.check(meter, rate))


async def _watched(emit: Emit, work: Callable[[_Meter], Awaitable[T]]) -> T:
    """Do something that takes long, telling how far it has come. Raises NbdvdeError."""
    meter = _Meter()
    result: T | NbdvdeError
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_tell, meter, emit)
        try:
            result = await work(meter)
        except NbdvdeError as error:
            result = error
        except _StoppedError:
            await trio.lowlevel.checkpoint_if_cancelled()
            raise
        nursery.cancel_scope.cancel()
    if isinstance(result, NbdvdeError):
        raise result
    return result


async def _tell(meter: _Meter, emit: Emit) -> None:
    told = None
    try:
        while True:
            await trio.sleep(PROGRESS_S)
            if meter.latest != told:
                told = meter.latest
                await emit(CopyLine(progress=told))
    finally:
        meter.stopped = True
