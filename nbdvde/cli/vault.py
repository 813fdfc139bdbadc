"""The commands about the compliance vault. Private keys stay in this process."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from uuid import UUID, uuid4

import msgspec
import typer

from nbdvde.cli import output, regionreports
from nbdvde.cli.arguments import Control, ImageArgument, Json, KeyFile, Overwrite, image_at
from nbdvde.cli.times import parse_expiry, parse_time
from nbdvde.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from nbdvde.admin.vaultcalls import PassportInfo
    from nbdvde.cli.images import ImageByPath
    from nbdvde.engine.regions.signature import PrivateKey
    from nbdvde.engine.regions.vault import Entry, Record

vault_app = typer.Typer(help="Issue, verify, revoke and query compliance passports.", rich_markup_mode=None)

VaultDisk = Annotated[
    str | None, typer.Option("--disk", metavar="NAME", help="The disk whose vault it is. [default: the first disk]")
]
Id = Annotated[str, typer.Argument(metavar="ID", help="Id of the passport, a UUID.", show_default=False)]
SigningKey = Annotated[
    Path,
    typer.Option("--key", metavar="PEM", readable=False, help="Private key, P-256, mode 0600.", show_default=False),
]
Issuer = Annotated[str, typer.Option(metavar="TEXT", help="Who says so, at most 128 bytes.", show_default=False)]
Notes = Annotated[str, typer.Option(metavar="TEXT", help="What else is to be said, at most 256 bytes.")]
FRAMEWORK_HELP = "GDPR, HIPAA, SOX, PCI-DSS, SOC2, ISO27001, CCPA, FISMA or FedRAMP."
STATUS_HELP = "compliant, non-compliant, exempt, pending-review or unknown."


class ExportFormat(StrEnum):
    """What is exported of a passport."""

    JSON = "json"
    DER = "der"
    RAW = "raw"


@vault_app.command("create")
def create(
    image: ImageArgument, disk: VaultDisk = None,
    capacity: Annotated[str, typer.Option(metavar="SIZE", help="Most bytes that it may have, 4K to 4G.")] = "64M",
    key_file: KeyFile = None, control: Control = None, json: Json = False,
) -> None:  # fmt: skip
    """Give a disk an empty vault."""
    from nbdvde.admin.vaultcalls import CREATE, CreateVault
    from nbdvde.config import parse_size

    made = image_at(image, key_file, control).call(CREATE, CreateVault(disk, parse_size(capacity)))
    if json:
        output.json(made)


@vault_app.command("issue")
def issue(
    image: ImageArgument,
    framework: Annotated[str, typer.Option(metavar="NAME", help=FRAMEWORK_HELP, show_default=False)],
    status: Annotated[str, typer.Option(metavar="NAME", help=STATUS_HELP, show_default=False)],
    issuer: Issuer, key: SigningKey, disk: VaultDisk = None,
    snapshot: Annotated[
        str | None, typer.Option(metavar="NAME", help="About this snapshot of the disk. [default: about the disk]")
    ] = None,
    object_: Annotated[
        str | None, typer.Option("--object", metavar="UUID", help="About whatever has this UUID.")
    ] = None,
    expires: Annotated[str, typer.Option(metavar="TIME", help="2027-01-01, 365d, 1y or never.")] = "never",
    notes: Notes = "", key_file: KeyFile = None, control: Control = None, json: Json = False,
) -> None:  # fmt: skip
    """Issue a passport: sign what is known of a disk, a snapshot or another object. Prints its id."""
    from nbdvde.engine.regions.vault import FRAMEWORKS, STATUSES, Record, code_of

    room, now_ns = _room(image, disk, key_file, control), time.time_ns()
    passport = Record(
        uuid4().bytes, bytes(16), code_of("framework", FRAMEWORKS, framework), code_of("status", STATUSES, status),
        now_ns, parse_expiry(expires, now_ns), now_ns, issuer, notes,
    )  # fmt: skip
    if object_ and snapshot:
        raise UsageError("--object", "does not go with --snapshot", "give one of them")
    private = _private(key, passport)
    about = _uuid(object_) if object_ else room.object(snapshot)
    _tell(room.add(replace(passport, object=about.bytes), private), json=json)


@vault_app.command("verify")
def verify(
    image: ImageArgument, id_: Id,
    public_key: Annotated[
        Path, typer.Option(metavar="PEM", readable=False, help="Public key of the issuer.", show_default=False)
    ],
    disk: VaultDisk = None,
    record: Annotated[bool, typer.Option("--record", help="Keep in the vault when it was verified, and how.")] = False,
    key: Annotated[
        Path | None, typer.Option("--key", metavar="PEM", readable=False, help="Sign that record with this key.")
    ] = None,
    issuer: Annotated[str, typer.Option(metavar="TEXT", help="Who verifies, for that record.")] = "",
    key_file: KeyFile = None, control: Control = None, json: Json = False,
) -> int:  # fmt: skip
    """Verify a passport: its signature, its time, and that it was not revoked. Exit code 9 when it does not hold."""
    from nbdvde.engine.regions.vault import EVENT, FAILED, VERIFIED, Record
    from nbdvde.keysource import read_public_key

    if (key or issuer) and not record:
        raise UsageError("--key" if key else "--issuer", "is for --record", "add that, or leave it out")
    room, public = _room(image, disk, key_file, control), read_public_key(public_key)
    id_of = _uuid(id_)
    now_ns = time.time_ns()
    why = room.entry(id_of).flaw(public, now_ns)
    if record:
        event = Record(uuid4().bytes, id_of.bytes, EVENT, FAILED if why else VERIFIED, now_ns, 0, 0, issuer, why)
        room.add(event, _private(key, event) if key else None)
    if json:
        output.json({"id": str(id_of), "valid": not why, "reason": why, "verified_ns": now_ns})
    else:
        output.line(f"{id_of}: {why or 'valid'}")
    return ExitCode.REFUSED if why else ExitCode.DONE


@vault_app.command("revoke")
def revoke(
    image: ImageArgument, id_: Id, key: SigningKey, disk: VaultDisk = None,
    why: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why, at most 256 bytes.")] = "",
    key_file: KeyFile = None, control: Control = None, json: Json = False,
) -> None:  # fmt: skip
    """Revoke a passport, with the key that it was signed with. It stays in the vault. Prints the revocation's id."""
    from nbdvde.engine.regions.vault import EVENT, REVOKED, Record

    room, id_of = _room(image, disk, key_file, control), _uuid(id_)
    event = Record(uuid4().bytes, id_of.bytes, EVENT, REVOKED, time.time_ns(), notes=why)
    private = _private(key, event)
    issuer = room.entry(id_of).passport.issuer
    _tell(room.add(replace(event, issuer=issuer), private), json=json)


@vault_app.command("query")
def query(
    image: ImageArgument, disk: VaultDisk = None,
    object_: Annotated[str | None, typer.Option("--object", metavar="UUID", help="About this object.")] = None,
    framework: Annotated[str | None, typer.Option(metavar="NAME", help="Of this framework, by name or number.")] = None,
    status: Annotated[str | None, typer.Option(metavar="NAME", help="Of this status, by name or number.")] = None,
    valid_at: Annotated[
        str | None, typer.Option(metavar="TIME", help="Valid at this time: now, 2027-01-01, 2027-01-01T12:00Z.")
    ] = None,
    key_file: KeyFile = None, control: Control = None, json: Json = False,
) -> None:  # fmt: skip
    """List the passports of a vault, oldest first. Signatures are looked at by `verify` alone."""
    from nbdvde.admin.vaultcalls import QUERY, QueryVault

    found: list[PassportInfo] = []
    asked = QueryVault(
        disk, _uuid(object_) if object_ else None, framework, status, parse_time(valid_at) if valid_at else None
    )
    image_at(image, key_file, control).feed(QUERY, asked, found.append)
    output.json({"passports": found}) if json else regionreports.passports(found)


@vault_app.command("export")
def export(
    image: ImageArgument, id_: Id, disk: VaultDisk = None,
    format_: Annotated[
        ExportFormat,
        typer.Option("--format", help="json, der: the signature, or raw: the record with the signature in its end."),
    ] = ExportFormat.JSON,
    file: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Where to. [default: standard output]")
    ] = None,
    overwrite: Overwrite = False, key_file: KeyFile = None, control: Control = None,
) -> None:  # fmt: skip
    """Export a passport such that others can verify it; with --format der or raw also an event, by its id."""
    from nbdvde.admin.vaultcalls import described
    from nbdvde.cli.files import written
    from nbdvde.engine.regions.signature import to_der

    room, id_of = _room(image, disk, key_file, control), _uuid(id_)
    if format_ is ExportFormat.JSON:
        entry = room.entry(id_of)
        told = msgspec.structs.replace(
            described(entry, time.time_ns()), signature=entry.passport.signature.hex(), signed=entry.passport.signed
        )
        data = msgspec.json.encode(told) + b"\n"
    else:
        found = room.records(id_of)[0]
        data = found.pack() if format_ is ExportFormat.RAW else to_der(found.signature)
    if file is None:
        output.raw(data)
        return
    with written(file, image, overwrite=overwrite) as out:
        out.write(data)


@dataclass(frozen=True, slots=True)
class _Room:
    """The vault of a disk, as the commands see it."""

    image: "ImageByPath"
    disk: str | None

    def object(self, snapshot: str | None) -> UUID:
        from nbdvde.admin.vaultcalls import OBJECT, ObjectOf

        return self.image.call(OBJECT, ObjectOf(self.disk, snapshot)).uuid

    def records(self, id_: UUID) -> "Sequence[Record]":
        from nbdvde.admin.vaultcalls import GET, GetPassport
        from nbdvde.engine.regions.vault import Record

        return [Record.unpack(raw) for raw in self.image.call(GET, GetPassport(id_, self.disk)).records]

    def entry(self, id_: UUID) -> "Entry":
        from nbdvde.engine.regions.vault import Entry

        passport, *events = self.records(id_)
        if passport.is_event:
            raise UsageError(f"passport {id_}", "is an event of one", "give the id of the passport")
        return Entry(passport, events)

    def add(self, record: "Record", key: "PrivateKey | None") -> "Record":
        from nbdvde.admin.vaultcalls import ADD, AddRecord
        from nbdvde.engine.regions.signature import to_pem

        signed = record.signed_with(key) if key else record
        public = to_pem(key.public_key()).decode() if key else None
        self.image.call(ADD, AddRecord(signed.pack(), public, self.disk))
        return signed


def _private(key: Path, record: "Record") -> "PrivateKey":
    """The key, once it is known that the record can be stored."""
    from nbdvde.keysource import read_signing_key

    record.pack()
    return read_signing_key(key)


def _uuid(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise UsageError(f"id {text!r}", "is not a UUID", "nbdvde vault query shows them") from None


def _tell(record: "Record", *, json: bool) -> None:
    id_ = UUID(bytes=record.id)
    output.json({"id": str(id_)}) if json else output.line(str(id_))


def _room(path: Path, disk: str | None, key_file: Path | None, control: Path | None) -> _Room:
    return _Room(image_at(path, key_file, control), disk)
