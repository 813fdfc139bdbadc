"""The `serve` command: listeners, images, server and control sockets, from start to a clean stop."""

import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, closing, contextmanager
from functools import partial
from pathlib import Path

import trio

from nbdvde import workers
from nbdvde.admin import http
from nbdvde.admin.client import connect
from nbdvde.admin.messages import Reloaded
from nbdvde.admin.recorder import Recorder
from nbdvde.admin.replicated import executing
from nbdvde.admin.service import Service
from nbdvde.admin.wormcalls import keep_clocks
from nbdvde.cli.dashboard import Dashboard
from nbdvde.cli.images import default_control
from nbdvde.cli.logs import configure_logging
from nbdvde.cli.plan import Plan
from nbdvde.cli.ready import announce, pid_file, tell_systemd, uris_of
from nbdvde.engine.image import Image
from nbdvde.engine.keys import Secret
from nbdvde.errors import InUseError, NbdvdeError, NetworkError
from nbdvde.exports import Exports
from nbdvde.hosting import TENDING_S, Host, on_its_own
from nbdvde.listeners import Address, Listener, StdioAddress, UnixAddress, open_listener
from nbdvde.replication.registry import replica_of
from nbdvde.replication.replica import Replica
from nbdvde.replication.running import replicated
from nbdvde.server import Server
from nbdvde.stdio import standard_streams
from nbdvde.tuning import tune_process

_log = logging.getLogger(__name__)


def serve(plan: Plan) -> None:
    """Serve until a signal or the control socket ends it. Raises NbdvdeError."""
    configure_logging(plan.options.server.log_format)
    tune_process()
    secrets: dict[Path | None, Secret | None] = {}
    for export in plan.exports:
        image = export.spec.image
        if image and image not in secrets:
            secrets[image] = export.secret()
    trio.run(_Serving(plan, secrets).run)


class _Serving:
    def __init__(self, plan: Plan, secrets: Mapping[Path | None, Secret | None]) -> None:
        self._plan, self._secrets = plan, secrets
        self._first = next((export.spec.image for export in plan.exports if export.spec.image), None)
        self._control = plan.control
        """Control socket of the first image."""
        self._exports = Exports(default=plan.default)
        self._server = Server(self._exports, limits=plan.limits, tls=plan.tls)
        self._held = AsyncExitStack()
        self._starting, self._clients = trio.CancelScope(), trio.CancelScope()
        self._ready = self._stopping = False
        self._reloading = trio.Lock()
        self._host: Host
        self._nursery: trio.Nursery
        self._uris: list[str] = []
        self._dashboard: Dashboard | None = None

    async def run(self) -> None:
        """Start, serve, stop. Nothing is written to an image before every listener is bound."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        with trio.open_signal_receiver(*numbers) as signals:
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._obey, signals)
                with self._starting:
                    async with self._held:
                        listeners = [await self._bind(address) for address in self._plan.addresses]
                        if self._plan.dashboard:
                            bound = await Dashboard.bind(self._plan.dashboard)
                            self._dashboard = self._held.enter_context(closing(bound))
                        tls = self._plan.tls is not None
                        self._uris = [uri for listener in listeners for uri in uris_of(listener, tls=tls)]
                        async with self._hosting():
                            await self._serve_clients(listeners)
                self._nursery.cancel_scope.cancel()

    @property
    def is_ready(self) -> bool:
        """Whether clients are let in."""
        return self._ready and not self._stopping

    @property
    def admin(self) -> list[str]:
        """URLs of the dashboard."""
        return self._dashboard.urls if self._dashboard else []

    def stop(self) -> None:
        """Begin a clean stop; when it has begun, end the waiting for clients."""
        tell_systemd("STOPPING=1")
        if not self._ready:
            self._starting.cancel()
        elif self._stopping:
            self._clients.cancel()
        else:
            self._stopping = True
            self._server.stop()

    async def reload(self) -> Reloaded:
        """Make true what the configuration now says; what cannot be changed while serving is left as it is.

        Raises the first NbdvdeError, when everything else is done.
        """
        async with self._reloading:
            plan = await workers.run(self._plan.again)
            old, self._plan = self._plan, plan
            self._server.change(plan.limits, plan.tls)
            _warn_of_the_rest(old, plan)
            return await self._reload_exports(old, plan)

    async def _reload_exports(self, old: Plan, new: Plan) -> Reloaded:
        host, wanted = self._host, new.named()
        done, failures = Reloaded(), list[NbdvdeError]()
        for name, spec in host.specs.items():
            if name in wanted and wanted[name].spec.shown == spec.shown:
                host.adjust(wanted[name].spec)
            elif name in wanted or name in old.named():
                await _trying(failures, partial(host.remove, name, force=True))
                done.removed.append(name)
        for export in new.exports:
            if export.spec.name not in host.specs:
                writable = new.writable(export.spec.file)
                await _trying(failures, partial(host.add, export.spec, export.secret_unasked, writable=writable))
                done.added.append(export.spec.name)
        for failure in failures[1:]:
            _log.error("cannot reload everything: %s", failure)
        if failures:
            raise failures[0]
        return done

    async def _obey(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            if number != signal.SIGHUP:
                self.stop()
            elif self._ready:
                self._nursery.start_soon(self._reload_by_signal)

    async def _reload_by_signal(self) -> None:
        tell_systemd(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            done = await self.reload()
        except NbdvdeError as error:
            _log.error("cannot reload the configuration: %s", error)
        else:
            _log.info("reloaded: %d exports added, %d removed", len(done.added), len(done.removed))
        tell_systemd("READY=1")

    async def _bind(self, address: Address) -> Listener:
        if isinstance(address, StdioAddress):
            return Listener(address, (), [await self._held.enter_async_context(standard_streams())])
        return self._held.enter_context(closing(await open_listener(address)))

    @asynccontextmanager
    async def _hosting(self) -> AsyncIterator[None]:
        engine = self._plan.options.engine
        sizes = {
            "cache_bytes": engine.cache_size,
            "buffer_bytes": engine.write_buffer_size,
            "dedup_memory": engine.dedup_memory,
        }
        memory = {name: value for name, value in sizes.items() if value is not None}
        async with trio.open_nursery() as images:
            self._host = Host(self._server, self._exports, images, self._attend, memory, self._replicate)
            try:
                for export in self._plan.exports:
                    secret = partial(self._secrets.get, export.spec.image)
                    await self._host.add(export.spec, secret, writable=self._plan.writable(export.spec.file))
                yield
            finally:
                with trio.CancelScope(shield=True):
                    await self._host.close()

    def _replicate(self, image: Image) -> AbstractAsyncContextManager[Replica | None]:
        plan = self._plan.cluster
        return replicated(image, plan, executing(image)) if plan else on_its_own(image)

    @asynccontextmanager
    async def _attend(self, path: Path | None) -> AsyncIterator[Callable[[Image | None], Awaitable[None]]]:
        """Answer at the control socket of an image while it is open, and record what becomes of it."""
        control = self._control_of(path)
        scope, following = trio.CancelScope(), trio.CancelScope()

        async def attend(image: Image | None) -> None:
            if listener:
                routes = Service(self._server, lambda: image, self._host, self._uris, self).routes()
                await self._nursery.start(_answer, scope, listener, routes)
            if image:
                self._nursery.start_soon(self._follow, following, image)

        listener = await self._bind_control(control, path) if control else None
        try:
            yield attend
        finally:
            scope.cancel()
            following.cancel()
            if listener:
                listener.close()

    def _first_image(self) -> Image | None:
        return next(iter(self._host.images), None)

    def _is_recorded(self, image: Image) -> bool:
        """Whether its metrics logs are written: each node of a cluster records what it does."""
        return bool(self._plan.options.server.metrics_interval) and not image.read_only

    async def _follow(self, scope: trio.CancelScope, image: Image) -> None:
        """Record what becomes of an image, and have its cluster agree on retention clocks."""
        with scope:
            async with trio.open_nursery() as nursery:
                if self._is_recorded(image):
                    recorder = Recorder(image, self._server, lambda: self._host.exports, time.time_ns)
                    nursery.start_soon(recorder.run, self._plan.options.server.metrics_interval)
                if replica_of(image):
                    nursery.start_soon(keep_clocks, image, TENDING_S)

    def _control_of(self, path: Path | None) -> Path | None:
        if path == self._first or self._control is None:
            return self._control
        return path and default_control(path)

    async def _bind_control(self, control: Path, image: Path | None) -> Listener:
        if await workers.run(connect, control):  # it may be our own, or one that does not answer
            raise InUseError(str(image or control), f"a server answers at {control}", "stop it first")
        try:
            with _private():
                return await open_listener(UnixAddress(control))
        except NetworkError as error:
            raise NetworkError(error.what, error.why, "choose another place with --control, or none") from None

    async def _serve_clients(self, listeners: Sequence[Listener]) -> None:
        plan = self._plan
        async with AsyncExitStack() as held:
            if self._first is None:
                attend = await held.enter_async_context(self._attend(None))
                await attend(None)
            if self._dashboard:
                service = Service(self._server, self._first_image, self._host, self._uris, self)
                await held.enter_async_context(self._dashboard.answering(service))
            with self._clients:
                async with trio.open_nursery() as serving:
                    self._ready = True
                    await serving.start(self._server.run, listeners)
                    held.enter_context(pid_file(plan.options.server.pid_file))
                    names = [export.name for export in self._host.exports]
                    printed = plan.options.server.print_uri
                    announce(names, plan.default, listeners, tls=plan.tls is not None, printed=printed)
                    tell_systemd("READY=1")


async def _answer(
    scope: trio.CancelScope, listener: Listener, routes: http.Routes, *, task_status: trio.TaskStatus[None]
) -> None:
    with scope:
        await http.serve(listener.sockets[0], routes, task_status=task_status)


def _warn_of_the_rest(old: Plan, new: Plan) -> None:
    """Say what of the configuration counts only from the next start on."""
    before, after = old.options, new.options
    for key in (
        "listen", "control", "admin", "admin_allow", "admin_names", "pid_file", "log_format", "export",
        "metrics_interval",
    ):  # fmt: skip
        if getattr(before.server, key) != getattr(after.server, key):
            _log.warning("server.%s has changed: restart to let it count", key)
    if before.engine != after.engine:
        _log.warning("[engine] has changed: restart to let it count")
    if (old.tls is None) != (new.tls is None):
        _log.warning("TLS is now %s: the URIs of the exports change", "off" if new.tls is None else "demanded")


async def _trying(failures: list[NbdvdeError], do: Callable[[], Awaitable[None]]) -> None:
    try:
        await do()
    except NbdvdeError as error:
        failures.append(error)


@contextmanager
def _private() -> Iterator[None]:
    """Files made inside belong to this user alone, from their first moment on."""
    old = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(old)
