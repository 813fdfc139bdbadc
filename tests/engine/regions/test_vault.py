"""Passports: what comes back, what a signature covers, what the rules refuse, and who is valid when."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdvde.engine.regions import vault
from nbdvde.engine.regions.directory import Slot
from nbdvde.engine.regions.form import ROOM
from nbdvde.engine.regions.pages import Pages
from nbdvde.engine.regions.vault import (
    EVENT,
    FAILED,
    FORM,
    FRAMEWORKS,
    REVOKED,
    STATUSES,
    UNSIGNED,
    VERIFIED,
    Entry,
    Ledger,
    Record,
    code_of,
    header,
    named,
)
from nbdvde.errors import DamageError, RefusedError, UsageError
from tests.engine.regions.passports import DISK, KEY, NOW, OTHER, OTHER_PUBLIC, PUBLIC, event, passport
from tests.engine.regions.passports import named as an_id

u64 = st.integers(0, (1 << 64) - 1)
texts = st.text(max_size=32)


@given(id_=st.binary(min_size=16, max_size=16).filter(any), framework=st.integers(0, EVENT), time=u64, issuer=texts,
       notes=texts, end=st.binary(min_size=64, max_size=64))  # fmt: skip
def test_records_come_back(id_: bytes, framework: int, time: int, issuer: str, notes: str, end: bytes) -> None:
    record = Record(id_, DISK, framework, 9, time, time, time, issuer, notes, end)
    raw = record.pack()
    assert len(raw) == 132 + len(issuer.encode()) + len(notes.encode())
    assert Record.unpack(raw) == record


def test_the_signature_covers_every_bit_before_it() -> None:
    for made in (passport(notes="n"), event(passport(), 2).signed_with(KEY)):
        assert made.fits(PUBLIC)
        assert not made.fits(OTHER_PUBLIC)
        raw = made.pack()
        for at in range(len(raw)):
            changed = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
            try:
                assert not Record.unpack(changed).fits(PUBLIC), f"byte {at}"
            except DamageError:
                assert at in range(60, 64) or 64 <= at < len(raw) - 64, "lengths and texts alone may be impossible"


@pytest.mark.parametrize(("field", "text", "ok"), [
    ("issuer", "ü" * 64, True), ("issuer", "ü" * 64 + "x", False), ("issuer", "x" * 129, False),
    ("notes", "€" * 85 + "x", True), ("notes", "€" * 86, False), ("notes", "\ud800", False),
])  # fmt: skip
def test_texts_are_limited_in_bytes(field: str, text: str, ok: bool) -> None:
    made = replace(passport(), issuer=text) if field == "issuer" else replace(passport(), notes=text)
    if ok:
        assert Record.unpack(made.pack()) == made
        return
    with pytest.raises(UsageError, match=field):
        made.pack()


def test_a_whole_record_fits_into_every_block() -> None:
    made = replace(passport(), issuer="i" * 128, notes="n" * 256)
    assert len(made.pack()) == 516 <= ROOM - FORM.header_bytes


@pytest.mark.parametrize(("at", "byte", "why"), [
    (64, 0xFF, "not UTF-8"), (60, 200, "makes no sense"), (63, 1, "makes no sense"),
])  # fmt: skip
def test_what_cannot_be_a_record_is_damage(at: int, byte: int, why: str) -> None:
    raw = bytearray(passport().pack())
    raw[at] = byte
    with pytest.raises(DamageError, match=why):
        Record.unpack(bytes(raw))


def test_codes_of_a_newer_version_are_numbers() -> None:
    assert [named(FRAMEWORKS, code) for code in (0, 8, 9, 70)] == ["GDPR", "FedRAMP", "9", "70"]
    assert [code_of("framework", FRAMEWORKS, text) for text in ("gdpr", "PCI-DSS", "77")] == [0, 3, 77]
    assert [code_of("status", STATUSES, text) for text in ("unknown", "non-compliant")] == [0, 2]
    for text in ("65535", "-1", "GPDR", "²"):
        with pytest.raises(UsageError, match="use GDPR, HIPAA"):
            code_of("framework", FRAMEWORKS, text)


def ledger(*records: Record) -> Ledger:
    made = Ledger()
    for record in records:
        made.add(record)
    return made


def test_a_passport_is_valid_from_its_issue_to_its_end() -> None:
    entry = Entry(passport(expires_ns=NOW + 100))
    assert [entry.state(NOW + after) for after in (-1, 0, 99, 100)] == ["not yet valid", "valid", "valid", "expired"]
    assert [entry.was_valid(NOW + after) for after in (-1, 0, 99, 100)] == [False, True, True, False]
    assert [entry.flaw(PUBLIC, NOW + after) for after in (0, 100)] == ["", "expired"]
    assert "does not fit" in entry.flaw(OTHER_PUBLIC, NOW)


def test_a_revoked_one_stays_revoked_whatever_the_clock_says() -> None:
    made = passport()
    entry = Entry(made, [event(made, 2, time_ns=NOW + 50).signed_with(KEY)])
    assert [entry.state(NOW + after) for after in (0, 49, 50)] == ["revoked"] * 3
    assert [entry.was_valid(NOW + after) for after in (0, 49, 50)] == [True, True, False]
    assert entry.flaw(PUBLIC, NOW) == "revoked"
    forged = Entry(made, [event(made, 2).signed_with(OTHER)])
    assert forged.flaw(PUBLIC, NOW) == "revoked, by a signature that does not fit the key"


def test_verifications_tell_when_it_was_verified_last() -> None:
    made = passport()
    entry = Entry(made)
    assert entry.verified_ns == NOW
    entry.events += [event(made, 2, VERIFIED, time_ns=NOW + 5), event(made, 3, FAILED, time_ns=NOW + 9)]
    assert entry.verified_ns == NOW + 5
    assert entry.state(NOW) == "valid"


def test_passports_are_found_by_what_they_are_about() -> None:
    one, two = passport(1), passport(2, framework=3, status=2)
    three = replace(passport(3, framework=3), object=bytes(16))
    held = ledger(one, two, three, event(two, 9))

    def found(**asked: object) -> list[int]:
        return [entry.passport.id[-1] for entry in held.query(**asked)]  # type: ignore[arg-type]

    assert found() == [1, 2, 3]
    assert found(about=DISK) == [1, 2]
    assert found(framework=3) == [2, 3]
    assert found(framework=3, about=DISK) == [2]
    assert found(status=1) == [1, 3]
    assert found(valid_at_ns=NOW) == [1, 3]
    assert found(about=b"nothing of this") == []
    assert held.passport(two.id).revocation == held.find(an_id(9))
    with pytest.raises(UsageError, match="that of an event"):
        held.passport(an_id(9))
    with pytest.raises(UsageError, match="none of this id"):
        held.find(bytes(16))


GOOD = passport()
WRONG = [
    (GOOD, PUBLIC, RefusedError, "its id is taken"),
    (passport(2), OTHER_PUBLIC, RefusedError, "does not fit the key"),
    (passport(2), None, UsageError, "no public key"),
    (replace(passport(2), notes="other"), PUBLIC, RefusedError, "does not fit the key"),
    (replace(passport(2), issued_ns=NOW + 1).signed_with(KEY), PUBLIC, RefusedError, "dated in the future"),
    (passport(2, expires_ns=NOW), PUBLIC, UsageError, "expires before it is issued"),
    (event(GOOD, 2), None, UsageError, "no public key"),
    (event(GOOD, 2).signed_with(OTHER), OTHER_PUBLIC, RefusedError, "signed with another key"),
    (event(passport(7), 2, VERIFIED), None, UsageError, "none of this id"),
    (event(GOOD, 2, 4), None, UsageError, "event 4: is unknown"),
    (event(GOOD, 2, VERIFIED).signed_with(KEY), None, UsageError, "no public key"),
]


@pytest.mark.parametrize(("record", "key", "error", "why"), WRONG)
def test_what_may_not_be_added(record: Record, key: object, error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        ledger(GOOD).refuse(record, key, NOW)  # type: ignore[arg-type]


def test_what_may_be_added() -> None:
    held = ledger(GOOD)
    held.refuse(passport(2, framework=99, status=99), PUBLIC, NOW)
    held.refuse(event(GOOD, 2, VERIFIED), None, NOW)
    held.refuse(event(GOOD, 2, FAILED).signed_with(OTHER), OTHER_PUBLIC, NOW)
    revocation = event(GOOD, 2).signed_with(KEY)
    held.refuse(revocation, PUBLIC, NOW)
    held.add(revocation)
    with pytest.raises(RefusedError, match="revoked already"):
        held.refuse(event(GOOD, 3).signed_with(KEY), PUBLIC, NOW)


def region(*records: Record, told: int) -> list[bytes]:
    _, blocks = Pages(FORM, b"").adding(header(told), [record.pack() for record in records])
    return [blocks[number] for number in sorted(blocks)]


@pytest.mark.parametrize(("records", "told", "why"), [
    ([GOOD], 2, "header"), ([GOOD, GOOD], 2, "an id twice"), ([event(GOOD, 2)], 0, "without its passport"),
    ([GOOD, event(GOOD, 2), event(replace(GOOD, id=event(GOOD, 2).id), 3)], 1, "without its passport"),
])  # fmt: skip
def test_damage_is_found(records: list[Record], told: int, why: str) -> None:
    blocks = region(*records, told=told)
    with pytest.raises(DamageError, match=why):
        vault.verify(lambda number: blocks[number], Slot(FORM.tag, 1 << 34, 9, len(blocks)))


def test_many_fill_blocks_and_come_back() -> None:
    records = [passport(number, notes="n" * (number * 7 % 256)) for number in range(1, 60)]
    blocks = region(*records, told=59)
    assert len(blocks) > 3
    pages, held = vault.load(lambda number: blocks[number], len(blocks))
    assert [entry.passport for entry in held.query()] == records
    assert pages.blocks == len(blocks)
    assert passport().signature != UNSIGNED
    assert event(GOOD, 2, REVOKED).signature == UNSIGNED
