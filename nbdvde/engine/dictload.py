"""Reading the dictionaries of an image from their region, when it is opened."""

from collections.abc import Callable

from nbdvde.engine.catalogue import Catalogue
from nbdvde.engine.dictionaries import FORM, Dictionaries, Entry, Table
from nbdvde.engine.regionreader import RegionReader
from nbdvde.engine.segments import Segments
from nbdvde.errors import DamageError


def load_dictionaries(segments: Segments, catalogue: Catalogue, tell: Callable[[str, str], None]) -> Dictionaries:
    """All there are; `tell` hears what is damaged: (where, what). Blocks."""
    dictionaries = Dictionaries()
    member = catalogue.regions.get((FORM.tag, 0))
    if member is None:
        return dictionaries
    dictionaries.volume = member.number
    region = RegionReader(segments, member)
    try:
        table = Table() if not region.read([0]).strip(b"\0") else Table.unpack(lambda number: region.read([number]))
    except DamageError as damage:
        dictionaries.damaged = damage.why
        tell("dictionaries", f"{damage.why}; what was compressed with them cannot be read")
        return dictionaries
    contents = {entry.number: _content(region, entry) for entry in table.entries}
    for entry in dictionaries.load(table, contents):
        tell(f"dictionary {entry.slot}", "is damaged; what was compressed with it cannot be read")
    return dictionaries


def _content(region: RegionReader, entry: Entry) -> bytes:
    """Of a dictionary; nothing when it cannot be read."""
    try:
        return region.read(range(entry.offset, entry.offset + entry.blocks))[: entry.size]
    except DamageError:
        return b""
