"""Compressing what a transaction stores while it is hashed, looked up, sealed and written.

A thread takes the frames in order; the one that writes the log joins in when it needs what is not ready yet. So both
have work all the time: before, one thread hashed alone, and half of the compressing waited for each write.
"""

from collections.abc import Sequence
from typing import TypeAlias

from nbdvde import workers
from nbdvde.disk import Buffer
from nbdvde.engine.buffer import Generation
from nbdvde.engine.extent import Compressor
from nbdvde.engine.groups import frames_of
from nbdvde.engine.layout import FRAME_BLOCKS

Packed: TypeAlias = tuple[list[list[Buffer]], list[list[bytes]]]
"""The frames of each of some extents, as they are and compressed."""
_BATCH_BLOCKS = 128
"""Half a millisecond of work, for which the interpreter lock is hardly needed."""
_BATCH_FRAMES = _BATCH_BLOCKS // FRAME_BLOCKS


class Ahead:
    """Frames of blocks that lie one behind the other in their groups, so that each frame has four, but the last."""

    def __init__(self, compressors: workers.PerThread[Compressor], written: Generation, blocks: Sequence[int]) -> None:
        def pack(batch: Sequence[int]) -> tuple[list[Buffer], list[bytes]]:
            frames = frames_of(written, batch)
            return frames, compressors.get().pack(frames)

        batches = [blocks[at : at + _BATCH_BLOCKS] for at in range(0, len(blocks), _BATCH_BLOCKS)]
        self._work = workers.Ahead(pack, batches)
        self.abandon = self._work.abandon

    def take(self, start: int, chunks: Sequence[Sequence[int]]) -> Packed:
        """The frames of each chunk of blocks; the first one begins with block number `start`."""
        frames: list[list[Buffer]] = []
        packed: list[list[bytes]] = []
        at = start // FRAME_BLOCKS
        for chunk in chunks:
            stop = at + -(-len(chunk) // FRAME_BLOCKS)
            pairs = [self._frame(number) for number in range(at, stop)]
            frames.append([frame for frame, _ in pairs])
            packed.append([small for _, small in pairs])
            at = stop
        return frames, packed

    def _frame(self, number: int) -> tuple[Buffer, bytes]:
        batch, at = divmod(number, _BATCH_FRAMES)
        frames, packed = self._work.get(batch)
        return frames[at], packed[at]
