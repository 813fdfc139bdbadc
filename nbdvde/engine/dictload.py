"""Reading the dictionaries of an image from their region, when it is opened."""

from collections.abc import Callable, Iterable, Sequence

from nbdvde.disk import Piece
from nbdvde.engine.cache import FrameCache
from nbdvde.engine.catalogue import Catalogue, Member
from nbdvde.engine.changes import loading
from nbdvde.engine.dictionaries import FORM, Dictionaries, Entry, Table
from nbdvde.engine.layout import ALLOCATED_ZERO, BLOCK, SLOT_SHIFT
from nbdvde.engine.lbamap import LEAF_SHIFT
from nbdvde.engine.loader import drive_blocking
from nbdvde.engine.reader import Reader, Want
from nbdvde.engine.segments import Segments
from nbdvde.errors import DamageError


def load_dictionaries(segments: Segments, catalogue: Catalogue, tell: Callable[[str, str], None]) -> Dictionaries:
    """All there are; `tell` hears what is damaged: (where, what). Blocks."""
    dictionaries = Dictionaries()
    member = catalogue.regions.get(FORM.tag)
    if member is None:
        return dictionaries
    dictionaries.volume = member.number
    region = _Region(segments, member)
    try:
        table = Table() if not region.read([0]).strip(b"\0") else Table.unpack(lambda number: region.read([number]))
    except DamageError as damage:
        dictionaries.damaged = damage.why
        tell("dictionaries", f"{damage.why}; what was compressed with them cannot be read")
        return dictionaries
    contents = {entry.number: region.content(entry) for entry in table.entries}
    for entry in dictionaries.load(table, contents):
        tell(f"dictionary {entry.slot}", "is damaged; what was compressed with it cannot be read")
    return dictionaries


class _Region:
    """What the volume of a region holds."""

    def __init__(self, segments: Segments, member: Member) -> None:
        self._segments, self._member = segments, member
        self._reader = Reader(segments, FrameCache(0))

    def content(self, entry: Entry) -> bytes:
        """Of a dictionary; nothing when it cannot be read."""
        try:
            return self.read(range(entry.offset, entry.offset + entry.blocks))[: entry.size]
        except DamageError:
            return b""

    def read(self, blocks: Sequence[int]) -> bytes:
        """Some blocks, joined. Raises DamageError."""
        lbamap = self._member.map
        drive_blocking(loading(lbamap, _leaves(blocks)), self._segments, lbamap)
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


def _leaves(blocks: Iterable[int]) -> set[int]:
    return {block >> LEAF_SHIFT for block in blocks}
