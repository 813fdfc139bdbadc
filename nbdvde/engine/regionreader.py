"""Reading what the volume of a region holds, without an event loop: when an image is opened, or checked."""

from collections.abc import Sequence

from nbdvde.disk import Piece
from nbdvde.engine.cache import FrameCache
from nbdvde.engine.catalogue import Member
from nbdvde.engine.changes import loading
from nbdvde.engine.dictionaries import Dictionaries
from nbdvde.engine.layout import ALLOCATED_ZERO, BLOCK, SLOT_SHIFT
from nbdvde.engine.lbamap import LEAF_SHIFT
from nbdvde.engine.loader import drive_blocking
from nbdvde.engine.reader import Reader, Want
from nbdvde.engine.segments import Segments


class RegionReader:
    """What the volume of a region holds."""

    def __init__(self, segments: Segments, member: Member, dictionaries: Dictionaries | None = None) -> None:
        self._segments, self._member = segments, member
        self._reader = Reader(segments, FrameCache(0), dictionaries)

    def block(self, number: int) -> bytes:
        """One block. Raises DamageError."""
        return self.read((number,))

    def read(self, blocks: Sequence[int]) -> bytes:
        """Some blocks, joined. Raises DamageError."""
        lbamap = self._member.map
        drive_blocking(loading(lbamap, {block >> LEAF_SHIFT for block in blocks}), self._segments, lbamap)
        pieces: list[list[Piece]] = [[BLOCK] for _ in blocks]
        wants = []
        for place, block in enumerate(blocks):
            entry = lbamap.lookup(block)
            assert entry is not None, "its leaf is in memory"
            if entry > ALLOCATED_ZERO:
                wants.append(Want(place, entry, 1, self._segments.find(entry >> SLOT_SHIFT)))
        if wants:
            self._reader.fill(pieces, wants)
        return b"".join(bytes(piece) for found in pieces for piece in found)
