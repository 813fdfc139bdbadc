"""Which group of a replicated image has which part of a disk: so that all of them can be asked at the same time.

A disk is cut into stripes. Which slot a stripe has follows from the name of the disk and never changes; which group
has a slot says the table (`raft.placement`).
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

from blake3 import blake3

from nbdvde.raft.placement import Table, slot_of

STRIPE = 16 << 20
"""Bytes: few requests have to do with two groups, and a disk of 1 GiB has 64."""
_DISK_BYTES = 8


def group_name(hold: int, at: int) -> str:
    """Of a group that comes under a hold: none ever has a name that another one had, whose log somebody may have."""
    return f"g{hold}.{at}"


def hold_of(name: str) -> int:
    """The hold under which a group came; 0 for `default`, which was always there."""
    hold, separator, _ = name.removeprefix("g").partition(".")
    return int(hold) if separator and hold.isdecimal() else 0


class Routing:
    """A table, as it is asked."""

    def __init__(self, table: Table) -> None:
        self.table, self.version = table, table.version
        self.groups = tuple(sorted(table.groups))
        self.noted = table.pack() if table.version else b""
        """As it is noted with each commit; nothing while it is the first one."""
        self.alone = len(self.groups) == 1
        """Whether one group has everything."""

    def at(self, disk: str, offset: int) -> str:
        """The group that has what lies there."""
        return self.groups[0] if self.alone else self.table.slots[_slot(disk, offset // STRIPE)]

    def along(self, disk: str, offset: int, length: int) -> Sequence[str]:
        """The groups that have any of a range."""
        first, last = offset // STRIPE, (offset + max(1, length) - 1) // STRIPE
        if self.alone or first == last:
            return (self.at(disk, offset),)
        found = set[str]()
        for stripe in range(first, last + 1):
            found.add(self.at(disk, stripe * STRIPE))
            if len(found) == len(self.groups):
                break
        return sorted(found)

    def parts(self, disk: str, offset: int, length: int, group: str) -> Iterator[tuple[int, int]]:
        """(offset, length) of what a group has of a range, in order; neighbours are joined."""
        if self.alone:
            yield offset, length
            return
        start = stop = offset
        for piece, size in pieces(offset, length, STRIPE):
            if self.at(disk, piece) == group:
                start = start if stop > start else piece
                stop = piece + size
            elif stop > start:
                yield start, stop - start
                start = stop
        if stop > start:
            yield start, stop - start


def pieces(offset: int, length: int, most: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of a range cut where `most` divides the offset."""
    stop = offset + length
    while offset < stop:
        following = min(stop, (offset // most + 1) * most)
        yield offset, following - offset
        offset = following


@lru_cache(maxsize=1 << 16)
def _slot(disk: str, stripe: int) -> int:
    return slot_of(_number(disk), stripe)


@lru_cache(maxsize=1 << 10)
def _number(disk: str) -> int:
    return int.from_bytes(blake3(disk.encode()).digest(length=_DISK_BYTES), "little")
