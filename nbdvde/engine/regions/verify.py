"""Verifying the regions of a disk, for `nbdvde check`."""

from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

from nbdvde.engine.regions import anon, samples, stream, tiers, vault, worm
from nbdvde.engine.regions.directory import Directory, Slot
from nbdvde.engine.regions.pages import Read
from nbdvde.errors import DamageError

Verifier: TypeAlias = Callable[[Read, Slot], Iterator[str]]
"""Tells what is wrong with a region; `Read` answers its blocks. May raise DamageError at the first flaw."""
VERIFIERS: Mapping[int, Verifier] = {
    stream.FORM.tag: stream.verify,
    vault.FORM.tag: vault.verify,
    samples.FORM.tag: tiers.flaws,
    anon.FORM.tag: anon.verify,
    worm.FORM.tag: worm.verify,
}
"""By type. Of what a newer version has made nothing is known."""


def verify(read: Read) -> Iterator[tuple[str, str]]:
    """(region, flaw) of everything that is wrong with the regions of a disk; `read` answers blocks of their volume."""
    try:
        directory = Directory.unpack(read) if read(0).strip(b"\0") else Directory()
    except DamageError as damage:
        yield "directory", damage.why
        return
    for slot in directory:
        try:
            yield from ((slot.name, flaw) for flaw in _flaws(read, slot))
        except DamageError as damage:
            yield slot.name, damage.why


def _flaws(read: Read, slot: Slot) -> Iterator[str]:
    if slot.type in VERIFIERS:
        yield from VERIFIERS[slot.type](lambda number: read(slot.start + number), slot)
