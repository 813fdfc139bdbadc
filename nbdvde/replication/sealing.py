"""Entries as they lie in logs and travel between nodes: compressed, encrypted, authenticated.

    sealed = salt, 16 bytes | number u64 | flags u8, 1 for compressed | AES-256-GCM of the entry, with its tag

Each start of a node draws a salt, and another one after so many bytes; the key follows from it and from the key of the
cluster (HKDF-SHA256, info `nbdvde replication`), the nonce is the number, which counts up from 0 under each salt. So no
nonce comes twice, whoever seals. What stands before the ciphertext and the name of the group are authenticated too.
"""

import struct
from collections import OrderedDict
from collections.abc import Callable

import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from nbdvde.errors import DamageError
from nbdvde.replication.operations import Operation, pack, unpack

KEY_BYTES, SALT_BYTES = 32, 16
_HEAD = struct.Struct(f"<{SALT_BYTES}sQB")
_COMPRESSED = 1
_SALT_LASTS = 64 << 20
"""Bytes that are sealed under a salt."""
_LEVEL = 1
_WORTH = 16
"""It is kept compressed when that saves a part of so many."""
_SAMPLED, _SAMPLE_BYTES = 128 << 10, 4 << 10
"""From so many bytes on a few samples tell first whether compressing pays."""
_SAMPLES = 4
_KEYS = 256
"""Derived keys at hand."""
_OWN_BYTES = 16 << 20
"""Of entries sealed here that are expected back, to be applied."""
ENTRY_MAX = 40 << 20
"""Bytes of an entry: the longest request of a client fits."""


class Sealer:
    """Seals entries of the groups of a cluster, and opens them."""

    def __init__(self, key: bytes, random: Callable[[int], bytes]) -> None:
        self._key, self._random = key, random
        self._keys: OrderedDict[bytes, AESGCM] = OrderedDict()
        self._number = self._bytes = 0
        self._salt = random(SALT_BYTES)
        self._compress = zstandard.ZstdCompressor(level=_LEVEL).compress
        self._decompress = zstandard.ZstdDecompressor().decompress
        self._own: OrderedDict[tuple[str, bytes], tuple[bytes, Operation]] = OrderedDict()
        """By group, salt and number."""
        self._own_bytes = 0

    def seal(self, group: str, operation: Operation) -> bytes:
        """An entry that says this."""
        whole = b"".join(pack(operation))
        flags, body = 0, whole
        if self._is_promising(whole):
            shorter = self._compress(whole)
            if _pays(shorter, whole):
                flags, body = _COMPRESSED, shorter
        salt, number = self._next(len(body))
        head = _HEAD.pack(salt, number, flags)
        sealed = b"".join((head, self._cipher(salt).encrypt(_nonce(number), body, head + group.encode())))
        self._expect((group, head), sealed, operation)
        return sealed

    def open(self, group: str, sealed: bytes) -> Operation:
        """What an entry says. Raises DamageError."""
        head = sealed[: _HEAD.size]
        if own := self._own.pop((group, head), None):
            self._own_bytes -= len(own[0])
            if own[0] is sealed:  # it has never left this process
                return own[1]
        try:
            salt, number, flags = _HEAD.unpack(head)
            body = memoryview(sealed)[_HEAD.size :]
            entry = self._cipher(salt).decrypt(_nonce(number), body, head + group.encode())
            if flags & _COMPRESSED:
                entry = self._decompress(entry, max_output_size=ENTRY_MAX)
        except (struct.error, InvalidTag, zstandard.ZstdError):
            hint = "run nbdvde cluster verify"
            raise DamageError("entry of the replication log", "fails its authentication", hint) from None
        return unpack(memoryview(entry))

    def _is_promising(self, whole: bytes) -> bool:
        """Whether it may be worth compressing: what does not compress costs as much time as what does."""
        if len(whole) < _SAMPLED:
            return True
        starts = range(0, len(whole) - _SAMPLE_BYTES, len(whole) // _SAMPLES)
        sample = b"".join(whole[start : start + _SAMPLE_BYTES] for start in starts)
        return _pays(self._compress(sample), sample)

    def _expect(self, head: tuple[str, bytes], sealed: bytes, operation: Operation) -> None:
        """Remember what was sealed here: it is applied here as well, most of the time."""
        self._own[head] = sealed, operation
        self._own_bytes += len(sealed)
        while self._own_bytes > _OWN_BYTES:
            _, (oldest, _) = self._own.popitem(last=False)
            self._own_bytes -= len(oldest)

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


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "little")


def _pays(shorter: bytes, whole: bytes) -> bool:
    return len(shorter) <= len(whole) - len(whole) // _WORTH
