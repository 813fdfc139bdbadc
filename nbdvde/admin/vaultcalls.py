"""The compliance vault as commands and programs ask for it. Private keys never get here: records come signed."""

from collections.abc import AsyncGenerator
from uuid import UUID

import msgspec
from msgspec import UNSET, UnsetType

from nbdvde.admin.calls import Call, Feed
from nbdvde.engine.image import Image
from nbdvde.engine.managed.vault import CAPACITY, Vault
from nbdvde.engine.regions.signature import load_public
from nbdvde.engine.regions.vault import (
    EVENTS,
    FRAMEWORKS,
    STATUSES,
    UNSIGNED,
    Entry,
    Record,
    code_of,
    named,
)
from nbdvde.errors import DamageError, UsageError
from nbdvde.moment import now_ns


class CreateVault(msgspec.Struct, frozen=True):
    """Give a disk a vault."""

    disk: str | None = None
    """The first disk when it is left out."""
    capacity: int = CAPACITY
    """Most bytes that it may have."""


class CreatedVault(msgspec.Struct, frozen=True):
    """An empty vault."""

    disk: str
    capacity: int


class ObjectOf(msgspec.Struct, frozen=True):
    """Ask for the UUID of a disk, or of a snapshot of it."""

    disk: str | None = None
    snapshot: str | None = None
    """Its name within the disk."""


class ObjectFound(msgspec.Struct, frozen=True):
    """What identifies it in passports."""

    uuid: UUID


class AddRecord(msgspec.Struct, frozen=True):
    """Add a signed passport or event."""

    record: bytes
    """As it is stored: docs/format.md, "Compliance vault"."""
    public_key: str | None = None
    """That its signature fits, in PEM; none for an unsigned verification."""
    disk: str | None = None


class GetPassport(msgspec.Struct, frozen=True):
    """Look up a passport, or an event."""

    id: UUID
    disk: str | None = None


class Records(msgspec.Struct, frozen=True):
    """Records as they are stored: what was asked for, behind a passport its events, oldest first."""

    records: list[bytes]


class QueryVault(msgspec.Struct, frozen=True):
    """Ask for passports: those that fit everything that is given."""

    disk: str | None = None
    object: UUID | None = None
    framework: str | None = None
    """By name, or number."""
    status: str | None = None
    valid_at_ns: int | None = None
    """Valid at this time: issued, not expired, and not revoked."""


class EventInfo(msgspec.Struct, frozen=True):
    """What happened to a passport."""

    id: UUID
    event: str
    """`verified`, `failed` or `revoked`; a number of a newer version."""
    time_ns: int
    issuer: str
    notes: str
    signed: bool


class PassportInfo(msgspec.Struct, frozen=True):
    """A passport. Times in nanoseconds since 1970 UTC."""

    id: UUID
    object: UUID
    framework: str
    """By name; the number when a newer version has made it."""
    status: str
    state: str
    """`valid`, `expired`, `not yet valid` or `revoked`; whether the signature is right, only its key can tell."""
    issued_ns: int
    expires_ns: int | None
    """None for never."""
    verified_ns: int | None
    """When it was last verified with success."""
    issuer: str
    notes: str
    events: list[EventInfo]
    signature: UnsetType | str = UNSET
    """Of an export: r | s, in hexadecimal digits."""
    signed: UnsetType | bytes = UNSET
    """Of an export: what the signature is over."""


def described(entry: Entry, now_ns: int) -> PassportInfo:
    """A passport for people and programs."""
    passport = entry.passport
    return PassportInfo(
        UUID(bytes=passport.id), UUID(bytes=passport.object), named(FRAMEWORKS, passport.framework),
        named(STATUSES, passport.status), entry.state(now_ns), passport.issued_ns, passport.expires_ns or None,
        entry.verified_ns or None, passport.issuer, passport.notes, [_event(event) for event in entry.events],
    )  # fmt: skip


def _event(event: Record) -> EventInfo:
    return EventInfo(
        UUID(bytes=event.id), named(EVENTS, event.status), event.issued_ns, event.issuer, event.notes,
        event.signature != UNSIGNED,
    )  # fmt: skip


async def _vault(image: Image, disk: str | None) -> Vault:
    return await image.regions.get(Vault, image.disk(disk))


async def create_vault(image: Image, request: CreateVault) -> CreatedVault:
    """Give a disk an empty compliance vault."""
    disk = image.disk(request.disk)
    await Vault.create(await image.regions.area(disk), request.capacity)
    return CreatedVault(disk.name, request.capacity)


async def object_of(image: Image, request: ObjectOf) -> ObjectFound:
    """The UUID of a disk, or of a snapshot of it."""
    volume = image.disk(request.disk)
    if request.snapshot is not None:
        volume = image.disk(f"{volume.name}@{request.snapshot}")
    return ObjectFound(image.uuid_of(volume.number))


async def add_record(image: Image, request: AddRecord) -> Records:
    """Add a passport, a verification or a revocation that its maker has signed."""
    vault = await _vault(image, request.disk)
    key = load_public(request.public_key.encode(), "public key") if request.public_key else None
    try:
        record = Record.unpack(request.record)
    except DamageError as error:
        raise UsageError("record", error.why, 'see "Compliance vault" in docs/format.md') from None
    await vault.add(record, key, now_ns())
    return Records([request.record])


async def get_passport(image: Image, request: GetPassport) -> Records:
    """A passport and its events by the id of the passport, or an event by its own."""
    found = (await _vault(image, request.disk)).find(request.id.bytes)
    records = [found] if isinstance(found, Record) else [found.passport, *found.events]
    return Records([record.pack() for record in records])


async def query_vault(image: Image, request: QueryVault) -> AsyncGenerator[PassportInfo, None]:
    """Passports, oldest first: of an object, of a framework, of a status, valid at a time."""
    about = request.object.bytes if request.object else None
    framework = code_of("framework", FRAMEWORKS, request.framework) if request.framework else None
    status = code_of("status", STATUSES, request.status) if request.status else None
    vault, asked_ns = await _vault(image, request.disk), now_ns()
    found = vault.query(about=about, framework=framework, status=status, valid_at_ns=request.valid_at_ns)
    for entry in list(found):
        yield described(entry, asked_ns)


CREATE = Call("vault/create", CreateVault, CreatedVault, create_vault)
OBJECT = Call("vault/object", ObjectOf, ObjectFound, object_of, changes=False)
ADD = Call("vault/add", AddRecord, Records, add_record)
GET = Call("vault/get", GetPassport, Records, get_passport, changes=False)
QUERY = Feed("vault/query", QueryVault, PassportInfo, query_vault)
VAULT_CALLS = (CREATE, OBJECT, ADD, GET, QUERY)
