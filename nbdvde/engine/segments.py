"""The segments of an image in use: identity, key and index of each, and the reading of sealed units."""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import replace
from typing import TypeAlias

from nbdvde import workers
from nbdvde.engine.dedup import PRINT_BYTES
from nbdvde.engine.layout import (
    BLOCK,
    KIND_COMPACT,
    KIND_LOG,
    KIND_META,
    LINK_BYTES,
    LOST_SLOT,
    MAX_SLOTS,
    SEGMENT_BYTES_MAX,
    TAG_BYTES,
    Kind,
    Segment,
    TableEntry,
    UnitRef,
    unit_refs,
    unpack_index,
)
from nbdvde.engine.metadata import inflate
from nbdvde.engine.reading import read, unreadable
from nbdvde.engine.sealing import Keyring, Sealer
from nbdvde.engine.space import FreeSpace
from nbdvde.engine.storage import Storage
from nbdvde.errors import DamageError, NoSpaceError

Index: TypeAlias = "array[int]"
"""Entries of typecode 'Q', one for each unit: layout.pack_index, 0 for what is no extent."""
_LOADED_BYTES_MAX = 48 << 20
"""What may be kept of closed segments: enough for 64 GiB in extents of 32 KiB."""
_THIN = 8
"""Of what is stored, one part in so many is garbage that cleaning may leave."""
_CIPHER_BYTES = 3 << 10


class State:
    """One segment in use."""

    __slots__ = (
        "blocks", "born", "dead", "index", "index_ref", "indexed", "kind", "linked", "live", "prints", "prints_bytes",
        "sealer", "segment", "suspect", "units", "used", "victim",
    )  # fmt: skip

    def __init__(self, segment: Segment, kind: int, sealer: Sealer) -> None:
        self.segment, self.kind, self.sealer = segment, kind, sealer
        self.born = segment.sequence
        """Sequence of the segment in which its units were first written."""
        self.linked = kind == KIND_META
        """Whether the log, or a checkpoint, has come to it; a segment that waits to be used is in no table."""
        self.used = 0
        """Bytes written."""
        self.units = 0
        """Units numbered so far."""
        self.index: Index | None = array("Q")
        """Index entry of each unit, 0 for those that are no extents; None while not loaded."""
        self.index_ref: UnitRef | None = None
        self.indexed = 0
        """Units that the index unit in the image covers."""
        self.live = 0
        """References of the maps to its blocks (log) or units (metadata) at most: at 0 the segment is freed."""
        self.blocks = 0
        """Blocks in its extents, dead ones included; 0 in metadata segments, and where it is not known."""
        self.dead = 0
        """Blocks that a mark found not to be in use, at least: `live` may count one several times."""
        self.prints = bytearray()
        """Fingerprints of the blocks, in the order of the units, until a checkpoint has stored them."""
        self.prints_bytes = 0
        """Sealed bytes of the fingerprints in the image, 0 for none."""
        self.victim = False
        """Whether the cleaner takes it: no new reference may point into it."""
        self.suspect = False
        """Whether something in it was found damaged: what is written once more is stored once more."""

    @property
    def refs(self) -> tuple[UnitRef, ...]:
        """The metadata units in the image that only this segment needs."""
        return unit_refs(self.index_ref, self.prints_bytes)

    @property
    def holds_blocks(self) -> bool:
        """Whether there are extents in it, and an index."""
        return self.kind != KIND_META

    @property
    def garbage(self) -> int:
        """Bytes that the counts say are not used any more, at least."""
        return self.used * max(self.dead, self.blocks - self.live) // self.blocks if self.blocks else 0

    def entry(self) -> TableEntry:
        return TableEntry(
            self.segment, self.index_ref, self.used, self.units, self.live, self.kind, self.prints_bytes, self.blocks,
            self.born if self.kind == KIND_COMPACT else 0,
        )  # fmt: skip


class Segments:
    """Every segment in use, by slot. All changes are made on one thread."""

    def __init__(self, storage: Storage, keyring: Keyring, space: FreeSpace, segment_bytes: int) -> None:
        self.storage, self.keyring, self.space, self.segment_bytes = storage, keyring, space, segment_bytes
        self.name = "image"
        """Of the image, for errors."""
        self.states: dict[int, State] = {}
        self.next_sequence = 1
        self.kept_bytes = 0
        """In ranges of something else than segments."""
        self._slots: deque[int] = deque()
        self._next_slot = 1
        self._loaded: dict[State, int] = {}
        """Closed segments whose index is in memory, and the bytes of index and cipher; oldest first."""
        self._loaded_bytes = 0
        self._loading = workers.Lock()

    # Making and removing segments

    def new(self, kind: int, length: int, salt: bytes, *, reserved: bool = True) -> State:
        """A fresh segment, of the reserve if need be; the caller has the storage allocate it, or calls `abandon`."""
        slot = self._slots[0] if self._slots else self._next_slot
        if slot >= MAX_SLOTS:
            raise NoSpaceError("image", "all segment slots are used", "trim or delete data")
        segment = Segment(slot, length, self.next_sequence, self.space.allocate(length, reserved=reserved), salt)
        if slot == self._next_slot:
            self._next_slot += 1
        else:
            self._slots.popleft()
        self.next_sequence += 1
        state = State(segment, kind, self.keyring.sealer(segment))
        self.states[slot] = state
        return state

    def adopt(self, entry: TableEntry) -> State:
        """Take over a segment that the image lists; its space must be free."""
        segment = entry.segment
        if segment.slot in self.states or not 0 < segment.slot < MAX_SLOTS:
            raise DamageError("segment table", f"lists slot {segment.slot} twice", "run nbdvde check")
        if why := _impossible(entry):
            raise DamageError("segment table", f"slot {segment.slot} {why}", "run nbdvde check")
        self.reserve(segment)
        state = State(segment, entry.kind, self.keyring.sealer(segment))
        state.linked = True
        state.used, state.units, state.live, state.index_ref = entry.used, entry.units, entry.live, entry.index
        state.indexed, state.prints_bytes = entry.units if entry.index else 0, entry.prints
        state.blocks = entry.blocks
        if entry.kind == KIND_COMPACT:
            state.born = entry.born  # 0 if it is not known, as it may be that of any segment
        if entry.index:
            state.index = None
        self.states[segment.slot] = state
        self.next_sequence = max(self.next_sequence, segment.sequence + 1)
        return state

    def reserve(self, segment: Segment) -> None:
        """Mark the space of a segment as used."""
        try:
            self.space.reserve(segment.offset, segment.length)
        except ValueError as error:
            raise DamageError("segment table", str(error), "run nbdvde check") from None

    def keep_range(self, offset: int, length: int) -> None:
        """Mark a range as used in which there is no segment."""
        try:
            self.space.reserve(offset, length)
        except ValueError as error:
            raise DamageError("subject keys", str(error), "run nbdvde check") from None
        self.kept_bytes += length

    def take_range(self, length: int) -> int:
        """Offset of a range for something else than a segment. Raises NoSpaceError."""
        offset = self.space.allocate(length, reserved=False)
        self.kept_bytes += length
        return offset

    def release_range(self, offset: int, length: int) -> None:
        """Give such a range back."""
        self.space.free(offset, length)
        self.kept_bytes -= length

    def finish_adopting(self) -> None:
        """Every segment is known: find the unused slots below the highest."""
        self._next_slot = max(self.states, default=0) + 1
        self._slots = deque(slot for slot in range(1, self._next_slot) if slot not in self.states)

    def new_root(self, length: int, salt: bytes) -> State:
        """A fresh segment for a root: it has no slot, the superblock points at it."""
        segment = Segment(0, length, self.next_sequence, self.space.allocate(length), salt)
        self.next_sequence += 1
        return State(segment, KIND_META, self.keyring.sealer(segment))

    def remove(self, slot: int) -> Segment:
        """Forget a segment. Its space and its slot stay taken until `release`."""
        state = self.states.pop(slot)
        with self._loading:
            self._loaded_bytes -= self._loaded.pop(state, 0)
        return state.segment

    def successor(self, old: State, length: int, salt: bytes) -> State:
        """A fresh segment for what is left of one with extents. Nothing leads to it until `replace`."""
        segment = Segment(old.segment.slot, length, self.next_sequence, self.space.allocate(length), salt)
        self.next_sequence += 1
        state = State(segment, KIND_COMPACT, self.keyring.sealer(segment))
        state.linked = True
        state.units, state.born = old.units, old.born
        return state

    def replace(self, state: State) -> Segment:
        """Put a successor into the place of the segment before it; answers the range of that."""
        old = self.states[state.segment.slot]
        with self._loading:
            self._loaded_bytes -= self._loaded.pop(old, 0)
        state.live, state.index_ref, state.prints_bytes = old.live, old.index_ref, old.prints_bytes
        self.states[state.segment.slot] = state
        return bare(old.segment)

    def reclaimable(self) -> int:
        """Bytes that cleaning would surely free: garbage thinly spread is not counted."""
        stored = garbage = 0
        for state in self.states.values():
            if state.holds_blocks and state.linked:
                stored += state.used
                garbage += state.garbage
        return max(0, garbage - stored // _THIN)

    def release(self, segment: Segment) -> None:
        """Its space and its slot can be used again."""
        self.space.free(segment.offset, segment.length)
        if segment.slot:
            self._slots.append(segment.slot)

    def abandon(self, state: State) -> None:
        """Undo `new` or `new_root`: nothing points at the segment."""
        if state.segment.slot:
            self.remove(state.segment.slot)
        self.release(state.segment)

    def shrink(self, state: State, length: int) -> Segment | None:
        """Cut a segment's unused end off; answers that end as a range to free, if there is any."""
        segment = state.segment
        length = max(BLOCK, -(-length // BLOCK) * BLOCK)
        if length >= segment.length:
            return None
        state.segment = Segment(segment.slot, length, segment.sequence, segment.offset, segment.salt)
        return bare(replace(segment, offset=segment.offset + length, length=segment.length - length))

    # Reading

    def find(self, slot: int) -> State:
        """The segment of a slot that a reference names."""
        state = self.states.get(slot)
        if state is not None:
            return state
        if slot == LOST_SLOT:
            raise DamageError("map", "is damaged where it says what these blocks hold", "run nbdvde check")
        raise DamageError("map", f"points at segment slot {slot}, which is not in use", "run nbdvde check")

    def count(self, slot: int, step: int) -> None:
        """More of a segment is in use."""
        self.find(slot).live += step

    def uncount(self, slot: int, step: int, protected: int) -> None:
        """Less of a segment is in use, unless it is older than the segments from sequence `protected` on.

        Raises DamageError when less than nothing is left.
        """
        state = self.find(slot)
        if state.born < protected:
            return
        state.live -= step
        if state.live < 0:
            raise DamageError("segment table", f"counts less in use in slot {slot} than there is", "run nbdvde check")

    def _holder(self, ref: UnitRef) -> State:
        state = self.find(ref.slot)
        if ref.position + ref.length > state.segment.length:
            raise DamageError("map", f"points past the end of segment slot {ref.slot}", "run nbdvde check")
        return state

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the file; blocks. Raises DamageError when the device cannot read them."""
        return read(self.storage, offset, length, self.name)

    def unreadable(self, error: OSError, offset: int) -> DamageError:
        """What to raise for an error of the device."""
        return unreadable(error, offset, self.name)

    def read_unit(self, ref: UnitRef, kind: int) -> bytes:
        """Plaintext of a metadata unit; blocks."""
        state = self._holder(ref)
        sealed = self.read(state.segment.offset + ref.position, ref.length)
        return inflate(state.sealer.open(ref.unit, kind, sealed))

    def read_unit_nowait(self, ref: UnitRef, kind: int) -> bytes | None:
        """Plaintext of a metadata unit, or None when it has to be waited for."""
        state = self._holder(ref)
        offset = state.segment.offset + ref.position
        try:
            sealed = self.storage.read_nowait(offset, ref.length)
        except OSError as error:
            raise self.unreadable(error, offset) from None
        return None if sealed is None else inflate(state.sealer.open(ref.unit, kind, sealed))

    def locate(self, state: State, index: Index, unit: int) -> tuple[int, int, int]:
        """(position, sealed bytes, blocks) of an extent, from the index of its segment."""
        if unit < len(index) and (entry := index[unit]):
            return unpack_index(entry)
        raise DamageError("map", f"points at unit {unit} of slot {state.segment.slot}, no extent", "run nbdvde check")

    def index(self, state: State) -> Index:
        """The index of a segment, read if need be; blocks."""
        index, ref = state.index, state.index_ref
        if index is not None:
            return index
        assert ref is not None, "an index that is not in memory is in the image"
        return self.install_index(state, self.read_unit(ref, Kind.INDEX))

    def prints(self, state: State) -> bytes:
        """Fingerprints of the blocks of a segment, in the order of its units; none when they cannot be had; blocks."""
        if state.prints:
            return bytes(state.prints)
        # Until a checkpoint has stored its index, what lies there is of the segment that it replaced.
        stored = state.refs[1:] if state.indexed == state.units else ()
        for ref in stored:
            try:
                data = self.read_unit(ref, Kind.PRINTS)
            except DamageError:  # a checkpoint may just have moved it; and they are derived
                continue
            return data[: len(data) // PRINT_BYTES * PRINT_BYTES]
        return b""

    def index_nowait(self, state: State) -> Index | None:
        """As `index`, or None when it has to be waited for."""
        index, ref = state.index, state.index_ref
        if index is not None:
            return index
        assert ref is not None, "an index that is not in memory is in the image"
        data = self.read_unit_nowait(ref, Kind.INDEX)
        return None if data is None else self.install_index(state, data)

    def install_index(self, state: State, data: bytes) -> Index:
        """Keep an index that was loaded."""
        if len(data) != 8 * state.units:
            raise DamageError("segment index", f"has {len(data)} bytes for {state.units} units", "run nbdvde check")
        state.index = index = array("Q", data)
        self.settle(state)
        return index

    def settle(self, state: State) -> None:
        """The segment grows no more: its index may be forgotten. Those in memory longest go when there are too many."""
        with self._loading:
            index = state.index
            if index is None or state in self._loaded:
                return
            self._loaded[state] = size = len(index) * index.itemsize + _CIPHER_BYTES
            self._loaded_bytes += size
            while self._loaded_bytes > _LOADED_BYTES_MAX and len(self._loaded) > 1:
                oldest = next(iter(self._loaded))
                self._loaded_bytes -= self._loaded.pop(oldest)
                if oldest.indexed == oldest.units:  # else a checkpoint settles it once it is in the image
                    oldest.index = None
                    oldest.sealer.forget()


def _impossible(entry: TableEntry) -> str | None:
    """Why no segment can be so, or None. Whoever can seal a table must not fill the memory with it."""
    length = entry.segment.length
    if entry.kind not in (KIND_LOG, KIND_META, KIND_COMPACT):
        return "is of no known kind"
    # A compact segment numbers its units as the segment did in which they were written.
    held = SEGMENT_BYTES_MAX if entry.kind == KIND_COMPACT else entry.used
    if not length or length > SEGMENT_BYTES_MAX or entry.used > length or entry.units * TAG_BYTES > held:
        return "holds more than fits into it"
    if entry.kind != KIND_META and entry.units and entry.index is None:
        return "has no index"
    if entry.kind != KIND_META and entry.live and not entry.units:
        return "counts blocks in use and holds none"
    return None


def bare(segment: Segment) -> Segment:
    """The range of a segment without its slot, to be freed."""
    return Segment(0, segment.length, 0, segment.offset, bytes(32))


def log_room(segment: Segment) -> int:
    """Bytes of a log segment that groups can use."""
    return segment.length - LINK_BYTES
