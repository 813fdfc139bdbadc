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
from nbdvde.errors import DamageError

AHEAD = 128
"""Blocks that are read at a time by who reads them in order: one by one each extent would be opened as often as it has
blocks."""


class RegionReader:
    """What the volume of a region holds."""

    def __init__(self, segments: Segments, member: Member, dictionaries: Dictionaries | None = None) -> None:
        self._segments, self._member = segments, member
        self._reader = Reader(segments, FrameCache(0), dictionaries)
        self._group, self._held = -1, b""

    def block(self, number: int) -> bytes:
        """One block. Raises DamageError."""
        return self.read((number,))

    def next_block(self, number: int) -> bytes:
        """As `block`, for who will read those behind it as well."""
        group, place = divmod(number, AHEAD)
        if group != self._group:
            try:
                self._group, self._held = group, self.read(range(group * AHEAD, (group + 1) * AHEAD))
            except DamageError:  # perhaps of another block
                self._group = -1
                return self.block(number)
        return self._held[place * BLOCK : (place + 1) * BLOCK]

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
