"""The compliance vault: signed passports of objects, and what became of them, each a record that stays.

    record = id 16 | object 16 | framework u16 | status u16 | issued u64 | expires u64 | verified u64
             | issuer length u32 | issuer | notes length u32 | notes | signature 64

Framework 0xFFFF says that a record is an *event*: its object is the passport, its status what happened to it. So one
layout, and one way of verifying a signature, serves both. Nothing is removed: a passport ends with a revocation.
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Self

from nbdvde.engine.regions import signature
from nbdvde.engine.regions.directory import Slot
from nbdvde.engine.regions.form import ROOM, Form
from nbdvde.engine.regions.pages import Pages, Read
from nbdvde.engine.regions.signature import SIGNATURE_BYTES, PrivateKey, PublicKey
from nbdvde.errors import RefusedError, UsageError

FORM = Form("CMVT", 16, 0)
_HEADER = struct.Struct("<I12s")
_HEAD = struct.Struct("<16s16sHHQQQI")
_LENGTH = struct.Struct("<I")
ISSUER_MAX, NOTES_MAX = 128, 256
"""Bytes of UTF-8."""
_TOO_LONG = 1 << 32
_REVOCATION_BYTES = _HEAD.size + _LENGTH.size + SIGNATURE_BYTES
"""Without issuer and reason."""
_CUT_MAX = _REVOCATION_BYTES + ISSUER_MAX - 1
"""Bytes at the end of a block that a revocation may not fit into."""
FRAMEWORKS = ("GDPR", "HIPAA", "SOX", "PCI-DSS", "SOC2", "ISO27001", "CCPA", "FISMA", "FedRAMP")
STATUSES = ("unknown", "compliant", "non-compliant", "exempt", "pending-review")
EVENT = 0xFFFF
"""The framework of events."""
VERIFIED, REVOKED, FAILED = 1, 2, 3
"""Statuses of events: verified with success, revoked, verified without success."""
EVENTS = ("", "verified", "revoked", "failed")
UNSIGNED = bytes(SIGNATURE_BYTES)


@dataclass(frozen=True, slots=True)
class Record:
    """A passport, or an event. Times in nanoseconds since 1970 UTC."""

    id: bytes
    """A UUID, 16 bytes; not zero."""
    object: bytes
    """What a passport is about; the passport that an event happened to."""
    framework: int
    status: int
    issued_ns: int
    expires_ns: int = 0
    """0 for never."""
    verified_ns: int = 0
    """Of a passport: when what it says was last verified before it was issued."""
    issuer: str = ""
    notes: str = ""
    signature: bytes = UNSIGNED

    @property
    def is_event(self) -> bool:
        """Whether it tells what happened to a passport."""
        return self.framework == EVENT

    @property
    def signed(self) -> bytes:
        """What the signature is over: everything before it."""
        return self.pack()[:-SIGNATURE_BYTES]

    def signed_with(self, key: PrivateKey) -> Self:
        """The same with a signature."""
        return replace(self, signature=signature.sign(key, self.signed))

    def fits(self, key: PublicKey) -> bool:
        """Whether the holder of the key has signed it."""
        return signature.fits(key, self.signed, self.signature)

    def pack(self) -> bytes:
        """Raises UsageError when a text is too long, DamageError when something cannot be stored."""
        issuer = _text("issuer", self.issuer, ISSUER_MAX)
        notes = _text("notes", self.notes, NOTES_MAX)
        try:
            head = _HEAD.pack(
                self.id, self.object, self.framework, self.status, self.issued_ns, self.expires_ns, self.verified_ns,
                len(issuer),
            )  # fmt: skip
        except struct.error:
            raise FORM.damage("has a number that is too large") from None
        return head + issuer + _LENGTH.pack(len(notes)) + notes + self.signature

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The record in just these bytes. Raises DamageError."""
        if len(data) < _HEAD.size or not any(data[:16]) or record_bytes(data, 0) != len(data):
            raise FORM.damage("has a record that makes no sense")
        id_, about, framework, status, issued, expires, verified, issuer_bytes = _HEAD.unpack_from(data)
        issuer_end = _HEAD.size + issuer_bytes
        try:
            issuer = data[_HEAD.size : issuer_end].decode()
            notes = data[issuer_end + _LENGTH.size : -SIGNATURE_BYTES].decode()
        except UnicodeDecodeError:
            raise FORM.damage("has a text that is not UTF-8") from None
        end = data[-SIGNATURE_BYTES:]
        return cls(id_, about, framework, status, issued, expires, verified, issuer, notes, end)


def _text(name: str, text: str, limit: int) -> bytes:
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        raise UsageError(name, "is not valid UTF-8", "write it in UTF-8") from None
    if len(raw) > limit:
        raise UsageError(name, f"has {len(raw)} bytes, and there is room for {limit}", "shorten it")
    return raw


def record_bytes(body: bytes, at: int) -> int:
    """Length of the record at an offset, more than is there if its lengths make no sense; 0 when none begins there."""
    if not any(body[at : at + 16]):
        return 0
    issuer = _read_length(body, at + _HEAD.size - _LENGTH.size, ISSUER_MAX)
    notes = _read_length(body, at + _HEAD.size + issuer, NOTES_MAX)
    return _HEAD.size + issuer + _LENGTH.size + notes + SIGNATURE_BYTES


def _read_length(body: bytes, at: int, limit: int) -> int:
    if at + _LENGTH.size > len(body):
        return _TOO_LONG
    [length] = _LENGTH.unpack_from(body, at)
    return int(length) if length <= limit else _TOO_LONG


def named(names: tuple[str, ...], code: int) -> str:
    """What a code stands for; a number when a newer version has made it."""
    return names[code] if code < len(names) and names[code] else str(code)


def code_of(what: str, names: tuple[str, ...], text: str) -> int:
    """The code of a name, in any case, or a number. Raises UsageError."""
    for code, name in enumerate(names):
        if name.lower() == text.lower():
            return code
    if text.isascii() and text.isdigit() and int(text) < EVENT:
        return int(text)
    raise UsageError(f"{what} {text}", "is unknown", f"use {', '.join(names)}")


@dataclass(slots=True)
class Entry:
    """A passport, and what happened to it, in this order."""

    passport: Record
    events: list[Record] = field(default_factory=list)

    @property
    def revocation(self) -> Record | None:
        """What ended it."""
        return next((event for event in self.events if event.status == REVOKED), None)

    @property
    def verified_ns(self) -> int:
        """When it was last verified with success."""
        return max((e.issued_ns for e in self.events if e.status == VERIFIED), default=self.passport.verified_ns)

    def state(self, now_ns: int) -> str:
        """`valid`, `expired`, `not yet valid` or `revoked`; the last whatever the clock says."""
        passport = self.passport
        if self.revocation:
            return "revoked"
        if passport.expires_ns and now_ns >= passport.expires_ns:
            return "expired"
        return "not yet valid" if now_ns < passport.issued_ns else "valid"

    def flaw(self, key: PublicKey, now_ns: int) -> str:
        """Why the passport does not hold, as far as the public key of its issuer tells; empty when it does."""
        if not self.passport.fits(key):
            return "its signature does not fit the key"
        if self.revocation:
            return "revoked" if self.revocation.fits(key) else "revoked, by a signature that does not fit the key"
        state = self.state(now_ns)
        return "" if state == "valid" else state

    def was_valid(self, at_ns: int) -> bool:
        """Whether it was valid at a time, as far as is known now."""
        passport, end = self.passport, self.revocation
        if not passport.issued_ns <= at_ns or (end and end.issued_ns <= at_ns):
            return False
        return not passport.expires_ns or at_ns < passport.expires_ns


class Ledger:
    """All records of a vault, found in O(1) by id, and by object and framework."""

    def __init__(self) -> None:
        self._by_id: dict[bytes, Entry | Record] = {}
        self._by_object: dict[bytes, list[Entry]] = {}
        self._by_framework: dict[int, list[Entry]] = {}
        self.passports = 0
        self.revocable_bytes = 0
        """Of the revocations, without reasons, of all passports that are not revoked."""

    def add(self, record: Record) -> None:
        """Take up a record that is stored. Raises DamageError."""
        if record.id in self._by_id:
            raise FORM.damage("has an id twice")
        if not record.is_event:
            entry = Entry(record)
            self._by_id[record.id] = entry
            self._by_object.setdefault(record.object, []).append(entry)
            self._by_framework.setdefault(record.framework, []).append(entry)
            self.passports += 1
            self.revocable_bytes += revocation_bytes(record)
            return
        target = self._by_id.get(record.object)
        if not isinstance(target, Entry):
            raise FORM.damage("has an event without its passport")
        if record.status == REVOKED and not target.revocation:
            self.revocable_bytes -= revocation_bytes(target.passport)
        target.events.append(record)
        self._by_id[record.id] = record

    def find(self, id_: bytes) -> Entry | Record:
        """A passport with its events, or an event. Raises UsageError."""
        found = self._by_id.get(id_)
        if found is None:
            raise UsageError("passport", "there is none of this id in the vault", "see nbdvde vault query")
        return found

    def passport(self, id_: bytes) -> Entry:
        """A passport with its events. Raises UsageError."""
        found = self.find(id_)
        if isinstance(found, Entry):
            return found
        raise UsageError("passport", f"this id is that of an event ({named(EVENTS, found.status)})")

    def query(
        self, *, about: bytes | None = None, framework: int | None = None, status: int | None = None,
        valid_at_ns: int | None = None,
    ) -> Iterator[Entry]:  # fmt: skip
        """Passports in the order in which they were issued, of all that is asked for."""
        for entry in self._candidates(about, framework):
            passport = entry.passport
            fits = framework in (None, passport.framework) and status in (None, passport.status)
            if fits and (valid_at_ns is None or entry.was_valid(valid_at_ns)):
                yield entry

    def _candidates(self, about: bytes | None, framework: int | None) -> Iterable[Entry]:
        if about is not None:
            return self._by_object.get(about, ())
        if framework is not None:
            return self._by_framework.get(framework, ())
        return (entry for entry in self._by_id.values() if isinstance(entry, Entry))

    def refuse(self, record: Record, key: PublicKey | None, now_ns: int) -> None:
        """Raise RefusedError or UsageError unless a new record, signed with this key, may be added."""
        if record.id in self._by_id:
            raise RefusedError("passport", "its id is taken", "choose another")
        if record.issued_ns > now_ns:
            raise RefusedError("passport", "is dated in the future", "set the clock")
        if key is None:
            if not record.is_event or record.status == REVOKED or record.signature != UNSIGNED:
                raise UsageError("passport", "there is no public key to verify its signature with", "give it too")
        elif not record.fits(key):
            raise RefusedError("passport", "its signature does not fit the key", "sign just the bytes before it")
        if record.is_event:
            self._refuse_event(record, key)
        elif not record.issuer.strip():
            raise UsageError("issuer", "is empty", "say who issues it")
        elif record.expires_ns and record.expires_ns <= record.issued_ns:
            raise UsageError("passport", "expires before it is issued", "choose a later day")

    def _refuse_event(self, event: Record, key: PublicKey | None) -> None:
        entry = self.passport(event.object)
        if event.status not in (VERIFIED, REVOKED, FAILED):
            raise UsageError(f"event {event.status}", "is unknown")
        if event.status == REVOKED:
            if entry.revocation:
                raise RefusedError("passport", "is revoked already")
            if key is None or not entry.passport.fits(key):
                raise RefusedError("passport", "was signed with another key", "revoke it with that one")


def revocation_bytes(passport: Record) -> int:
    """Of a revocation of a passport, without a reason."""
    return _REVOCATION_BYTES + len(passport.issuer.encode())


def blocks_needed(pages: Pages, reserved: int) -> int:
    """For the records, and behind them for so many bytes of revocations, however they are cut into blocks."""
    free = ROOM - (FORM.header_bytes if pages.blocks == 1 else 0) - len(pages.last)
    left = reserved - free if reserved <= free else reserved - max(0, free - _CUT_MAX)
    return pages.blocks + max(0, -(-left // (ROOM - _CUT_MAX)))


def header(passports: int) -> bytes:
    """Of the region."""
    return _HEADER.pack(passports, bytes(12))


def load(read: Read, used: int) -> tuple[Pages, Ledger]:
    """The records of a region that uses so many blocks. Raises DamageError."""
    pages, ledger = Pages.load(FORM, read, used, record_bytes), Ledger()
    for _, raw in pages.records(read, record_bytes):
        ledger.add(Record.unpack(raw))
    if pages.header != header(ledger.passports):
        raise FORM.damage("has a header that does not fit its records")
    return pages, ledger


def verify(read: Read, slot: Slot) -> Iterator[str]:
    """What is wrong with the region: texts, ids, events without a passport, counts.

    Signatures need their keys. Raises DamageError at the first flaw.
    """
    load(read, slot.used)
    return iter(())
