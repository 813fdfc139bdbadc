"""What the segments of a log say, read from the oldest to the newest.

A batch whose sectors are all there in the log or in its twin is known. What is missing of the last one was never
acknowledged if its twin is not whole either, and is cut. Everything else that is missing was lost: an entry whose twin
is there is damaged, and of whatever could have been in a batch of which nothing is known every group is unsure, until
a later segment tells everything again.
"""

from collections.abc import Iterable, Sequence

import msgspec

from nbdvde.errors import DamageError
from nbdvde.raft.places import Live
from nbdvde.raft.records import Draft, Head, Kind, State
from nbdvde.raft.segment import Found, Segment, Spot
from nbdvde.raft.view import View

_HINT = "remove the node from its groups and let it join with an empty directory"


class Replay:
    """Of all segments, in their order."""

    def __init__(self) -> None:
        self.live = Live()
        self.views: dict[int, View] = {}
        self.batch = 1
        """Number of the next one."""
        self.chain: int | None = None
        """`check` of the last record; None: not known, there is damage before."""
        self.head: Head | None = None
        """Of the newest segment."""
        self.next_group = 1
        self.notes: list[str] = []
        """What was wrong, for people."""
        self.is_blurred = False
        """Whether something was lost in the newest segment or behind it."""
        self.unsure = False
        """Whether there may have been groups that nothing tells of."""
        self._spoiled: list[tuple[int, Draft]] = []
        self._unknown: set[int] = set()
        """Groups that nothing was told about."""

    def run(self, segments: Iterable[Segment]) -> None:
        """Read them. Raises DamageError when groups cannot even be named, ImageError."""
        current: Segment | None = None
        behind: list[Segment] = []
        for segment in segments:
            if segment.first is None:
                behind.append(segment)
                continue
            behind = []
            if current:
                self._read(current, segment.first)
            self._enter_segment(segment.number, segment.first)
            current = segment
        if current:
            self._read(current, None)
        self._end([segment for segment in behind if not segment.is_torn(self.batch, segment.begin, self.chain)])

    def _enter_segment(self, number: int, first: int) -> None:
        if self.head and number != self.head.segment + 1:
            self._lose(f"what came before segment {number}")
        self.batch, self.is_blurred = first, False

    def _read(self, segment: Segment, stop: int | None) -> None:
        """Read a segment; the next one begins with batch `stop`, None: there is none."""
        spot: Spot | None = segment.begin
        while spot and self.batch != stop:
            if found := self._records(segment, spot):
                self._take(found)
                spot = spot.behind(found)
            elif spot == segment.begin and (found := self._records(segment, spot, chained=False)):
                self._take(found)
                spot = spot.behind(found)
                self._lose(f"what came before segment {segment.number}")
            elif stop is None and segment.is_torn(self.batch, spot, self.chain):
                return
            else:
                spot = self._skip(segment, stop)

    def _records(self, segment: Segment, spot: Spot, *, chained: bool = True) -> Sequence[Found] | None:
        log = self.head.log if self.head else None
        return segment.records(self.batch, spot, self.chain if chained else None, log)

    def _skip(self, segment: Segment, stop: int | None) -> Spot | None:
        """A batch is lost: go on with the next one that is known of; answers where it begins."""
        self._lose(f"batch {self.batch} in segment {segment.number}")
        following = segment.next_twin(self.batch)
        if following is None or (stop is not None and following >= stop):
            self.batch = self.batch + 1 if stop is None else stop
            return None
        self.batch = following
        return segment.spot(following)

    def _take(self, found: Sequence[Found]) -> None:
        if found[0].header.kind == Kind.SEGMENT:
            self._forget({record.header.group for record in found if record.header.kind == Kind.GROUP})
        for record in found:
            self._apply(record)
        self.batch += 1
        self.chain = found[-1].header.check

    def _forget(self, named: set[int]) -> None:
        """A segment names all groups that there are."""
        for group in self.views.keys() - named:
            self.views.pop(group).places.clear(1)
        self._unknown.clear()

    def _lose(self, what: str) -> None:
        self.notes.append(f"lost: {what}")
        self.chain = None
        self.is_blurred = self.unsure = True
        for view in self.views.values():
            view.doubt()

    def _apply(self, record: Found) -> None:
        draft = record.draft
        view = self.views.get(draft.group)
        if draft.kind == Kind.SEGMENT:
            self._begin(draft)
        elif draft.kind == Kind.GROUP:
            self._restate(draft)
        elif draft.kind == Kind.REMOVE:
            self._unknown.discard(draft.group)
            if view:
                view.places.clear(1)
                del self.views[draft.group]
        elif view is None:
            self._unknown.add(draft.group)
        elif draft.is_entry:
            self._enter(view, record, draft)
        else:
            view.change(draft)

    def _begin(self, draft: Draft) -> None:
        self.head = Head.unpack(draft.payload)
        self.next_group = max(self.next_group, self.head.next_group)
        self.unsure = self.head.unsure

    def _restate(self, draft: Draft) -> None:
        state = State.unpack(draft.index, draft.term, draft.payload)
        self.next_group = max(self.next_group, draft.group + 1)
        self._unknown.discard(draft.group)
        if view := self.views.get(draft.group):
            view.restate(state)
        else:
            self.views[draft.group] = View.begun(state, self.live)

    def _enter(self, view: View, record: Found, draft: Draft) -> None:
        if draft.kind == Kind.ENTRY:
            view.enter(draft)
        elif record.payload is None and view.places.is_sound(draft.index):
            return  # it still is where it was before
        view.place(draft, record.place, record.header.length)
        if record.payload is None:
            view.places.spoil(draft.index)
        elif not record.is_whole:
            self._spoiled.append((record.place, draft))

    def _end(self, blurred: Sequence[Segment]) -> None:
        """Look at what is left: segments of which nothing is known, groups without a name, entries without a place."""
        for segment in blurred:
            self._lose(f"segment {segment.number}")
        if self._unknown or (blurred and not self.head):
            raise DamageError("raft log", "does not tell whose entries it holds", _HINT)
        for view in self.views.values():
            self._close_gap(view)
            if damaged := view.places.damaged:
                self.notes.append(
                    f"damaged: {len(damaged)} of the entries of group {view.state.name}, from {min(damaged)} on"
                )

    def _close_gap(self, view: View) -> None:
        """Entries of which nothing is left end the log: those behind them are fetched again."""
        if (missing := view.places.missing()) is not None:
            self.notes.append(f"lost: entry {missing} of group {view.state.name} and those behind it")
            view.change(view.truncation(0, missing))
            view.state.unsure = True

    @property
    def spoiled(self) -> list[Draft]:
        """Entries that are known from their twins alone, to be written again."""
        return [
            msgspec.structs.replace(draft, kind=Kind.AGAIN)
            for place, draft in self._spoiled
            if (view := self.views.get(draft.group)) and view.places.lies(draft.index, place)
        ]
