"""What the control socket can do with a running server and its image."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import msgspec
import trio

from nbdvde import workers
from nbdvde.admin.calls import Call, Feed, OfImage, answer, feed, parse
from nbdvde.admin.catalog import CALLS
from nbdvde.admin.clustermeasures import cluster_problem
from nbdvde.admin.http import Emit, Page, Routes
from nbdvde.admin.imageservice import ImageService
from nbdvde.admin.measures import Gauges, Measures, as_text, measures
from nbdvde.admin.messages import (
    AddExport,
    Client,
    Done,
    ExportList,
    ExportStatus,
    Health,
    Reloaded,
    RemoveExport,
    Status,
)
from nbdvde.engine.image import Image
from nbdvde.engine.volumes import check_size
from nbdvde.errors import UsageError
from nbdvde.exports import Access, Export
from nbdvde.hosting import ExportSpec, Host
from nbdvde.server import Connection, Server
from nbdvde.version import VERSION

_log = logging.getLogger(__name__)


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

    PATHS: ClassVar[Mapping[str, tuple[str, str]]] = {
        "/metrics": ("GET", "exposition"),
        "/healthz": ("GET", "health"),
        "/readyz": ("GET", "readiness"),
        "/v1/openapi.json": ("GET", "openapi"),
        "/v1/status": ("GET", "status"),
        "/v1/metrics": ("GET", "metrics"),
        "/v1/stop": ("POST", "stop"),
        "/v1/reload": ("POST", "reload"),
        "/v1/exports": ("GET", "exports"),
        "/v1/exports/add": ("POST", "add_export"),
        "/v1/exports/remove": ("POST", "remove_export"),
    }
    """Path to method and name of the handler."""

    def __init__(
        self,
        server: Server,
        image: Callable[[], Image | None],
        host: Host,
        addresses: Sequence[str],
        serving: Serving,
    ) -> None:
        """`image` tells which one is spoken of, if any; `addresses` are the URIs of the default export."""
        self._server, self._image, self._host, self._serving = server, image, host, serving
        self._of_image = ImageService(image, host)
        self._addresses = list(addresses)
        self._started_s = trio.current_time()
        self._gauges = Gauges()

    def routes(self) -> Routes:
        """Paths, methods and handlers."""
        calls = {f"/v1/{call.path}": (call.method, partial(self._answer, call)) for call in CALLS}
        rooms = (self, self._of_image)
        return {
            path: (method, getattr(room, name)) for room in rooms for path, (method, name) in room.PATHS.items()
        } | calls

    async def _answer(self, call: Call[Any, Any] | Feed[Any, Any], body: bytes, emit: Emit) -> object:
        request = parse(body, call.request)
        image = self._of_image.find(request.image if isinstance(request, OfImage) else None)
        return await (answer(call, image, request) if isinstance(call, Call) else feed(call, image, request, emit))

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
        found = ((as_text(image.path), image.poisoned or cluster_problem(image)) for image in self._host.images)
        return [f"{path}: {problem}" for path, problem in found if problem]

    async def status(self, body: bytes, emit: Emit) -> Status:
        """What is served, to whom, and since when."""
        server, image = self._server, self._image()
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


def handlers() -> dict[str, tuple[str, Callable[..., Any]]]:
    """Path to method and handler of all that is answered besides the calls."""
    rooms = (Service, ImageService)
    return {path: (how, getattr(room, name)) for room in rooms for path, (how, name) in room.PATHS.items()}


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
