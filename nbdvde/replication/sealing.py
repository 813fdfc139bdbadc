"""Entries as they lie in logs and travel between nodes: compressed, encrypted, authenticated.

    sealed = salt, 16 bytes | number u64 | flags u8, 1 for compressed | AES-256-GCM of the entry, with its tag

Each start of a node draws a salt, and another one after so many bytes; the key follows from it and from the key of the
cluster (HKDF-SHA256, info `nbdvde replication`), the nonce is the number, which counts up from 0 under each salt. So no
nonce comes twice, whoever seals. What stands before the ciphertext and the name of the group are authenticated too.
"""

import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence

import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from nbdvde.disk import Buffer
from nbdvde.errors import DamageError

KEY_BYTES, SALT_BYTES = 32, 16
_HEAD = struct.Struct(f"<{SALT_BYTES}sQB")
_COMPRESSED = 1
_SALT_LASTS = 64 << 20
"""Bytes that are sealed under a salt."""
_LEVEL = 1
_WORTH = 16
"""It is kept compressed when that saves a part of so many."""
_KEYS = 256
"""Derived keys at hand."""
ENTRY_MAX = 40 << 20
"""Bytes of an entry: the longest request of a client fits."""


class Sealer:
    """Seals entries of the groups of a cluster, and opens them."""

    def __init__(self, key: bytes, random: Callable[[int], bytes]) -> None:
        self._key, self._random = key, random
        self._keys: OrderedDict[bytes, AESGCM] = OrderedDict()
        self._number = self._bytes = 0
        self._salt = random(SALT_BYTES)

    def seal(self, group: str, pieces: Sequence[Buffer]) -> bytes:
        """An entry that consists of these pieces."""
        whole = b"".join(pieces)
        flags, body = 0, whole
        shorter = zstandard.ZstdCompressor(level=_LEVEL).compress(whole)
        if len(shorter) <= len(whole) - len(whole) // _WORTH:
            flags, body = _COMPRESSED, shorter
        salt, number = self._next(len(body))
        head = _HEAD.pack(salt, number, flags)
        return head + self._cipher(salt).encrypt(number.to_bytes(12, "little"), body, head + group.encode())

    def open(self, group: str, sealed: bytes) -> memoryview:
        """The entry. Raises DamageError."""
        try:
            head = sealed[: _HEAD.size]
            salt, number, flags = _HEAD.unpack(head)
            nonce = number.to_bytes(12, "little")
            entry = self._cipher(salt).decrypt(nonce, sealed[_HEAD.size :], head + group.encode())
            if flags & _COMPRESSED:
                entry = zstandard.ZstdDecompressor().decompress(entry, max_output_size=ENTRY_MAX)
        except (struct.error, InvalidTag, zstandard.ZstdError):
            hint = "run nbdvde cluster verify"
            raise DamageError("entry of the replication log", "fails its authentication", hint) from None
        return memoryview(entry)

    def _next(self, length: int) -> tuple[bytes, int]:
        if self._bytes >= _SALT_LASTS:
            self._salt, self._number, self._bytes = self._random(SALT_BYTES), 0, 0
        number = self._number
        self._number += 1
        self._bytes += length
        return self._salt, number

    def _cipher(self, salt: bytes) -> AESGCM:
        cipher = self._keys.get(salt)
        if cipher is None:
            key = HKDF(SHA256(), KEY_BYTES, salt, b"nbdvde replication").derive(self._key)
            self._keys[salt] = cipher = AESGCM(key)
            if len(self._keys) > _KEYS:
                self._keys.popitem(last=False)
        return cipher
