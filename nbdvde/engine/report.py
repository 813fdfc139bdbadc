"""What `info`, `check` and `optimize` tell about an image; field names are part of the interface."""

import msgspec


class SnapshotInfo(msgspec.Struct, frozen=True):
    """A snapshot of a disk."""

    name: str
    """Within its disk: DISK@NAME in full."""
    size: int
    created_ns: int
    """Nanoseconds since 1970."""
    uuid: str | None = None
    """Stays the same whatever the image does, and is given to nothing else."""


class DiskInfo(msgspec.Struct, frozen=True):
    """One disk. Sizes in bytes; what only the key tells is 0 without it."""

    name: str
    size: int
    logical_bytes: int = 0
    """Bytes that hold data, as a client sees them."""
    stored_bytes: int | None = 0
    """Bytes that it and its snapshots take in the file; None beside other disks, which may share them: see `df`."""
    snapshots: list[SnapshotInfo] = []
    """Oldest first."""
    dedup_with: str | None = None
    """The oldest disk that it shares what it stores with, itself if no other; None when it takes no part."""
    origin: str | None = None
    """Of a clone: the disk or DISK@SNAPSHOT that it began as, or `(deleted)`."""
    uuid: str | None = None
    """As that of a snapshot; only the key tells it."""


class ImageInfo(msgspec.Struct, frozen=True):
    """An image as a whole."""

    format: int
    path: str
    uuid: str
    encryption: str
    """`aes-256-gcm` or `none`."""
    compression: str
    capacity: int | None
    """Limit of the file in bytes."""
    file_bytes: int
    """Bytes that the file takes on the host."""
    disks: list[DiskInfo]
    extent_bytes: int
    """Most that is sealed as one unit."""
    created_ns: int
    """Nanoseconds since 1970."""
    clean: bool
    """Whether it was stopped in order; not so while it is served for writing."""
    key_slots: int = 0
    """Number of slots in use."""
    stored_bytes: int = 0
    """Bytes that all disks take in the file."""
    dedup_memory: int = 0
    """Bytes for finding duplicates."""
    statistics: dict[str, int | float] = {}
    cleaning_held: str = ""
    """Why a part of the garbage cannot be cleaned, if that is so since it was opened."""


class DiskUsage(msgspec.Struct, frozen=True):
    """What a disk, or a snapshot, has in an image; bytes before compression."""

    name: str
    """DISK, DISK@SNAPSHOT, or `region DICT`: the dictionaries."""
    size: int
    logical_bytes: int
    """Bytes that hold data, as a client sees them."""
    exclusive_bytes: int
    """Of different blocks that nothing else uses: what deleting it frees."""
    shared_bytes: int
    """The rest: blocks that others use too, and repetitions."""


class SpaceReport(msgspec.Struct, frozen=True):
    """Where the bytes of an image went. What is in use of the file is compressed, garbage and overhead together."""

    capacity: int | None
    """Limit of the file in bytes."""
    file_bytes: int
    """Bytes that the file takes on the host."""
    logical_bytes: int
    """Bytes that hold data in all disks and snapshots, as clients see them."""
    written_bytes: int
    """Bytes that clients wrote since the image was made, without zeroes."""
    unique_bytes: int
    """Of different blocks, before compression."""
    shared_bytes: int
    """Saved as several disks, snapshots or places share a block."""
    compressed_bytes: int
    """What the unique bytes take in the file."""
    garbage_bytes: int
    """What cleaning can free."""
    reserved_bytes: int
    """Of the capacity: only for checkpoints, trims and cleaning."""
    overhead_bytes: int
    """The rest of what is in use: maps, indexes, log records, segments not filled yet."""
    fill: float
    """Compressed bytes of the capacity, or of what is in use of the file when there is no limit."""
    disks: list[DiskUsage]


class CheckError(msgspec.Struct, frozen=True):
    """One thing found wrong."""

    where: str
    """Place in the image: `segment 3, unit 17`."""
    what: str
    disk: str | None = None
    offset: int | None = None
    """First byte of the disk that is affected."""
    length: int | None = None


class CheckReport(msgspec.Struct, frozen=True):
    """Result of verifying everything."""

    ok: bool
    errors: list[CheckError]
    units_verified: int


class ClassReport(msgspec.Struct, frozen=True):
    """What training for a class of data came to, measured on samples that it did not see."""

    name: str
    """Empty where a dictionary is replaced."""
    samples: int
    ratio_without: float
    ratio_with: float
    saved: float
    """Part of the compressed bytes."""
    id: int | None
    """The dictionary that was made."""
    note: str = ""
    """Why none was."""


class OptimizeReport(msgspec.Struct, frozen=True):
    """What `optimize` did. Bytes are those of the file, unless it says otherwise."""

    file_bytes_before: int
    file_bytes_after: int
    blocks_repacked: int
    """Of 4 KiB, stored again in the order of their addresses."""
    blocks_shared: int
    """Of 4 KiB, that became references to equal ones."""
    cleaned_bytes: int
    """Freed by leaving out what nobody uses any more."""
    segments_recompressed: int
    recompressed_bytes: int
    """Saved by that."""
    dictionaries: list[ClassReport]
    """What training came to, class by class."""
    dictionaries_note: str
    """Why none was thought of, if so."""
    seconds: float


class RepairReport(CheckReport, frozen=True):
    """Result of repairing: `errors` are what is still wrong, or lost; `ok` means that nothing is."""

    repaired: list[CheckError] = []
    """What was wrong, and is not any more."""
