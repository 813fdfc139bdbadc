"""The anonymisation table: records, tokens as text, the chain of proofs, and what contradicts it."""

from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdvde.engine.regions import anon
from nbdvde.engine.regions.anon import (
    ACTIVE,
    ERASED,
    FORM,
    NO_CHAIN,
    PER_BLOCK,
    Record,
    Table,
    digest_of,
    hash_of,
    parse_token,
    proof,
    token_text,
)
from nbdvde.engine.regions.directory import Slot
from nbdvde.errors import DamageError, UsageError

KEY, SUBJECT, OTHER = b"k" * 32, b"s" * 16, b"o" * 16
NOW = 1_800_000_000 * 10**9


def mapping(number: int, subject: bytes = SUBJECT) -> Record:
    token = number.to_bytes(32, "big")
    return Record(token[16:], subject, 1, hash_of(KEY, b"%d" % number), token, NOW + number)


def stored(table: Table) -> dict[int, bytes]:
    return table.blocks(range(table.used))


def verified(blocks: dict[int, bytes]) -> list[str]:
    return list(anon.verify(blocks.__getitem__, Slot(FORM.tag, 1 << 34, 99, len(blocks))))


@given(st.binary(min_size=32, max_size=32))
def test_tokens_are_text(token: bytes) -> None:
    text = token_text(token)
    assert (len(text), text) == (52, text.lower())
    assert parse_token(text) == parse_token(text.upper()) == token


@pytest.mark.parametrize("text", ["", "a", "a" * 51, "a" * 53, "1" * 52, "ä" * 52, "a" * 51 + "b", "a" * 50 + "=="])
def test_what_is_no_token(text: str) -> None:
    with pytest.raises(UsageError, match="token"):
        parse_token(text)


def test_a_hash_is_of_a_value_under_the_key_of_its_subject() -> None:
    """RFC 4231, test case 2, padded as HMAC does it, and two subjects that have the same value in common."""
    assert hash_of(b"Jefe", b"what do ya want for nothing?").hex() == (
        "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    )
    assert hash_of(KEY, b"value") != hash_of(b"K" * 32, b"value")
    for value in (b"", b"v" * 4097):
        with pytest.raises(UsageError, match="value: is not 1 to 4096 bytes long"):
            hash_of(KEY, value)


@pytest.mark.parametrize("count", [0, 1, PER_BLOCK, PER_BLOCK + 1, 5 * PER_BLOCK])
def test_records_come_back(count: int) -> None:
    table = Table([mapping(number + 1, (SUBJECT, OTHER)[number % 2]) for number in range(count)])
    blocks = stored(table)
    assert len(blocks) == max(1, -(-count // PER_BLOCK)) == table.used
    loaded = anon.load(blocks.__getitem__, len(blocks))
    assert list(loaded.mapped()) == list(table.mapped())
    assert loaded.by_subject(SUBJECT) == table.by_subject(SUBJECT)
    assert (loaded.generation, loaded.mappings) == (1, count)
    assert verified(blocks) == []


def test_mappings_are_found() -> None:
    table = Table([mapping(1), mapping(2, OTHER)])
    assert table.by_id(mapping(2).id) == table.by_token(mapping(2).token) == mapping(2, OTHER)
    for find in (table.by_id, table.by_token):
        with pytest.raises(UsageError, match="there is none like this"):
            find(bytes(32))


def erased(*subjects: bytes) -> Table:
    """A table of two subjects, of which these were erased, in this order."""
    table = Table([mapping(number + 1, (SUBJECT, OTHER)[number % 2]) for number in range(100)])
    for subject in subjects:
        made = proof(KEY, subject, table.by_subject(subject), table.chain, NOW)
        table.flag(subject)
        table.append(made)
    return table


def test_proofs_are_a_chain_and_say_what_was_destroyed() -> None:
    table = erased(OTHER, SUBJECT)
    first, second = table.proofs
    assert first.id == second.id == sha256(b"nbdvde subject key" + KEY).digest()[:16]
    assert first.token != second.token != NO_CHAIN
    assert first.hash == digest_of(mapping(number, OTHER) for number in range(2, 101, 2))
    assert verified(stored(table)) == []
    assert {record.flags for record in table.mapped()} == {ERASED}
    assert table.chain == second.token


def changed(table: Table, at: int, **fields: object) -> list[str]:
    """What a check finds when one record is another."""
    records = [*table._records]
    records[at] = replace(records[at], **fields)  # type: ignore[arg-type]
    return verified(stored(Table(records)))


def test_every_change_of_what_a_proof_is_about_is_found() -> None:
    table = erased(OTHER, SUBJECT)
    names = {subject: f"the proof of the erasure of subject {subject.hex()}" for subject in (SUBJECT, OTHER)}
    for field, value in {"id": b"x" * 16, "hash": bytes(32), "token": bytes(32), "created_ns": NOW + 1}.items():
        assert f"{names[OTHER]} is not of this chain" in changed(table, 100, **{field: value}), field
    assert changed(table, 1, hash=bytes(32)) == [f"{names[OTHER]} is of other mappings"]
    assert changed(table, 1, created_ns=0) == [f"{names[OTHER]} is of other mappings"]
    assert changed(table, 0, flags=ACTIVE) == [f"mapping {mapping(1).id.hex()} does not say that it was erased"]
    swapped = Table([*table._records[:100], *reversed(table._records[100:])])
    assert len(verified(stored(swapped))) == 2


@pytest.mark.parametrize(("records", "why"), [
    ([mapping(1), mapping(1)], "a mapping twice"),
    ([mapping(1), replace(mapping(2), token=mapping(1).token)], "a mapping twice"),
    ([proof(KEY, SUBJECT, [], NO_CHAIN, 1)] * 2, "two proofs of one erasure"),
])  # fmt: skip
def test_what_cannot_be(records: list[Record], why: str) -> None:
    with pytest.raises(DamageError, match=why):
        Table(records)


def test_a_block_that_is_not_full_before_the_last_is_damage() -> None:
    blocks = stored(Table([mapping(number + 1) for number in range(PER_BLOCK + 1)]))
    blocks[0] = stored(Table([mapping(number + 1) for number in range(PER_BLOCK - 1)]))[0]
    with pytest.raises(DamageError, match="not full before its last one"):
        verified(blocks)


def test_a_header_that_lies_is_damage() -> None:
    blocks = stored(Table([mapping(1)]))
    blocks[0] = FORM.block((2).to_bytes(16, "little") + mapping(1).pack(), 1)
    with pytest.raises(DamageError, match="header"):
        verified(blocks)


def test_there_is_room_for_the_proof_of_every_subject() -> None:
    table = Table([mapping(1), mapping(2), mapping(3, OTHER)])
    assert table.room_for(SUBJECT) == 3 + 1 + 2
    assert table.room_for(b"somebody else123") == 3 + 1 + 3
    assert erased(OTHER).room_for(SUBJECT) == 101 + 1 + 1


def test_what_was_appended_last_is_taken_back() -> None:
    table = erased(OTHER)
    before = stored(table)
    table.append(mapping(500, b"somebody else123"))
    table.drop_last()
    table.generation -= 1
    assert stored(table) == before
    table.drop_last()
    assert table.proofs == []
    table.append(mapping(500, b"somebody else123"))
    assert len(table) == 101
