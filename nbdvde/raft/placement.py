"""Which group has which part of a disk: extent to slot by a hash, slot to group by a table.

The hash never changes; the table does when groups come and go, and says so by its version. So any group can go, which
a hash over the groups themselves would not allow.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Annotated

import msgspec
from msgspec import Meta

from nbdvde.errors import DamageError, UsageError

SLOTS = 1024
_FACTOR, _MASK = 2862933555777941757, (1 << 64) - 1
_Name = Annotated[str, Meta(min_length=1, max_length=64)]


def jump_hash(key: int, buckets: int) -> int:
    """The bucket, from 0 on, of a key of 64 bits.

    One bucket more moves one key in `buckets + 1`, all of them into the new one (Lamping, Veach: "A Fast, Minimal
    Memory, Consistent Hash Algorithm", 2014).
    """
    bucket, following = -1, 0
    while following < buckets:
        bucket = following
        key = (key * _FACTOR + 1) & _MASK
        following = int((bucket + 1) * ((1 << 31) / ((key >> 33) + 1)))
    return bucket


def slot_of(disk: int, extent: int) -> int:
    """The slot of an extent, by a number of the disk of 64 bits that is as good as drawn at random."""
    return jump_hash((disk + extent) & _MASK, SLOTS)


class _Packed(msgspec.Struct, frozen=True, array_like=True):
    version: Annotated[int, Meta(ge=0)]
    groups: Annotated[tuple[_Name, ...], Meta(min_length=1, max_length=SLOTS)]
    slots: Annotated[tuple[int, ...], Meta(min_length=SLOTS, max_length=SLOTS)]
    """The place of its group in `groups`, for each slot."""


@dataclass(frozen=True, slots=True)
class Table:
    """The group of each slot."""

    version: int
    """One more with each change."""
    slots: tuple[str, ...]

    @classmethod
    def of(cls, groups: Iterable[str]) -> "Table":
        """The first table: every group has as many slots as another, or one more. Raises UsageError."""
        names = _checked(groups)
        shares = cycle(names)
        return cls(0, tuple(next(shares) for _ in range(SLOTS)))

    @property
    def groups(self) -> Mapping[str, int]:
        """How many slots each group has that has any."""
        return Counter(self.slots)

    def spread(self, groups: Iterable[str]) -> "Table":
        """Have these groups, and no others, share the slots evenly; as few move as possible. Raises UsageError."""
        names = _checked(groups)
        have = self.groups
        ranked = sorted(names, key=lambda name: (-have.get(name, 0), name))
        share, more = divmod(SLOTS, len(names))
        left = {name: share + (at < more) for at, name in enumerate(ranked)}
        slots: list[str | None] = []
        for name in self.slots:
            stays = left.get(name, 0) > 0
            slots.append(name if stays else None)
            if stays:
                left[name] -= 1
        takers = (name for name in ranked for _ in range(left[name]))
        return Table(self.version + 1, tuple(name if name is not None else next(takers) for name in slots))

    def without(self, group: str) -> "Table":
        """Divide the slots of a group among the others. Raises UsageError when there is no other."""
        return self.spread(set(self.groups) - {group})

    def moved(self, other: "Table") -> frozenset[int]:
        """The slots that have another group there."""
        pairs = enumerate(zip(self.slots, other.slots, strict=True))
        return frozenset(slot for slot, (mine, its) in pairs if mine != its)

    def pack(self) -> bytes:
        """As bytes."""
        names = tuple(sorted(self.groups))
        places = {name: place for place, name in enumerate(names)}
        return msgspec.msgpack.encode(_Packed(self.version, names, tuple(places[name] for name in self.slots)))

    @classmethod
    def unpack(cls, data: bytes) -> "Table":
        """From bytes. Raises DamageError."""
        try:
            packed = msgspec.msgpack.decode(data, type=_Packed)
        except msgspec.MsgspecError as error:
            raise DamageError("table of slots", str(error).lower()) from None
        names = packed.groups
        if len({*names}) < len(names) or {*packed.slots} != {*range(len(names))}:
            raise DamageError("table of slots", "does not name each group once")
        return cls(packed.version, tuple(names[place] for place in packed.slots))


def _checked(groups: Iterable[str]) -> list[str]:
    names = sorted({*groups})
    if not 0 < len(names) <= SLOTS:
        raise UsageError("table of slots", f"cannot be shared by {len(names)} groups", f"use 1 to {SLOTS}")
    if any(not 0 < len(name) <= 64 for name in names):
        raise UsageError("table of slots", "has a group whose name is not 1 to 64 characters long")
    return names
