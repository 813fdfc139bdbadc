"""Where records go: into batches, and batches into segments, each of which begins by telling everything again.

So whatever segments are left, the oldest of them says what there is to know but for the entries before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

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
        self._bytes = 0
        """Of the current segment; 0: there is none yet."""
        self._start = self._twin_start = 0

    def plan(self, drafts: Sequence[Draft]) -> tuple[list[Batch], list[int]]:
        """Batches, and the place of every draft."""
        batches = [self._begin()]
        places = []
        for draft in drafts:
            size = space(len(draft.payload))
            if batches[-1].drafts and batches[-1].data_bytes + size > BATCH_BYTES:
                self._end(batches[-1])
                batches.append(self._begin())
            if not self._fits(batches[-1], draft):
                self._roll(batches, draft)
            places.append(self._put(batches[-1], draft))
        self._end(batches[-1])
        return batches, places

    def roll(self) -> Batch:
        """A batch that begins a segment with everything there is to say."""
        batches = [self._begin()]
        self._roll(batches, None)
        self._end(batches[0])
        return batches[0]

    def _begin(self) -> Batch:
        return Batch(self.number, self._head.segment, self._start, self._twin_start)

    def _end(self, batch: Batch) -> None:
        """What comes goes behind it."""
        self.number += 1
        self._start = -(-(batch.start + batch.data_bytes) // BLOCK) * BLOCK
        self._twin_start = batch.twin_start + twin_sectors(batch.twin_bytes) * SECTOR
        limit = data_bytes(self._bytes)
        batch.is_late = 2 * self._start > limit or 2 * (self._twin_start - limit) > self._bytes - limit

    def _fits(self, batch: Batch, draft: Draft) -> bool:
        data_end = batch.start + batch.data_bytes + space(len(draft.payload))
        twin_end = batch.twin_start + twin_sectors(batch.twin_bytes + draft.twin_bytes) * SECTOR
        return data_end <= data_bytes(self._bytes) and twin_end <= self._bytes

    def _put(self, batch: Batch, draft: Draft) -> int:
        place = place_of(batch.segment, batch.start + batch.data_bytes)
        batch.drafts.append(draft)
        batch.data_bytes += space(len(draft.payload))
        batch.twin_bytes += draft.twin_bytes
        self._note(draft)
        return place

    def _note(self, draft: Draft) -> None:
        match draft.kind:
            case Kind.SEGMENT:
                pass
            case Kind.GROUP:
                self._states[draft.group] = State.unpack(draft.index, draft.term, draft.payload)
            case Kind.REMOVE:
                del self._states[draft.group]
            case _:
                self._states[draft.group].note(draft)

    def _roll(self, batches: list[Batch], draft: Draft | None) -> None:
        """Begin a segment that has room for everything that it says first, and for a record."""
        if batches[-1].drafts:
            self._end(batches[-1])
        else:
            batches.pop()
        self._head = Head(self._head.segment + 1, self.next_group, self._head.uuid)
        first = [self._head.draft(), *(state.draft(group) for group, state in sorted(self._states.items()))]
        wanted = [*first, draft] if draft else first
        size = self._segment_bytes if self._bytes else self.first_bytes
        while data_bytes(size) < 2 * sum(space(len(each.payload)) for each in wanted) or size - data_bytes(
            size
        ) < 2 * sum(each.twin_bytes for each in wanted):
            size *= 2
        self._bytes, self._start, self._twin_start = size, 0, data_bytes(size)
        batches.append(self._begin())
        batches[-1].creates = size
        for each in first:
            self._put(batches[-1], each)
