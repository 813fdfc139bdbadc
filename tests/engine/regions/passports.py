"""Keys and passports for tests."""

from cryptography.hazmat.primitives.asymmetric import ec

from nbdvde.engine.regions.vault import EVENT, REVOKED, Record

KEY, OTHER = (ec.derive_private_key(number, ec.SECP256R1()) for number in (1234567, 7654321))
PUBLIC, OTHER_PUBLIC = KEY.public_key(), OTHER.public_key()
DISK = bytes(range(16, 32))
NOW = 1_800_000_000 * 10**9


def named(number: int) -> bytes:
    """An id."""
    return b"passport" + number.to_bytes(8, "big")


def passport(number: int = 1, *, notes: str = "", expires_ns: int = 0, framework: int = 0, status: int = 1) -> Record:
    """A signed passport that was issued at NOW."""
    made = Record(named(number), DISK, framework, status, NOW, expires_ns, NOW, "Prüfstelle", notes)
    return made.signed_with(KEY)


def event(of: Record, number: int, kind: int = REVOKED, *, time_ns: int = NOW) -> Record:
    """An event that is not signed."""
    return Record(named(number), of.id, EVENT, kind, time_ns, issuer="someone", notes="because")
