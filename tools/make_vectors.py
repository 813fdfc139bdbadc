"""Make the test vectors anew: python tools/make_vectors.py [FOLDER], tests/vectors by default.

They are made by docs/format.md alone and share no code with nbdvde, so that they prove the format and not only that it
stays as it is. They come out the same each time; a test compares them with the ones that are kept.
"""

import json
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from struct import pack
from typing import Any

from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tools.region_vectors import blocks as region_blocks
from tools.region_vectors import regions

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "vectors"
UUID, KEY = bytes(range(16)), bytes(range(32))
CREATED_NS = 1_700_000_000_000_000_000
SECRETS = (
    ("passphrase", b"correct horse battery staple"), ("passphrase", "Pässwörd ☃".encode()),
    ("keyfile", bytes(range(32))), ("keyfile", bytes(32)),
    ("passphrase", b"x"), ("keyfile", blake3(b"key file").digest(300)),
    ("passphrase", b" spaces kept "), ("keyfile", b"line\n" * 7),
)  # fmt: skip
LABELS = ("", "laptop", "Schlüssel", "x" * 64)
COSTS = ((64, 1, 1), (32, 1, 4), (128, 2, 2), (1024, 1, 16), (64, 16, 1))
"""KiB of memory, iterations, lanes; the last vector has the default cost."""
DEFAULT_COST = (65536, 3, 4)


def _hkdf(key: bytes, salt: bytes, info: bytes) -> bytes:
    return HKDF(SHA256(), 32, salt, info).derive(key)


def key_vector(number: int) -> dict[str, Any]:
    """A key area of generation 1 with slot 0 in use (section "Key area"); bytes as hexadecimal."""
    kind, secret = SECRETS[number % len(SECRETS)]
    label = LABELS[number % len(LABELS)]
    cost = DEFAULT_COST if number == 15 else COSTS[number % len(COSTS)]
    chance = blake3(b"key vector %d" % number).digest(92)
    uuid, master, salt, nonce = chance[:16], chance[16:48], chance[48:80], chance[80:]
    header, slot, tail = _key_area(uuid, master, salt, nonce, kind, secret, label, cost, CREATED_NS + number)
    values = {"secret": secret, "uuid": uuid, "master": master, "salt": salt, "nonce": nonce}
    return {
        "kind": kind, **{name: value.hex() for name, value in values.items()},
        "created_ns": CREATED_NS + number, "memory_kib": cost[0], "iterations": cost[1], "lanes": cost[2],
        "label": label, "header": header.hex(), "slot": slot.hex(), "tail": tail.hex(),
    }  # fmt: skip


def _key_area(
    uuid: bytes, master: bytes, salt: bytes, nonce: bytes, kind: str, secret: bytes, label: str,
    cost: tuple[int, int, int], created_ns: int,
) -> tuple[bytes, bytes, bytes]:  # fmt: skip
    """Its first 40 bytes, slot 0, and its last 64."""
    text = label.encode()
    number = 1 if kind == "passphrase" else 2
    slot = pack("<BBBBIIIQ8x32s64s", number, 1, 1, len(text), *cost, created_ns, salt, text)
    key = Argon2id(salt=salt, length=32, iterations=cost[1], lanes=cost[2], memory_cost=cost[0]).derive(secret)
    slot += nonce + AESGCM(key).encrypt(nonce, master, uuid + pack("<I", 0) + slot)
    header = pack("<8sII16sQ", b"NBDVKEYS", 1, 16, uuid, 1)
    area = (header.ljust(256, b"\0") + slot).ljust(32704, b"\0")
    area += blake3(area, key=_hkdf(master, uuid, b"nbdvde key area")).digest()
    return header, slot.ljust(256, b"\0"), area[32704:] + blake3(area).digest()


def structures() -> dict[str, bytes]:
    """One of each structure."""
    reference = pack("<IIII", 4, 5, 6000, 700)
    segment = pack("<IIQQ32s8x", 3, 65536, 9, 131072, bytes(range(100, 132)))
    log_point = segment + pack("<IIQ32s", 8192, 7, 41, bytes(range(32)))
    return {
        "unit reference": reference,
        "segment": segment,
        "table entry": segment + reference + pack("<IIIBHB", 40960, 12, 99, 1, 0x4142, 0x43),
        "log point": log_point,
        "superblock": _superblock(segment, log_point),
        "group header": pack("<IIIIQQ", 7, 2, 500, 8192, 41, 40),
        "record": _record(),
        "operation": _operation(),
        "link": (pack("<IIQQ32s", 8192, 7, 41, 40, bytes(range(32))) + segment).ljust(4080, b"\0"),
        "root": _root(reference),
        "sealed unit": _sealed(KEY, kind=3, blocks=2, encrypted=True),
        "tagged unit": _sealed(blake3(b"nbdvde unencrypted" + UUID).digest(), kind=2, blocks=0, encrypted=False),
        "map entry": pack("<Q", 3 << 40 | 5 << 16 | 255),
        "index entry": pack("<Q", 256 << 48 | 4116 << 24 | 40960),
        "dictionaries": b"".join(_dictionaries()),
        "subject head": _subject_head(),
        "subject page": _subject_page(),
    }


def _superblock(root: bytes, log_point: bytes) -> bytes:
    """Section "Superblock"; its MAC key is 32 zero bytes."""
    disks = b"".join(pack("<QB", size, len(name)) + name for name, size in ((b"disk", 1 << 30), (b"a.b-c_9", 512)))
    block = pack("<8sHH4xQQQ16sQQ", b"NBDVDE\r\n", 1, 296, 0, 0, 0, UUID, 6, 2)
    block += pack("<HhIIB3xQQ", 1, 3, 65536, 65536, 0, CREATED_NS, 0)
    block += root + pack("<I4x", 300) + log_point + pack("<HH4x", 2, len(disks)) + disks
    block = block.ljust(4032, b"\0")
    block += blake3(block).digest()
    return block + blake3(block, key=bytes(32)).digest()


def _record() -> bytes:
    """Section "Log": two extents, two zero items, two runs, two references."""
    head = pack("<QQIIIIII32s", 41, 2, 1, 1, 2, 2, 2, 2, bytes(range(32)))
    items = pack("<IIII", 4116, 4, 99, 1) + pack("<QQQQ", 7, 1 << 40 | 1 << 63, 3, 2) + pack("<QQQQ", 0, 4, 900, 1)
    return head + items + pack("<QQIIQQII", 7, 3 << 40 | 5 << 16, 16, 0, 99, 3 << 40 | 6 << 16 | 2, 1, 0)


def _operation() -> bytes:
    """Section "Log": a record with an operation, which makes volume 9 from volume 2."""
    head = pack("<QQIIIIII32s", 41, 2, 1, 3, 0, 0, 0, 0, bytes(range(32)))
    return head + pack("<B3xIIIQQB64s3x4s", 3, 5, 9, 2, 1 << 30, CREATED_NS, 4, b"copy", b"ABCD")


def _root(reference: bytes) -> bytes:
    """Section "Root segment": a disk, a volume with everything that one can have, two tables."""
    head = pack("<IIIIQQ8Q64x", 2, 2, 160, 300, 12, 8, *[1] * 8)
    disk = pack("<IIQQ16sB65s54x", 1, 2, 1 << 30, 77, reference, 4, b"disk")
    empty = pack("<IIQQ16sB65s6xIIQQ4sII12x", 2, 0, 512, 0, bytes(16), 2, b"d2", 1, 7, 99, 12, b"DICT", 3, 1)
    return head + disk + empty + pack("<II", 100, 20)


def _dictionaries() -> Iterator[bytes]:
    """Section "Dictionaries": sixty in generation 7, so that one is in the second block."""
    entries = [
        pack(
            "<HHQIIQQ32s",
            1 << 8 | slot,
            0,
            32 + 2 * slot,
            2,
            8000 + slot,
            CREATED_NS,
            100,
            sha256(b"%d" % slot).digest(),
        )
        for slot in range(60)
    ]
    return region_blocks(b"DICT", [(pack("<I12x", 60) + b"".join(entries[:59]), 7), (entries[59], 7)])


def _subject_head() -> bytes:
    """Section "Subject keys": a head of generation 3, whose last erasure was on disk 7."""
    bound = pack("<8sII16sQQQ8x", b"NBDVSUBJ", 1, 16, UUID, 3, 131072, 196608)
    salt, plain = bytes(range(40, 72)), bytes(range(200, 232)) + pack("<I", 7) + bytes(range(108))
    sealed = AESGCM(_hkdf(KEY, salt, b"nbdvde subject vault" + UUID)).encrypt(bytes(12), plain, bound)
    body = (bound + salt + sealed).ljust(4064, b"\0")
    return body + blake3(body).digest()


def _subject_page() -> bytes:
    """Section "Subject keys": page 5 with two keys, under the vault key of the head."""
    entries = [pack("<I4x16s32s", 7, bytes([number]) * 16, bytes([number + 9]) * 32) for number in (1, 2)]
    salt, plain = bytes(range(80, 112)), (pack("<QI4x", 4, 2) + b"".join(entries)).ljust(4048, b"\0")
    key = _hkdf(bytes(range(200, 232)), salt, b"nbdvde subject page" + UUID + pack("<I", 5))
    return salt + AESGCM(key).encrypt(bytes(12), plain, None)


def _sealed(master: bytes, *, kind: int, blocks: int, encrypted: bool) -> bytes:
    """Section "Sealed units": the plaintext `text` as unit 5 of the segment above."""
    identity = UUID + pack("<IQ", 3, 9)
    key = _hkdf(master, bytes(range(100, 132)), b"nbdvde segment" + identity)
    nonce, text = pack("<IQ", 0, 5), b"text"
    aad = identity + pack("<QBBHI", 5, 0, kind, blocks, len(text) + 16)
    if encrypted:
        return AESGCM(key).encrypt(nonce, text, aad)
    return text + blake3(nonce + aad + text, key=key).digest()[:16]


def vectors() -> dict[str, Any]:
    """What belongs into each file. Structures are kept without the zeroes at their end."""
    kept = {name: {"length": len(raw), "bytes": raw.rstrip(b"\0").hex()} for name, raw in structures().items()}
    held = {name: [_cut(block) for block in blocks] for name, blocks in regions().items()}
    return {
        "keys.json": [key_vector(number) for number in range(16)], "structures.json": kept, "regions.json": held,
    }  # fmt: skip


def _cut(block: bytes) -> dict[str, str]:
    """A block of a region without the zeroes before its trailer."""
    return {"body": block[:4080].rstrip(b"\0").hex(), "trailer": block[4080:].hex()}


def files() -> dict[str, str]:
    """The text of each file by its name."""
    return {name: json.dumps(content, indent=1, ensure_ascii=False) + "\n" for name, content in vectors().items()}


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    for name, text in files().items():
        (folder / name).write_text(text)
