"""Whether what clients saw can have happened in some order: each request at once, between its begin and its end.

Blocks are judged one by one; a snapshot reads all of them, at one moment. A change that was not acknowledged may never
have happened. Clients write something else each time, but zeroes many times.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tests.interop.records import Record
from tests.sim.stack.register import Op, explained

NEVER = Record(True, True, 0, 0, -1, -1)
"""What a block holds before anybody writes."""


@dataclass
class Snapshot:
    """One that somebody asked for."""

    label: str
    begin_ns: int
    end_ns: float = math.inf
    """When it was known to be there."""
    sure: bool = False
    """Whether it was acknowledged."""
    doomed: bool = False
    """Whether anybody asked for its end."""
    kept: bool = False
    """Whether nobody does: a disk was rolled back to it."""
    versions: Sequence[int] = field(default_factory=list)
    """What its blocks hold, as far as anybody saw that."""


@dataclass
class Rollback:
    """A disk was to become what a snapshot holds."""

    snapshot: Snapshot
    begin_ns: int
    end_ns: float = math.inf
    sure: bool = False
    """Whether it was acknowledged."""


def problem(
    records: Sequence[Record], snapshots: Sequence[Snapshot] = (), rollbacks: Sequence[Rollback] = ()
) -> str | None:
    """What is wrong with the history of a disk, if anything is; it is known what it was rolled back to."""
    blocks: dict[int, list[Record]] = {}
    for record in records:
        blocks.setdefault(record.block, []).append(record)
    seen = [snapshot for snapshot in snapshots if snapshot.versions]
    for block, found in blocks.items():
        ops = [Op(r.version, r.begin_ns, r.end_ns, not r.wrote, r.acknowledged) for r in found]
        ops += [Op(s.versions[block], s.begin_ns, s.end_ns, is_read=True, sure=True) for s in seen]
        ops += [Op(r.snapshot.versions[block], r.begin_ns, r.end_ns, sure=r.sure) for r in rollbacks]
        if not explained(ops):
            return f"block {block}: {_told(ops)}"
    came_back = {(at, r.snapshot.versions[at]) for r in rollbacks for at in blocks}
    return next((wrong for snapshot in seen if (wrong := _torn(blocks, snapshot, came_back))), None)


def _torn(
    blocks: Mapping[int, Sequence[Record]], snapshot: Snapshot, came_back: Collection[tuple[int, int]]
) -> str | None:
    """What of a snapshot is not of one moment: it has something that began after something that it lacks ended.

    Of blocks whose content in it came back by a rollback nobody knows what it lacks.
    """
    first: tuple[float, str] = snapshot.begin_ns, "it was asked for"
    last: tuple[float, str] = snapshot.end_ns, "it was there"
    for block, records in blocks.items():
        changes = [record for record in records if record.wrote]
        held = _write_of(changes, snapshot.versions[block])
        if held and (block, held.version) not in came_back:
            first = max(first, (held.begin_ns, f"{held} began"))
            overwriting = [other for other in changes if other.acknowledged and other.begin_ns > held.end_ns]
            last = min([last, *((other.end_ns, f"{other} ended") for other in overwriting)])
    return f"{snapshot.label} is torn: {first[1]}, {last[1]}" if first[0] > last[0] else None


def _write_of(changes: Sequence[Record], version: int) -> Record | None:
    """The change that wrote what a block holds; None if it can have been one of several."""
    if version == 0:
        return None if any(change.version == 0 for change in changes) else NEVER
    return next(change for change in changes if change.version == version)


def _told(ops: Sequence[Op]) -> str:
    """What began before the first moment at which it cannot be explained any more."""
    ends = sorted(op.ended for op in ops if op.sure)
    found = _by(next(end for end in ends if not explained(_by(end, ops))), ops)
    return "; ".join(map(str, sorted(found, key=lambda op: op.begun)))


def _by(now: float, ops: Sequence[Op]) -> list[Op]:
    """What can be known at a moment."""
    begun = [op for op in ops if op.begun <= now and (op.ended <= now or not op.is_read)]
    return [replace(op, sure=op.sure and op.ended <= now) for op in begun]
