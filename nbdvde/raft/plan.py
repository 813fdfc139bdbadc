"""Where records go: into batches, and batches into segments, each of which begins by telling everything again.

So whatever segments are left, the oldest of them says what there is to know but for the entries before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from nbdvde.raft.records import (
    BLOCK,
    SECTOR,
    Draft,
    Head,
    Kind,
    State,
    data_bytes,
    place_of,
    space,
    twin_sectors,
)

BATCH_BYTES = 8 << 20
"""A batch is written at once; more than this is split."""


@dataclass
class Batch:
    """Records that are written, and made durable, at once."""

    number: int
    segment: int
    start: int
    """Offset in the segment."""
    twin_start: int
    creates: int = 0
    """Bytes of the segment, when it is new."""
    drafts: list[Draft] = field(default_factory=list)
    data_bytes: int = 0
    twin_bytes: int = 0
    is_late: bool = False
    """Whether half of the segment is used."""

    def put(self, draft: Draft, size: int, twin_bytes: int) -> int:
        """Have a record written that takes so much, here and in the twin; answers its place."""
        place = place_of(self.segment, self.start + self.data_bytes)
        self.drafts.append(draft)
        self.data_bytes += size
        self.twin_bytes += twin_bytes
        return place


class Planner:
    """Decides for every record, in order, where it will lie."""

    def __init__(self, head: Head, batch: int, states: dict[int, State], segment_bytes: int) -> None:
        """Goes on behind the segment of `head`, with what is known of every group until then."""
        self.number = batch
        """Of the next batch."""
        self.next_group = head.next_group
        self.first_bytes = segment_bytes // 8
        """The first segment is short: a node that is started again and again takes little more each time."""
        self._head, self._states, self._segment_bytes = head, states, segment_bytes
        self._bytes = self._limit = 0
        """Of the current segment, with twins and without; 0: there is none yet."""
        self._start = self._twin_start = 0

    def plan(self, drafts: Sequence[Draft]) -> tuple[list[Batch], list[int]]:
        """Batches, and the place of every draft."""
        batches = [self._begin()]
        places = []
        for draft in drafts:
            size, twin_bytes = space(len(draft.payload)), draft.twin_bytes
            batch = batches[-1]
            if batch.drafts and batch.data_bytes + size > BATCH_BYTES:
                self._end(batch)
                batches.append(batch := self._begin())
            if not self._has_room(batch, size, twin_bytes):
                batch = self._roll(batches, draft)
            places.append(batch.put(draft, size, twin_bytes))
            self._note(draft)
        self._end(batches[-1])
        return batches, places

    def roll(self) -> Batch:
        """A batch that begins a segment with everything there is to say."""
        batch = self._roll([self._begin()], None)
        self._end(batch)
        return batch

    def _begin(self) -> Batch:
        return Batch(self.number, self._head.segment, self._start, self._twin_start)

    def _end(self, batch: Batch) -> None:
        """What comes goes behind it."""
        self.number += 1
        self._start = -(-(batch.start + batch.data_bytes) // BLOCK) * BLOCK
        self._twin_start = batch.twin_start + twin_sectors(batch.twin_bytes) * SECTOR
        batch.is_late = (
            2 * self._start > self._limit or 2 * (self._twin_start - self._limit) > self._bytes - self._limit
        )

    def _has_room(self, batch: Batch, size: int, twin_bytes: int) -> bool:
        data_end = batch.start + batch.data_bytes + size
        twin_end = batch.twin_start + twin_sectors(batch.twin_bytes + twin_bytes) * SECTOR
        return data_end <= self._limit and twin_end <= self._bytes

    def _note(self, draft: Draft) -> None:
        match draft.kind:
            case Kind.GROUP:
                self._states[draft.group] = State.unpack(draft.index, draft.term, draft.payload)
            case Kind.REMOVE:
                del self._states[draft.group]
            case _:
                self._states[draft.group].note(draft)

    def _roll(self, batches: list[Batch], draft: Draft | None) -> Batch:
        """Begin a segment that has room for everything that it says first, and for a record; answers its first batch.

        What was planned last ends there.
        """
        if batches[-1].drafts:
            self._end(batches[-1])
        else:
            batches.pop()
        self._head = replace(self._head, segment=self._head.segment + 1, next_group=self.next_group)
        first = [self._head.draft(), *(state.draft(group) for group, state in sorted(self._states.items()))]
        size = self._size_for([*first, draft] if draft else first)
        self._bytes, self._limit = size, data_bytes(size)
        self._start, self._twin_start = 0, self._limit
        batches.append(batch := self._begin())
        batch.creates = size
        for each in first:
            batch.put(each, space(len(each.payload)), each.twin_bytes)
        return batch

    def _size_for(self, drafts: Sequence[Draft]) -> int:
        """Bytes of the next segment, no more than half of which these records take."""
        data = sum(space(len(draft.payload)) for draft in drafts)
        twin = sum(draft.twin_bytes for draft in drafts)
        size = self._segment_bytes if self._bytes else self.first_bytes
        while data_bytes(size) < 2 * data or size - data_bytes(size) < 2 * twin:
            size *= 2
        return size
