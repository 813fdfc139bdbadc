"""The logs of all groups of a node, in segments of a directory: format, rules and reasons are in docs/raft-log.md."""

import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, replace
from functools import partial

from nbdvde.raft.directory import Directory
from nbdvde.raft.filestore import FileStore
from nbdvde.raft.logfiles import LogFiles
from nbdvde.raft.messages import Entry, Snapshot
from nbdvde.raft.plan import Planner
from nbdvde.raft.recent import Cache, Recent
from nbdvde.raft.records import Draft, Head, Kind, State
from nbdvde.raft.replay import Replay
from nbdvde.raft.store import Work, check_absent, check_present
from nbdvde.raft.view import View

_log = logging.getLogger(__name__)
_STRAGGLERS = 16
"""What is still needed of the oldest segment is written again, so that it can go, once it is this part of a segment."""
_SPRAWL = 4
"""Or once the log takes so many times what is needed of it."""
_MOVE_BYTES = 4 << 20
"""Of entries that are written again at a time."""


@dataclass(frozen=True)
class Sizes:
    """What a log takes."""

    segment_bytes: int = 64 << 20
    """On the disk, a multiple of 256 KiB; one more than needed is kept ready."""
    memory_bytes: int = 64 << 20
    """For the newest entries."""


@dataclass(frozen=True, slots=True)
class _Move:
    """An entry on its way out of the oldest segment."""

    store: FileStore
    wanted: tuple[int, int, int, int]
    """Index, term, place, length."""
    entry: Entry | None = None


class FileLog:
    """Implements NodeLog."""

    def __init__(
        self, directory: Directory, sizes: Sizes = Sizes(), fresh: Callable[[int], bytes] = os.urandom
    ) -> None:
        """Take over a directory and the log in it, or begin one, with random bytes from `fresh`. Blocks.

        Raises OSError, NoSpaceError, PoisonedError; DamageError when it cannot even be told which groups there are.
        """
        self._sizes = sizes
        self._files = LogFiles(directory)
        with ExitStack() as undo:
            undo.callback(self.close)
            self._begin(fresh)
            undo.pop_all()

    def _begin(self, fresh: Callable[[int], bytes]) -> None:
        """Read what there is, and have it told again in a segment of its own."""
        files, replay = self._files, Replay()
        replay.run(files.segments())
        if not replay.is_blurred:
            files.drop_behind(replay.head.segment if replay.head else 0)
        self.notes = replay.notes
        """What was found to be damaged or lost."""
        for note in self.notes:
            _log.warning("raft log: %s", note)
        uuid = replay.head.uuid if replay.head else fresh(16)
        head = Head(max(files.numbers, default=0), replay.next_group, uuid, replay.unsure)
        files.follow(head.log, replay.chain or 0)
        self.unsure = replay.unsure
        self._live = replay.live
        states = {number: copy(view.state) for number, view in replay.views.items()}
        self._planner = Planner(head, replay.batch, states, self._sizes.segment_bytes)
        self._recent = Recent(self._sizes.memory_bytes)
        self._by_number = {number: FileStore(self, number, view) for number, view in replay.views.items()}
        self._stores = {store.view.state.name: store for store in self._by_number.values()}
        self._drafts = replay.spoiled
        self._batches = deque([self._planner.roll()])
        """Those that have places and are not durable."""
        self._segments = deque(files.numbers)
        self._needless: deque[int] = deque()
        """Segments that go when everything planned is durable."""
        self._round = self._durable = 0
        """Of what was taken: the newest, and the newest that is durable."""
        self._moved: list[_Move] = []
        if work := self.take():
            work()

    def groups(self) -> Sequence[str]:
        return sorted(self._stores)

    def group(self, name: str) -> FileStore | None:
        return self._stores.get(name)

    def create(self, name: str, start: Snapshot) -> FileStore:
        check_absent(self._stores, name)
        number = self._planner.next_group
        self._planner.next_group += 1
        store = FileStore(self, number, View.begun(State.begun(name, start, unsure=self.unsure), self._live))
        self._stores[name] = self._by_number[number] = store
        self.emit(store.view.state.draft(number))
        return store

    def remove(self, name: str) -> None:
        check_present(self._stores, name)
        store = self._stores.pop(name)
        del self._by_number[store.number]
        store.view.places.clear(1)
        self.emit(Draft(Kind.REMOVE, store.number, 0, 0))

    def emit(self, draft: Draft) -> None:
        """Have a record written with the next work, unless its group was removed."""
        if draft.kind == Kind.REMOVE or draft.group in self._by_number:
            self._drafts.append(draft)

    def keep(self, cache: Cache, entries: Sequence[Entry], *, written: bool) -> None:
        """Have entries in memory."""
        self._recent.shrink(self._durable)  # not these: whoever had them read is about to ask for them
        self._recent.add(cache, entries, 0 if written else self._round + 1)

    def read(self, group: int, index: int, term: int, place: int, length: int) -> Entry | None:
        """An entry from the disk, None if it is not there. Blocks."""
        return self._files.read(group, index, term, place, length)

    def take(self) -> Work | None:
        self._files.check()
        self._recent.shrink(self._durable)
        self._write_moved()
        if self._drafts:
            self._plan()
        if not self._batches:
            return None
        self._segments += sorted({batch.segment for batch in self._batches} - set(self._segments))
        while len(self._segments) > 1 and not self._live.of(self._segments[0]):
            self._needless.append(self._segments.popleft())
        return partial(self._write, self._round, self._stragglers())

    def close(self) -> None:
        self._files.close()

    def _write(self, round_: int, moves: Sequence[_Move]) -> None:
        while self._batches:
            batch = self._batches[0]
            self._files.write(batch)
            self._batches.popleft()
            if batch.is_late:
                self._files.prepare(batch.segment + 1, self._sizes.segment_bytes)
        self._durable = round_
        while self._needless:
            self._files.drop(self._needless.popleft())
        self._moved += [replace(move, entry=self.read(move.store.number, *move.wanted)) for move in moves]

    def _plan(self) -> None:
        """Give everything new a place."""
        drafts, self._drafts = self._drafts, []
        batches, places = self._planner.plan(drafts)
        self._batches += batches
        self._round += 1
        for draft, place in zip(drafts, places, strict=True):
            if draft.is_entry and (store := self._by_number.get(draft.group)):
                store.view.places.put(draft.index, draft.term, len(draft.payload), place)

    def _stragglers(self) -> list[_Move]:
        """What has to be written again so that the oldest segment can go, if that is worth it; not too much at once."""
        count, oldest, size = len(self._segments), self._segments[0], self._sizes.segment_bytes
        sprawls = count * size > _SPRAWL * (self._live.total + size)
        if count < 3 or (self._live.of(oldest) > size // _STRAGGLERS and not sprawls):
            return []
        moves: list[_Move] = []
        left = _MOVE_BYTES
        for store in self._by_number.values():
            for wanted in store.wanted_in(oldest):
                moves.append(_Move(store, wanted))
                left -= wanted[3]
                if left <= 0:
                    return moves
        return moves

    def _write_moved(self) -> None:
        moved, self._moved = self._moved, []
        for move in moved:
            store, (index, _, place, _) = move.store, move.wanted
            if self._by_number.get(store.number) is not store or not store.view.places.lies(index, place):
                continue
            if move.entry:
                self.emit(Draft.of(store.number, move.entry, Kind.AGAIN))
            else:
                store.view.places.spoil(index)
