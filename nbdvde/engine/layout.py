"""Every structure of an image file, byte for byte; docs/format.md has the same tables in words.

Integers are little-endian. Offsets called `position` count from the start of a segment, all others from
the start of the file. Parsers check what can be checked without context and raise `DamageError`.
"""

import re
import struct
from dataclasses import dataclass, field
from typing import Any, Self

from blake3 import blake3

from nbdvde.errors import DamageError, ImageError

BLOCK = 4096
MAGIC = b"NBDVDE\r\n"
VERSION = 1

SUPERBLOCKS = (0, 65536)
KEY_AREAS = (4096, 65536 + 4096)
KEY_AREA_BYTES = 32768
DATA_START = 131072
"""Superblocks, key areas and their reserve; segments start here."""

SEGMENT_BYTES = 16 << 20
MIN_SEGMENT_BYTES, SEGMENT_BYTES_MAX = 64 << 10, 1 << 24
LINK_BYTES = 2 * BLOCK
"""The last two blocks of a log segment: its link, twice."""
TAG_BYTES = 16
EXTENT_BLOCKS_MAX = 256
GROUP_BLOCKS_MAX = 256
"""Blocks in a group of the log: 1 MiB, so that little is lost at the end of a segment."""
FRAME_BLOCKS = 4
"""Blocks in a compression frame. 16 KiB: ratio 2.58 against 2.64 for one 64 KiB frame, and a random 4 KiB
read decompresses a quarter (docs/decisions/0004-extent-size.md)."""
MIN_CAPACITY = 64 << 20
_RESERVE_MAX = 1 << 30
MAX_DISK_BYTES = (1 << 63) - 512
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""Of a disk or a snapshot."""
COMPRESSION_MAX = 22
"""zstd levels go from 1 to here; 0 is none."""

ENCRYPTION_NONE, ENCRYPTION_AES_256_GCM = 0, 1
STATE_OPEN, STATE_CLEAN = 0, 1

# Feature bits. Unknown incompatible bits: refuse. Unknown compatible bits: keep. Unknown autoclear bits: clear when
# writing.
COMPACTED_SEGMENTS = 1 << 0
"""Incompatible: there may be segments of KIND_COMPACT."""
DICTIONARIES = 1 << 1
"""Incompatible: there may be volumes that are regions, and extents compressed with a dictionary."""
REGIONS = 1 << 2
"""Incompatible: there may be regions that belong to disks."""
SUBJECT_KEYS = 1 << 3
"""Incompatible: there are keys of data subjects, in ranges that no segment may take (engine/subjectkeys.py)."""
KNOWN_INCOMPATIBLE = COMPACTED_SEGMENTS | DICTIONARIES | REGIONS | SUBJECT_KEYS


def reserve_of(capacity: int) -> int:
    """Bytes of a capacity that checkpoints, trims and the cleaner may use, but writes may not."""
    return min(capacity // 16, _RESERVE_MAX)


class Kind:
    """What a sealed unit holds; part of its associated data."""

    HEADER, RECORD, EXTENT, LEAF, NODE, INDEX, ROOT, TABLE, LINK, PRINTS = range(1, 11)


class Domain:
    """First four bytes of a nonce: units are counted; headers and links are numbered by the block they lie in."""

    UNIT, HEADER, LINK = range(3)


def _fields(structure: struct.Struct, data: bytes, offset: int = 0) -> tuple[Any, ...]:
    try:
        return structure.unpack_from(data, offset)
    except struct.error:
        raise DamageError("stored structure", "is too short", "run nbdvde check") from None


def _text(raw: bytes) -> str:
    try:
        return raw.decode("ascii")
    except UnicodeDecodeError:
        raise DamageError("disk name", "is not ASCII", "run nbdvde check") from None


_REF = struct.Struct("<IIII")


@dataclass(frozen=True, slots=True)
class UnitRef:
    """Where a metadata unit lies: segment slot, unit number, position and sealed length in bytes."""

    slot: int
    unit: int
    position: int
    length: int

    SIZE = _REF.size

    def pack(self) -> bytes:
        return _REF.pack(self.slot, self.unit, self.position, self.length)

    @classmethod
    def unpack(cls, data: bytes | bytearray, offset: int = 0) -> Self | None:
        """The reference, or None for sixteen zero bytes."""
        values = _REF.unpack_from(data, offset)
        return cls(*values) if values[3] else None


NO_REF = bytes(UnitRef.SIZE)

_SEGMENT = struct.Struct("<IIQQ32s8x")


@dataclass(frozen=True, slots=True)
class Segment:
    """Identity and place of a segment. `sequence` is never reused; it and `salt` make its key."""

    slot: int
    length: int
    sequence: int
    offset: int
    salt: bytes

    SIZE = _SEGMENT.size

    def pack(self) -> bytes:
        return _SEGMENT.pack(self.slot, self.length, self.sequence, self.offset, self.salt)

    @classmethod
    def unpack(cls, data: bytes, offset: int = 0) -> Self:
        segment = cls(*_fields(_SEGMENT, data, offset))
        if segment.offset % BLOCK or segment.length % BLOCK or segment.offset + segment.length > 1 << 63:
            raise DamageError("segment", "lies at an impossible place", "run nbdvde check")
        return segment

    @property
    def end(self) -> int:
        return self.offset + self.length


_TABLE_ENTRY = struct.Struct(f"<{_SEGMENT.size - 8}sII{UnitRef.SIZE}sIIIB3s")
"""The zeroes at the end of a segment have something else in them."""
KIND_LOG, KIND_META, KIND_COMPACT = 1, 2, 3
"""A compact segment holds the extents of a log segment that were still in use when it took its slot."""


@dataclass(frozen=True, slots=True)
class TableEntry:
    """A segment as the segment table keeps it."""

    segment: Segment
    index: UnitRef | None
    used: int
    """Bytes written."""
    units: int
    """Units numbered."""
    live: int
    """References of the maps to its blocks (log) or units (metadata) at most: at 0 the segment is freed."""
    kind: int
    prints: int = 0
    """Sealed bytes of the fingerprints, the unit directly behind the index; 0 for none."""
    blocks: int = 0
    """Blocks in its extents, those nobody uses any more included; 0 in images of older versions."""
    born: int = 0
    """Of a compact segment: sequence of the log segment that first had its slot; 0 for not known, and of others."""

    SIZE = _TABLE_ENTRY.size

    def pack(self) -> bytes:
        index = self.index.pack() if self.index else NO_REF
        return _TABLE_ENTRY.pack(
            self.segment.pack(), self.blocks, self.born if self.born < 1 << 32 else 0, index, self.used, self.units,
            min(self.live, _LIVE_MAX), self.kind, self.prints.to_bytes(3, "little"),
        )  # fmt: skip

    @classmethod
    def unpack(cls, data: bytes, offset: int = 0) -> Self:
        blocks, born, index, used, units, live, kind, prints = _fields(_TABLE_ENTRY, data, offset)[1:]
        segment, behind = Segment.unpack(data, offset), int.from_bytes(prints, "little")
        live = UNCOUNTED if live == _LIVE_MAX else live
        return cls(segment, UnitRef.unpack(index), used, units, live, kind, behind, blocks, born)

    @property
    def refs(self) -> tuple[UnitRef, ...]:
        """The metadata units that only this segment needs: its index, and its fingerprints behind that."""
        return unit_refs(self.index, self.prints)


def unit_refs(index: UnitRef | None, prints: int) -> tuple[UnitRef, ...]:
    """Index and fingerprints of a log segment, as far as there are any."""
    if index is None:
        return ()
    behind = UnitRef(index.slot, index.unit + 1, index.position + index.length, prints)
    return (index, behind) if prints else (index,)


_LOG_POINT = struct.Struct(f"<{Segment.SIZE}sIIQ32s")


@dataclass(frozen=True, slots=True)
class LogPoint:
    """A place in the log: the next group's position, unit and sequence, and the hash of the record before."""

    segment: Segment
    position: int
    unit: int
    sequence: int
    chain: bytes

    SIZE = _LOG_POINT.size

    def pack(self) -> bytes:
        return _LOG_POINT.pack(self.segment.pack(), self.position, self.unit, self.sequence, self.chain)

    @classmethod
    def unpack(cls, data: bytes, offset: int = 0) -> Self:
        segment, position, unit, sequence, chain = _fields(_LOG_POINT, data, offset)
        return cls(Segment.unpack(segment), position, unit, sequence, chain)


_SUPER = struct.Struct(f"<8sHH4xQQQ16sQQHhIIB3xQQ{Segment.SIZE}sI4x{LogPoint.SIZE}sHH4x")
_DISK = struct.Struct("<QB")
_CHECKSUM_AT, _MAC_AT = BLOCK - 64, BLOCK - 32


@dataclass(frozen=True, slots=True)
class Superblock:
    """The anchor: everything else is found, and authenticated, from here.

    `checksum` (BLAKE3) finds corruption without a key; `mac` (keyed BLAKE3) finds tampering.
    """

    uuid: bytes
    sequence: int
    epoch: int
    encryption: int
    compression: int
    """zstd level 1 to 22, 0 for none."""
    extent_bytes: int
    segment_bytes: int
    state: int
    created_ns: int
    capacity: int
    """Limit of the file in bytes, 0 for none."""
    root: Segment
    root_length: int
    """Sealed bytes of the first unit of the root segment."""
    log: LogPoint
    disks: tuple[tuple[str, int], ...] = ()
    """Names and sizes, readable without the key."""
    compatible: int = 0
    incompatible: int = 0
    version: int = field(default=VERSION)

    def pack(self, mac_key: bytes) -> bytes:
        """The block as written. Only the disks that fit are named (sixty of the longest names)."""
        names = bytearray()
        count = 0
        for name, size in self.disks:
            raw = name.encode("ascii")
            if _SUPER.size + len(names) + _DISK.size + len(raw) > _CHECKSUM_AT:
                break
            names += _DISK.pack(size, len(raw)) + raw
            count += 1
        head = _SUPER.pack(
            MAGIC, VERSION, _SUPER.size, self.incompatible, self.compatible, 0, self.uuid, self.sequence, self.epoch,
            self.encryption, self.compression, self.extent_bytes, self.segment_bytes, self.state, self.created_ns,
            self.capacity, self.root.pack(), self.root_length, self.log.pack(), count, len(names),
        )  # fmt: skip
        body = (head + names).ljust(_CHECKSUM_AT, b"\0")
        body += blake3(body).digest()
        return body + blake3(body, key=mac_key).digest()

    @classmethod
    def unpack(cls, data: bytes) -> Self | None:
        """The superblock in a block, or None when its checksum fails. The MAC is not looked at.

        Raises ImageError when the block is a sound superblock of a format that this version cannot open.
        """
        if len(data) != BLOCK or data[: len(MAGIC)] != MAGIC:
            return None
        if blake3(data[:_CHECKSUM_AT]).digest() != data[_CHECKSUM_AT:_MAC_AT]:
            return None
        values = _fields(_SUPER, data)
        _, version, _, incompatible, compatible, _, uuid, sequence, epoch, encryption, compression = values[:11]
        if version != VERSION:
            raise ImageError("image", f"has format version {version}, this program reads {VERSION}", "use a newer one")
        if unknown := incompatible & ~KNOWN_INCOMPATIBLE:
            bits = ", ".join(str(bit) for bit in range(64) if unknown >> bit & 1)
            raise ImageError("image", f"needs the unknown incompatible feature {bits}", "use a newer nbdvde")
        if encryption not in (ENCRYPTION_NONE, ENCRYPTION_AES_256_GCM):
            raise ImageError("image", f"is encrypted in the unknown way {encryption}", "use a newer nbdvde")
        extent_bytes, segment_bytes, state, created, capacity, root, root_length, log, count, _ = values[11:]
        return cls(
            uuid, sequence, epoch, encryption, compression, extent_bytes, segment_bytes, state, created, capacity,
            Segment.unpack(root), root_length, LogPoint.unpack(log), _parse_disks(data, count), compatible,
            incompatible, version,
        )  # fmt: skip

    @staticmethod
    def authentic(data: bytes, mac_key: bytes) -> bool:
        """Whether the block carries the MAC that only a holder of the key can make."""
        return blake3(data[:_MAC_AT], key=mac_key).digest() == data[_MAC_AT:]


def _parse_disks(data: bytes, count: int) -> tuple[tuple[str, int], ...]:
    disks = []
    offset = _SUPER.size
    for _ in range(count):
        size, length = _fields(_DISK, data, offset)
        offset += _DISK.size
        disks.append((_text(data[offset : offset + length]), size))
        offset += length
    return tuple(disks)


_HEADER = struct.Struct("<IIIIQQ")
HEADER_BYTES = _HEADER.size + TAG_BYTES


@dataclass(frozen=True, slots=True)
class GroupHeader:
    """First 48 bytes of a group: how long it is, and what was known to be durable when it was sealed."""

    unit: int
    """Number of the record; the extents follow."""
    extents: int
    record_length: int
    """Sealed bytes."""
    length: int
    """Bytes of the whole group, a multiple of the block size."""
    sequence: int
    synced: int
    """Every group below this sequence was durable before this one was written."""

    def pack(self) -> bytes:
        return _HEADER.pack(self.unit, self.extents, self.record_length, self.length, self.sequence, self.synced)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*_HEADER.unpack(data))


class Action:
    """What an operation does to the catalogue."""

    CREATE, SNAPSHOT, CLONE, DELETE, ROLLBACK, RESIZE = range(1, 7)


_OPERATION = struct.Struct("<B3xIIIQQB64s3xI")


@dataclass(frozen=True, slots=True)
class Operation:
    """A change of the catalogue, logged as a transaction of its own."""

    action: int
    number: int
    """The volume that is made or changed."""
    source: int = 0
    """The volume that is copied: of SNAPSHOT, CLONE and ROLLBACK. Of CREATE: the disk that a region belongs to."""
    size: int = 0
    """In bytes: of CREATE and RESIZE."""
    time_ns: int = 0
    """When it was made, since 1970 UTC."""
    name: str = ""
    """Of what is made."""
    domain: int = 0
    """Of CREATE: the dedup domain."""
    region: int = 0
    """Of CREATE: type of the region that the volume is, 0 for a disk."""

    SIZE = _OPERATION.size

    def pack(self) -> bytes:
        raw = self.name.encode("ascii")
        return _OPERATION.pack(
            self.action, self.domain, self.number, self.source, self.size, self.time_ns, len(raw), raw, self.region
        )

    @classmethod
    def unpack(cls, data: bytes, offset: int = 0) -> Self:
        action, domain, number, source, size, time_ns, length, raw, region = _fields(_OPERATION, data, offset)
        return cls(action, number, source, size, time_ns, _text(raw[:length]), domain, region)


_RECORD = struct.Struct("<QQIIIIII32s")
FLAG_FINAL, FLAG_OPERATION = 1, 2
EXTENT_ITEM = struct.Struct("<II")
ZERO_ITEM = struct.Struct("<QQ")
RUN_ITEM = struct.Struct("<QQ")
REFERENCE_ITEM = struct.Struct("<QQII")
REFERENCES_MAX = 64 * GROUP_BLOCKS_MAX
"""Blocks that the references of a group place at most."""
ALLOCATED_BIT = 1 << 63


@dataclass(frozen=True, slots=True)
class Record:
    """What one group of the log does to one volume. A transaction is the groups up to one marked final."""

    sequence: int
    epoch: int
    volume: int
    final: bool
    previous: bytes
    """BLAKE3 of the sealed record before."""
    extents: tuple[tuple[int, int], ...]
    """(sealed length in bytes, blocks) in the order of the units."""
    zeroes: tuple[tuple[int, int, bool], ...]
    """(first block, blocks, allocated), applied before the runs."""
    runs: tuple[tuple[int, int], ...]
    """(first block, blocks): where the blocks of the extents, taken in order, belong."""
    references: tuple[tuple[int, int, int], ...] = ()
    """(first block, first map entry, blocks): what becomes a duplicate of blocks stored before."""
    operation: Operation | None = None
    """A change of the catalogue; such a record has nothing else."""

    def pack(self) -> bytes:
        flags = (FLAG_FINAL if self.final else 0) | (FLAG_OPERATION if self.operation else 0)
        head = _RECORD.pack(
            self.sequence, self.epoch, self.volume, flags,
            len(self.extents), len(self.zeroes), len(self.runs), len(self.references), self.previous,
        )  # fmt: skip
        parts = [head]
        parts += [EXTENT_ITEM.pack(*item) for item in self.extents]
        parts += [ZERO_ITEM.pack(start, count | (ALLOCATED_BIT if kept else 0)) for start, count, kept in self.zeroes]
        parts += [RUN_ITEM.pack(*item) for item in self.runs]
        parts += [REFERENCE_ITEM.pack(*item, 0) for item in self.references]
        if self.operation:
            parts.append(self.operation.pack())
        return b"".join(parts)

    @staticmethod
    def packed_bytes(extents: int, zeroes: int, runs: int, references: int = 0) -> int:
        items = extents * EXTENT_ITEM.size + zeroes * ZERO_ITEM.size + runs * RUN_ITEM.size
        return _RECORD.size + items + references * REFERENCE_ITEM.size

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        sequence, epoch, volume, flags, extents, zeroes, runs, references, previous = _fields(_RECORD, data)
        if cls.packed_bytes(extents, zeroes, runs, references) > len(data):
            raise DamageError("log record", "is shorter than its tables", "run nbdvde check")
        at = _RECORD.size
        extent_end = at + extents * EXTENT_ITEM.size
        zero_end = extent_end + zeroes * ZERO_ITEM.size
        run_end = zero_end + runs * RUN_ITEM.size
        end = run_end + references * REFERENCE_ITEM.size
        return cls(
            sequence, epoch, volume, bool(flags & FLAG_FINAL), previous,
            tuple(EXTENT_ITEM.iter_unpack(data[at:extent_end])),
            tuple(
                (start, count & ~ALLOCATED_BIT, bool(count & ALLOCATED_BIT))
                for start, count in ZERO_ITEM.iter_unpack(data[extent_end:zero_end])
            ),
            tuple(RUN_ITEM.iter_unpack(data[zero_end:run_end])),
            tuple((start, entry, count) for start, entry, count, _ in REFERENCE_ITEM.iter_unpack(data[run_end:end])),
            Operation.unpack(data, end) if flags & FLAG_OPERATION else None,
        )  # fmt: skip


_LINK = struct.Struct(f"<IIQQ32s{Segment.SIZE}s")


@dataclass(frozen=True, slots=True)
class Link:
    """Last blocks of a log segment: where its groups end, and the segment in which the log goes on."""

    position: int
    unit: int
    sequence: int
    synced: int
    chain: bytes
    segment: Segment

    def pack(self) -> bytes:
        raw = _LINK.pack(self.position, self.unit, self.sequence, self.synced, self.chain, self.segment.pack())
        return raw.ljust(BLOCK - TAG_BYTES, b"\0")

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        position, unit, sequence, synced, chain, segment = _fields(_LINK, data)
        return cls(position, unit, sequence, synced, chain, Segment.unpack(segment))


# An entry of a segment's index, and of the map, is one u64.
INDEX_POSITION_BITS, INDEX_LENGTH_BITS = 24, 24


def pack_index(position: int, length: int, blocks: int) -> int:
    """Index entry of an extent: position in the segment, sealed bytes, blocks."""
    return position | length << INDEX_POSITION_BITS | blocks << (INDEX_POSITION_BITS + INDEX_LENGTH_BITS)


def unpack_index(entry: int) -> tuple[int, int, int]:
    """(position, sealed bytes, blocks); blocks is 0 where the unit is no extent."""
    return entry & 0xFFFFFF, entry >> 24 & 0xFFFFFF, entry >> 48


HOLE = 0
"""Map entry of a block that was never written or was trimmed."""
ALLOCATED_ZERO = 1
"""Map entry of a block that was zeroed with NO_HOLE: reads as zeroes, is not reported as a hole."""
LOST_SLOT = 0
"""Segment of what is lost: no segment has it, so that references to it are errors."""
LOST = 2
"""Map entry of a block that cannot be read any more, as the leaf that had its entry was damaged."""
MAX_SLOTS = 1 << 24
MAX_VOLUMES = 1 << 16
"""Disks and snapshots: with 160 bytes for each, the catalogue stays below what a metadata unit holds."""
_LIVE_MAX = (1 << 32) - 1
UNCOUNTED = 1 << 62
"""Stands for references that are too many to be stored: they never get to 0 by being counted down."""
UNIT_SHIFT, SLOT_SHIFT = 16, 40
BLOCK_MASK, UNIT_MASK = (1 << UNIT_SHIFT) - 1, (1 << (SLOT_SHIFT - UNIT_SHIFT)) - 1


def pack_entry(slot: int, unit: int, block: int) -> int:
    """Map entry: segment slot (never 0), unit of the extent, block in the extent."""
    return slot << SLOT_SHIFT | unit << UNIT_SHIFT | block


_ROOT = struct.Struct("<IIIIQQ16Q")
_VOLUME = struct.Struct("<IIQQ16sB65s6xIIQQIII12x")
_VOLUME_BYTES_FIRST = 112
"""Bytes of a volume entry in images from before there were snapshots: the rest of it is zero."""
STATISTICS = (
    "extents_sealed", "extents_compressed", "blocks_zero", "bytes_in", "bytes_stored", "seal_ns", "commits",
    "blocks_shared",
)  # fmt: skip
"""Names of the counters kept in the root, in their order; the rest of the sixteen is reserved."""


@dataclass(frozen=True, slots=True)
class VolumeEntry:
    """A volume in the catalogue: identity, size, height and root of its map, mapped blocks, and where it comes from."""

    volume: int
    name: str
    size: int
    height: int
    mapped: int
    root: UnitRef | None
    parent: int = 0
    """Number of the disk that this is a snapshot of; 0 for a disk."""
    created_ns: int = 0
    protected: int = 0
    """What segments of a lower sequence hold may be in use by another volume, too."""
    domain: int = 0
    """Volumes of equal domains share what they store; 0 takes no part."""
    region: int = 0
    """Type of the region that it is (regions.form.Form.tag); 0 for disks and snapshots."""
    owner: int = 0
    """Of a region: number of the disk that it belongs to, 0 for one of the image."""
    origin: int = 0
    """Number of the disk or snapshot that a clone began as; 0 for none, and for clones of older versions."""

    SIZE = _VOLUME.size

    def pack(self) -> bytes:
        raw = self.name.encode("ascii")
        root = self.root.pack() if self.root else NO_REF
        return _VOLUME.pack(
            self.volume, self.height, self.size, self.mapped, root, len(raw), raw, self.parent, self.domain,
            self.created_ns, self.protected, self.region, self.owner, self.origin,
        )  # fmt: skip

    @classmethod
    def unpack(cls, data: bytes, offset: int = 0) -> Self:
        volume, height, size, mapped, root, length, raw, *rest = _fields(_VOLUME, data, offset)
        parent, domain, created, protected, region, owner, origin = rest
        name, ref = _text(raw[:length]), UnitRef.unpack(root)
        return cls(volume, name, size, height, mapped, ref, parent, created, protected, domain, region, owner, origin)


@dataclass(frozen=True, slots=True)
class Root:
    """First unit of a root segment: the catalogue, the counters, and how many table units follow."""

    volumes: tuple[VolumeEntry, ...]
    tables: tuple[int, ...]
    """Sealed bytes of each TABLE unit that follows."""
    next_sequence: int
    """Segment sequence numbers from here on are unused."""
    statistics: tuple[int, ...]
    next_volume: int = 0
    """Volume numbers from here on are unused."""
    dedup_mib: int = 0
    """MiB of memory that the fingerprints may take, 0 for the default."""

    def pack(self) -> bytes:
        counters = (*self.statistics, *(0 for _ in range(16 - len(self.statistics))))
        head = _ROOT.pack(
            len(self.volumes), len(self.tables), VolumeEntry.SIZE, self.dedup_mib, self.next_sequence, self.next_volume,
            *counters,
        )  # fmt: skip
        return b"".join(
            [head, *(v.pack() for v in self.volumes), *(length.to_bytes(4, "little") for length in self.tables)]
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        volumes, tables, entry_bytes, dedup_mib, next_sequence, next_volume, *counters = _fields(_ROOT, data)
        entry_bytes = entry_bytes or _VOLUME_BYTES_FIRST
        at = _ROOT.size + volumes * entry_bytes
        if at + tables * 4 > len(data):
            raise DamageError("root", "is shorter than its tables", "run nbdvde check")
        entries = (data[start : start + entry_bytes] for start in range(_ROOT.size, at, entry_bytes))
        return cls(
            tuple(VolumeEntry.unpack(entry.ljust(VolumeEntry.SIZE, b"\0")) for entry in entries),
            struct.unpack_from(f"<{tables}I", data, at),
            next_sequence,
            tuple(counters[: len(STATISTICS)]),
            next_volume,
            dedup_mib,
        )
