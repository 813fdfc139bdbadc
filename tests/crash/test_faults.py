"""After a failed sync or write nothing succeeds until the image is reopened; a lack of space loses nothing."""

import errno
import random
from collections.abc import Awaitable, Callable

import pytest
import trio

from nbdvde.disk import BLOCK
from nbdvde.engine.access import format_storage, open_storage
from nbdvde.engine.image import Image
from nbdvde.errors import NbdvdeError, NoSpaceError, PoisonedError
from tests.crash.oracle import observe
from tests.crash.recording import FrozenStorage, RecordingStorage
from tests.crash.session import KEY, Pages, digest, overwritten
from tests.crash.stepping import deterministic

BUFFER = 96 << 10


def deterministically(function: Callable[[], Awaitable[None]]) -> None:
    with deterministic(1):
        trio.run(function)


def made() -> RecordingStorage:
    storage = RecordingStorage()
    format_storage(storage, 1 << 20, KEY, segment_bytes=64 << 10, extent_bytes=16 << 10)
    return storage


class Faults:
    """Fails the operations of one name, from the `first` to the `last`, counted from 0."""

    def __init__(self, operation: str, first: int, last: int, number: int) -> None:
        self.operation, self.first, self.last, self.number = operation, first, last, number
        self.seen = 0

    def __call__(self, operation: str) -> int | None:
        if operation != self.operation:
            return None
        self.seen += 1
        return self.number if self.first < self.seen <= self.last + 1 else None

    @property
    def struck(self) -> bool:
        return self.seen > self.first


class Client:
    """Writes, flushes and checkpoints in turn, and keeps what the disk must hold."""

    def __init__(self, image: Image) -> None:
        self.image, self.disk = image, image.disk()
        self.accepted: list[Pages] = [{}]
        self.flushed = 0

    async def write(self, number: int) -> None:
        offset, data = number % 40 * BLOCK, random.Random(number).randbytes(3 * BLOCK)
        await self.disk.write(offset, memoryview(data))
        self.accepted.append(overwritten(self.accepted[-1], offset, data))

    async def flush(self, *, alone: bool = False) -> None:
        count = len(self.accepted) - 1
        await self.image.flush()
        self.flushed = count

    async def work(self) -> None:
        for number in range(1, 31):
            await self.write(number)
            if number % 4 == 0:
                await self.flush()
            if number % 7 == 0:
                await self.image.checkpoint()

    async def check_reads(self) -> None:
        pieces = await self.disk.read(0, self.disk.size)
        whole = b"".join(bytes(piece) for piece in pieces)
        pages = {at // BLOCK: page for at in range(0, len(whole), BLOCK) if any(page := whole[at : at + BLOCK])}
        assert pages == self.accepted[-1], "reads show every accepted write"

    def check_survives(self, storage: RecordingStorage) -> None:
        found = observe(FrozenStorage(bytes(storage.image)))
        assert found in [digest(pages) for pages in self.accepted[self.flushed :]], "nothing flushed is lost"


async def fail(operation: str, first: int) -> bool:
    """Have one operation fail; whether there was one with this number."""
    storage = made()
    image = await open_storage(storage, KEY, buffer_bytes=BUFFER)
    client, faults = Client(image), Faults(operation, first, first, errno.EIO)
    storage.fault = faults
    if await _worked(client.work) and await _worked(image.close):
        return faults.struck
    if not storage.closed:
        await check_refusals(client)
    client.check_survives(storage)
    again = await open_storage(RecordingStorage(bytes(storage.image)), KEY, buffer_bytes=BUFFER)
    await again.disk().write(0, memoryview(b"x" * BLOCK))
    await again.close()
    return True


async def check_refusals(client: Client) -> None:
    """Nothing is accepted after the error, and reads go on."""
    image, disk = client.image, client.disk
    for action in (image.flush, image.checkpoint, lambda: client.write(99), disk.flush):
        assert not await _worked(action)
    assert not disk.write_nowait(0, memoryview(bytes(BLOCK)), owned=False)
    assert not disk.zero_nowait(0, BLOCK, allocate=False)
    await client.check_reads()
    assert not await _worked(image.close)


async def _worked(action: Callable[[], Awaitable[None]]) -> bool:
    try:
        await action()
    except PoisonedError:
        return False
    return True


@pytest.mark.parametrize(("operation", "least"), [("sync", 20), ("write", 20)])
def test_after_an_error_of_the_device_nothing_succeeds_until_reopening(operation: str, least: int) -> None:
    async def every() -> None:
        struck = [number for number in range(60) if await fail(operation, number)]
        assert least <= len(struck) < 60, "there are that many places to fail"

    deterministically(every)


async def starve(first: int) -> bool:
    """Let allocations fail from one on, for a while; whether there was one with this number."""
    storage = made()
    image = await open_storage(storage, KEY, buffer_bytes=BUFFER)
    client, faults = Client(image), Faults("allocate", first, 1 << 30, errno.ENOSPC)
    storage.fault = faults
    try:
        await client.work()
    except NoSpaceError:
        assert faults.struck
        await client.check_reads()
        await client.flush()
        client.check_survives(storage)
    faults.last = -1
    if first % 2:
        await client.work()
    await client.flush()
    await client.check_reads()
    client.check_survives(storage)
    await image.close()
    assert observe(FrozenStorage(bytes(storage.image))) == digest(client.accepted[-1])
    return faults.struck and first < 100


def test_without_space_writers_are_told_and_nothing_is_lost() -> None:
    async def every() -> None:
        number = 0
        while number < 30 and await starve(number):
            number += 1
        assert number >= 10, "there are that many places to fail"

    deterministically(every)


@pytest.mark.parametrize("operation", ["sync", "write", "allocate"])
def test_opening_fails_cleanly_on_an_error_of_the_device(operation: str) -> None:
    async def every() -> None:
        for number in range(100):
            storage = made()
            before = observe(FrozenStorage(bytes(storage.image)))
            faults = Faults(operation, number, number, errno.EIO)
            storage.fault = faults
            try:
                image = await open_storage(storage, KEY, buffer_bytes=BUFFER)
                storage.fault = Faults("none", 0, 0, 0)
            except NbdvdeError:
                assert storage.closed
                assert observe(FrozenStorage(bytes(storage.image))) == before
                continue
            assert not faults.struck, "an image does not open over an error"
            await image.close()
            assert number >= 2
            return

    deterministically(every)


def test_a_file_that_cannot_be_cut_is_closed_all_the_same() -> None:
    async def cut() -> None:
        storage = made()
        image = await open_storage(storage, KEY, buffer_bytes=BUFFER)
        storage.fault = Faults("truncate", 0, 9, errno.EIO)
        await image.close()
        assert observe(FrozenStorage(bytes(storage.image))) == digest({})

    deterministically(cut)
