"""The write buffer: later writes replace earlier ones, blocks lie over zeroed ranges."""

from hypothesis import given
from hypothesis import strategies as st

from nbdvde.disk import BLOCK
from nbdvde.engine.buffer import Generation, ZeroRanges

RANGES = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12), st.booleans()), max_size=40)


@given(ranges=RANGES)
def test_zero_ranges_are_what_a_table_of_blocks_would_be(ranges: list[tuple[int, int, bool]]) -> None:
    zeroes, table = ZeroRanges(), {}
    for start, length, allocated in ranges:
        zeroes.add(start, start + length, allocated)
        table.update(dict.fromkeys(range(start, start + length), allocated))
        zeroes.check()
        assert {block: zeroes.find(block) for block in range(50)} == {block: table.get(block) for block in range(50)}
    assert {block for start, stop, _ in zeroes for block in range(start, stop)} == set(table)
    assert bool(zeroes) == bool(table)
    assert len(zeroes) == len(list(zeroes))
    for start in range(0, 45, 3):
        touched = any(start <= block < start + 2 for block in table)
        assert bool(zeroes.overlapping(start, start + 2)) == touched


@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 40), st.integers(1, 10), st.booleans()), max_size=40))
def test_a_generation_shows_the_last_thing_done_to_each_block(steps: list[tuple[bool, int, int, bool]]) -> None:
    generation = Generation()
    model: dict[int, bytes | bool] = {}
    for number, (write, start, length, allocated) in enumerate(steps):
        if write:
            generation.blocks[start] = model[start] = number.to_bytes(4, "big") * (BLOCK // 4)
        else:
            generation.zero(start, start + length, allocated)
            model.update(dict.fromkeys(range(start, start + length), allocated))
        if generation.zeroes:
            generation.zeroes.check()
        assert bool(generation)
    for block in range(55):
        expected = model.get(block)
        shown = generation.blocks.get(block, generation.zeroes.find(block) if generation.zeroes else None)
        assert shown == expected
        assert generation.covers_any(block, block + 1) == (expected is not None)


def test_zeroing_pays_for_a_block() -> None:
    generation = Generation()
    generation.zero(0, 1 << 40, False)
    assert generation.payload == BLOCK
