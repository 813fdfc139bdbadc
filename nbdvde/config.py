"""Options of the server: command line over environment over TOML file over defaults, all checked and frozen.

Tables and keys of the file are the classes below. The environment variable of key K in table T is `NBDVDE_T_K`;
lists are separated by commas. What is unknown is an error. No secret is ever an option.
"""

import os
import re
import stat
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec

from nbdvde.engine.pace import check_rate
from nbdvde.errors import UsageError, reason

MAX_DISK_BYTES = (1 << 63) - 512
_ENVIRONMENT = "NBDVDE_"
_INTERVAL_MIN = 0.1
_LISTS = {("server", key) for key in ("listen", "admin_allow", "admin_names")}
_SIZE = re.compile(r"([0-9]{1,19})(?:\.([0-9]{1,9}))?(?:([KMGTP])(?:iB)?)?", re.ASCII | re.IGNORECASE)
_SECTOR, _BLOCK, _MAX_EXTENT_BLOCKS = 512, 4096, 256
_MIN_CAPACITY = 64 << 20


class Size(int):
    """A number of bytes, written like `64M`."""


Count = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]
FileName = Annotated[str, msgspec.Meta(min_length=1, pattern=r"^[^\0]*$")]
"""A path: never empty, so that a variable that is unset somewhere turns nothing off."""


def parse_size(text: str) -> int:
    """Bytes of a size such as `10G` (units K M G T P, powers of 1024). Raises UsageError.

    Of a fraction, as in the `1.3G` that we print, come as many whole sectors as it holds.
    """
    match = _SIZE.fullmatch(text)
    if not match:
        raise UsageError(f"size {text!r}", "is not a number with an optional K, M, G, T or P", "like 10G or 1.5G")
    number, decimals, unit = match.groups()
    shift = 10 * " KMGTP".index((unit or " ").upper())
    if decimals is None:
        return int(number) << shift
    size: int = (int(number + decimals) << shift) // 10 ** len(decimals)
    return size - size % _SECTOR


def parse_disk_size(text: str) -> int:
    """Bytes of a disk: a positive multiple of 512, at most 8 EiB - 512. Raises UsageError."""
    size = parse_size(text)
    if not 0 < size <= MAX_DISK_BYTES:
        raise UsageError(f"size {text}", "a disk has 512 bytes to 8 EiB - 512", "like 10G")
    if size % _SECTOR:
        raise UsageError(f"size {text}", "is not allowed", f"a multiple of {_SECTOR}, like 1K")
    return size


def parse_extent_size(text: str) -> int:
    """Bytes of an extent: 1 to 256 blocks of 4096. Raises UsageError."""
    size = parse_size(text)
    if size % _BLOCK or not _BLOCK <= size <= _MAX_EXTENT_BLOCKS * _BLOCK:
        raise UsageError(f"extent size {text}", "is not a multiple of 4K from 4K to 1M", "the default is 64K")
    return size


def parse_rate(text: str) -> int:
    """Bytes a second. Raises UsageError."""
    return check_rate(parse_size(text))


def parse_dedup_memory(text: str) -> int:
    """Bytes of memory, 1 MiB to 1 TiB. Raises UsageError."""
    size = parse_size(text)
    if not 1 << 20 <= size <= 1 << 40:
        raise UsageError(f"dedup memory {text}", "is not between 1M and 1T", "the default is 256M")
    return size


def parse_capacity(text: str) -> int:
    """Bytes of the capacity of an image: 64 MiB or more. Raises UsageError."""
    size = parse_size(text)
    if not _MIN_CAPACITY <= size <= MAX_DISK_BYTES:
        raise UsageError(f"capacity {text}", "an image needs 64M or more", "like 10G")
    return size


def parse_compression(text: str) -> str | int:
    """A name, or a zstd level 1 to 22. Raises UsageError."""
    if text in ("fastest", "optimal", "smallest", "none"):
        return text
    if text.isascii() and text.isdigit() and 1 <= int(text) <= 22:
        return int(text)
    raise UsageError(f"compression {text!r}", "is none of fastest, optimal, smallest, none, and no level 1 to 22")


class ServerOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is served, and where."""

    key_file: FileName | None = None
    """Path of the key file of images on the command line; without one the passphrase is asked for."""
    listen: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)] = ("localhost:10809",)
    """Listeners: `unix:PATH`, `HOST:PORT`, `vsock:CID:PORT`, `systemd` for what it passes, `stdio` for one client."""
    export: str | None = None
    """Name of the export of a single image on the command line; of several exports, the one that is the default."""
    read_only: bool = False
    """Refuse every change."""
    control: FileName | None = None
    """Path of the control socket of the first image, or `none` for all; `IMAGE.ctl` by default."""
    admin: str | None = None
    """`HOST:PORT` of the dashboard, of metrics for Prometheus and of health; none by default."""
    admin_allow: tuple[Literal["remote", "changes"], ...] = ()
    """What is allowed there besides reading from this machine: `remote` addresses, `changes`."""
    admin_names: tuple[str, ...] = ()
    """Further names of this machine in URLs of the dashboard; addresses and `localhost` are always known."""
    pid_file: FileName | None = None
    """File that holds the process id while the server is ready."""
    print_uri: bool = False
    """Print the address of each export on standard output."""
    metrics_interval: float = 10.0
    """Seconds between samples in the metrics logs of disks that have one, at least 0.1; 0 for none."""
    log_format: Literal["text", "json"] = "text"
    """Form of the log on standard error."""

    def __post_init__(self) -> None:
        if self.metrics_interval != 0 and not self.metrics_interval >= _INTERVAL_MIN:
            raise ValueError(f"metrics_interval {self.metrics_interval:g} is neither 0 nor at least {_INTERVAL_MIN}")


class TlsOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Encrypted connections; with a certificate every client has to use them."""

    cert: FileName | None = None
    """PEM file with the server's certificate, followed by those between it and its authority."""
    key: FileName | None = None
    """PEM file with the key of the certificate."""
    client_ca: FileName | None = None
    """PEM file with the authority whose certificates clients must show."""
    psk: FileName | None = None
    """File of lines NAME:HEX, mode 0600: keys that clients share, instead of certificates. Needs Python 3.13."""


class LimitOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What clients may take; unset ones keep the server's own defaults."""

    connections: Count | None = None
    """Clients at a time."""
    address_connections: Count | None = None
    """Clients at a time from one IP address."""
    handshake_s: Seconds | None = None
    """Seconds from connecting to being served."""
    handshake_bytes: Size | None = None
    """Bytes that a client may send before it is served."""
    option_bytes: Size | None = None
    """Data of one option that are looked at; more is refused."""
    options: Count | None = None
    """Options that a client may send before it is served."""
    idle_s: Seconds | None = None
    """Seconds without a request after which a client is disconnected."""
    keepalive_s: Annotated[int, msgspec.Meta(ge=1, le=32767)] | None = None
    """Seconds of silence after which TCP asks whether a client is still there; it has half as long to answer."""
    requests_in_flight: Count | None = None
    """Requests of one client that wait for a disk or for their answers to be sent."""
    bytes_in_flight: Size | None = None
    """Bytes that these requests hold in memory."""
    server_bytes_in_flight: Size | None = None
    """Bytes that the requests of all clients hold, those of payloads on their way included."""
    stall_s: Seconds | None = None
    """Seconds that a client may be at a standstill while all of server_bytes_in_flight is used."""
    surveys: Count | None = None
    """CACHE and BLOCK_STATUS requests at a time, of all clients."""
    client_surveys: Count | None = None
    """As `surveys`, of one client."""
    stop_s: Seconds | None = None
    """Seconds that a stop waits for requests in flight."""


class EngineOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Memory of the storage engine; unset ones keep the engine's own defaults."""

    cache_size: Size | None = None
    """Decoded data kept in memory."""
    write_buffer_size: Size | None = None
    """Written data kept in memory before it is sealed."""
    dedup_memory: Size | None = None
    """Memory for finding duplicates, instead of what the image was made with: 256M if that was not said."""


class ClusterOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Replication: all of it, or nothing. The image belongs to a cluster then (`nbdvde cluster init` and `join`)."""

    listen: str | None = None
    """`HOST:PORT` where the other nodes call."""
    cert: FileName | None = None
    """PEM file with the certificate of this node, good for servers and clients."""
    key: FileName | None = None
    """PEM file with its key."""
    ca: FileName | None = None
    """PEM file with the authority that issued the certificates of all nodes."""
    directory: FileName | None = None
    """Where the replication log is; `IMAGE.raft` by default."""
    log_size: Size = Size(64 << 20)
    """Of entries that are kept for nodes that are away for a short time: who was for longer compares its image."""
    catch_up_rate: Size | None = None
    """Bytes a second, at most, that are taken from another node after having been away for longer."""
    election: Annotated[float, msgspec.Meta(ge=0.1, le=60)] = 1.0
    """Seconds without a sign of the leader after which another is elected."""
    lease: bool = False
    """Answer reads without asking the other nodes, as long as they cannot have elected another leader. A clock that
    runs more than twice as fast as another may then have old data read. The same on all nodes, and `election` too: stop
    all of them to change it."""
    compare_every: Annotated[float, msgspec.Meta(ge=0, le=31_536_000)] = 604_800.0
    """Seconds from one comparison of all replicas in the background to the next, which mends what differs; 0: never."""
    compare_rate: Size = Size(16 << 20)
    """Bytes of disks a second, at most, that are compared in the background."""

    @property
    def wanted(self) -> bool:
        """Whether anything is to be replicated."""
        return self.listen is not None

    def __post_init__(self) -> None:
        given = [name for name in ("listen", "cert", "key", "ca") if getattr(self, name) is not None]
        if given and len(given) < 4:
            raise ValueError(f"{given[0]} is of no use without the others of listen, cert, key and ca")
        for rate in (self.catch_up_rate, self.compare_rate):
            if rate is not None:
                try:
                    check_rate(rate)
                except UsageError as error:
                    raise ValueError(error.message) from None


class DiskOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """An export; one table for each, besides the images on the command line. SIGHUP reads them again."""

    name: str
    """What clients ask for."""
    image: FileName | None = None
    """Path of its image, which several exports may share."""
    disk: str | None = None
    """Which disk of the image, or snapshot as `DISK@NAME`; the first disk by default."""
    memory: Size | None = None
    """Size of a disk in memory, instead of an image."""
    key_file: FileName | None = None
    """Path of the key file of the image."""
    read_only: bool = False
    """Refuse every change."""
    description: str = ""
    """Text that clients show to people."""
    addresses: tuple[str, ...] | None = None
    """Where clients may come from: IP addresses and networks, `unix`, `vsock`; from everywhere by default."""
    certificates: tuple[str, ...] | None = None
    """Names of which a client's certificate must have one; needs `client_ca`."""
    connections: Count | None = None
    """Clients at a time."""


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All options of a server."""

    server: ServerOptions = ServerOptions()
    tls: TlsOptions = TlsOptions()
    limits: LimitOptions = LimitOptions()
    engine: EngineOptions = EngineOptions()
    cluster: ClusterOptions = ClusterOptions()
    disk: tuple[DiskOptions, ...] = ()


Layer = dict[str, Any]


def load(command_line: Mapping[str, Any], file: Path | None, environment: Mapping[str, str]) -> Options:
    """Options from all sources; None means not given.

    `command_line` has keys of the table `server`, and with `tls_` or `engine_` before them those of these tables.

    Raises UsageError that names the key and its source.
    """
    given = {key: value for key, value in command_line.items() if value is not None}
    merged: Layer = {}
    arguments: Layer = {"server": {}, "tls": {}, "engine": {}}
    for key, value in given.items():
        table, _, rest = key.partition("_")
        if table in ("tls", "engine"):
            arguments[table][rest] = value
        else:
            arguments["server"][key] = value
    for layer in (_read_file(file) if file else {}, _read_environment(environment), arguments):
        for table, values in layer.items():
            if isinstance(values, list):
                merged[table] = values
            else:
                merged.setdefault(table, {}).update(values)
    return _convert(merged, "options")


def _read_file(path: Path) -> Layer:
    what = f"configuration file {path}"
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UsageError(what, "is not a regular file", "check --config")
            layer = tomllib.load(file)
    except OSError as error:
        raise UsageError(what, reason(error), "check --config") from None
    except (ValueError, RecursionError) as error:  # what tomllib raises for broken text, long numbers and deep nesting
        raise UsageError(what, f"is not TOML: {error}") from None
    _convert(layer, what, strict=True)
    return layer


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # or a FIFO would wait for a writer


def _read_environment(environment: Mapping[str, str]) -> Layer:
    layer: Layer = {}
    for variable, text in environment.items():
        if not variable.startswith(_ENVIRONMENT):
            continue
        table, _, key = variable.removeprefix(_ENVIRONMENT).lower().partition("_")
        value = text.split(",") if (table, key) in _LISTS else text
        _convert({table: {key: value}}, f"environment variable {variable}")
        layer.setdefault(table, {})[key] = value
    return layer


def _convert(layer: Layer, source: str, *, strict: bool = False) -> Options:
    try:
        return msgspec.convert(layer, Options, strict=strict, dec_hook=_size)
    except msgspec.ValidationError as error:
        raise UsageError(source, _explain(str(error)), "the reference lists all keys") from None


def _size(kind: type, value: object) -> Size:
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise TypeError("expected a size like 64M")
    try:
        size = parse_size(str(value))
    except UsageError as error:
        raise ValueError(error.message) from None
    if not size:
        raise ValueError("expected a size above 0")
    return Size(size)


_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`")
_PATTERN = re.compile(r"matching regex .*")  # that of `FileName`
_WHERE = re.compile(r"(.*) - at `\$\.?(.*)`")


def _explain(message: str) -> str:
    """msgspec's message in the words of a TOML file."""
    text, where = match.groups() if (match := _WHERE.fullmatch(message)) else (message, "")
    if unknown := _UNKNOWN.fullmatch(text):
        return f"unknown key {where}.{unknown[1]}" if where else f"unknown table [{unknown[1]}]"
    if text.startswith("Invalid enum value"):
        text += f", expected {' or '.join(_choices(where))}"
    text = text[:1].lower() + text[1:].replace(" | null", "").replace("`object`", "a table").replace("`", "")
    return f"{where}: {_PATTERN.sub('without zero bytes', text)}"


def _choices(where: str) -> list[str]:
    """The texts that a key takes, from the types of the options."""
    leaves: list[object] = [Options]
    for key in re.findall("[a-z_]+", where):
        table = next(leaf for leaf in leaves if isinstance(leaf, type) and issubclass(leaf, msgspec.Struct))
        leaves = list(_leaves(get_type_hints(table)[key]))
    return [leaf for leaf in leaves if isinstance(leaf, str)]


def _leaves(kind: object) -> Iterator[object]:
    """The types and values that a type is made of."""
    parts = get_args(kind)
    if not parts:
        yield kind
    for part in parts:
        yield from _leaves(part)
