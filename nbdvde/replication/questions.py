"""What who catches up asks, and what it is answered."""

from collections.abc import Awaitable, Callable
from typing import TypeAlias

import msgspec

from nbdvde.replication.notes import Note

CHUNKS_ASKED = 16
"""Whose hashes are asked for at a time."""


class SnapshotState(msgspec.Struct, frozen=True, array_like=True):
    """A snapshot of a disk."""

    name: str
    size: int
    created_ns: int


class RegionState(msgspec.Struct, frozen=True, array_like=True):
    """A management region of a disk. Blocks, in the volume that all regions of the disk share."""

    type: int
    """The tag of its kind."""
    start: int
    blocks: int


class DiskState(msgspec.Struct, frozen=True, array_like=True):
    """A disk, its snapshots from the oldest on, and its regions."""

    name: str
    size: int
    snapshots: list[SnapshotState]
    regions: list[RegionState]


class ImageState(msgspec.Struct, frozen=True, array_like=True):
    """How far an image is, and what there is in it."""

    notes: list[Note]
    """Of all groups."""
    disks: list[DiskState]
    changing: int
    """Another number when something has changed the catalogue, even if it is the same again."""


class AskChunks(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Hashes of chunks of a disk or snapshot."""

    label: str
    first: int
    count: int


class AskBlocks(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Hashes of the blocks of a chunk."""

    label: str
    chunk: int


class AskData(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """What some blocks of a chunk hold, compressed."""

    label: str
    chunk: int
    blocks: bytes
    """Numbers within the chunk, a byte each."""


class AskState(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """The `ImageState`."""


class AskWatch(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """Remember what of the regions of a disk is changed from now on; answers a number for that."""

    disk: str


class AskRest(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """What was changed meanwhile: a `Rest`."""

    watch: int


class Rest(msgspec.Struct, frozen=True, array_like=True):
    """What the regions of a disk hold at one point of the log, besides what was copied before."""

    head: bytes
    """Directory, and the entry that changed them last; nothing when `again` tells of chunks."""
    chunks: dict[int, bytes]
    """Those of the volume that were changed, compressed."""
    again: list[int]
    """Chunks that were changed, too many to tell what they hold: copy them, and ask for the rest again."""


class AskCompared(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """What the node found when it applied an entry that compares."""

    group: str
    index: int


Question: TypeAlias = AskChunks | AskBlocks | AskData | AskState | AskCompared | AskWatch | AskRest
Ask: TypeAlias = Callable[[bytes], Awaitable[bytes]]
