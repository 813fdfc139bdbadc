"""What management regions look like on disk, for tests/vectors/regions.json (see make_vectors)."""

import hmac
from collections.abc import Iterator, Sequence
from hashlib import sha256
from struct import pack

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from xxhash import xxh64_intdigest


def blocks(tag: bytes, bodies: Sequence[tuple[bytes, int]]) -> Iterator[bytes]:
    """Section "Regions": blocks with these contents, each of the generation beside it."""
    for body, generation in bodies:
        block = body.ljust(4080, b"\0") + pack("<4sI", tag, generation)
        yield block + pack("<Q", xxh64_intdigest(block))


def directory() -> Iterator[bytes]:
    """Section "Directory": two regions in generation 7, one of a kind that nobody knows."""
    slots = pack("<4sIQQQ", b"STRE", 0, 1 << 34, 4097, 1) + pack("<4sIQQQ", b"NEW!", 5, 3 << 34, 1 << 34, 99)
    return blocks(b"RDIR", [(pack("<I12x", 2) + slots, 7)])


def vault() -> Iterator[bytes]:
    """Section "Compliance vault": passports with the longest texts, one verified, one revoked, in two blocks."""
    about, time = bytes(range(16)), 1_800_000_000 * 10**9
    names = [b"passport" + pack(">Q", number) for number in range(10)]
    records = [_signed(name, about, 8, 4, time, time + 7, time, "é" * 64, "ñ" * 128) for name in names]
    verified = _record(bytes([1]) * 16, names[0], 65535, 1, time + 1, 0, 0, "auditor", "") + bytes(64)
    revoked = _signed(bytes([2]) * 16, names[9], 65535, 2, time + 2, 0, 0, "", "mistake")
    first = pack("<I12x", 10) + b"".join(records[:7])
    return blocks(b"CMVT", [(first, 1), (b"".join([*records[7:], verified, revoked]), 1)])


def _record(id_: bytes, about: bytes, *rest: object) -> bytes:
    *numbers, issuer, notes = rest
    texts = [str(text).encode() for text in (issuer, notes)]
    return pack("<16s16sHHQQQ", id_, about, *numbers) + b"".join(pack("<I", len(text)) + text for text in texts)


def _signed(*fields: object) -> bytes:
    record = _record(*fields)  # type: ignore[arg-type]
    key = ec.derive_private_key(1234567, ec.SECP256R1())
    r, s = decode_dss_signature(key.sign(record, ec.ECDSA(hashes.SHA256(), deterministic_signing=True)))
    return record + r.to_bytes(32, "big") + s.to_bytes(32, "big")


def stream() -> Iterator[bytes]:
    """Section "Stream": five places, all allocated, and the entries 7, 8 and 9 of 1, 0 and 4096 bytes."""
    header = pack("<QQQQQIB", 5, 5, 10, 7, 3, 3, 1)
    lengths = pack("<5H", 0, 0, 1, 0, 4096)  # places 2, 3 and 4
    return blocks(b"STRE", [(header, 4), (lengths, 4)])


def metrics() -> Iterator[bytes]:
    """Section "Metrics log": 256 KiB in generation 3, with two samples, and a window of a minute with 302."""
    tiers = b"".join(
        pack("<QQQQQ", width, *place)
        for width, place in zip(
            (0, 60 * 10**9, 3600 * 10**9, 86400 * 10**9),
            ((1, 7, 9, 10), (8, 15, 0, 1), (23, 15, 0, 0), (38, 26, 0, 0)),
            strict=True,
        )
    )
    header = pack("<QQd8x", 304, 256 << 10, 0.75)
    samples = pack("<HQdB", 7, 1_700_000_000 * 10**9, -2.5, 0) + pack("<HQdB", 65535, 1, 1e300, 6)
    window = pack("<HBBHBBQQddd", 7, 0, 2, 3, 0, 0, 60 * 10**9 * 28_333_333, 302, 9.0, -1.0, 10.0)
    window += pack("<hhh", -15024, 0, 15082) + pack("<HHH", 1, 300, 1)
    return blocks(b"MTRK", [(header + tiers, 3), (samples, 3), (window, 2)])


def anon() -> Iterator[bytes]:
    """Section "Anonymisation table": 40 mappings of two subjects, one of whom was erased, in two blocks."""
    subjects, keys = (b"subject of these", b"subject of those"), (bytes([1]) * 32, bytes([2]) * 32)
    time, fixed = 1_800_000_000 * 10**9, list[bytes]()
    for number in range(1, 41):
        hashed = hmac.digest(keys[number % 2], b"value %d" % number, "sha256")
        token = sha256(b"%d" % number).digest()
        fixed.append(pack("<16s16sH32s32sQ", token[:16], subjects[number % 2], 1, hashed, token, time + number))
    gone = [record for record in fixed if record[16:32] == subjects[1]]
    mappings = [record + pack("<H", 2 if record in gone else 1) for record in fixed]
    head = pack(
        "<16s16sH32s", sha256(b"nbdvde subject key" + keys[1]).digest()[:16], subjects[1], 65535,
        sha256(b"".join(gone)).digest(),
    )  # fmt: skip
    end = pack("<Q", time + 99)
    proof = head + sha256(bytes(32) + head + end).digest() + end + pack("<H", 4)
    records = [*mappings, proof]
    first = pack("<I12x", 40) + b"".join(records[:37])
    return blocks(b"ANON", [(first, 1), (b"".join(records[37:]), 1)])


def worm() -> Iterator[bytes]:
    """Section "WORM": 5 bytes appended, then the retention made for ever."""
    capacity, created = 16, 1_800_000_000 * 10**9
    first = sha256(pack("<QQQ", capacity, 10**9, created)).digest()
    last = sha256(pack("<QQQ", capacity, 0, created)).digest()
    records, chain = b"", bytes(32)
    for block, time, length, digest in ((0, 0, 0, first), (0, 7, 5, sha256(b"hello").digest()), (1, 9, 0, last)):
        record = pack("<QQI32s", block, created + time, length, digest)
        chain = sha256(chain + record).digest()
        records += record + chain
    header = pack("<QQQQIIQ", 1, capacity, 0, created, 3, 0, 9)
    return blocks(b"WORM", [(header + records, 3)])


def regions() -> dict[str, list[bytes]]:
    """Blocks by name."""
    return {
        "directory": list(directory()),
        "stream": list(stream()),
        "vault": list(vault()),
        "worm": list(worm()),
        "metrics": list(metrics()),
        "anon": list(anon()),
    }
