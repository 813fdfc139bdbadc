"""From a map entry to the bytes of its frame: index, file, authentication, decompression, cache."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nbdvde import workers
from nbdvde.disk import BLOCK, Buffer, Piece
from nbdvde.engine.cache import FRAME_SHIFT, FrameCache
from nbdvde.engine.dictionaries import Dictionaries
from nbdvde.engine.extent import Decoder
from nbdvde.engine.layout import FRAME_BLOCKS, SLOT_SHIFT, UNIT_SHIFT, Kind
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
class _Extent:
    """An extent that is wanted: where it lies, and the runs to cut from it."""

    state: State
    unit: int
    offset: int
    length: int
    blocks: int
    wants: list[Want]

    def frames(self) -> list[int]:
        """Numbers of the frames that have any of it."""
        runs = ((want.entry & _BLOCK_MASK, want.blocks) for want in self.wants)
        numbers = {
            number
            for first, blocks in runs
            for number in range(first // FRAME_BLOCKS, (first + blocks - 1) // FRAME_BLOCKS + 1)
        }
        return sorted(numbers)


class Reader:
    """Reads sealed extents of an image."""

    def __init__(self, segments: Segments, cache: FrameCache, dictionaries: Dictionaries | None = None) -> None:
        self._segments, self.cache = segments, cache
        self._decoder = Decoder(dictionaries)
        self._decoders = workers.PerThread(lambda: Decoder(dictionaries))

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
        offset = state.segment.offset + position
        try:
            sealed = segments.storage.read_nowait(offset, length)
        except OSError as error:
            raise segments.unreadable(error, offset) from None
        if sealed is None:
            return None
        try:
            plain = state.sealer.open(unit, Kind.EXTENT, sealed, blocks=blocks)
        except DamageError:
            state.suspect = True
            raise
        frame = self._decoder.frame(plain, blocks, block // FRAME_BLOCKS)
        self.cache.put(key, frame)
        return frame

    def fill(self, pieces: list[list[Piece]], wants: list[Want]) -> None:
        """Put what is wanted into its places; for a worker thread. Raises DamageError.

        Each extent is opened once, and those that follow each other in the file are read in one go.
        """
        extents: dict[int, _Extent] = {}
        for want in wants:
            extent = extents.get(want.entry >> UNIT_SHIFT)
            if extent is None:
                extent = extents[want.entry >> UNIT_SHIFT] = self._locate(want)
            if (want.entry & _BLOCK_MASK) + want.blocks > extent.blocks:
                raise _past_the_end(want.entry)
            extent.wants.append(want)
        opened: list[tuple[_Extent, bytes]] = []
        group: list[_Extent] = []
        for extent in extents.values():
            if group and extent.offset != group[-1].offset + group[-1].length:
                opened += zip(group, self._opened(group), strict=True)
                group = []
            group.append(extent)
        opened += zip(group, self._opened(group), strict=True)
        self._decode(pieces, opened)

    def _locate(self, want: Want) -> _Extent:
        segments, state = self._segments, want.state
        unit = want.entry >> UNIT_SHIFT & _UNIT_MASK
        position, length, blocks = segments.locate(state, segments.index(state), unit)
        return _Extent(state, unit, state.segment.offset + position, length, blocks, [])

    def _opened(self, group: Sequence[_Extent]) -> Iterator[bytes]:
        """Plaintext of each extent; a segment in which one is damaged gets suspect."""
        start, extent = group[0].offset, group[0]
        try:
            data = memoryview(self._segments.read(start, group[-1].offset + group[-1].length - start))
            for extent in group:
                sealed = data[extent.offset - start : extent.offset - start + extent.length]
                yield extent.state.sealer.open(extent.unit, Kind.EXTENT, sealed, blocks=extent.blocks)
        except DamageError:
            extent.state.suspect = True
            raise

    def _decode(self, pieces: list[list[Piece]], opened: Sequence[tuple[_Extent, bytes]]) -> None:
        """Put the runs of extents into their places; frames that are wanted are decoded once, and all together."""
        wanted = [(plain, extent.blocks, frame) for extent, plain in opened for frame in extent.frames()]
        decoded = iter(self._decoders.get().many(wanted))
        for extent, _ in opened:
            data = {frame: next(decoded) for frame in extent.frames()}
            for want in extent.wants:
                first = want.entry & _BLOCK_MASK
                pieces[want.place] = _cut(data, first, first + want.blocks)


def _cut(frames: Mapping[int, Buffer], first: int, stop: int) -> list[Piece]:
    """The blocks [first, stop) of an extent, frame by frame."""
    pieces: list[Piece] = []
    for frame in range(first // FRAME_BLOCKS, (stop - 1) // FRAME_BLOCKS + 1):
        data, base = frames[frame], frame * FRAME_BLOCKS
        low, high = max(first - base, 0) * BLOCK, min(stop - base, FRAME_BLOCKS) * BLOCK
        pieces.append(data if high - low == len(data) else memoryview(data)[low:high])
    return pieces


def _past_the_end(entry: int) -> DamageError:
    return DamageError("map", f"points past the end of an extent (entry {entry:#x})", "run nbdvde check")
