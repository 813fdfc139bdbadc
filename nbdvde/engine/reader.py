"""From a map entry to the bytes of its frame: index, file, authentication, decompression, cache."""

from collections.abc import Sequence
from dataclasses import dataclass

from nbdvde import workers
from nbdvde.disk import BLOCK, Piece
from nbdvde.engine.cache import FRAME_SHIFT, FrameCache
from nbdvde.engine.extent import Decoder
from nbdvde.engine.layout import FRAME_BLOCKS, SLOT_SHIFT, UNIT_SHIFT, Kind
from nbdvde.engine.sealing import Sealer
from nbdvde.engine.segments import Segments, State
from nbdvde.errors import DamageError

_UNIT_MASK = (1 << (SLOT_SHIFT - UNIT_SHIFT)) - 1
_BLOCK_MASK = (1 << UNIT_SHIFT) - 1


@dataclass(frozen=True, slots=True)
class Want:
    """A run of blocks of one extent: where it goes in the list of pieces, its first entry, how many."""

    place: int
    entry: int
    blocks: int
    state: State
    """Its segment, which may leave the table before it is read."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the extent of a want lies, and how it is opened."""

    want: Want
    sealer: Sealer
    unit: int
    offset: int
    length: int
    blocks: int


class Reader:
    """Reads sealed extents of an image."""

    def __init__(self, segments: Segments, cache: FrameCache) -> None:
        self._segments, self.cache = segments, cache
        self._decoder = Decoder()
        self._decoders = workers.PerThread(Decoder)

    def frame_nowait(self, entry: int) -> bytes | None:
        """The frame that holds a block, or None when it has to be waited for. Raises DamageError."""
        key = entry >> FRAME_SHIFT
        frame = self.cache.get(key)
        if frame is not None:
            return frame
        segments = self._segments
        state = segments.states.get(entry >> SLOT_SHIFT) or segments.find(entry >> SLOT_SHIFT)
        unit = entry >> UNIT_SHIFT & _UNIT_MASK
        index = state.index or segments.index_nowait(state)
        if index is None:
            return None
        position, length, blocks = segments.locate(state, index, unit)
        block = entry & _BLOCK_MASK
        if block >= blocks:
            raise _past_the_end(entry)
        sealed = segments.storage.read_nowait(state.segment.offset + position, length)
        if sealed is None:
            return None
        plain = state.sealer.open(unit, Kind.EXTENT, sealed, blocks=blocks)
        frame = self._decoder.frame(plain, blocks, block // FRAME_BLOCKS)
        self.cache.put(key, frame)
        return frame

    def fill(self, pieces: list[list[Piece]], wants: list[Want]) -> None:
        """Put what is wanted into its places; for a worker thread. Raises DamageError.

        Extents that follow each other in the file are read in one go.
        """
        group: list[_Place] = []
        for place in map(self._locate, wants):
            if group and place.offset != group[-1].offset + group[-1].length:
                self._fill_group(pieces, group)
                group = []
            group.append(place)
        self._fill_group(pieces, group)

    def _locate(self, want: Want) -> _Place:
        segments = self._segments
        state = want.state
        unit = want.entry >> UNIT_SHIFT & _UNIT_MASK
        position, length, blocks = segments.locate(state, segments.index(state), unit)
        if (want.entry & _BLOCK_MASK) + want.blocks > blocks:
            raise _past_the_end(want.entry)
        return _Place(want, state.sealer, unit, state.segment.offset + position, length, blocks)

    def _fill_group(self, pieces: list[list[Piece]], group: Sequence[_Place]) -> None:
        start = group[0].offset
        data = memoryview(self._segments.storage.read(start, group[-1].offset + group[-1].length - start))
        for place in group:
            sealed = data[place.offset - start : place.offset - start + place.length]
            plain = place.sealer.open(place.unit, Kind.EXTENT, sealed, blocks=place.blocks)
            first = place.want.entry & _BLOCK_MASK
            pieces[place.want.place] = self._cut(plain, place.blocks, first, first + place.want.blocks)

    def _cut(self, plain: bytes, blocks: int, first: int, stop: int) -> list[Piece]:
        """The blocks [first, stop) of an extent, frame by frame."""
        decoder = self._decoders.get()
        pieces: list[Piece] = []
        for frame in range(first // FRAME_BLOCKS, (stop - 1) // FRAME_BLOCKS + 1):
            data = decoder.frame(plain, blocks, frame)
            base = frame * FRAME_BLOCKS
            low, high = max(first - base, 0) * BLOCK, min(stop - base, FRAME_BLOCKS) * BLOCK
            pieces.append(data if high - low == len(data) else memoryview(data)[low:high])
        return pieces


def _past_the_end(entry: int) -> DamageError:
    return DamageError("map", f"points past the end of an extent (entry {entry:#x})", "run nbdvde check")
