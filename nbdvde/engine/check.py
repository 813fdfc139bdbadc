"""Verifying an image from end to end: both superblocks and key areas, every map unit, every extent in use.

Leaves are read one at a time. What stays of them is which extents they use, two bytes for each that is stored
(`_Usage`), beside 0.6 KiB a segment and up to 48 MiB of indexes: 1 MiB more for 16 GiB in extents of 32 KiB.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from nbdvde.engine import keys
from nbdvde.engine.catalogue import Member
from nbdvde.engine.extent import Decoder
from nbdvde.engine.known import Known, Walk
from nbdvde.engine.layout import (
    ALLOCATED_ZERO,
    BLOCK,
    ENCRYPTION_NONE,
    KEY_AREA_BYTES,
    KEY_AREAS,
    LOST,
    LOST_SLOT,
    SLOT_SHIFT,
    SUPERBLOCKS,
    UNIT_SHIFT,
    Kind,
    Segment,
    Superblock,
    UnitRef,
)
from nbdvde.engine.lbamap import LEAF_BLOCKS, parse_leaf
from nbdvde.engine.mark import Tree, mark
from nbdvde.engine.reading import read_copy
from nbdvde.engine.recovery import Loaded, load
from nbdvde.engine.regionreader import RegionReader
from nbdvde.engine.regions.directory import FORM as DIRECTORY
from nbdvde.engine.regions.verify import verify
from nbdvde.engine.report import CheckError, CheckReport
from nbdvde.engine.segments import Segments, State
from nbdvde.engine.storage import Storage
from nbdvde.engine.subjectstore import flaws
from nbdvde.engine.versions import FANOUT, Entries, Node
from nbdvde.errors import DamageError, NbdvdeError

Progress = Callable[[int, int], None]
Damaged = Callable[[Segment], None]
"""Told of the segment of each extent that cannot be read."""
Batch: TypeAlias = list[tuple[int, Entries]]
"""Some leaves with their numbers."""
Blocks: TypeAlias = npt.NDArray[np.bool_]
"""Which blocks of a leaf."""
_LEAVES_AT_ONCE = 128
_ERRORS_MAX = 100_000
_SLOT = np.uint64(SLOT_SHIFT)
_UNIT = np.uint64(UNIT_SHIFT)
_UNIT_MASK, _BLOCK_MASK = (1 << (SLOT_SHIFT - UNIT_SHIFT)) - 1, (1 << UNIT_SHIFT) - 1


def check_storage(
    storage: Storage, master_of: Callable[[Superblock], bytes], progress: Progress | None = None, *, replay: bool = True
) -> CheckReport:
    """Verify everything; blocks, and only reads. Without `replay` the log after the last checkpoint is left out.

    `progress` gets extents done and in all. Raises ImageError and KeyFailure; damage goes into the report.
    """
    return begin_check(storage, master_of, replay=replay)(progress)


def begin_check(
    storage: Storage, master_of: Callable[[Superblock], bytes], *, replay: bool = True, damaged: Damaged | None = None
) -> Callable[[Progress | None], CheckReport]:
    """The short part of `check_storage`, during which no superblock may be written; answers the long one.

    That calls `damaged` for each extent that cannot be read.
    """
    try:
        loaded = load(storage, master_of, replay=replay, salvage=True)
        # When a flaw was found the counts are not looked at: without its log the image may not even open.
        checker = Checker(loaded, loaded if loaded.flaws else load(storage, master_of, replay=False), damaged)
    except DamageError as error:
        report = CheckReport(False, [CheckError(error.what, error.why)], 0)
        return lambda progress: report
    checker.anchors()
    return checker.run


class Checker:
    """One check: what it reports, and where the damage lies for whoever repairs it."""

    def __init__(self, loaded: Loaded, counted: Loaded, damaged: Damaged | None = None) -> None:
        """`counted` is the image at its last checkpoint."""
        self._damaged: Damaged = damaged or (lambda segment: None)
        self._loaded, self._counted, self._segments = loaded, counted, loaded.segments
        self._progress: Progress = lambda done, total: None
        self.errors: list[CheckError] = []
        self.units = loaded.units_verified
        self.bad: dict[int, str] = {}
        """Extents that cannot be read, and why: slot and unit, as in a map entry without the block."""
        self._bad_keys = np.zeros(0, np.uint64)
        self.lost = False
        """Whether some bytes of a disk or a snapshot cannot be read."""
        self.torn: dict[tuple[int, int, int], None] = {}
        """Leaves (level 0) and nodes that cannot be read: volume, level, index."""
        self.mapped: dict[int, int] = {}
        """Blocks with an extent behind them by volume, as far as its map can be read."""
        self.without_prints: list[State] = []
        """Segments of which the fingerprints cannot be read."""
        self._usage, self._known = _Usage(loaded.segments), Known(several=len(loaded.catalogue.members) > 1)
        self._decoder = Decoder(loaded.dictionaries)

    def run(self, progress: Progress | None) -> CheckReport:
        """Verify what the anchors lead to."""
        self._progress = progress or self._progress
        for volume in self._loaded.catalogue:
            self._map(volume)
        for state in self._segments.states.values():
            self._index(state)
        self._all_extents()
        self._regions()
        self._counts()
        return CheckReport(not self.errors, self.errors, self.units)

    def _report(
        self, where: str, what: str, disk: str | None = None, offset: int | None = None, length: int | None = None
    ) -> None:
        self.lost |= offset is not None
        if len(self.errors) < _ERRORS_MAX:
            self.errors.append(CheckError(where, what, disk, offset, length))

    def anchors(self) -> None:
        """Both copies of superblock and key area; either one is enough to open, both should be sound."""
        storage, superblock = self._loaded.storage, self._loaded.superblock
        mac_key = self._loaded.keyring.superblock_key()
        for where, what in self._loaded.flaws:
            self._report(where, what)
        for offset in SUPERBLOCKS:
            block = read_copy(storage, offset, BLOCK)
            if Superblock.unpack(block) is None or not Superblock.authentic(block, mac_key):
                self._report(f"superblock at byte {offset}", "is damaged; the other copy is in use")
        if self._loaded.subjects:
            for where, what in flaws(storage, self._loaded.keyring.master, superblock.uuid):
                self._report(where, what)
        if superblock.encryption == ENCRYPTION_NONE:
            return
        for offset in KEY_AREAS:
            try:
                keys.KeyArea.parse(read_copy(storage, offset, KEY_AREA_BYTES))
            except NbdvdeError as error:
                self._report(f"key area at byte {offset}", error.why)

    def _map(self, volume: Member) -> None:
        walk, errors = Walk(self._known, volume.map.in_memory()), len(self.errors)
        for leaves in _batches(self.leaves(volume, walk)):
            for number, entries in leaves:
                walk.count(number, int(np.count_nonzero(entries > LOST)))
            entries = np.concatenate([entries[entries > ALLOCATED_ZERO] for _, entries in leaves])
            if not self._usage.add(entries):
                self._report_foreign(volume, leaves)
        self.mapped[volume.number] = mapped = walk.mapped
        if len(self.errors) == errors:
            walk.keep()
        torn = any(number == volume.number for number, _, _ in self.torn)
        if mapped != volume.map.mapped and not torn:
            name = self._loaded.catalogue.label(volume)
            self._report("catalogue", f"counts {volume.map.mapped} mapped blocks, the map has {mapped}", name)

    def leaves(self, volume: Member, walk: Walk | None = None) -> Iterator[tuple[int, Entries]]:
        """Every leaf: those that replay changed from memory, the others from the image but for what a walk skips."""
        changed, tree = volume.map.in_memory(), volume.map.base.tree
        for number in changed:
            leaf = volume.map.held(number)
            assert leaf is not None, "it is in memory"
            yield number, np.frombuffer(leaf, np.uint64)
        for number, ref in self._leaf_refs(volume, tree.height, 0, tree.root, set(), walk):
            if number in changed:
                continue
            try:
                data = parse_leaf(self._segments.read_unit(ref, Kind.LEAF))
            except DamageError as error:
                self._report_torn(volume, 0, number, error)
                continue
            self.units += 1
            yield number, np.frombuffer(data, np.uint64)

    def _leaf_refs(
        self, volume: Member, level: int, index: int, ref: UnitRef | None, seen: set[tuple[int, int]], walk: Walk | None
    ) -> Iterator[tuple[int, UnitRef]]:  # fmt: skip
        """(number, where it lies) of every leaf below a node; `seen` has the nodes met before."""
        if ref is None or (walk and walk.skips(ref, level, index)):
            return
        try:
            self._segments.find(ref.slot)
            if level == 0:
                yield index, ref
                return
            if (ref.slot, ref.unit) in seen:  # or it might go round for ever
                raise DamageError("map node", "stands in two places of the map")
            seen.add((ref.slot, ref.unit))
            node = Node(self._segments.read_unit(ref, Kind.NODE))
        except DamageError as error:
            self._report_torn(volume, level, index, error)
            return
        self.units += 1
        for child in range(FANOUT):
            yield from self._leaf_refs(volume, level - 1, index * FANOUT + child, node.get(child), seen, walk)

    def _regions(self) -> None:
        """Verify what the regions of disks hold, as far as it can be read."""
        for (tag, _), region in self._loaded.catalogue.regions.items():
            if tag == DIRECTORY.tag:
                for where, what in verify(self._region_block(region)):
                    self._report(f"{self._loaded.catalogue.label(region)}, {where}", what)

    def _region_block(self, region: Member) -> Callable[[int], bytes]:
        return RegionReader(self._segments, region, self._loaded.dictionaries).next_block

    def _report_torn(self, volume: Member, level: int, index: int, error: DamageError) -> None:
        """Say what lies below a leaf or node, the first time that it is met."""
        if (volume.number, level, index) in self.torn:
            return
        self.torn[volume.number, level, index] = None
        span = FANOUT**level * LEAF_BLOCKS * BLOCK
        what = f"map node {index} of level {level}" if level else f"map leaf {index}"
        length = min(span, volume.size - index * span)
        name = self._loaded.catalogue.label(volume)
        self._report(f"{what} of {name}", error.why, name, index * span, length)

    def _report_foreign(self, volume: Member, leaves: Batch) -> None:
        """Say which blocks of some leaves point at what is no extent."""
        for number, entries in leaves:
            for slot in np.unique(entries[self.foreign(entries)] >> _SLOT).tolist():
                what = f"points at slot {slot}, which has no such extent"
                if slot == LOST_SLOT:
                    what = "what these bytes were is lost, until they are written again"
                blocks = self.foreign(entries) & (entries >> _SLOT == slot)
                where = f"map leaf {number} of {self._loaded.catalogue.label(volume)}"
                self._report_blocks(where, what, volume, number, blocks)

    def foreign(self, entries: Entries) -> Blocks:
        """Which blocks of a leaf point at what is no extent, or are lost."""
        return (entries > ALLOCATED_ZERO) & self._usage.foreign(entries)

    def _report_blocks(self, where: str, what: str, volume: Member, number: int, blocks: Blocks) -> None:
        """Report blocks of a leaf, each run of them by itself."""
        name, hits = self._loaded.catalogue.label(volume), np.flatnonzero(blocks)
        for run in np.split(hits, np.flatnonzero(np.diff(hits) != 1) + 1):
            if len(run):
                start = (number * LEAF_BLOCKS + int(run[0])) * BLOCK
                length = min(len(run) * BLOCK, volume.size - start)
                self._report(where, what, name, start, length)

    def _index(self, state: State) -> None:
        try:
            if state.index_ref:
                self._segments.index(state)
            for prints in state.refs[1:]:
                self._read_prints(state, prints)
            self.units += len(state.refs)
        except DamageError as error:
            self._report(f"index of segment {state.segment.sequence}", error.why)

    def _read_prints(self, state: State, ref: UnitRef) -> None:
        try:
            self._segments.read_unit(ref, Kind.PRINTS)
        except DamageError:
            self.without_prints.append(state)
            raise

    def _all_extents(self) -> None:
        """Open every extent in use, in the order of the file."""
        done, total = 0, self._usage.extents()
        for state in sorted(self._segments.states.values(), key=lambda state: state.segment.offset):
            for unit, blocks in self._usage.of(state.segment.slot):
                if not done % 256:
                    self._progress(done, total)
                done += 1
                try:
                    self._extent(state, unit, blocks)
                except DamageError as error:
                    self.bad[state.segment.slot << (SLOT_SHIFT - UNIT_SHIFT) | unit] = error.why
                    self._damaged(state.segment)
            state.sealer.forget()
        self._progress(done, total)
        if self.bad:
            self._bad_keys = np.fromiter(self.bad, np.uint64, len(self.bad))
            self._locate()

    def _extent(self, state: State, unit: int, used: int) -> None:
        position, length, blocks = self._segments.locate(state, self._segments.index(state), unit)
        if used > blocks:
            raise DamageError("extent", f"has {blocks} blocks, the map points at block {used - 1}")
        sealed = self._segments.read(state.segment.offset + position, length)
        self._decoder.frames(state.sealer.open(unit, Kind.EXTENT, sealed, blocks=blocks), blocks)
        self.units += 1

    def _locate(self) -> None:
        """Say which bytes of which disk the damaged extents hold."""
        for volume in self._loaded.catalogue:
            for number, entries in self.leaves(volume):
                unreadable = self.unreadable(entries)
                for key in np.unique(entries[unreadable] >> _UNIT).tolist():
                    where = _name(self._segments.find(key >> (SLOT_SHIFT - UNIT_SHIFT)), key & _UNIT_MASK)
                    blocks = unreadable & (entries >> _UNIT == key)
                    self._report_blocks(where, self.bad[key], volume, number, blocks)

    def unreadable(self, entries: Entries) -> Blocks:
        """Which blocks of a leaf lie in extents that cannot be read."""
        return (entries > LOST) & np.isin(entries >> _UNIT, self._bad_keys)

    def _counts(self) -> None:
        """The segment table must count what can be counted down, and not 0 where anything is in use.

        More is garbage, which a mark finds. What the log changed since the checkpoint is counted as it is replayed.
        """
        if self.errors:
            return
        segments = self._counted.segments
        slots = max(segments.states, default=0) + 1
        indexes = [ref for state in segments.states.values() for ref in state.refs]
        trees = [Tree(member.number, member.map.height, member.map.root) for member in self._counted.catalogue]
        used = mark(trees, indexes, segments.read_unit, slots)
        own = mark((), indexes, segments.read_unit, slots)
        catalogue = self._counted.catalogue
        for disk in (*catalogue.disks, *catalogue.regions.values()):
            tree = Tree(disk.number, disk.map.height, disk.map.root)
            for slot, count in enumerate(mark([tree], (), segments.read_unit, slots)):
                own[slot] += count if count and segments.find(slot).born >= disk.map.protected else 0
        for slot, state in segments.states.items():
            if state.live < max(own[slot], min(used[slot], 1)):
                what = f"counts {state.live} live, the maps use {used[slot]}"
                self._report(f"segment {state.segment.sequence}", what)


class _Usage:
    """Which blocks the leaves use: the last one of each extent."""

    def __init__(self, segments: Segments) -> None:
        states = sorted((s for s in segments.states.values() if s.holds_blocks), key=lambda s: s.segment.slot)
        self._slots = np.array([state.segment.slot for state in states], np.uint64)
        self._units = np.array([state.units for state in states], np.uint64)
        self._starts = np.cumsum(self._units) - self._units
        self._blocks = np.zeros(int(self._units.sum()), np.uint16)
        """For each unit of each segment the blocks up to the last one used, 0 for an extent that is not in use."""

    def add(self, entries: Entries) -> bool:
        """Take in what leaves point at; whether all of it is extents of log segments."""
        if not len(self._slots):
            return not len(entries)
        at, good = self._segments_of(entries)
        at, entries = at[good], entries[good]
        last = np.minimum(entries & np.uint64(_BLOCK_MASK), np.uint64(_BLOCK_MASK - 1)).astype(np.uint16)
        units = entries >> _UNIT & np.uint64(_UNIT_MASK)
        np.maximum.at(self._blocks, self._starts[at] + units, last + np.uint16(1))
        return bool(good.all())

    def foreign(self, entries: Entries) -> Blocks:
        """Which of some entries point at what is no extent of a log segment."""
        if not len(self._slots):
            return np.ones(len(entries), np.bool_)
        return np.logical_not(self._segments_of(entries)[1])

    def _segments_of(self, entries: Entries) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
        """For each entry the place of its segment, and whether there is such a unit."""
        slots = entries >> _SLOT
        at = np.minimum(np.searchsorted(self._slots, slots), len(self._slots) - 1)
        return at, (self._slots[at] == slots) & (entries >> _UNIT & np.uint64(_UNIT_MASK) < self._units[at])

    def extents(self) -> int:
        """How many are in use."""
        return int(np.count_nonzero(self._blocks))

    def of(self, slot: int) -> Iterator[tuple[int, int]]:
        """(unit, blocks up to the last one used) of the extents in use of a segment."""
        at = int(np.searchsorted(self._slots, slot))
        if at < len(self._slots) and self._slots[at] == slot:
            start = int(self._starts[at])
            blocks = self._blocks[start : start + int(self._units[at])]
            for unit in np.flatnonzero(blocks).tolist():
                yield unit, int(blocks[unit])


def _batches(leaves: Iterable[tuple[int, Entries]]) -> Iterator[Batch]:
    """Several leaves at a time: numpy takes as long for one."""
    batch: Batch = []
    for number, leaf in leaves:
        batch.append((number, leaf))
        if len(batch) == _LEAVES_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _name(state: State, unit: int) -> str:
    return f"segment {state.segment.sequence} at byte {state.segment.offset}, unit {unit}"
