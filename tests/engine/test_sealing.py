"""A sealed unit opens only as what it is, where it is."""

from dataclasses import replace
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdvde.engine import sealing
from nbdvde.engine.layout import ENCRYPTION_AES_256_GCM, ENCRYPTION_NONE, TAG_BYTES, Domain, Kind, Segment
from nbdvde.engine.sealing import Keyring, derive
from nbdvde.errors import DamageError

SEGMENT = Segment(3, 65536, 9, 131072, bytes(32))
RINGS = [Keyring(bytes(32), bytes(16), kind) for kind in (ENCRYPTION_AES_256_GCM, ENCRYPTION_NONE)]


@pytest.mark.parametrize("ring", RINGS)
@given(data=st.binary(max_size=100), number=st.integers(0, 2**40), blocks=st.integers(0, 256))
def test_what_was_sealed_opens(ring: Keyring, data: bytes, number: int, blocks: int) -> None:
    sealer = ring.sealer(SEGMENT)
    sealed = sealer.seal(number, Kind.EXTENT, data, blocks=blocks)
    assert len(sealed) == len(data) + TAG_BYTES
    assert sealer.open(number, Kind.EXTENT, sealed, blocks=blocks) == data


@pytest.mark.parametrize("ring", RINGS)
def test_every_bit_and_everything_it_is_bound_to_counts(ring: Keyring) -> None:
    sealer = ring.sealer(SEGMENT)
    sealed = sealer.seal(5, Kind.EXTENT, b"sixteen bytes ok", blocks=4)
    attempts = [(sealer, 5, Kind.EXTENT, sealed[:-1], 4, Domain.UNIT), (sealer, 5, Kind.EXTENT, b"", 4, Domain.UNIT)]
    for at in range(len(sealed) * 8):
        flipped = bytearray(sealed)
        flipped[at // 8] ^= 1 << at % 8
        attempts.append((sealer, 5, Kind.EXTENT, bytes(flipped), 4, Domain.UNIT))
    attempts += [
        (sealer, 6, Kind.EXTENT, sealed, 4, Domain.UNIT),
        (sealer, 5, Kind.RECORD, sealed, 4, Domain.UNIT),
        (sealer, 5, Kind.EXTENT, sealed, 3, Domain.UNIT),
        (sealer, 5, Kind.EXTENT, sealed, 4, Domain.HEADER),
    ]
    others = [replace(SEGMENT, slot=4), replace(SEGMENT, sequence=10), replace(SEGMENT, salt=b"\1" * 32)]
    attempts += [(ring.sealer(other), 5, Kind.EXTENT, sealed, 4, Domain.UNIT) for other in others]
    for kind in (ENCRYPTION_AES_256_GCM, ENCRYPTION_NONE):
        for ring_of_another in (Keyring(b"\1" * 32, bytes(16), kind), Keyring(bytes(32), b"\1" * 16, kind)):
            attempts.append((ring_of_another.sealer(SEGMENT), 5, Kind.EXTENT, sealed, 4, Domain.UNIT))
    for opener, number, unit_kind, data, blocks, domain in attempts:
        with pytest.raises(DamageError):
            opener.open(number, unit_kind, data, blocks=blocks, domain=domain)


def test_a_key_is_derived_when_it_is_first_used_and_again_when_it_was_forgotten() -> None:
    ring = RINGS[0]
    with mock.patch.object(sealing, "derive", side_effect=derive) as deriving:
        sealer = ring.sealer(SEGMENT)
        assert deriving.call_count == 0
        sealed = sealer.seal(5, Kind.EXTENT, b"text")
        assert sealer.open(5, Kind.EXTENT, sealed) == b"text"
        assert deriving.call_count == 1
        sealer.forget()
        assert sealer.open(5, Kind.EXTENT, sealed) == b"text"
        assert deriving.call_count == 2
