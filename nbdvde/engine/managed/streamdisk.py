"""The entries of a stream as a disk to read, in order, a block each."""

from collections.abc import Sequence

from nbdvde.disk import BLOCK, Piece
from nbdvde.engine.managed.regiondisk import RegionDisk
from nbdvde.engine.managed.stream import Stream
from nbdvde.engine.pieces import cut


class StreamDisk(RegionDisk):
    """Block N is the entry at `base` + N, filled up with zeroes; all of it has the capacity of the stream.

    What is appended appears behind what was there, what is overwritten or consumed meanwhile reads as zeroes: nothing
    moves, and no entry is ever taken for another one.
    """

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream.disk, "stream", stream.ring.capacity * BLOCK)
        self.stream = stream
        self.base = stream.tail
        """Position of the first block."""

    @property
    def used(self) -> tuple[int, int]:
        stream = self.stream
        return (stream.tail - self.base) * BLOCK, (stream.head - self.base) * BLOCK

    @property
    def gone(self) -> bool:
        return self.stream.gone

    async def read(self, offset: int, length: int) -> Sequence[Piece]:
        stream = self.stream
        stream.refuse_if_gone()
        first, stop = self.base + offset // BLOCK, self.base - (-(offset + length) // BLOCK)
        start, end = max(first, stream.tail), min(stop, stream.head)
        pages = await stream.pages(start, end) if start < end else b""
        stream.refuse_if_gone()
        gone = min(max(0, stream.tail - start) * BLOCK, len(pages))  # while it was read
        before = max(0, min(start, stop) - first) * BLOCK + gone
        behind = (stop - first) * BLOCK - before - (len(pages) - gone)
        pieces: list[Piece] = [before, memoryview(pages)[gone:], behind]
        return cut([piece for piece in pieces if piece], offset - (first - self.base) * BLOCK, length)
