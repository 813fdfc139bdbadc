"""Entries that are sealed, and what an operation is after all that."""

import random

import pytest

from nbdvde.errors import DamageError
from nbdvde.replication.operations import Action, Change, pack, unpack
from nbdvde.replication.sealing import SALT_BYTES, Sealer

KEY = bytes(range(32))


def sealer(seed: int = 1) -> Sealer:
    return Sealer(KEY, random.Random(seed).randbytes)


def test_no_nonce_comes_twice() -> None:
    one = sealer()
    entries = [one.seal("group", [b"the same"]) for _ in range(100)]
    assert len({entry[: SALT_BYTES + 8] for entry in entries}) == 100
    assert [bytes(sealer(2).open("group", entry)) for entry in entries] == [b"the same"] * 100


def test_entries_of_another_group_or_changed_ones_are_refused() -> None:
    sealed = sealer().seal("a", [b"text"])
    with pytest.raises(DamageError):
        sealer().open("b", sealed)
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
