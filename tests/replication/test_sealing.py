"""Entries that are sealed, what is kept of those that come back, and what an operation is after all that."""

import random
from itertools import count

import pytest

from nbdvde.errors import DamageError
from nbdvde.replication import sealing
from nbdvde.replication.operations import Action, Change, Enrol, Release, pack, unpack
from nbdvde.replication.sealing import KEY_BYTES, SALT_BYTES, Sealer

GROUP, KEY = "default", b"k" * KEY_BYTES
NUMBER_BYTES = SALT_BYTES + 8


def sealer() -> Sealer:
    numbers = count(1)
    return Sealer(KEY, lambda length: next(numbers).to_bytes(length, "little"))


def changes(data: bytes) -> list[Change]:
    return [Change("disk", 1, Action.WRITE, 0, len(data), data)]


def copy_of(sealed: bytes) -> bytes:
    return bytes(bytearray(sealed))


def test_what_was_sealed_here_is_not_opened_again() -> None:
    here, there = sealer(), sealer()
    operation = changes(b"x" * 5000)
    sealed = here.seal(GROUP, operation)
    assert here.open(GROUP, sealed) is operation
    assert there.open(GROUP, sealed) == operation
    assert here.open(GROUP, sealed) == operation, "it is asked for once more, as after a change of leaders"


def test_other_bytes_are_not_taken_for_what_was_sealed_here() -> None:
    here = sealer()
    operation = changes(b"x" * 5000)
    sealed = here.seal(GROUP, operation)
    changed = bytearray(sealed)
    changed[-1] ^= 1
    with pytest.raises(DamageError):
        here.open(GROUP, bytes(changed))
    found = here.open(GROUP, copy_of(sealed))
    assert found == operation
    assert found is not operation


def test_little_is_kept_of_what_never_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "_OWN_BYTES", 20_000)
    here, data = sealer(), random.Random(1).randbytes(5000)
    operations = [changes(data) for _ in range(10)]
    sealed = [here.seal(GROUP, operation) for operation in operations]
    kept = [here.open(GROUP, each) is operation for each, operation in zip(sealed, operations, strict=True)]
    assert kept == [False] * 7 + [True] * 3


@pytest.mark.parametrize("length", [5000, 300_000, 1 << 20])
def test_only_what_becomes_shorter_is_compressed(length: int) -> None:
    here, chance = sealer(), random.Random(length)
    for data, shorter in ((chance.randbytes(length), False), (chance.randbytes(1000) * (length // 1000), True)):
        sealed = here.seal(GROUP, changes(data))
        assert (len(sealed) < len(data) // 2) == shorter
        assert here.open(GROUP, copy_of(sealed)) == changes(data)


def test_no_nonce_comes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "_SALT_LASTS", 200)
    here = sealer()
    heads = [here.seal(GROUP, Enrol("127.0.0.1:1", f"node-{number}"))[:NUMBER_BYTES] for number in range(100)]
    assert len(set(heads)) == len(heads)
    assert len({head[:SALT_BYTES] for head in heads}) > 3


def test_entries_of_another_group_or_changed_ones_are_refused() -> None:
    here = sealer()
    sealed = here.seal("a", Release("disk", 1))
    for other in (here, sealer()):
        with pytest.raises(DamageError):
            other.open("b", sealed)
    for at in range(len(sealed)):
        with pytest.raises(DamageError):
            sealer().open("a", sealed[:at] + bytes((sealed[at] ^ 1,)) + sealed[at + 1 :])


def test_changes_keep_their_data() -> None:
    changes = [
        Change("disk", 3, Action.WRITE, 0, 2, b"ab"),
        Change("disk", 3, Action.TRIM, 4096, 8192),
        Change("other", 4, Action.WRITE, 2, 2, b"cd"),
    ]
    found = unpack(memoryview(b"".join(pack(changes))))
    assert [(c.disk, c.epoch, c.offset, bytes(c.data)) for c in found] == [  # type: ignore[union-attr]
        ("disk", 3, 0, b"ab"), ("disk", 3, 4096, b""), ("other", 4, 2, b"cd"),
    ]  # fmt: skip
