"""What is compressed ahead is what would be compressed on the spot, wherever groups and extents begin."""

import random
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from nbdvde import workers
from nbdvde.disk import BLOCK
from nbdvde.engine.ahead import Ahead
from nbdvde.engine.buffer import Generation
from nbdvde.engine.extent import Compressor
from nbdvde.engine.groups import frames_of
from nbdvde.engine.layout import FRAME_BLOCKS

EXTENT = 4 * FRAME_BLOCKS


def written(count: int) -> Generation:
    """Blocks from number 7 on, that compress more or less."""
    generation, rng = Generation(), random.Random(1)
    pages = [rng.randbytes(number % 5 * 1000).ljust(BLOCK, b"x") for number in range(count)]
    generation.put(7, memoryview(b"".join(pages)))
    return generation


@settings(max_examples=20)
@given(count=st.integers(1, 700), ends=st.sets(st.integers(1, 174), max_size=4))
def test_it_is_the_same_as_without(count: int, ends: set[int]) -> None:
    generation, compressor = written(count), Compressor(1)
    blocks = sorted(generation.blocks)
    ahead = Ahead(workers.PerThread(lambda: Compressor(1)), generation, blocks)
    starts = [0, *sorted(end * FRAME_BLOCKS for end in ends if end * FRAME_BLOCKS < count), count]
    for start, stop in pairwise(starts):
        group = blocks[start:stop]
        chunks = [group[at : at + EXTENT] for at in range(0, len(group), EXTENT)]
        frames = [frames_of(generation, chunk) for chunk in chunks]
        taken, packed = ahead.take(start, chunks)
        assert taken == frames
        assert compressor.assemble(taken, packed) == compressor.encode(frames)
