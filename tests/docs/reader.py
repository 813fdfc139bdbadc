"""A second reader of images, written from docs/format.md alone, slow and simple: it shares no code with nbdvde."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from struct import iter_unpack, pack, unpack, unpack_from

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from xxhash import xxh64_intdigest
from zstandard import ZstdCompressionDict, ZstdDecompressor, decompress

BLOCK, TAG = 4096, 16
HEADER, RECORD, EXTENT, LEAF, NODE, INDEX, ROOT, TABLE, LINK = range(1, 10)
Ref = tuple[int, int, int, int]
Group = tuple[int, bytes, list[int]]


class ReaderError(Exception):
    """The image cannot be opened, or is damaged."""


def _hkdf(key: bytes, salt: bytes, info: bytes) -> bytes:
    return HKDF(SHA256(), 32, salt, info).derive(key)


def _mac(master: bytes, uuid: bytes, info: bytes, data: bytes) -> bytes:
    return blake3(data, key=_hkdf(master, uuid, info)).digest()


@dataclass
class Segment:
    """A segment, and what the table says of it."""

    slot: int
    length: int
    sequence: int
    offset: int
    salt: bytes
    units: int = 0
    index: tuple[int, ...] | None = None
    index_ref: Ref = (0, 0, 0, 0)

    @classmethod
    def parse(cls, data: bytes) -> "Segment":
        return cls(*unpack("<IIQQ32s8x", data))


class Image:
    """An image in the bytes of its file."""

    def __init__(self, file: bytes, secret: bytes, kind: int = 0) -> None:
        """`kind` of the secret: 0 master key, 1 passphrase, 2 key file; of no account without encryption."""
        self.file = file
        superblock = self._superblock(secret, kind)
        (self.epoch,) = unpack_from("<Q", superblock, 64)
        self.segments: dict[int, Segment] = {}
        self.disks: dict[str, int] = {}
        self._dict = 0
        self._maps: dict[int, tuple[int, Ref]] = {}
        self._leaves: dict[tuple[int, int], list[int]] = {}
        self._load_root(Segment.parse(superblock[104:168]), *unpack_from("<I", superblock, 168))
        if superblock[84] == 0:
            self._replay(superblock[176:288])

    def _superblock(self, secret: bytes, kind: int) -> bytes:
        blocks = [self.file[at : at + BLOCK] for at in (0, 65536)]
        sound = [b for b in blocks if b[:8] == b"NBDVDE\r\n" and blake3(b[:4032]).digest() == b[4032:4064]]
        for block in sorted(sound, key=lambda b: unpack_from("<Q", b, 56), reverse=True):
            version, features = unpack_from("<H6xQ", block, 8)
            if version != 1 or features > 3:
                raise ReaderError("a newer format")
            self.uuid, self.encryption = block[40:56], unpack_from("<H", block, 72)[0]
            self.master = self._master(secret, kind)
            if _mac(self.master, self.uuid, b"nbdvde superblock", block[:4064]) == block[4064:]:
                return block
        raise ReaderError("no superblock fits the key")

    def _master(self, secret: bytes, kind: int) -> bytes:
        if self.encryption == 0:
            return blake3(b"nbdvde unencrypted" + self.uuid).digest()
        if kind == 0:
            return secret
        copies = [self.file[at : at + 32768] for at in (4096, 69632)]
        sound = [copy for copy in copies if blake3(copy[:32736]).digest() == copy[32736:]]
        area = max(sound, key=lambda copy: unpack_from("<Q", copy, 32))
        for number in range(16):
            slot = area[256 + 256 * number : 512 + 256 * number]
            master = self._open_slot(area[16:32], number, slot, secret) if slot[0] == kind else None
            if master and _mac(master, area[16:32], b"nbdvde key area", area[:32704]) == area[32704:32736]:
                return master
        raise ReaderError("wrong key, or the key area was altered")

    @staticmethod
    def _open_slot(uuid: bytes, number: int, slot: bytes, secret: bytes) -> bytes | None:
        memory, iterations, lanes = unpack_from("<III", slot, 4)
        kdf = Argon2id(salt=slot[32:64], length=32, iterations=iterations, lanes=lanes, memory_cost=memory)
        try:
            return AESGCM(kdf.derive(secret)).decrypt(
                slot[128:140], slot[140:188], uuid + pack("<I", number) + slot[:128]
            )
        except InvalidTag:
            return None

    def _open(self, segment: Segment, kind: int, number: int, sealed: bytes, blocks: int = 0, domain: int = 0) -> bytes:
        identity = self.uuid + pack("<IQ", segment.slot, segment.sequence)
        key = _hkdf(self.master, segment.salt, b"nbdvde segment" + identity)
        nonce, aad = pack("<IQ", domain, number), identity + pack("<QBBHI", number, domain, kind, blocks, len(sealed))
        try:
            if self.encryption:
                return AESGCM(key).decrypt(nonce, sealed, aad)
            if blake3(nonce + aad + sealed[:-TAG], key=key).digest()[:TAG] == sealed[-TAG:]:
                return sealed[:-TAG]
        except InvalidTag:
            pass
        raise ReaderError(f"unit {number} of kind {kind} does not open")

    def _read(self, segment: Segment, position: int, length: int) -> bytes:
        return self.file[segment.offset + position : segment.offset + position + length]

    def _metadata(self, ref: Ref, kind: int) -> bytes:
        segment = self.segments[ref[0]]
        return decompress(self._open(segment, kind, ref[1], self._read(segment, *ref[2:])))

    def _load_root(self, segment: Segment, length: int) -> None:
        root = decompress(self._open(segment, ROOT, 0, self._read(segment, 0, length)))
        volumes, tables = unpack_from("<II", root)
        length_of_entry = unpack_from("<I", root, 8)[0] or 112
        for at in range(160, 160 + length_of_entry * volumes, length_of_entry):
            volume, height = unpack_from("<II", root, at)
            if not unpack_from("<I", root[at : at + length_of_entry].ljust(160, b"\0"), 136)[0]:
                self.disks[root[at + 41 : at + 41 + root[at + 40]].decode("ascii")] = volume
            elif root[at + 136 : at + 140] == b"DICT":
                self._dict = volume
            self._maps[volume] = height, unpack_from("<IIII", root, at + 24)
        position = length
        for number, sealed in enumerate(unpack_from(f"<{tables}I", root, 160 + length_of_entry * volumes), 1):
            table = decompress(self._open(segment, TABLE, number, self._read(segment, position, sealed)))
            position += sealed
            for at in range(0, len(table), 96):
                entry = Segment.parse(table[at : at + 64])
                entry.index_ref = unpack_from("<IIII", table, at + 64)
                entry.units = unpack_from("<I", table, at + 84)[0]
                self.segments[entry.slot] = entry

    def _leaf(self, volume: int, number: int) -> list[int]:
        key = (volume, number)
        if key not in self._leaves:
            height, ref = self._maps[volume]
            for level in range(height, 0, -1):
                child = number >> 8 * (level - 1) & 255
                ref = unpack_from("<IIII", self._metadata(ref, NODE), 16 * child) if ref[3] else ref
            self._leaves[key] = list(unpack("<512Q", self._metadata(ref, LEAF))) if ref[3] else [0] * 512
        return self._leaves[key]

    def _index(self, segment: Segment) -> tuple[int, ...]:
        if segment.index is None:
            raw = self._metadata(segment.index_ref, INDEX) if segment.index_ref[3] else bytes(8 * segment.units)
            segment.index = unpack(f"<{segment.units}Q", raw)
        return segment.index

    def block(self, disk: str, number: int) -> bytes:
        """One block of a disk."""
        return self._block(self.disks[disk], number)

    def _block(self, volume: int, number: int) -> bytes:
        entry = self._leaf(volume, number >> 9)[number & 511]
        if entry < 2:
            return bytes(BLOCK)
        segment, unit, block = self.segments[entry >> 40], entry >> 16 & 0xFFFFFF, entry & 0xFFFF
        place = self._index(segment)[unit]
        sealed = self._read(segment, place & 0xFFFFFF, place >> 24 & 0xFFFFFF)
        plain = self._open(segment, EXTENT, unit, sealed, blocks=place >> 48)
        named = int.from_bytes(plain[2:4], "little")
        return _block_of(plain, place >> 48, block, self._dictionary(named) if named else b"")

    def _dictionary(self, number: int) -> bytes:
        """The content of a dictionary (section "Dictionaries")."""
        at, left = 16, unpack_from("<I", self._block(self._dict, 0))[0]
        for block in range(32):
            page = self._block(self._dict, block)
            if page[4080:4084] != b"DICT" or unpack_from("<Q", page, 4088)[0] != xxh64_intdigest(page[:4088]):
                break
            while left and at + 68 <= 4080:
                named, _, first, blocks, size = unpack_from("<HHQII", page, at)
                content = b"".join(self._block(self._dict, first + n) for n in range(blocks))[:size]
                if named == number and sha256(content).digest() == page[at + 36 : at + 68]:
                    return content
                at, left = at + 68, left - 1
            at = 0
        raise ReaderError(f"there is no dictionary {number}")

    def _replay(self, point: bytes) -> None:
        position, unit, sequence, chain = unpack_from("<IIQ32s", point, 64)
        segment = self.segments[unpack_from("<I", point)[0]]
        waiting: list[tuple[bytes, list[int]]] = []
        while True:
            try:
                length, record, entries = self._group(segment, position, unit, sequence, chain)
            except ReaderError:
                link = self._link(segment)
                if link is None or unpack_from("<IIQ8x32s", link) != (position, unit, sequence, chain):
                    break
                segment, position, unit = Segment.parse(link[56:120]), 0, 0
                self.segments[segment.slot] = segment
                continue
            waiting.append((record, entries))
            while record[20] & 1 and waiting:
                self._apply(*waiting.pop(0))
            sealed = self._read(segment, position + 48, len(record) + TAG)
            position, unit, sequence, chain = position + length, segment.units, sequence + 1, blake3(sealed).digest()
        if any(synced > sequence for synced in self._witnesses(segment, position)):
            raise ReaderError(f"record {sequence} is damaged")

    def _group(self, segment: Segment, position: int, unit: int, sequence: int, chain: bytes) -> Group:
        """Length, record and map entries of the next group."""
        header = self._open(segment, HEADER, position // BLOCK, self._read(segment, position, 48), domain=1)
        first, _, sealed, length, number = unpack_from("<IIIIQ", header)
        if (first, number) != (unit, sequence) or length % BLOCK or position + length > segment.length - 8192:
            raise ReaderError("not the next group")
        record = self._open(segment, RECORD, unit, self._read(segment, position + 48, sealed))
        if unpack_from("<QQ", record) != (sequence, self.epoch) or record[40:72] != chain:
            raise ReaderError("a record of another history")
        at, index, entries = position + 48 + sealed, [0], []
        for size, blocks in iter_unpack("<II", record[72:][: 8 * unpack_from("<I", record, 24)[0]]):
            number = unit + len(index)
            self._open(segment, EXTENT, number, self._read(segment, at, size), blocks=blocks)
            entries += [segment.slot << 40 | number << 16 | block for block in range(blocks)]
            index.append(at | size << 24 | blocks << 48)
            at += size
        segment.index = (*self._index(segment), *index)
        segment.units += len(index)
        return length, record, entries

    def _apply(self, record: bytes, entries: list[int]) -> None:
        volume, extents, zeroes, runs, references = unpack_from("<I4xIIII", record, 16)
        at = 72 + 8 * extents
        for start, count in iter_unpack("<QQ", record[at : at + 16 * zeroes]):
            for block in range(start, start + (count & ~(1 << 63))):
                self._leaf(volume, block >> 9)[block & 511] = count >> 63
        rest = iter(entries)
        for start, count in iter_unpack("<QQ", record[at + 16 * zeroes :][: 16 * runs]):
            for block in range(start, start + count):
                self._leaf(volume, block >> 9)[block & 511] = next(rest)
        at += 16 * zeroes + 16 * runs
        for start, entry, count in iter_unpack("<QQI4x", record[at : at + 24 * references]):
            for number in range(count):
                self._leaf(volume, (start + number) >> 9)[(start + number) & 511] = entry + number

    def _link(self, segment: Segment) -> bytes | None:
        for at in (segment.length - 8192, segment.length - BLOCK):
            try:
                return self._open(segment, LINK, 0, self._read(segment, at, BLOCK), domain=2)
            except ReaderError:
                continue
        return None

    def _witnesses(self, segment: Segment, position: int) -> Iterator[int]:
        for at in range(position, segment.length - 8192, BLOCK):
            try:
                header = self._open(segment, HEADER, at // BLOCK, self._read(segment, at, 48), domain=1)
            except ReaderError:
                continue
            yield from unpack_from("<Q", header, 24)
        if link := self._link(segment):
            yield from unpack_from("<Q", link, 16)
            yield from self._witnesses(Segment.parse(link[56:120]), 0)


def _block_of(plain: bytes, blocks: int, block: int, dictionary: bytes) -> bytes:
    """A block of an extent's plaintext (section "Extent")."""
    if plain[0] == 0:
        return plain[4 + BLOCK * block :][:BLOCK]
    frames, number = (blocks + 3) // 4, block // 4
    ends, base = (0, *unpack_from(f"<{frames}I", plain, 4)), 4 + 4 * frames
    frame = plain[base + ends[number] : base + ends[number + 1]]
    if len(frame) != BLOCK * min(4, blocks - 4 * number):
        frame = ZstdDecompressor(dict_data=ZstdCompressionDict(dictionary)).decompress(frame)
    return frame[BLOCK * (block % 4) :][:BLOCK]
