"""What goes over the control socket: JSON of these types. `bytes` are base64."""

from typing import Literal

import msgspec

from nbdvde import errors
from nbdvde.engine.keys import KeyFile, Passphrase, Secret, SlotInfo
from nbdvde.engine.report import CheckReport, ClassReport, OptimizeReport
from nbdvde.errors import ExitCode, NbdvdeError


class ErrorBody(msgspec.Struct, frozen=True):
    """An error as programs read it; `code` is the exit code of a command that meets it."""

    code: int
    message: str
    hint: str = ""

    @classmethod
    def of(cls, error: NbdvdeError) -> "ErrorBody":
        """The body for an error."""
        return cls(error.exit_code, error.message, error.hint)

    def exception(self) -> NbdvdeError:
        """The error again, on the other side."""
        return _CLASSES.get(self.code, NbdvdeError)(self.message, hint=self.hint)


class Failure(msgspec.Struct, frozen=True):
    """Answer to what failed."""

    error: ErrorBody


_CLASSES: dict[int, type[NbdvdeError]] = {
    ExitCode.USAGE: errors.UsageError,
    ExitCode.IMAGE: errors.ImageError,
    ExitCode.KEY: errors.KeyFailure,
    ExitCode.IN_USE: errors.InUseError,
    ExitCode.DAMAGE: errors.DamageError,
    ExitCode.NO_SPACE: errors.NoSpaceError,
    ExitCode.NETWORK: errors.NetworkError,
    ExitCode.REFUSED: errors.RefusedError,
}


class Client(msgspec.Struct, frozen=True):
    """A connected client."""

    number: int
    peer: str
    export: str | None


class Status(msgspec.Struct, frozen=True):
    """Answer of GET /v1/status."""

    version: str
    pid: int
    uptime_s: float
    image: str | None
    """Path; None for a disk in memory."""
    read_only: bool
    exports: list[str]
    addresses: list[str]
    """URIs under which the default export is served."""
    clients: list[Client]
    metrics: dict[str, int]
    failure: str | None
    """Why the image takes no writes any more, if so."""
    admin: list[str] = []
    """URLs of the dashboard."""


class Health(msgspec.Struct, frozen=True):
    """Answer of GET /healthz and GET /readyz."""

    ok: bool
    problems: list[str] = []
    """What people should know, also of a server that is fine."""


class ExportStatus(msgspec.Struct, frozen=True):
    """An export. Of those EXPORT@SNAPSHOT only the ones that clients use now are listed."""

    name: str
    image: str | None
    """Path; None for a disk in memory."""
    size: int
    """Bytes."""
    read_only: bool
    description: str
    clients: int
    """That use it now."""
    disk: str = ""
    """Which disk of the image, or snapshot, it shows."""


class ExportList(msgspec.Struct, frozen=True):
    """Answer of /v1/exports and of its changes."""

    exports: list[ExportStatus]


class AddExport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Body of POST /v1/exports/add: as a `[[disk]]` table of the configuration, with the key itself."""

    name: str
    image: str | None = None
    disk: str | None = None
    memory: int | None = None
    """Bytes."""
    secret: "SecretBody | None" = None
    read_only: bool = False
    description: str = ""
    addresses: list[str] | None = None
    certificates: list[str] | None = None
    connections: int | None = None


class RemoveExport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Body of POST /v1/exports/remove."""

    name: str
    force: bool = False
    """Even while clients use it."""


class Reloaded(msgspec.Struct, frozen=True):
    """Answer of POST /v1/reload: names of exports; one that shows another disk now is in both lists."""

    added: list[str] = []
    removed: list[str] = []


class Done(msgspec.Struct, frozen=True):
    """Answer of POST /v1/flush and POST /v1/stop."""

    done: bool = True


class Progress(msgspec.Struct, frozen=True):
    """A line of the answer of POST /v1/check, before the last one."""

    done: int
    total: int


class CheckLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """Any line of that answer: progress, and at the end the report."""

    progress: Progress | None = None
    report: CheckReport | None = None


class ScrubRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of POST /v1/scrub, of which the answer is as that of POST /v1/check."""

    rate: int
    """Bytes a second at most, 1 or more."""


class OptimizeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Body of POST /v1/optimize."""

    rate: int
    """Bytes a second that are read or written at most, 1 or more."""
    passes: list[str] | None = None
    """What to do; all without."""
    level: int | None = None
    """zstd level, 1 to 22."""
    memory: int | None = None
    """Bytes for comparing fingerprints."""


class OptimizeLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """Any line of the answer to that: progress, and at the end the report."""

    progress: Progress | None = None
    report: OptimizeReport | None = None


class CopyRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Body of POST /v1/import and /v1/export: a raw file or block device that the server can reach."""

    file: str
    """Absolute path."""
    disk: str | None = None
    """Name of the disk; the first one without."""
    overwrite: bool = False
    """Export to a file that exists."""


class CopyLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """Any line of the answer to that: progress, and at the end `done`."""

    progress: Progress | None = None
    done: bool = False
    disk: str = ""
    """With `done`: name of the disk."""
    bytes: int = 0
    """With `done`: that were copied, holes included."""


class CopyReport(msgspec.Struct, frozen=True):
    """What `import` or `export` did."""

    path: str
    """Of the image."""
    disk: str
    file: str
    format: str
    bytes: int
    """That were copied, holes included."""
    seconds: float


class SecretBody(msgspec.Struct, frozen=True):
    """A key file or a passphrase (UTF-8, NFC)."""

    kind: Literal["passphrase", "keyfile"]
    data: bytes

    def __repr__(self) -> str:
        return f"SecretBody({self.kind})"

    @classmethod
    def of(cls, secret: Secret) -> "SecretBody":
        """The body for a secret of a slot."""
        return cls("keyfile" if isinstance(secret, KeyFile) else "passphrase", secret.data)

    def secret(self) -> Secret:
        """The secret again."""
        return (KeyFile if self.kind == "keyfile" else Passphrase)(self.data)


class KeyRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Body of POST /v1/keys/add, /v1/keys/remove and /v1/keys/change."""

    secret: SecretBody
    """One that opens the image now."""
    new_secret: SecretBody | None = None
    slot: int | None = None
    """By default the first free one (add), or the one `secret` opens (remove, change)."""
    label: str = ""


class VolumeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Body of the POST requests about disks and snapshots."""

    name: str
    """DISK, or DISK@SNAPSHOT."""
    source: str | None = None
    """Disk or snapshot that a clone begins as."""
    size: int | None = None
    """Bytes of a disk that is made or resized."""
    dedup_with: str | None = None
    """Disk whose stored blocks a disk that is made shares, and the other way round."""
    discard: bool = False
    """Cut off data when a disk becomes shorter."""
    force: bool = False
    """Even while clients use it, which are disconnected then."""


class VolumeInfo(msgspec.Struct, frozen=True):
    """Answer to that: the disk or snapshot that was made, changed or deleted."""

    name: str
    size: int
    created_ns: int
    """Nanoseconds since 1970; 0 for the disk that an image was made with."""


class DictionaryRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Body of POST /v1/dictionaries/train, /v1/dictionaries/replace and /v1/dictionaries/remove."""

    id: int | None = None
    """Which one is replaced or removed."""
    disk: str | None = None
    """Whose data it is trained from: DISK or DISK@SNAPSHOT, the first disk without."""
    size: int = 64 << 10
    """Bytes of a dictionary."""
    classes: list[str] = []
    """Of data to train for; all without."""
    dry_run: bool = False
    """Only tell what would be gained."""


class DictionaryInfo(msgspec.Struct, frozen=True):
    """A dictionary in use."""

    id: int
    algorithm: str
    size: int
    """Bytes."""
    trained_ns: int
    """Nanoseconds since 1970."""
    samples: int
    sha256: str
    kept: int
    """Older contents that are kept, as data that is stored needs them."""


class DictionaryReport(msgspec.Struct, frozen=True):
    """Answer of GET /v1/dictionaries, and the end of the answers to changes."""

    dictionaries: list[DictionaryInfo]
    """What is there now."""
    classes: list[ClassReport] = []


class DictionaryLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """Any line of the answer to a change: progress, and at the end the report."""

    progress: Progress | None = None
    report: DictionaryReport | None = None


class DiffRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Body of POST /v1/snapshots/diff."""

    since: str
    """DISK@SNAPSHOT."""
    until: str | None = None
    """The disk, or another snapshot of it; the disk without."""


class DiffLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """Any line of the answer to that, of which the last says `done`."""

    changes: list[tuple[int, int]] = []
    """(offset, length) in bytes of what differs, ascending."""
    cut: tuple[int, int] | None = None
    """(offset, length) of what the snapshot has beyond the end of the other, in the last line."""
    done: bool = False


class KeyList(msgspec.Struct, frozen=True):
    """Answer of /v1/keys and of its changes: the slots in use."""

    slots: list[SlotInfo]
