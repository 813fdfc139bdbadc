"""What `serve` is to do, worked out from its options before anything is opened."""

import ssl
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import msgspec

import nbdvde
from nbdvde.cli.dashboard import DashboardPlan
from nbdvde.cli.images import ImageByPath, default_control
from nbdvde.config import ClusterOptions, DiskOptions, LimitOptions, Options, TlsOptions, parse_disk_size
from nbdvde.engine.keys import Secret
from nbdvde.errors import UsageError
from nbdvde.exports import Access
from nbdvde.hosting import ExportSpec
from nbdvde.keysource import read_shared_keys
from nbdvde.limits import Limits
from nbdvde.listeners import Address, StdioAddress, TcpAddress, UnixAddress, parse_listen
from nbdvde.memory import MemoryDisk
from nbdvde.protocol.handshake import HandshakeLimits
from nbdvde.replication.running import Plan as ClusterPlan
from nbdvde.tls import TlsFiles, server_context, shared_key_context


@dataclass(frozen=True, slots=True)
class PlannedExport:
    """An export and what opens its image."""

    spec: ExportSpec
    key_file: Path | None = None

    def secret(self) -> Secret | None:
        """What opens the image; asks for it if need be. Raises NbdvdeError."""
        return ImageByPath(self.spec.image, key_file=self.key_file).secret() if self.spec.image else None

    def secret_unasked(self) -> Secret | None:
        """As `secret`, where nobody can be asked. Raises NbdvdeError."""
        image = self.spec.image
        if image and self.key_file is None and nbdvde.read_info(image).encryption != "none":
            raise UsageError(f"export {self.spec.name}", "its image is encrypted", "name its key_file")
        return self.secret()


@dataclass(frozen=True, slots=True)
class Plan:
    """What to serve and where, checked as far as that goes without opening anything."""

    exports: tuple[PlannedExport, ...]
    default: str
    """Name of the default export."""
    addresses: tuple[Address, ...]
    control: Path | None
    """Control socket of the first image, or of a server without one."""
    dashboard: DashboardPlan | None
    tls: ssl.SSLContext | None
    limits: Limits
    cluster: ClusterPlan | None
    """How the image takes part in its cluster."""
    options: Options
    again: Callable[[], "Plan"]
    """Makes the plan anew, when the configuration file may have changed."""

    @classmethod
    def make(cls, images: Sequence[Path], memory: str | None, read: Callable[[], Options]) -> Self:
        """`read` gives the options. Raises UsageError, KeyFailure, ImageError."""
        options = read()
        exports = tuple(_exports(images, memory, options))
        addresses = tuple(map(parse_listen, options.server.listen))
        if StdioAddress() in addresses and options.server.print_uri:
            raise UsageError("--print-uri", "standard output is the client's", "drop one of the two")
        if addresses.count(StdioAddress()) > 1:
            raise UsageError("--listen", "names stdio twice", "it has one client")
        _check_certificates(options)
        control = _control(exports, options)
        if control and UnixAddress(control) in addresses:
            raise UsageError("--control", "is the same socket as --listen", "choose another for one of them")
        return cls(
            exports, _default(exports, images, memory, options), addresses, control,
            DashboardPlan.of(options.server), _tls(options.tls),
            _limits(options.limits), _cluster(exports, options.cluster), options,
            lambda: cls.make(images, memory, read),
        )  # fmt: skip

    def writable(self, file: Path | None) -> bool:
        """Whether an export needs to write to the image in a file (`ExportSpec.file`)."""
        return any(not export.spec.read_only for export in self.exports if export.spec.file == file)

    def named(self) -> dict[str, PlannedExport]:
        """The exports by name."""
        return {export.spec.name: export for export in self.exports}


def _exports(images: Sequence[Path], memory: str | None, options: Options) -> Iterator[PlannedExport]:
    if images and memory is not None:
        raise UsageError("serve", "takes either images or --memory", "see nbdvde serve --help")
    if not images and memory is None and not options.disk:
        raise UsageError("serve", "takes either an image or --memory", "see nbdvde serve --help")
    server, names = options.server, set()
    given = [_given(image, images, options) for image in images]
    if memory is not None:
        size = parse_disk_size(memory)
        name = server.export or MemoryDisk(size).name
        given.append(PlannedExport(ExportSpec(name=name, memory_bytes=size, read_only=server.read_only)))
    for export in [*given, *(_configured(disk, options) for disk in options.disk)]:
        if export.spec.name in names:
            raise UsageError(f"export {export.spec.name}", "is there twice", "name them in [[disk]] tables")
        names.add(export.spec.name)
        yield export


def _given(image: Path, images: Sequence[Path], options: Options) -> PlannedExport:
    """An image of the command line: a single one has the names of its disks, several have those of their files."""
    server = options.server
    name = image.stem if len(images) > 1 else server.export or nbdvde.read_info(image).disks[0].name
    key_file = Path(server.key_file) if server.key_file else None
    spec = ExportSpec(name=name, image=image, whole=len(images) == 1, read_only=server.read_only)
    return PlannedExport(spec, key_file)


def _configured(disk: DiskOptions, options: Options) -> PlannedExport:
    if (disk.image is None) == (disk.memory is None):
        raise UsageError(f"disk {disk.name}", "needs either image or memory")
    if disk.disk is not None and disk.image is None:
        raise UsageError(f"disk {disk.name}", "is in memory, and has no disks to choose from", "drop disk")
    spec = ExportSpec(
        name=disk.name,
        image=None if disk.image is None else Path(disk.image),
        memory_bytes=parse_disk_size(str(disk.memory)) if disk.memory else 0,
        disk=disk.disk,
        read_only=disk.read_only or options.server.read_only,
        description=disk.description,
        access=Access.parse(disk.addresses, disk.certificates, disk.connections),
    )
    return PlannedExport(spec, Path(disk.key_file) if disk.key_file else None)


def _default(exports: Sequence[PlannedExport], images: Sequence[Path], memory: str | None, options: Options) -> str:
    wanted = options.server.export
    names = [export.spec.name for export in exports]
    if wanted is None or wanted in names:
        return wanted or names[0]
    raise UsageError(f"export {wanted}", "is none of those served", f"use one of {', '.join(names)}")


def _control(exports: Sequence[PlannedExport], options: Options) -> Path | None:
    if options.server.control == "none":
        return None
    if options.server.control is not None:
        return Path(options.server.control)
    image = next((export.spec.image for export in exports if export.spec.image), None)
    return image and default_control(image)


def _check_certificates(options: Options) -> None:
    for disk in options.disk:
        if disk.certificates is not None and options.tls.client_ca is None:
            raise UsageError(f"disk {disk.name}", "certificates are of no use without client_ca", "set it in [tls]")


def _limits(options: LimitOptions) -> Limits:
    given = {key: value for key, value in msgspec.structs.asdict(options).items() if value is not None}
    own = {field.name for field in fields(HandshakeLimits)}
    handshake = HandshakeLimits(**{key: value for key, value in given.items() if key in own})
    return Limits(**{key: value for key, value in given.items() if key not in own}, handshake=handshake)


def _cluster(exports: Sequence[PlannedExport], options: ClusterOptions) -> ClusterPlan | None:
    if options.listen is None or options.cert is None or options.key is None or options.ca is None:
        return None
    images = {export.spec.image for export in exports}
    image = next(iter(images))
    if len(images) > 1 or image is None:
        raise UsageError("[cluster]", "one image is replicated, and nothing else served", "serve others apart")
    address = parse_listen(options.listen)
    if not isinstance(address, TcpAddress):
        raise UsageError(f"cluster.listen {options.listen}", "is not HOST:PORT", "like 10.0.0.1:10810")
    files = TlsFiles(Path(options.cert), Path(options.key), Path(options.ca))
    directory = Path(options.directory) if options.directory else image.with_name(f"{image.name}.raft")
    return ClusterPlan(
        address, files, directory, options.log_size, options.election, catch_up_rate=options.catch_up_rate,
        lease=options.lease, compare_every_s=options.compare_every, compare_rate=options.compare_rate,
    )  # fmt: skip


def _tls(options: TlsOptions) -> ssl.SSLContext | None:
    files = options.cert, options.key, options.client_ca
    if options.psk is not None:
        if any(file is not None for file in files):
            raise UsageError("TLS", "has either shared keys or certificates", "drop one of the two")
        return shared_key_context(read_shared_keys(Path(options.psk)))
    if options.cert is not None and options.key is not None:
        authority = None if options.client_ca is None else Path(options.client_ca)
        return server_context(TlsFiles(Path(options.cert), Path(options.key), authority))
    if any(file is not None for file in files):
        raise UsageError("TLS", "needs both a certificate and its key", "give --tls-cert and --tls-key")
    return None
