"""The anonymisation table: which token stands for which value of whom, without the values.

    record = mapping 16 | subject 16 | type u16 | hash 32 | token 32 | created u64 | flags u16

The hash of a value is HMAC-SHA-256 under the key of its subject, which is not here (engine/subjectkeys.py). Of a
subject whose key was destroyed the records say so, and a further record proves it, laid out in the same way: type
0xFFFF, as mapping a fingerprint of the key, as hash one of the mappings, as token the link of a chain of all such.
"""

import base64
import hmac
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Self

from nbdvde.engine.regions.directory import Slot
from nbdvde.engine.regions.form import ROOM, Form
from nbdvde.engine.regions.pages import Pages, Read
from nbdvde.errors import UsageError

FORM = Form("ANON", 16, 108)
PER_BLOCK = ROOM // FORM.record_bytes
"""Records in every block, the first one included."""
_HEADER = struct.Struct("<I12s")
_RECORD = struct.Struct("<16s16sH32s32sQH")
_LINKED = struct.Struct("<16s16sH32sQ")
TYPES = ("name", "email", "phone", "ssn", "address", "birth-date", "ip", "custom")
ACTIVE, ERASED, PROOF = 1, 2, 4
PROOF_TYPE = 0xFFFF
VALUE_MAX = 4096
"""Bytes of a value."""
NO_CHAIN = bytes(32)


@dataclass(frozen=True, slots=True)
class Record:
    """A mapping, or the proof of an erasure."""

    id: bytes
    subject: bytes
    type: int
    hash: bytes
    token: bytes
    created_ns: int
    """Nanoseconds since 1970 UTC; of a proof, when the key was destroyed."""
    flags: int = ACTIVE

    @property
    def is_proof(self) -> bool:
        """Whether it tells that the key of its subject was destroyed."""
        return self.type == PROOF_TYPE

    def pack(self) -> bytes:
        return _RECORD.pack(self.id, self.subject, self.type, self.hash, self.token, self.created_ns, self.flags)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*_RECORD.unpack(data))


def record_bytes(body: bytes, at: int) -> int:
    """Length of the record at an offset, 0 when none begins there."""
    return FORM.record_bytes if any(body[at : at + 16]) else 0


def hash_of(key: bytes, value: bytes) -> bytes:
    """What a mapping keeps of a value. Raises UsageError."""
    if not 0 < len(value) <= VALUE_MAX:
        raise UsageError("value", f"is not 1 to {VALUE_MAX} bytes long", "give a part of it, or a digest")
    return hmac.digest(key, value, "sha256")


def token_text(token: bytes) -> str:
    """A token as text: base32 (RFC 4648) in lower case without padding, 52 characters."""
    return base64.b32encode(token).decode().rstrip("=").lower()


def parse_token(text: str) -> bytes:
    """The token in a text, in any case. Raises UsageError."""
    try:
        token = base64.b32decode(text.upper() + "====")
    except ValueError:
        token = b""
    if len(token) != 32 or token_text(token) != text.lower():
        raise UsageError("token", "is not 52 characters of base32", "give it as map printed it")
    return token


def proof(key: bytes, subject: bytes, mappings: Iterable[Record], chain: bytes, now_ns: int) -> Record:
    """That the key of a subject is destroyed, and what can be opened no more; `chain` is the token of the last one."""
    fingerprint = sha256(b"nbdvde subject key" + key).digest()[:16]
    made = Record(fingerprint, subject, PROOF_TYPE, digest_of(mappings), NO_CHAIN, now_ns, PROOF)
    return replace(made, token=_link(made, chain))


def digest_of(mappings: Iterable[Record]) -> bytes:
    """SHA-256 of mappings as they are stored, without their flags."""
    digest = sha256()
    for mapping in mappings:
        digest.update(mapping.pack()[:-2])
    return digest.digest()


def _link(made: Record, chain: bytes) -> bytes:
    linked = _LINKED.pack(made.id, made.subject, made.type, made.hash, made.created_ns)
    return sha256(chain + linked).digest()


class Table:
    """All records in memory, found in O(1) by id, by token, and by subject."""

    def __init__(self, records: Sequence[Record] = (), generation: int = 0) -> None:
        self.generation = generation
        self.mappings = 0
        self._records: list[Record] = []
        self._ids: dict[bytes, int] = {}
        self._tokens: dict[bytes, int] = {}
        self._subjects: dict[bytes, list[int]] = {}
        self._proofs: dict[bytes, Record] = {}
        for record in records:
            self.append(record)

    def append(self, record: Record) -> None:
        """Take up one more. Raises DamageError."""
        if record.is_proof:
            if record.subject in self._proofs:
                raise FORM.damage("has two proofs of one erasure")
            self._proofs[record.subject] = record
        else:
            if record.id in self._ids or record.token in self._tokens:
                raise FORM.damage("has a mapping twice")
            self._ids[record.id] = self._tokens[record.token] = len(self._records)
            self._subjects.setdefault(record.subject, []).append(len(self._records))
            self.mappings += 1
        self._records.append(record)

    def drop_last(self) -> None:
        """Take back what was appended last."""
        record = self._records.pop()
        if record.is_proof:
            del self._proofs[record.subject]
            return
        del self._ids[record.id], self._tokens[record.token]
        self._subjects[record.subject].pop()
        if not self._subjects[record.subject]:
            del self._subjects[record.subject]
        self.mappings -= 1

    def __len__(self) -> int:
        return len(self._records)

    def by_id(self, id_: bytes) -> Record:
        """A mapping. Raises UsageError."""
        return self._found(self._ids.get(id_))

    def by_token(self, token: bytes) -> Record:
        """The mapping of a token. Raises UsageError."""
        return self._found(self._tokens.get(token))

    def _found(self, at: int | None) -> Record:
        if at is None:
            raise UsageError("mapping", "there is none like this", "see nbdvde anon list")
        return self._records[at]

    @property
    def subjects(self) -> int:
        """How many have mappings."""
        return len(self._subjects)

    def by_subject(self, subject: bytes) -> list[Record]:
        """Its mappings, oldest first."""
        return [self._records[at] for at in self._subjects.get(subject, ())]

    def proof(self, subject: bytes) -> Record | None:
        """That a subject was erased, if it was."""
        return self._proofs.get(subject)

    @property
    def proofs(self) -> list[Record]:
        """Oldest first."""
        return list(self._proofs.values())

    @property
    def chain(self) -> bytes:
        """The last link of the chain of proofs."""
        return next(reversed(self._proofs.values())).token if self._proofs else NO_CHAIN

    def mapped(self) -> Iterator[Record]:
        """All mappings, oldest first."""
        return (record for record in self._records if not record.is_proof)

    def room_for(self, subject: bytes) -> int:
        """Records that there have to be room for, so that after one more of a subject each can still be erased."""
        known = subject in self._subjects
        return len(self._records) + 1 + len(self._subjects) + (not known) - len(self._proofs)

    def flag(self, subject: bytes) -> list[int]:
        """Say of the mappings of a subject that they are erased; answers the blocks that this changes."""
        places = self._subjects.get(subject, [])
        for at in places:
            self._records[at] = replace(self._records[at], flags=self._records[at].flags & ~ACTIVE | ERASED)
        return sorted({at // PER_BLOCK for at in places})

    def blocks(self, numbers: Iterable[int]) -> dict[int, bytes]:
        """These blocks and the first one as they have to be stored now, one generation on."""
        self.generation += 1
        return {number: self._block(number) for number in {0, *numbers}}

    def _block(self, number: int) -> bytes:
        header = _HEADER.pack(self.mappings, bytes(12)) if number == 0 else b""
        records = self._records[number * PER_BLOCK : (number + 1) * PER_BLOCK]
        return FORM.block(header + b"".join(record.pack() for record in records), self.generation)

    @property
    def used(self) -> int:
        """Blocks in use."""
        return FORM.blocks(len(self._records))

    def flaws(self) -> Iterator[str]:
        """What contradicts itself: the chain of proofs, what they say of mappings, flags."""
        chain = NO_CHAIN
        for found in self._proofs.values():
            name, chain = found.subject.hex(), _link(found, chain)
            if chain != found.token:
                yield f"the proof of the erasure of subject {name} is not of this chain"
            if digest_of(self.by_subject(found.subject)) != found.hash:
                yield f"the proof of the erasure of subject {name} is of other mappings"
        for record in self.mapped():
            if record.subject in self._proofs and not record.flags & ERASED:  # flags are set before there is a proof
                yield f"mapping {record.id.hex()} does not say that it was erased"


def load(read: Read, used: int) -> Table:
    """The records of a region that uses so many blocks. Raises DamageError."""
    pages, table = Pages.load(FORM, read, used, record_bytes), Table()
    for number, raw in pages.records(read, record_bytes):
        if number != len(table) // PER_BLOCK:
            raise FORM.damage("has a block that is not full before its last one")
        table.append(Record.unpack(raw))
    if pages.header != _HEADER.pack(table.mappings, bytes(12)):
        raise FORM.damage("has a header that does not fit its records")
    table.generation = pages.generation
    return table


def verify(read: Read, slot: Slot) -> Iterator[str]:
    """What is wrong with the region. Raises DamageError."""
    return load(read, slot.used).flaws()
