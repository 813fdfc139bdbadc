"""What `info` and `check` tell about an image; field names are part of the interface."""

import msgspec


class DiskInfo(msgspec.Struct, frozen=True):
    """One disk. Sizes in bytes; what only the key tells is 0 without it."""

    name: str
    size: int
    logical_bytes: int = 0
    """Bytes that hold data, as a client sees them."""
    stored_bytes: int = 0
    """Bytes they take in the file."""
    snapshots: list[str] = []


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
    key_slots: int = 0
    """Number of slots in use."""
    statistics: dict[str, int | float] = {}


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
