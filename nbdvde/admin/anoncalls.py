"""The anonymisation table as commands and programs ask for it."""

from collections.abc import AsyncGenerator, Sequence
from typing import NoReturn
from uuid import UUID

import msgspec

from nbdvde.admin.calls import Call, Feed
from nbdvde.engine.identity import subject_uuid
from nbdvde.engine.image import Image
from nbdvde.engine.managed.anon import CAPACITY, AnonTable
from nbdvde.engine.regions.anon import ERASED, PROOF_TYPE, TYPES, Record, parse_token, token_text
from nbdvde.engine.regions.vault import named
from nbdvde.errors import RefusedError, UsageError
from nbdvde.moment import draw, now_ns


class CreateTable(msgspec.Struct, frozen=True):
    """Give a disk an anonymisation table."""

    disk: str | None = None
    """The first disk when it is left out."""
    capacity: int = CAPACITY
    """Most bytes that it may have, without the keys of subjects."""


class CreatedTable(msgspec.Struct, frozen=True):
    """An empty table."""

    disk: str
    capacity: int


class MapValue(msgspec.Struct, frozen=True):
    """Have a token for a value."""

    subject: str
    """A UUID, or any text, which stands for one."""
    type: str
    value: bytes = b""
    """1 to 4096 bytes."""
    disk: str | None = None

    def __repr__(self) -> str:
        """Without the value."""
        return f"MapValue(subject={self.subject!r}, type={self.type!r})"


class LookUp(msgspec.Struct, frozen=True):
    """Look up a mapping by one of: its id, its token, or its subject and value."""

    mapping: UUID | None = None
    token: str | None = None
    subject: str | None = None
    value: bytes | None = None
    disk: str | None = None

    def __repr__(self) -> str:
        """Without the value."""
        return f"LookUp(mapping={self.mapping!r}, token={self.token!r}, subject={self.subject!r})"


class ListMappings(msgspec.Struct, frozen=True):
    """List all mappings, or those of a subject."""

    subject: str | None = None
    disk: str | None = None


class MappingInfo(msgspec.Struct, frozen=True):
    """A mapping."""

    id: UUID
    subject: UUID
    type: str
    """By name; the number when a newer version has made it."""
    token: str
    """52 characters of base32."""
    state: str
    """`active` or `erased`."""
    created_ns: int
    """Nanoseconds since 1970 UTC."""


class Mappings(msgspec.Struct, frozen=True):
    """What was found."""

    mappings: list[MappingInfo]


class OfSubject(msgspec.Struct, frozen=True):
    """Name a subject."""

    subject: str
    disk: str | None = None


class ErasureInfo(msgspec.Struct, frozen=True):
    """The proof that a subject was erased, and whether it holds."""

    subject: UUID
    erased_ns: int
    """When its key was destroyed, nanoseconds since 1970 UTC."""
    key_fingerprint: str
    """Of that key: the first half of a SHA-256, in hexadecimal digits."""
    mappings: int
    """How many can be opened no more."""
    mappings_sha256: str
    """Of their records without the flags."""
    number: int
    """Of the proof in the chain of all, from 1 on."""
    of: int
    """Proofs in the chain."""
    chain: str
    """SHA-256 of the link before and of this proof."""
    holds: bool
    doubts: list[str]
    """What speaks against it."""


def described(record: Record) -> MappingInfo:
    """A mapping for people and programs."""
    state = "erased" if record.flags & ERASED else "active"
    return MappingInfo(
        UUID(bytes=record.id), UUID(bytes=record.subject), named(TYPES, record.type), token_text(record.token), state,
        record.created_ns,
    )  # fmt: skip


async def _table(image: Image, disk: str | None) -> AnonTable:
    return await image.regions.get(AnonTable, image.disk(disk))


def _subject(image: Image, text: str) -> bytes:
    if not text.strip():
        raise UsageError("subject", "is empty", "name it, by a UUID")
    try:
        return subject_uuid(image.superblock.uuid, text).bytes
    except UnicodeEncodeError:
        raise UsageError("subject", "is not valid UTF-8", "write it in UTF-8") from None


def type_code(text: str) -> int:
    """The number of a type of personal data, by name or number. Raises UsageError."""
    if text.lower() in TYPES:
        return TYPES.index(text.lower())
    if text.isascii() and text.isdigit() and int(text) < PROOF_TYPE:
        return int(text)
    raise UsageError(f"type {text}", "is unknown", f"use {', '.join(TYPES)}")


async def create_table(image: Image, request: CreateTable) -> CreatedTable:
    """Give a disk an empty anonymisation table."""
    disk = image.disk(request.disk)
    await AnonTable.create(await image.regions.area(disk), request.capacity)
    return CreatedTable(disk.name, request.capacity)


async def map_value(image: Image, request: MapValue) -> MappingInfo:
    """The token of a value of a subject, a new one unless there is one."""
    type_, table = type_code(request.type), await _table(image, request.disk)
    subject = _subject(image, request.subject)
    identity = UUID(bytes=draw(16), version=4).bytes + draw(32)
    return described(await table.map(subject, type_, request.value, now_ns(), identity))


async def look_up(image: Image, request: LookUp) -> Mappings:
    """Mappings by id, by token, or by subject and value."""
    table = await _table(image, request.disk)
    return Mappings([described(record) for record in await _found(image, table, request)])


async def _found(image: Image, table: AnonTable, request: LookUp) -> Sequence[Record]:
    match request:
        case LookUp(mapping=UUID() as mapping, token=None, subject=None, value=None):
            return [table.by_id(mapping.bytes)]
        case LookUp(mapping=None, token=str(token), subject=None, value=None):
            return [table.by_token(parse_token(token))]
        case LookUp(mapping=None, token=None, subject=str(subject), value=bytes(value)):
            return await table.look_up(_subject(image, subject), value)
    raise UsageError("lookup", "takes a mapping, a token, or a subject and a value", "give one of the three")


async def list_mappings(image: Image, request: ListMappings) -> AsyncGenerator[MappingInfo, None]:
    """All mappings, or those of a subject, oldest first."""
    table = await _table(image, request.disk)
    subject = None if request.subject is None else _subject(image, request.subject)
    for record in list(table.mappings(subject)):
        yield described(record)


async def erase_subject(image: Image, request: OfSubject) -> ErasureInfo:
    """Destroy the key of a subject: no mapping of it can be opened again. Answers the proof."""
    table, subject = await _table(image, request.disk), _subject(image, request.subject)
    await table.erase(subject, now_ns())
    return await _proof(table, subject)


async def prove_erasure(image: Image, request: OfSubject) -> ErasureInfo:
    """The proof that a subject was erased, verified."""
    return await _proof(await _table(image, request.disk), _subject(image, request.subject))


async def _proof(table: AnonTable, subject: bytes) -> ErasureInfo:
    found, chain, doubts = table.proof(subject), table.proofs, await table.doubts(subject)
    return ErasureInfo(
        UUID(bytes=subject), found.created_ns, found.id.hex(), len(list(table.mappings(subject))), found.hash.hex(),
        1 + chain.index(found), len(chain), found.token.hex(), not doubts, doubts,
    )  # fmt: skip


async def refuse_everywhere(image: Image, request: CreateTable | MapValue | OfSubject) -> NoReturn:
    """Values and keys of subjects would stay in the logs of all nodes, long after they are erased."""
    raise RefusedError("anonymisation table", "cannot be changed in a cluster", "see docs/raft.md")


CREATE = Call("anon/create", CreateTable, CreatedTable, create_table, everywhere=refuse_everywhere)
MAP = Call("anon/map", MapValue, MappingInfo, map_value, everywhere=refuse_everywhere)
LOOK_UP = Call("anon/lookup", LookUp, Mappings, look_up, changes=False)
LIST = Feed("anon/list", ListMappings, MappingInfo, list_mappings)
ERASE = Call("anon/erase", OfSubject, ErasureInfo, erase_subject, everywhere=refuse_everywhere)
PROVE = Call("anon/proof", OfSubject, ErasureInfo, prove_erasure, changes=False)
ANON_CALLS = (CREATE, MAP, LOOK_UP, LIST, ERASE, PROVE)
