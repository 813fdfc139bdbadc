"""Verifying an image from end to end: both superblocks and key areas, every map unit, every extent in use."""

from collections.abc import Callable, Iterator

import numpy as np

from nbdvde.engine import keys
from nbdvde.engine.extent import Decoder
from nbdvde.engine.layout import (
    ALLOCATED_ZERO,
    BLOCK,
    ENCRYPTION_NONE,
    KEY_AREA_BYTES,
    KEY_AREAS,
    KIND_LOG,
    SLOT_SHIFT,
    SUPERBLOCKS,
    UNIT_SHIFT,
    Kind,
    Superblock,
    UnitRef,
)
from nbdvde.engine.lbamap import FANOUT, LEAF_BLOCKS, Entries, Node, parse_leaf
from nbdvde.engine.reading import read_copy
from nbdvde.engine.recovery import Loaded, Volume, load
from nbdvde.engine.report import CheckError, CheckReport
from nbdvde.engine.segments import State
from nbdvde.engine.storage import Storage
from nbdvde.errors import DamageError, NbdvdeError

Progress = Callable[[int, int], None]
_ERRORS_MAX = 10_000
_SLOT = np.uint64(SLOT_SHIFT)
_UNIT = np.uint64(UNIT_SHIFT)


def check_storage(
    storage: Storage, master_of: Callable[[Superblock], bytes], progress: Progress | None = None, *, replay: bool = True
) -> CheckReport:
    """Verify everything; blocks, and only reads. Without `replay` the log after the last checkpoint is left out.

    `progress` gets extents done and in all. Raises ImageError and KeyFailure; damage goes into the report.
    """
    return begin_check(storage, master_of, replay=replay)(progress)


def begin_check(
    storage: Storage, master_of: Callable[[Superblock], bytes], *, replay: bool = True
) -> Callable[[Progress | None], CheckReport]:
    """The short part of `check_storage`, during which no superblock may be written; answers the long one."""
    try:
        checker = _Checker(load(storage, master_of, replay=replay))
    except DamageError as error:
        report = CheckReport(False, [CheckError(error.what, error.why)], 0)
        return lambda progress: report
    checker.anchors()
    return checker.run


class _Checker:
    def __init__(self, loaded: Loaded) -> None:
        self._loaded, self._segments = loaded, loaded.segments
        self._progress: Progress = lambda done, total: None
        self.errors: list[CheckError] = []
        self.units = loaded.units_verified
        self._live: dict[int, int] = dict.fromkeys(loaded.segments.states, 0)
        self._extents: list[Entries] = []
        """Distinct `entry >> 16` of each leaf."""
        self._decoder = Decoder()

    def run(self, progress: Progress | None) -> CheckReport:
        """Verify what the anchors lead to."""
        self._progress = progress or self._progress
        for volume in self._loaded.volumes.values():
            self._map(volume)
        for state in self._segments.states.values():
            self._index(state)
        self._all_extents()
        self._counts()
        return CheckReport(not self.errors, self.errors, self.units)

    def _report(
        self, where: str, what: str, disk: str | None = None, offset: int | None = None, length: int | None = None
    ) -> None:
        if len(self.errors) < _ERRORS_MAX:
            self.errors.append(CheckError(where, what, disk, offset, length))

    def anchors(self) -> None:
        """Both copies of superblock and key area; either one is enough to open, both should be sound."""
        storage, superblock = self._loaded.storage, self._loaded.superblock
        mac_key = self._loaded.keyring.superblock_key()
        for offset in SUPERBLOCKS:
            block = read_copy(storage, offset, BLOCK)
            if Superblock.unpack(block) is None or not Superblock.authentic(block, mac_key):
                self._report(f"superblock at byte {offset}", "is damaged; the other copy is in use")
        if superblock.encryption == ENCRYPTION_NONE:
            return
        for offset in KEY_AREAS:
            try:
                keys.KeyArea.parse(read_copy(storage, offset, KEY_AREA_BYTES))
            except NbdvdeError as error:
                self._report(f"key area at byte {offset}", error.why)

    def _map(self, volume: Volume) -> None:
        mapped = 0
        for number, entries in self._leaves(volume):
            extents = entries[entries > ALLOCATED_ZERO]
            mapped += len(extents)
            self._entries(volume, number, extents)
        if mapped != volume.map.mapped:
            self._report("catalogue", f"counts {volume.map.mapped} mapped blocks, the map has {mapped}", volume.name)

    def _leaves(self, volume: Volume) -> Iterator[tuple[int, Entries]]:
        """Every leaf: those that replay changed from memory, the others from the image."""
        lbamap = volume.map
        for number, leaf in lbamap.leaves.items():
            yield number, np.frombuffer(leaf, np.uint64)
        for number, ref in self._leaf_refs(volume, lbamap.height, 0, lbamap.root):
            if number in lbamap.leaves:
                continue
            try:
                data = parse_leaf(self._segments.read_unit(ref, Kind.LEAF))
            except DamageError as error:
                start = number * LEAF_BLOCKS * BLOCK
                length = min(LEAF_BLOCKS * BLOCK, volume.size - start)
                self._report(f"map leaf {number} of {volume.name}", error.why, volume.name, start, length)
                continue
            self.units += 1
            yield number, np.frombuffer(data, np.uint64)

    def _leaf_refs(self, volume: Volume, level: int, index: int, ref: UnitRef | None) -> Iterator[tuple[int, UnitRef]]:
        if ref is None:
            return
        if ref.slot not in self._live:
            self._report(
                f"map of {volume.name}", f"points at segment slot {ref.slot}, which is not in use", volume.name
            )
            return
        self._live[ref.slot] += 1
        if level == 0:
            yield index, ref
            return
        try:
            node = Node(self._segments.read_unit(ref, Kind.NODE))
        except DamageError as error:
            span = FANOUT**level * LEAF_BLOCKS * BLOCK
            start = index * span
            where = f"map node {index} of level {level} of {volume.name}"
            self._report(where, error.why, volume.name, start, min(span, volume.size - start))
            return
        self.units += 1
        for child in range(FANOUT):
            yield from self._leaf_refs(volume, level - 1, index * FANOUT + child, node.get(child))

    def _entries(self, volume: Volume, number: int, entries: Entries) -> None:
        """Count what a leaf uses, and see that it points at segments of the log."""
        slots, counts = np.unique(entries >> _SLOT, return_counts=True)
        for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
            state = self._segments.states.get(slot)
            if state is None or state.kind != KIND_LOG:
                start = number * LEAF_BLOCKS * BLOCK
                self._report(
                    f"map leaf {number} of {volume.name}", f"points at slot {slot}, no log segment", volume.name, start
                )
                entries = entries[entries >> _SLOT != slot]
            else:
                self._live[slot] += count
        units, last = _last_blocks(entries)
        self._extents.append(np.stack([units, last]))

    def _index(self, state: State) -> None:
        if state.index_ref is None:
            return
        slot = state.index_ref.slot
        self._live[slot] = self._live.get(slot, 0) + 1
        try:
            self._segments.index(state)
            self.units += 1
        except DamageError as error:
            self._report(f"index of segment {state.segment.sequence}", error.why)

    def _all_extents(self) -> None:
        """Open every extent in use, in the order of the file."""
        pairs = np.concatenate(self._extents, axis=1) if self._extents else np.zeros((2, 0), np.uint64)
        order = np.lexsort((pairs[1], pairs[0]))
        units, last = pairs[0][order], pairs[1][order]
        keep = np.append(units[1:] != units[:-1], True) if len(units) else np.zeros(0, bool)
        bad = set()
        todo = list(zip(units[keep].tolist(), last[keep].tolist(), strict=True))
        for done, (unit, block) in enumerate(todo):
            if not done % 256:
                self._progress(done, len(todo))
            try:
                self._extent(unit, block)
            except DamageError as error:
                bad.add(unit)
                self._report(self._name(unit), error.why)
        self._progress(len(todo), len(todo))
        if bad:
            self._locate(bad)

    def _extent(self, key: int, last_block: int) -> None:
        state = self._segments.find(key >> (SLOT_SHIFT - UNIT_SHIFT))
        unit = key & 0xFFFFFF
        position, length, blocks = self._segments.locate(state, self._segments.index(state), unit)
        if last_block >= blocks:
            raise DamageError("extent", f"has {blocks} blocks, the map points at block {last_block}")
        sealed = self._segments.read(state.segment.offset + position, length)
        self._decoder.frames(state.sealer.open(unit, Kind.EXTENT, sealed, blocks=blocks), blocks)
        self.units += 1

    def _name(self, key: int) -> str:
        state = self._segments.find(key >> (SLOT_SHIFT - UNIT_SHIFT))
        return f"segment {state.segment.sequence} at byte {state.segment.offset}, unit {key & 0xFFFFFF}"

    def _locate(self, bad: set[int]) -> None:
        """Say which bytes of which disk the damaged extents hold."""
        wanted = np.array(sorted(bad), np.uint64)
        for volume in self._loaded.volumes.values():
            for number, entries in self._leaves(volume):
                hits = np.flatnonzero(np.isin(entries >> _UNIT, wanted) & (entries > ALLOCATED_ZERO))
                for run in np.split(hits, np.flatnonzero(np.diff(hits) != 1) + 1):
                    if len(run):
                        start = (number * LEAF_BLOCKS + int(run[0])) * BLOCK
                        length = min(len(run) * BLOCK, volume.size - start)
                        where = self._name(int(entries[run[0]] >> _UNIT))
                        self._report(where, "these bytes cannot be read", volume.name, start, length)

    def _counts(self) -> None:
        if self.errors:
            return
        for slot, state in self._segments.states.items():
            if state.live != self._live[slot]:
                where = f"segment {state.segment.sequence}"
                self._report(where, f"counts {state.live} live, the maps use {self._live[slot]}")


def _last_blocks(entries: Entries) -> tuple[Entries, Entries]:
    """The distinct extents of some entries, and the highest block used of each."""
    ordered = np.sort(entries)
    units = ordered >> _UNIT
    last = np.append(units[1:] != units[:-1], True) if len(units) else np.zeros(0, bool)
    return units[last], ordered[last] & np.uint64((1 << UNIT_SHIFT) - 1)
