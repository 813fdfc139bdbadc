"""When checkpoints happen, what they contain, and when the space they make free is used again."""

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import trio

from nbdvde import workers
from nbdvde.engine.catalogue import Catalogue
from nbdvde.engine.checkpoint import Plan, Result, index_sizes, map_sizes, root_bytes, write
from nbdvde.engine.layout import BLOCK, KIND_META, STATE_CLEAN, STATE_OPEN, LogPoint, Segment, Superblock
from nbdvde.engine.recovery import empty_segment
from nbdvde.engine.segments import Segments, State, bare
from nbdvde.engine.versions import Version, unwritten
from nbdvde.engine.writer import Writer
from nbdvde.errors import NoSpaceError

LOG_BYTES = 512 << 20
"""Log between checkpoints: replaying it takes about a second, rewriting the leaves costs 6 % of it at most."""
DIRTY_LEAVES_MAX = 8192
_RESERVE_PART = 16
"""Changed leaves are as few that they take one part in so many of the reserve, where there is one."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class Checkpointer:
    """Writes checkpoints of an open image."""

    def __init__(
        self, segments: Segments, superblock: Superblock, mac_key: bytes, catalogue: Catalogue,
        statistics: Callable[[], tuple[int, ...]], forget: Callable[[set[int]], None], log_bytes: int,
    ) -> None:  # fmt: skip
        """`forget` is called with slots before they are used again; `log_bytes` of log make a checkpoint due."""
        self.superblock = superblock
        self.lock = trio.Lock()
        """While it is held, no segment is freed."""
        self._segments, self._mac_key, self._catalogue = segments, mac_key, catalogue
        self._statistics, self._forget, self._log_bytes = statistics, forget, log_bytes
        fitting = segments.space.reserve_bytes // _RESERVE_PART // BLOCK
        self._dirty_max = min(DIRTY_LEAVES_MAX, fitting or DIRTY_LEAVES_MAX)
        self._root: Segment = superblock.root
        self._count = 0
        self._logged = 0
        """Bytes of log when the last checkpoint was made."""
        self._removed: list[tuple[int, Segment]] = []
        """Segments left out of a checkpoint, with its number."""
        self._readers: Counter[int] = Counter()
        """Readers under way, by the number of the last checkpoint when they began."""

    @property
    def count(self) -> int:
        """How many checkpoints were written."""
        return self._count

    def is_due(self, writer: Writer) -> bool:
        """Whether the log or the changed part of the maps has grown enough."""
        if self.lock.locked():
            return False
        logged = writer.log.counters.bytes_stored - self._logged
        return logged >= self._log_bytes or self._catalogue.changed >= self._dirty_max

    def can_reclaim(self) -> bool:
        """Whether checkpoints would free the space of log segments."""
        open_to_removal = (s.live == 0 and s.holds_blocks and s.linked for s in self._segments.states.values())
        return len(self._removed) > 1 or sum(open_to_removal) > 1

    async def run_if_due(self, writer: Writer) -> None:
        """Write a checkpoint, unless another one made it needless since it was asked for."""
        if self.is_due(writer):
            await self.run(writer, STATE_OPEN)

    async def keep_up(self, writer: Writer) -> None:
        """Write a checkpoint if one is due that is not being written. Raises NoSpaceError, PoisonedError."""
        async with self.lock:
            pass
        await self.run_if_due(writer)

    async def run(self, writer: Writer, state: int, *, both: bool = False, features: int = 0) -> Result:
        """Write a checkpoint and a superblock in the given state, or both superblocks.

        `features` are incompatible feature bits to add. Raises NoSpaceError (nothing has changed then) and
        PoisonedError.
        """
        with trio.CancelScope(shield=True):
            async with self.lock:
                async with writer.commit_lock:
                    writer.refuse_if_poisoned()  # what a failed commit left behind must not get into a plan
                    plan = self._plan(writer, state, both=both, features=features)
                    removed = self._leave_out_dead(plan)
                await self._reserve(writer, plan)
                try:
                    result = await workers.run(write, self._segments, plan, self._mac_key, writer.log.sync_storage)
                except Exception as error:
                    # What reached the disk is unknown: a sync that fails for lack of space loses data too.
                    writer.log.poison(f"writing a checkpoint failed: {error}")
                    raise
                self._install(plan, result, removed)
                self._logged = writer.log.counters.bytes_stored
                await self._release(everything=both)
        return result

    def give_back(self, segment: Segment) -> None:
        """Have the range of a segment freed that nothing leads to."""
        self._removed.append((0, bare(segment)))

    async def replace(self, old: State, new: State) -> bool:
        """Have the successor of a segment take its place from the next checkpoint on; whether it still could."""
        async with self.lock:
            if self._segments.states.get(new.segment.slot) is not old or not old.linked:
                self.give_back(new.segment)
                return False
            # The one that both superblocks lead to is left out of the next checkpoint.
            self._removed.append((self._count + 1, self._segments.replace(new)))
            return True

    def _plan(self, writer: Writer, state: int, *, both: bool, features: int) -> Plan:
        point = writer.log.point
        if state == STATE_CLEAN:
            point = LogPoint(empty_segment(), 0, 0, point.sequence, point.chain)
        states = {slot: s for slot, s in self._segments.states.items() if s.linked}
        self._catalogue.seal()
        versions = unwritten(member.map.base for member in self._catalogue)
        indexes = {
            slot: s.index.tobytes()
            for slot, s in states.items()
            if s.holds_blocks and s.index is not None and s.indexed != s.units
        }
        prints = {slot: bytes(known) for slot in indexes if (known := states[slot].prints).strip(b"\0")}
        entries = {slot: s.entry() for slot, s in states.items()}
        meta, map_segments, root = self._place(versions, indexes, prints, len(entries))
        heads = {member.number: member.map.base for member in self._catalogue if member.map.base.below}
        for number, version in heads.items():
            if version.shared:
                self._catalogue.members[number].map.protected = self._segments.next_sequence
        catalogue = [member.entry() for member in self._catalogue]
        superblock = replace(self.superblock, state=state, incompatible=self.superblock.incompatible | features)
        return Plan(
            superblock, point, catalogue, self._catalogue.next_number,
            self._catalogue.dedup_mib, versions, heads, self._catalogue.sealed, indexes, prints, entries,
            self._segments.next_sequence, self._statistics(), meta, map_segments, root, [], both,
        )  # fmt: skip

    def _place(
        self, versions: list[Version], indexes: dict[int, bytes], prints: dict[int, bytes], listed: int
    ) -> tuple[list[State], int, State]:
        """Segments for what a plan writes, how many of them are for maps, and one for its root.

        Raises NoSpaceError; nothing is changed then.
        """
        try:
            return self._place_in(self._segments.segment_bytes, versions, indexes, prints, listed)
        except NoSpaceError:  # there may be room in smaller pieces
            return self._place_in(self._segments.segment_bytes // 8, versions, indexes, prints, listed)

    def _place_in(
        self, length: int, versions: list[Version], indexes: dict[int, bytes], prints: dict[int, bytes], listed: int
    ) -> tuple[list[State], int, State]:
        segments, sizes = self._segments, map_sizes(versions, length)
        meta: list[State] = []
        try:
            for size in sizes + index_sizes(indexes, prints, length):
                meta.append(segments.new(KIND_META, size, os.urandom(32)))  # noqa: PERF401 - an error leaves the first
            return meta, len(sizes), segments.new_root(self._root_bytes(listed + len(meta)), os.urandom(32))
        except NoSpaceError:
            self._abandon(meta)
            raise

    def _root_bytes(self, listed: int) -> int:
        return root_bytes(listed, len(self._catalogue.members))

    def _leave_out_dead(self, plan: Plan) -> list[State]:
        """Leave segments out of the checkpoint in which nothing lives."""
        states, open_slot = self._segments.states, plan.log.segment.slot
        dead = [states[slot] for slot, entry in plan.entries.items() if entry.live == 0 and slot != open_slot]
        for state in dead:
            del plan.entries[state.segment.slot]
            plan.indexes.pop(state.segment.slot, None)
            plan.garbage += state.refs
        return dead

    async def _reserve(self, writer: Writer, plan: Plan) -> None:
        """Have the host reserve the space of a checkpoint. Raises NoSpaceError; nothing is changed then."""
        try:
            for state in (*plan.meta, plan.root):
                await workers.run(self._segments.storage.allocate, state.segment.offset, state.segment.length)
        except OSError as error:
            self._abandon([*plan.meta, plan.root])
            if error.errno in NO_SPACE:
                raise NoSpaceError("image", "has no room for a checkpoint", "free space on the host") from None
            writer.log.poison(f"reserving space failed: {error.strerror}")

    def _abandon(self, made: list[State]) -> None:
        for state in made:
            self._segments.abandon(state)

    def _install(self, plan: Plan, result: Result, removed: list[State]) -> None:
        """Take over what a durable checkpoint wrote."""
        segments = self._segments
        for version in plan.versions:
            written = result.trees[version]
            version.settle(written.root, written.nodes)
        self._catalogue.sealed -= plan.sealed
        for slot, (ref, prints) in result.indexes.items():
            state = segments.states[slot]
            state.index_ref, state.prints_bytes = ref, prints
            state.indexed = len(plan.indexes[slot]) // 8
        for slot in plan.entries:
            if slot != plan.log.segment.slot and segments.states[slot].holds_blocks:
                segments.states[slot].prints = bytearray()
                segments.settle(segments.states[slot])
        for slot, units in result.garbage.items():
            segments.states[slot].live -= units
        self._count += 1
        for state in removed:
            state.linked = False  # those who read it now still find it, until `_release`
            self._removed.append((self._count, state.segment))
        self._removed.append((self._count, self._root))
        for state in plan.meta:
            if not state.units:
                segments.abandon(state)
        self._removed += ((0, tail) for tail in result.tails)
        self.superblock, self._root = result.superblock, plan.root.segment

    async def _release(self, *, everything: bool) -> None:
        """Free the space that no superblock leads to any more, and that no reader is in.

        The older superblock still leads to what the last checkpoint left out, unless both were just written.
        """
        last = min(self._count - (not everything), min(self._readers, default=self._count))
        free = [segment for number, segment in self._removed if number <= last]
        self._removed = [(number, segment) for number, segment in self._removed if number > last]
        await workers.run(self._punch, free)
        slots = {segment.slot for segment in free if segment.slot}
        self._forget(slots)
        for segment in free:
            if segment.slot:
                self._segments.remove(segment.slot)
            self._segments.release(segment)
        self._segments.space.reclaimable = self._segments.reclaimable()
        self._truncate()

    def _truncate(self) -> None:
        """Cut the free end off the file, here and now: no thread is beyond the end of what is in use."""
        segments = self._segments
        if segments.storage.size() - segments.space.end >= segments.segment_bytes:
            with suppress(OSError):  # a longer file does no harm
                segments.storage.truncate(segments.space.end)

    def _punch(self, freed: list[Segment]) -> None:
        for segment in freed:
            self._segments.storage.punch(segment.offset, segment.length)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep the segments that are in use now until the reader is done."""
        begun = self._count
        self._readers[begun] += 1
        try:
            yield
        finally:
            self._readers[begun] -= 1
            if not self._readers[begun]:
                del self._readers[begun]
