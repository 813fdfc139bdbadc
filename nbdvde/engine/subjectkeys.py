"""Keys of data subjects: what lies in place, twice, outside of everything that is logged, and can really be destroyed.

    master key --HKDF (salt of the head)--> seals the head: vault key
    vault key  --HKDF (salt of the page)--> seals a page: keys of 72 subjects

Head, 4096 bytes, integers little-endian:

    offset  length  content
         0       8  magic "NBDVSUBJ"
         8       4  version, 1
        12       4  blocks of each range of pages
        16      16  uuid of the image
        32       8  generation: one more whenever there is a new vault key
        40      16  where the ranges of copy A and B begin, 8 bytes each
        56       8  zero
        64      32  salt, random
        96     160  vault key 32 | erasure 112, sealed, with its tag
       256    3808  zero
      4064      32  BLAKE3 of bytes 0 to 4063

The erasure is the last one: number of the disk u32 (0 for none), and the record 108 that its region has to hold. A page
is a salt 32 and, sealed with its tag, generation u64 | count u32 | zero 4 | 72 entries, each disk u32 | zero 4 |
subject 16 | key 32. Every salt is used once, so that each key seals one plaintext and its nonce is zero. A page of
zeroes is unused.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from nbdvde.engine.layout import BLOCK, DATA_START, TAG_BYTES
from nbdvde.engine.sealing import derive
from nbdvde.errors import DamageError, ImageError

MAGIC = b"NBDVSUBJ"
VERSION = 1
HEADS = (36864, 102400)
"""Offsets of both heads."""
KEY_BYTES = SALT_BYTES = 32
ERASURE_BYTES = 108
PAGE_ENTRIES = 72
BLOCKS_MAX = 1 << 18
"""Pages of a range: 18 million subjects."""
_HEAD = struct.Struct("<8sII16sQQQ8x32s160s")
_BOUND_BYTES = 64
"""Bytes of a head that are bound to what it seals."""
_SEALED = struct.Struct("<32sI108s")
_CHECKSUM_AT = BLOCK - 32
_PAGE = struct.Struct("<QI4x")
_ENTRY = struct.Struct("<I4x16s32s")
_ONCE = bytes(12)
"""The nonce of keys that seal one plaintext."""
_UNUSED = bytes(BLOCK)


class Entry(NamedTuple):
    """The key of a subject of a disk."""

    disk: int
    subject: bytes
    key: bytes


class Erasure(NamedTuple):
    """What was destroyed last."""

    disk: int
    """Number of the disk whose region has to hold the record, 0 when nothing was destroyed yet."""
    record: bytes


NO_ERASURE = Erasure(0, bytes(ERASURE_BYTES))


@dataclass(frozen=True, slots=True)
class Head:
    """Where the pages lie, and the key that opens them."""

    uuid: bytes
    generation: int
    offsets: tuple[int, int]
    """Of the ranges of copy A and B."""
    blocks: int
    vault_key: bytes = field(repr=False)
    erasure: Erasure = NO_ERASURE

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """(offset, length) in the file."""
        return [(offset, self.blocks * BLOCK) for offset in self.offsets]

    def pack(self, master: bytes, salt: bytes) -> bytes:
        """The block. The salt is random, and was never used before."""
        bound = _HEAD.pack(
            MAGIC, VERSION, self.blocks, self.uuid, self.generation, *self.offsets, salt, bytes(160)
        )[:_BOUND_BYTES]  # fmt: skip
        plain = _SEALED.pack(self.vault_key, *self.erasure)
        sealed = AESGCM(_head_key(master, self.uuid, salt)).encrypt(_ONCE, plain, bound)
        body = (bound + salt + sealed).ljust(_CHECKSUM_AT, b"\0")
        return body + blake3(body).digest()

    @classmethod
    def unpack(cls, data: bytes, master: bytes, uuid: bytes) -> Self:
        """One copy. Raises DamageError, ImageError when it is of a newer format."""
        if len(data) != BLOCK or data[:8] != MAGIC or blake3(data[:_CHECKSUM_AT]).digest() != data[_CHECKSUM_AT:]:
            raise _damage("its checksum is wrong")
        _, version, blocks, owner, generation, a, b, salt, sealed = _HEAD.unpack_from(data)
        if version != VERSION:
            raise ImageError("subject keys", f"have format {version}", "use a newer nbdvde")
        try:
            plain = AESGCM(_head_key(master, uuid, salt)).decrypt(_ONCE, sealed, data[:_BOUND_BYTES])
        except InvalidTag:
            raise _damage("it was altered by someone without the key") from None
        if owner != uuid or not _sound_ranges((a, b), blocks):
            raise _damage("it makes no sense")
        vault_key, disk, record = _SEALED.unpack(plain)
        return cls(uuid, generation, (a, b), blocks, vault_key, Erasure(disk, record))

    def seal(self, number: int, page: "Page", salt: bytes) -> bytes:
        """The block of a page; the salt as in `pack`."""
        return salt + AESGCM(self._page_key(number, salt)).encrypt(_ONCE, page.pack(), None)

    def open(self, number: int, block: bytes) -> "Page | None":
        """A page, or None when it does not open. Raises DamageError when it has too much in it."""
        salt, sealed = block[:SALT_BYTES], block[SALT_BYTES:]
        try:
            return Page.unpack(AESGCM(self._page_key(number, salt)).decrypt(_ONCE, sealed, None))
        except InvalidTag:
            return None

    def _page_key(self, number: int, salt: bytes) -> bytes:
        return derive(self.vault_key, salt, b"nbdvde subject page" + self.uuid + number.to_bytes(4, "little"))


def _head_key(master: bytes, uuid: bytes, salt: bytes) -> bytes:
    return derive(master, salt, b"nbdvde subject vault" + uuid)


def _sound_ranges(offsets: tuple[int, int], blocks: int) -> bool:
    apart = abs(offsets[0] - offsets[1]) >= blocks * BLOCK
    return 0 < blocks <= BLOCKS_MAX and apart and all(at % BLOCK == 0 and DATA_START <= at < 1 << 62 for at in offsets)


@dataclass(frozen=True, slots=True)
class Page:
    """Some entries, one more generation each time that it is written."""

    generation: int
    entries: tuple[Entry, ...]

    def adding(self, entry: Entry) -> Self:
        """With one more."""
        return replace(self, generation=self.generation + 1, entries=(*self.entries, entry))

    def pack(self) -> bytes:
        assert len(self.entries) <= PAGE_ENTRIES, "it has room"
        entries = b"".join(_ENTRY.pack(*entry) for entry in self.entries)
        head = _PAGE.pack(self.generation, len(self.entries))
        return (head + entries).ljust(BLOCK - SALT_BYTES - TAG_BYTES, b"\0")

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Raises DamageError."""
        generation, count = _PAGE.unpack_from(data)
        if count > PAGE_ENTRIES:
            raise _damage("a page makes no sense")
        ends = range(_PAGE.size, _PAGE.size + count * _ENTRY.size, _ENTRY.size)
        return cls(generation, tuple(Entry._make(_ENTRY.unpack_from(data, at)) for at in ends))


def choose_head(copies: Sequence[bytes], master: bytes, uuid: bytes) -> Head:
    """The sound copy of the higher generation. Raises DamageError, ImageError."""
    found: list[Head] = []
    for copy in copies:
        try:
            found.append(Head.unpack(copy, master, uuid))
        except DamageError as error:
            damage = error
    if not found:
        raise DamageError("subject keys", f"both copies are damaged: {damage.why}", "restore the image from a backup")
    return max(found, key=lambda head: head.generation)


def choose_page(head: Head, number: int, copies: Sequence[bytes]) -> tuple[Page | None, bytes]:
    """The newer sound copy of a page, None when it is unused, and its block. Raises DamageError."""
    found = [(page, copy) for copy in copies if copy != _UNUSED and (page := head.open(number, copy))]
    if found:
        return max(found, key=lambda pair: pair[0].generation)
    if _UNUSED in copies:  # the other one was torn when it was written first
        return None, _UNUSED
    raise DamageError("subject keys", f"both copies of page {number} are damaged", "restore the image from a backup")


def pages_of(entries: Sequence[Entry]) -> list[Page]:
    """Entries in pages of the first generation."""
    starts = range(0, len(entries), PAGE_ENTRIES)
    return [Page(1, tuple(entries[start : start + PAGE_ENTRIES])) for start in starts]


def _damage(why: str) -> DamageError:
    return DamageError("subject keys", why, "run nbdvde check")
