"""Sealing and opening of units: one AEAD operation each, under a key of their segment.

    key   = HKDF-SHA256(master key, salt = the segment's, info = "nbdvde segment" | uuid | slot | sequence)
    nonce = domain u32 | number u64
    AAD   = uuid 16 | slot u32 | sequence u64 | number u64 | domain u8 | kind u8 | blocks u16 | sealed bytes u32

Units are numbered by a counter that only grows, within a segment whose salt is fresh and which is never
written twice, so no (key, nonce) pair repeats. Group headers and links are numbered by their block in the
segment, in domains of their own. Without encryption the same structure carries keyed BLAKE3 tags under a
key that the uuid gives away: corruption is found, tampering is not.
"""

import hmac
import struct
from typing import Protocol

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from nbdvde.disk import Buffer
from nbdvde.engine.layout import ENCRYPTION_NONE, TAG_BYTES, Domain, Segment
from nbdvde.errors import DamageError

_NONCE = struct.Struct("<IQ")
_IDENTITY = struct.Struct("<16sIQ")
_AAD = struct.Struct("<QBBHI")
_pack_nonce, _pack_aad = _NONCE.pack, _AAD.pack


class Aead(Protocol):
    """What a sealer needs of a cipher; AESGCM of the cryptography package has this form."""

    def encrypt(self, nonce: bytes, data: Buffer, aad: bytes, /) -> bytes: ...
    def decrypt(self, nonce: bytes, data: Buffer, aad: bytes, /) -> bytes: ...


class TagOnly:
    """Keyed BLAKE3 over nonce, associated data and data: the stand-in for a cipher in unencrypted images."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def _tag(self, nonce: bytes, data: Buffer, aad: bytes) -> bytes:
        return blake3(nonce + aad, key=self._key).update(data).digest(TAG_BYTES)

    def encrypt(self, nonce: bytes, data: Buffer, aad: bytes, /) -> bytes:
        return bytes(data) + self._tag(nonce, data, aad)

    def decrypt(self, nonce: bytes, data: Buffer, aad: bytes, /) -> bytes:
        plain = bytes(data[:-TAG_BYTES])
        if not hmac.compare_digest(self._tag(nonce, plain, aad), bytes(data[-TAG_BYTES:])):
            raise InvalidTag
        return plain


def derive(master: bytes, salt: bytes, info: bytes) -> bytes:
    """32 bytes by HKDF-SHA256 (RFC 5869)."""
    return HKDF(hashes.SHA256(), 32, salt, info).derive(master)


def public_master(uuid: bytes) -> bytes:
    """The stand-in for a master key in an unencrypted image."""
    return blake3(b"nbdvde unencrypted" + uuid).digest()


class Sealer:
    """Seals and opens the units of one segment. Its key is derived when it is first used: 20 µs and 3 KiB."""

    __slots__ = ("_cipher", "_identity", "_keyring", "_salt")

    def __init__(self, keyring: "Keyring", salt: bytes, identity: bytes) -> None:
        self._keyring, self._salt, self._identity = keyring, salt, identity
        self._cipher: Aead = _Later(self)

    def derive(self) -> Aead:
        """The cipher, from now on at hand. Two threads that do this at once arrive at the same."""
        self._cipher = cipher = self._keyring.cipher(self._salt, self._identity)
        return cipher

    def forget(self) -> None:
        """Give the memory back, until the next use."""
        self._cipher = _Later(self)

    def seal(self, number: int, kind: int, data: Buffer, *, blocks: int = 0, domain: int = Domain.UNIT) -> bytes:
        """`data` sealed, 16 bytes longer. A number must never be used twice with different data."""
        aad = self._identity + _pack_aad(number, domain, kind, blocks, len(data) + TAG_BYTES)
        return self._cipher.encrypt(_pack_nonce(domain, number), data, aad)

    def open(self, number: int, kind: int, sealed: Buffer, *, blocks: int = 0, domain: int = Domain.UNIT) -> bytes:
        """What was sealed; DamageError when one bit of it, or of what it is bound to, differs."""
        aad = self._identity + _pack_aad(number, domain, kind, blocks, len(sealed))
        try:
            return self._cipher.decrypt(_pack_nonce(domain, number), sealed, aad)
        except InvalidTag:
            raise DamageError("stored data", "fails its authentication", "run nbdvde check") from None


class _Later:
    """Stands in for a cipher until its first use: so that no use has to ask whether there is one."""

    __slots__ = ("_sealer",)

    def __init__(self, sealer: Sealer) -> None:
        self._sealer = sealer

    def encrypt(self, nonce: bytes, data: Buffer, aad: bytes, /) -> bytes:
        return self._sealer.derive().encrypt(nonce, data, aad)

    def decrypt(self, nonce: bytes, data: Buffer, aad: bytes, /) -> bytes:
        return self._sealer.derive().decrypt(nonce, data, aad)


class Keyring:
    """Derives the keys of one image from its master key."""

    def __init__(self, master: bytes, uuid: bytes, encryption: int) -> None:
        self.master, self._uuid = master, uuid
        self._cipher: type[AESGCM | TagOnly] = TagOnly if encryption == ENCRYPTION_NONE else AESGCM

    def superblock_key(self) -> bytes:
        return derive(self.master, self._uuid, b"nbdvde superblock")

    def dedup_key(self, domain: int) -> bytes:
        """The key under which the blocks of a dedup domain are hashed."""
        return derive(self.master, self._uuid, b"nbdvde dedup" + domain.to_bytes(4, "little"))

    def sealer(self, segment: Segment) -> Sealer:
        """The sealer of a segment; keep it."""
        return Sealer(self, segment.salt, _IDENTITY.pack(self._uuid, segment.slot, segment.sequence))

    def cipher(self, salt: bytes, identity: bytes) -> Aead:
        """The cipher of the segment with this salt and identity."""
        return self._cipher(derive(self.master, salt, b"nbdvde segment" + identity))
