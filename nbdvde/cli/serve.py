"""The `serve` command: listeners, image, server and control socket, from start to a clean stop."""

import logging
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import quote

import msgspec
import trio

from nbdvde.admin import http
from nbdvde.admin.client import connect
from nbdvde.admin.service import Service
from nbdvde.cli import output
from nbdvde.cli.images import ImageByPath, default_control
from nbdvde.cli.logs import configure_logging
from nbdvde.config import Options, TlsOptions, parse_disk_size
from nbdvde.disk import Disk
from nbdvde.engine.access import open_image
from nbdvde.engine.image import Image
from nbdvde.engine.keys import Secret
from nbdvde.errors import InUseError, NetworkError, UsageError, reason
from nbdvde.exports import Exports
from nbdvde.limits import Limits
from nbdvde.listeners import (
    ANY_CID,
    Address,
    Listener,
    TcpAddress,
    UnixAddress,
    VsockAddress,
    open_listener,
    parse_listen,
)
from nbdvde.memory import MemoryDisk
from nbdvde.protocol.constants import MAX_STRING
from nbdvde.server import Server
from nbdvde.tls import Certificates, server_context
from nbdvde.tuning import tune_process

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to serve and where, checked as far as that goes without opening anything."""

    image: Path | None
    memory_bytes: int
    """Size of the disk in memory, when there is no image."""
    addresses: tuple[Address, ...]
    control: Path | None
    tls: ssl.SSLContext | None
    options: Options

    @classmethod
    def make(cls, image: Path | None, memory: str | None, options: Options) -> Self:
        """Raises UsageError, KeyFailure."""
        if (image is None) == (memory is None):
            raise UsageError("serve", "takes either an image or --memory", "see nbdvde serve --help")
        _check_export(options.server.export)
        addresses = tuple(map(parse_listen, options.server.listen))
        control = Path(options.server.control) if options.server.control else image and default_control(image)
        if options.server.control == "none":
            control = None
        return cls(
            image, 0 if memory is None else parse_disk_size(memory), addresses, control, _tls(options.tls), options
        )

    def secret(self) -> Secret | None:
        """What opens the image; asks for it if need be."""
        key_file = self.options.server.key_file
        return ImageByPath(self.image, key_file=Path(key_file) if key_file else None).secret() if self.image else None


def serve(plan: Plan) -> None:
    """Serve until a signal or the control socket ends it. Raises NbdvdeError."""
    configure_logging(plan.options.server.log_format)
    tune_process()
    trio.run(_Serving(plan, plan.secret()).run)


class _Serving:
    def __init__(self, plan: Plan, secret: Secret | None) -> None:
        self._plan, self._secret = plan, secret
        self._server: Server | None = None
        self._held = ExitStack()
        self._starting, self._clients = trio.CancelScope(), trio.CancelScope()
        self._stopping = False

    async def run(self) -> None:
        """Start, serve, stop. Nothing is written to the image before every listener is bound."""
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals, self._held:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._obey, signals)
                with self._starting:
                    listeners = [await self._bind(address) for address in self._plan.addresses]
                    control = await self._bind_control()
                    async with self._opened() as (disk, image):
                        await self._serve(disk, image, listeners, control)
                nursery.cancel_scope.cancel()

    def stop(self) -> None:
        """Begin a clean stop; when it has begun, end the waiting for clients."""
        _tell_systemd("STOPPING=1")
        if self._server is None:
            self._starting.cancel()
        elif self._stopping:
            self._clients.cancel()
        else:
            self._stopping = True
            self._server.stop()

    async def _obey(self, signals: AsyncIterator[int]) -> None:
        async for _ in signals:
            self.stop()

    async def _bind(self, address: Address) -> Listener:
        return self._held.enter_context(closing(await open_listener(address)))

    async def _bind_control(self) -> Listener | None:
        path = self._plan.control
        if path is None:
            return None
        if connect(path):
            raise InUseError(str(self._plan.image or path), f"a server answers at {path}", "stop it first")
        try:
            with _private():
                return await self._bind(UnixAddress(path))
        except NetworkError as error:
            raise NetworkError(error.what, error.why, "choose another place with --control, or none") from None

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[tuple[Disk, Image | None]]:
        plan, engine, read_only = self._plan, self._plan.options.engine, self._plan.options.server.read_only
        if plan.image is None:
            yield MemoryDisk(plan.memory_bytes, read_only=read_only), None
            return
        sizes = {"cache_bytes": engine.cache_size, "buffer_bytes": engine.write_buffer_size}
        given = {name: value for name, value in sizes.items() if value is not None}
        async with open_image(plan.image, key=self._secret, read_only=read_only, **given) as image:
            yield image.disk(), image

    async def _serve(
        self, disk: Disk, image: Image | None, listeners: Sequence[Listener], control: Listener | None
    ) -> None:
        name = self._plan.options.server.export or disk.name
        given = msgspec.structs.asdict(self._plan.options.limits)
        limits = Limits(**{key: value for key, value in given.items() if value is not None})
        tls = self._plan.tls
        self._server = server = Server(Exports({name: disk}, default=name), limits=limits, tls=tls)
        uris = [uri for listener in listeners for uri in uris_of(listener, tls=tls is not None)]
        async with trio.open_nursery() as nursery:
            if control:
                service = Service(
                    server, image, exports=[name], addresses=uris, read_only=disk.read_only, stop=self.stop
                )
                await nursery.start(http.serve, control.sockets[0], service.routes())
            with self._clients:
                await self._serve_clients(server, listeners, name, uris)
            nursery.cancel_scope.cancel()

    async def _serve_clients(
        self, server: Server, listeners: Sequence[Listener], name: str, uris: Sequence[str]
    ) -> None:
        async with trio.open_nursery() as serving:
            await serving.start(server.run, listeners)
            self._held.enter_context(_pid_file(self._plan.options.server.pid_file))
            self._announce(name, uris)
            _tell_systemd("READY=1")

    def _announce(self, name: str, uris: Sequence[str]) -> None:
        for uri in uris:
            _log.info("serving %s on %s", name, uri, extra={"fields": {"export": name, "uri": uri}})
            if self._plan.options.server.print_uri:
                _print_uri(uri)


def _print_uri(uri: str) -> None:
    """Clients may come all the same when nobody reads it."""
    try:
        output.line(uri)
    except OSError as error:
        _log.warning("cannot print the URI on standard output: %s", reason(error))


def _check_export(name: str | None) -> None:
    try:
        raw = (name or "").encode()
    except UnicodeEncodeError:
        raise UsageError("export name", "is not valid UTF-8", "choose another") from None
    if len(raw) > MAX_STRING or b"\0" in raw:
        raise UsageError("export name", f"is longer than {MAX_STRING} bytes, or holds a zero byte", "choose another")


def uris_of(listener: Listener, *, tls: bool = False) -> list[str]:
    """Where clients find the default export of a listener: one URI, more when the kernel chose several ports."""
    address = listener.address
    known = isinstance(address, UnixAddress) or (isinstance(address, TcpAddress) and address.port)
    return [_uri(place, "nbds" if tls else "nbd") for place in ([address] if known else listener.bound)]


def _uri(place: Address, scheme: str) -> str:
    """See https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md; libnbd adds vsock."""
    if isinstance(place, UnixAddress):
        return f"{scheme}+unix:///?socket={quote(os.fsencode(place.path.absolute()))}"
    if isinstance(place, VsockAddress):
        return f"{scheme}+vsock://{'' if place.cid == ANY_CID else place.cid}:{place.port}/"
    return f"{scheme}://{place}/"


def _tell_systemd(state: str) -> None:
    """Tell the service manager, if there is one that wants to know (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)


def _tls(options: TlsOptions) -> ssl.SSLContext | None:
    if options.cert is None or options.key is None:
        if options.cert or options.key or options.client_ca:
            raise UsageError("TLS", "needs both a certificate and its key", "give --tls-cert and --tls-key")
        return None
    authority = Path(options.client_ca) if options.client_ca else None
    return server_context(Certificates(Path(options.cert), Path(options.key), authority))


@contextmanager
def _private() -> Iterator[None]:
    """Files made inside belong to this user alone, from their first moment on."""
    old = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(old)


@contextmanager
def _pid_file(name: str | None) -> Iterator[None]:
    if name is None:
        yield
        return
    path, text = Path(name), f"{os.getpid()}\n"
    try:
        _refuse_other_content(path)
        path.write_text(text)
    except OSError as error:
        raise UsageError(f"pid file {path}", reason(error), "check --pid-file") from None
    try:
        yield
    finally:
        with suppress(OSError):
            if path.read_bytes() == text.encode():
                path.unlink()


def _refuse_other_content(path: Path) -> None:
    """A pid file may be left over; anything else must not be lost."""
    if not path.exists():
        return
    if path.is_file():
        with path.open("rb") as file:
            content = file.read(32).strip()
        if not content or content.isdigit():
            return
    raise UsageError(f"pid file {path}", "exists and holds something else", "choose another name")
