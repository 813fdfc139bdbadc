"""A volume does what a disk in memory does, over stops and crashes, whatever is asked of it and in any order."""

import itertools
import random
import threading
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any

import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nbdvde.disk import ALLOCATION, ALLOCATION_DEPTH, BLOCK, Piece, Status
from nbdvde.engine.access import format_storage, open_storage
from nbdvde.engine.check import check_storage
from nbdvde.engine.image import Image
from nbdvde.engine.status import CONTEXTS, EXTENT, ZERO
from nbdvde.memory import MemoryDisk
from tests.crash.oracle import master_of
from tests.crash.recording import FrozenStorage, RecordingStorage, applied
from tests.crash.session import KEY, zero_parts
from tests.crash.states import epochs
from tests.crash.stepping import deterministic

SIZE = (3 << 20) + 512
HOT = 24 * BLOCK
ZERO_BIT = {ALLOCATION: int(Status.ZERO), EXTENT: ZERO, ALLOCATION_DEPTH: 0}
"""What tells of zeroes in each context; a depth of 0 does."""
offsets = st.integers(0, HOT) | st.integers(0, SIZE - 1) | st.sampled_from([0, 511 * BLOCK, 512 * BLOCK, SIZE - 1])
lengths = st.sampled_from([1, 512, 4095, 4096, 4097, 8192, 3 * BLOCK, 60000, 40 * BLOCK])


class Loop:
    """A trio loop in a thread; `run` has it do something and waits."""

    def __init__(self) -> None:
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main,), daemon=True)
        self._thread.start()
        self._ready.wait()

    async def _main(self) -> None:
        self._token, self._end = trio.lowlevel.current_trio_token(), trio.Event()
        self._ready.set()
        await self._end.wait()

    def run(self, function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        return trio.from_thread.run(_in_time, function, *args, trio_token=self._token)

    def stop(self) -> None:
        trio.from_thread.run_sync(self._end.set, trio_token=self._token)
        self._thread.join()


async def _in_time(function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    with trio.fail_after(60):  # what hangs fails
        return await function(*args)


def flat(pieces: Any) -> bytes:
    return b"".join(bytes(piece) for piece in pieces)


class VolumeMachine(RuleBasedStateMachine):
    """The same requests to a volume and to a MemoryDisk."""

    @initialize(level=st.sampled_from([0, 1]), encrypted=st.booleans(), extent=st.sampled_from([4096, 32768]))
    def make(self, level: int, encrypted: bool, extent: int) -> None:
        self.stack = ExitStack()
        self.stack.enter_context(deterministic(1))
        self.loop = Loop()
        self.key = KEY if encrypted else None
        self.storage = RecordingStorage()
        format_storage(self.storage, SIZE, self.key, level, extent, segment_bytes=64 << 10)
        self.model = MemoryDisk(SIZE)
        self.history: list[bytes] = [bytes(SIZE)]
        self.image: Image = self.loop.run(self._open)

    async def _open(self) -> Image:
        return await open_storage(self.storage, self.key, buffer_bytes=128 << 10, cache_bytes=64 << 10)

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            self.loop.run(self.image.close)
            report = check_storage(FrozenStorage(bytes(self.storage.image)), master_of)
            self.loop.stop()
            self.stack.close()
            assert report.ok, report.errors

    def _remember(self) -> None:
        self.history.append(flat(self.model.read_nowait(0, SIZE)))

    # Requests

    @rule(offset=offsets, length=lengths, seed=st.integers(0, 3), nowait=st.booleans(), owned=st.booleans())
    def write(self, offset: int, length: int, seed: int, nowait: bool, owned: bool) -> None:
        length = min(length, SIZE - offset)
        data = (bytes(length), random.Random(seed).randbytes(length), b"text" * length, b"\7" * length)[seed][:length]
        self.model.write_nowait(offset, memoryview(data), owned=False)
        self.loop.run(self._write, offset, memoryview(data), nowait, owned)
        self._remember()

    async def _write(self, offset: int, data: memoryview, nowait: bool, owned: bool) -> None:
        disk = self.image.disk()
        if not (nowait and disk.write_nowait(offset, data, owned=owned)):
            await disk.write(offset, data, owned=owned)

    @rule(offset=offsets, length=lengths | st.just(SIZE), allocate=st.booleans(), nowait=st.booleans())
    def zero(self, offset: int, length: int, allocate: bool, nowait: bool) -> None:
        length = min(length, SIZE - offset)
        for low, high in zero_parts(offset, length, SIZE):
            self.model.zero_nowait(low, high - low, allocate=allocate)
            self._remember()
        self.loop.run(self._zero, offset, length, allocate, nowait)

    async def _zero(self, offset: int, length: int, allocate: bool, nowait: bool) -> None:
        disk = self.image.disk()
        if not (nowait and disk.zero_nowait(offset, length, allocate=allocate)):
            await disk.zero(offset, length, allocate=allocate)

    @rule(offset=offsets, length=lengths, nowait=st.booleans())
    def read(self, offset: int, length: int, nowait: bool) -> None:
        length = min(length, SIZE - offset)
        assert flat(self.loop.run(self._read, offset, length, nowait)) == flat(self.model.read_nowait(offset, length))

    async def _read(self, offset: int, length: int, nowait: bool) -> Any:
        disk = self.image.disk()
        pieces: Any = disk.read_nowait(offset, length) if nowait else None
        pieces = await disk.read(offset, length) if pieces is None else pieces
        assert sum(_size(piece) for piece in pieces) == length
        return pieces

    @rule(
        context=st.sampled_from(list(CONTEXTS)), offset=offsets, length=lengths | st.just(SIZE), most=st.integers(1, 9)
    )
    def status(self, context: str, offset: int, length: int, most: int) -> None:
        length = min(length, SIZE - offset)
        extents = self.loop.run(self.image.disk().status, context, offset, length, most)
        covered = sum(size for size, _ in extents)
        assert 0 < covered <= length
        assert len(extents) <= most
        assert covered == length or len(extents) == most
        assert all(one != two for (_, one), (_, two) in itertools.pairwise(extents)), "neighbours merge"
        for size, status in extents:
            if status & ZERO_BIT[context] if ZERO_BIT[context] else not status:
                assert not any(flat(self.model.read_nowait(offset, size))), "what is called zero reads as zeroes"
            offset += size

    # Cancelled requests

    @rule(
        what=st.sampled_from(["write", "zero", "read", "flush"]), offset=offsets, length=lengths,
        seed=st.integers(0, 9), steps=st.integers(0, 12),
    )  # fmt: skip
    def cancelled(self, what: str, offset: int, length: int, seed: int, steps: int) -> None:
        """A write that is cancelled at some point took effect wholly or not at all; a zeroing part by part."""
        length = min(length, SIZE - offset)
        data = random.Random(seed).randbytes(length) if what == "write" else bytes(length)
        self.loop.run(self._cancelled, what, offset, data, steps)
        parts = {"write": [(offset, offset + length)], "zero": zero_parts(offset, length, SIZE)}.get(what, [])
        found = flat(self.loop.run(self._read, 0, SIZE, False))
        while found != flat(self.model.read_nowait(0, SIZE)):
            assert parts, "a request that was cancelled did what it was not asked for"
            low, high = parts.pop(0)
            self.model.write_nowait(low, memoryview(data[low - offset : high - offset]), owned=False)
            self._remember()

    async def _cancelled(self, what: str, offset: int, data: bytes, steps: int) -> None:
        disk = self.image.disk()
        async with trio.open_nursery() as nursery:
            match what:
                case "write":
                    nursery.start_soon(disk.write, offset, memoryview(data))
                case "zero":
                    nursery.start_soon(disk.zero, offset, len(data))
                case "read":
                    nursery.start_soon(disk.read, offset, len(data))
                case _:
                    nursery.start_soon(disk.flush)
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

    # Durability

    @rule()
    def flush(self) -> None:
        self.loop.run(self.image.flush)
        del self.history[:-1]

    @rule()
    def checkpoint(self) -> None:
        self.loop.run(self.image.checkpoint)

    @rule()
    def stop_and_reopen(self) -> None:
        self.loop.run(self.image.close)
        del self.history[:-1]
        self.storage = RecordingStorage(bytes(self.storage.image))
        self.image = self.loop.run(self._open)

    @rule(mask=st.integers(0, (1 << 64) - 1))
    def crash(self, mask: int) -> None:
        """Any subset of what was not synced survives."""
        self.loop.run(self.image._background.finish)
        self.storage.mark(0, 0)
        *_, last = epochs(self.storage.base, self.storage.events)
        survivors = [change for number, change in enumerate(last.changes) if mask >> (number % 64) & 1]
        self.storage = RecordingStorage(applied(last.base, survivors))
        self.image = self.loop.run(self._open)
        found = flat(self.loop.run(self.image.disk().read, 0, SIZE))
        assert found in self.history, "the disk is one cut at or after the last flush"
        self.history = [found]
        self.model = MemoryDisk(SIZE)
        self.model.write_nowait(0, memoryview(found), owned=False)

    @invariant()
    def is_sound(self) -> None:
        if hasattr(self, "image"):
            self.image.segments.space.check()


def _size(piece: Piece) -> int:
    return piece if isinstance(piece, int) else len(piece)


TestVolume = VolumeMachine.TestCase
TestVolume.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
