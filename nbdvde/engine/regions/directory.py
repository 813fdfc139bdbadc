"""The directory of the regions of a disk: which there are, and where in the volume they share.

It is block 0 of that volume. Each region has a window of the same length behind it, of which it uses the beginning;
nothing is stored for the rest. What a newer version has made is kept as it is. In a cluster block 1 holds the index of
the log entry that changed any of them last, u64.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

from nbdvde.engine.layout import BLOCK
from nbdvde.engine.regions.form import GENERATION_MAX, Form, name_of
from nbdvde.errors import RefusedError

FORM = Form("RDIR", 16, 32)
ENTRY, ENTRY_BLOCK = Form("RENT", 8, 0), 1
CLUSTER = Form("RAFT", 64, 1)
"""Of the region that an image has, and no disk, when it belongs to a cluster (`replication.notes`)."""
HEAD_BLOCKS = 2
"""Directory and entry."""
_HEADER = struct.Struct("<I12s")
_SLOT = struct.Struct("<IIQQQ")
SLOTS_MAX = FORM.capacity(1)
WINDOW = 1 << 34
"""Blocks from the start of a region to that of the next one: 64 TiB."""
VOLUME_BYTES = (1 + SLOTS_MAX) * WINDOW * BLOCK


class Kind(NamedTuple):
    """What people call a type of region."""

    article: str
    name: str
    command: str = ""
    """That makes one."""


_KINDS = {
    "STRE": Kind("a", "stream", "nbdvde stream create"),
    "WORM": Kind("a", "WORM region", "nbdvde worm create"),
    "MTRK": Kind("a", "metrics log", "nbdvde metrics create"),
    "CMVT": Kind("a", "compliance vault", "nbdvde vault create"),
    "ANON": Kind("an", "anonymisation table", "nbdvde anon create"),
}


def kind_of(tag: int) -> Kind:
    """How to speak of a type of region."""
    name = name_of(tag)
    return _KINDS.get(name) or Kind("a", f"region {name}")


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a region lies. Blocks; `start` counts from the beginning of the volume."""

    type: int
    """Form.tag of the region."""
    start: int
    blocks: int
    """Blocks that it may use."""
    used: int
    """Blocks from its start on that hold its header and records."""
    flags: int = 0

    @property
    def name(self) -> str:
        """Of the type: four characters."""
        return name_of(self.type)

    def pack(self) -> bytes:
        return _SLOT.pack(self.type, self.flags, self.start, self.blocks, self.used)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The slot in a record. Raises DamageError."""
        type_, flags, start, blocks, used = _SLOT.unpack(data)
        if start % WINDOW or not 0 < start <= SLOTS_MAX * WINDOW or not 0 < used <= blocks <= WINDOW:
            raise FORM.damage("a slot makes no sense")
        return cls(type_, start, blocks, used, flags)


@dataclass(frozen=True, slots=True)
class Directory:
    """All slots, in the order of their making."""

    slots: tuple[Slot, ...] = ()
    generation: int = 0

    def __iter__(self) -> Iterator[Slot]:
        return iter(self.slots)

    def find(self, form: Form) -> Slot | None:
        """The slot of a type of region, if the disk has one."""
        return next((slot for slot in self.slots if slot.type == form.tag), None)

    def adding(self, form: Form, blocks: int, used: int, flags: int = 0) -> Self:
        """With a region more, of a type that there is none of. Raises RefusedError when there is no room."""
        assert not self.find(form), "there is one of a type"
        taken = {slot.start for slot in self.slots}
        free = next((n * WINDOW for n in range(1, SLOTS_MAX + 1) if n * WINDOW not in taken), None)
        if free is None:
            raise RefusedError("region directory", f"has {SLOTS_MAX} regions, and no room for more")
        return self._with((*self.slots, Slot(form.tag, free, blocks, used, flags)))

    def using(self, form: Form, used: int, flags: int | None = None) -> Self:
        """With another number of blocks in use, and other flags."""
        found = self.find(form)
        assert found is not None, "it has a slot"
        after = replace(found, used=used, flags=found.flags if flags is None else flags)
        return self._with(tuple(after if slot is found else slot for slot in self.slots))

    def removing(self, form: Form) -> Self:
        """Without a region."""
        return self._with(tuple(slot for slot in self.slots if slot.type != form.tag))

    def _with(self, slots: tuple[Slot, ...]) -> Self:
        return replace(self, slots=slots, generation=min(self.generation + 1, GENERATION_MAX))

    def pack(self) -> bytes:
        """The block of the directory."""
        header = _HEADER.pack(len(self.slots), bytes(12))
        (block,) = FORM.pack(header, [slot.pack() for slot in self.slots], self.generation)
        return block

    @classmethod
    def unpack(cls, read: Callable[[int], bytes]) -> Self:
        """The directory in block 0, which `read` answers. Raises DamageError."""

        def count(header: bytes) -> int:
            slots, reserved = _HEADER.unpack(header)
            if slots > SLOTS_MAX or reserved.strip(b"\0"):
                raise FORM.damage("has a header that makes no sense")
            return int(slots)

        _, records, generation = FORM.unpack(read, count)
        slots = tuple(map(Slot.unpack, records))
        for what in ({slot.type for slot in slots}, {slot.start for slot in slots}):
            if len(what) < len(slots):
                raise FORM.damage("has one region twice")
        return cls(slots, generation)
