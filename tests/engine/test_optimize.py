"""Optimizing: what gets smaller, what stays as it is, and that it may end at any moment."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
import trio.testing

import nbdvde
from nbdvde.disk import BLOCK, Buffer
from nbdvde.engine import optimize
from nbdvde.engine.dictionaries import Choice
from nbdvde.engine.extent import Compressor
from nbdvde.engine.layout import KIND_COMPACT, unpack_index
from nbdvde.engine.optimize import RECOMPRESS, REPACK, Options, options_of
from nbdvde.engine.report import OptimizeReport
from nbdvde.errors import RefusedError, UsageError
from tests.crash.session import overwritten
from tests.engine.test_cleaner import Life, living

RECOMPRESSED = Options((RECOMPRESS,), level=3)


def untold(done: int, total: int) -> None:
    """A progress that nobody looks at."""


async def optimized(life: Life, options: Options = RECOMPRESSED) -> OptimizeReport:
    return await life.image.optimize(options, untold)


async def write_text(life: Life, block: int, blocks: int) -> None:
    """Blocks that compress to a third."""
    data = b"".join(life.rng.randbytes(BLOCK // 4) + b"text" * (BLOCK * 3 // 16) for _ in range(blocks))
    await life.image.disk().write(block * BLOCK, memoryview(data))
    life.pages = overwritten(life.pages, block * BLOCK, data)
    await life.image.flush()


async def test_segments_are_recompressed_once() -> None:
    async with living(level=0) as life:
        await write_text(life, 0, 300)
        told: list[tuple[int, int]] = []
        report = await life.image.optimize(RECOMPRESSED, lambda done, total: told.append((done, total)))
        assert report.segments_recompressed == life.kinds().count(KIND_COMPACT) > 3
        assert report.recompressed_bytes > 300 * BLOCK // 2
        assert told == sorted(told)
        assert await life.holds_everything()
        life.check()
        again = await optimized(life)
        assert (again.segments_recompressed, again.recompressed_bytes) == (0, 0)


async def test_what_gains_nothing_stays() -> None:
    async with living() as life:
        await life.write(0, 300)
        await optimized(life, Options(level=19))  # frees the ends of the segments, that no group fitted into
        assert (await optimized(life, Options(level=19))).segments_recompressed == 0
        assert await life.holds_everything()


async def test_a_disk_of_one_leaf_has_an_end(tmp_path: Path) -> None:
    """Behind the only leaf of a disk of 2 MiB the walk found that leaf again, for ever."""
    nbdvde.create_image(tmp_path / "image.vde", 2 << 20, secret=None)
    async with nbdvde.open_image(tmp_path / "image.vde") as image:
        await image.disk().write(0, memoryview(b"x" * 65536))
        await image.checkpoint()
        with trio.fail_after(10):
            report = await image.optimize(Options((REPACK,)), untold)
    assert report.blocks_repacked == 0


async def test_no_compression_is_left_at_that() -> None:
    async with living(level=0) as life:
        await write_text(life, 0, 300)
        assert (await optimized(life, Options())).segments_recompressed == 0


async def test_garbage_goes_first() -> None:
    async with living(level=0) as life:
        await write_text(life, 0, 300)
        for block in range(0, 300, 30):
            await life.trim(block, 18)
        report = await optimized(life)
        assert report.cleaned_bytes > 100 * BLOCK
        assert await life.holds_everything()


class Liar(Compressor):
    """Compresses something else."""

    def encode(self, extents: Sequence[Sequence[Buffer]], choice: Choice | None = None) -> list[bytes]:
        return super().encode([[bytes(len(frame)) for frame in frames] for frames in extents], choice)


async def test_only_what_gives_the_same_again_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimize, "Compressor", Liar)
    async with living(level=0) as life:
        await write_text(life, 0, 300)
        await optimized(life)
        assert await life.holds_everything()


async def test_a_damaged_segment_stays_where_it_is() -> None:
    async with living(level=0) as life:
        await write_text(life, 0, 300)
        await life.image.checkpoint()
        first = min((s for s in life.image.segments.states.values() if s.live > 9), key=lambda s: s.segment.offset)
        saved = bytes(life.storage.image)
        assert first.index is not None
        life.storage.image[first.segment.offset + unpack_index(first.index[-1])[0]] ^= 1
        assert (await optimized(life)).segments_recompressed > 1
        assert life.image.segments.states[first.segment.slot] is first
        life.storage.image[first.segment.offset : first.segment.end] = saved[first.segment.offset : first.segment.end]
        assert await life.holds_everything()


async def test_it_can_be_cancelled_between_any_two_steps() -> None:
    async with living(level=0) as life:
        await write_text(life, 0, 300)
        rounds = 0
        for turns in range(1, 400, 7):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(cancel_after, scope, turns)
                    await optimized(life)
                    nursery.cancel_scope.cancel()
            rounds += scope.cancelled_caught
            assert await life.holds_everything()
            await write_text(life, turns, 20)
        assert rounds > 5
        await life.image.flush()
        life.check()


async def cancel_after(scope: trio.CancelScope, turns: int) -> None:
    for _ in range(turns):
        await trio.lowlevel.checkpoint()
    scope.cancel()


async def test_closing_ends_it() -> None:
    async with living(level=0) as life:
        await write_text(life, 0, 300)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_refused, life)
            await trio.testing.wait_all_tasks_blocked()
            await life.image.close()


async def _refused(life: Life) -> None:
    with pytest.raises(RefusedError, match="closed"):
        await optimized(life, Options((RECOMPRESS,), 3, rate=1))


async def test_one_at_a_time() -> None:
    async with living(level=0) as life:
        await write_text(life, 0, 300)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(optimized, life)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(RefusedError, match="already"):
                await optimized(life)


async def test_the_rate_is_kept(autojump_clock: trio.testing.MockClock) -> None:
    async with living(level=0) as life:
        await write_text(life, 0, 300)
        begun_s = trio.current_time()
        await optimized(life, Options((RECOMPRESS,), 3, rate=100_000))
        assert trio.current_time() - begun_s > 200 * BLOCK / 100_000


@pytest.mark.parametrize(("passes", "level"), [(["other"], None), (None, 0), (None, 23)])
def test_options_that_make_no_sense(passes: list[str] | None, level: int | None) -> None:
    with pytest.raises(UsageError):
        options_of(passes, level, None, None)
