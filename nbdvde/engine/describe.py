"""What `info` tells of an image."""

import os
import uuid

from nbdvde.engine.extent import LEVELS
from nbdvde.engine.layout import ENCRYPTION_NONE, STATE_CLEAN, Superblock
from nbdvde.engine.report import DiskInfo, ImageInfo


def compression_name(level: int) -> str:
    """The setting as people write it."""
    return next((name for name, value in LEVELS.items() if value == level), str(level))


def file_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes that a file takes on the host."""
    return os.stat(path).st_blocks * 512


def described(statistics: dict[str, int]) -> dict[str, int | float]:
    """The counters of an image (layout.STATISTICS), with what follows from them."""
    taken, stored = statistics["bytes_in"], statistics["bytes_stored"]
    return {**statistics, "bytes_saved": taken - stored, "ratio": round(taken / (stored or 1), 3)}


def clear_info(superblock: Superblock, path: str, taken: int, key_slots: int) -> ImageInfo:
    """The part of an ImageInfo that the superblock tells."""
    return ImageInfo(
        superblock.version, path, str(uuid.UUID(bytes=superblock.uuid)),
        "none" if superblock.encryption == ENCRYPTION_NONE else "aes-256-gcm",
        compression_name(superblock.compression), superblock.capacity or None, taken,
        [DiskInfo(name, size) for name, size in superblock.disks], superblock.extent_bytes, superblock.created_ns,
        superblock.state == STATE_CLEAN, key_slots,
    )  # fmt: skip
