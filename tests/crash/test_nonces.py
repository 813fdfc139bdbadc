"""No (key, nonce) pair seals two different things: over crashes, rollbacks, and copies of an image opened apart."""

import random

import pytest

from tests.crash.nonces import Ledger, lives


@pytest.mark.parametrize("seed", range(6))
def test_no_nonce_repeats_over_crashes_rollbacks_and_copies(seed: int) -> None:
    ledger = Ledger()
    with ledger.watching():
        lives(seed, 8)
    assert ledger.units > 100
    assert ledger.repeats == []


def test_the_ledger_notices_a_repeat() -> None:
    ledger = Ledger()
    key, nonce = random.Random(1).randbytes(32), bytes(12)
    cipher = ledger.cipher()(key)
    cipher.encrypt(nonce, b"one", b"")
    cipher.encrypt(nonce, b"one", b"")
    assert ledger.repeats == []
    cipher.encrypt(nonce, b"two", b"")
    assert ledger.repeats == [(key, nonce)]
