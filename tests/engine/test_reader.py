"""Reading extents: once for each request, and errors of the device."""

import errno
from collections.abc import Callable, Sequence
from unittest import mock

import pytest

from nbdvde.disk import ALLOCATION, BLOCK, Buffer
from nbdvde.engine import recovery
from nbdvde.engine.access import format_storage, master_key, open_storage
from nbdvde.engine.check import check_storage
from nbdvde.engine.extent import Decoder
from nbdvde.engine.image import Image
from nbdvde.engine.keystore import load_key_area
from nbdvde.engine.layout import KEY_AREAS, SUPERBLOCKS, Kind
from nbdvde.engine.sealing import Sealer
from nbdvde.engine.volume import Volume
from nbdvde.errors import DamageError, NbdErrno
from tests.crash.oracle import master_of
from tests.crash.recording import FrozenStorage, RecordingStorage
from tests.crash.session import KEY

SIZE = 4 << 20


def content(number: int) -> bytes:
    return bytes([number + 1]) * BLOCK


async def image_with_an_overwritten_extent() -> bytes:
    """Blocks 0 to 31 in one extent of 128 KiB, each third of them written again; and a block in another leaf."""
    storage = RecordingStorage()
    format_storage(storage, SIZE, KEY, extent_bytes=128 << 10, segment_bytes=1 << 20)
    image = await open_storage(storage, KEY)
    disk = image.disk()
    await disk.write(0, memoryview(b"".join(map(content, range(32)))))
    await image.flush()
    for number in range(0, 32, 3):
        await disk.write(number * BLOCK, memoryview(content(number + 100)))
    await disk.write(600 * BLOCK, memoryview(content(5)))
    await image.close()
    return bytes(storage.image)


EXPECTED = b"".join(content(number if number % 3 else number + 100) for number in range(32))


class Failing(FrozenStorage):
    """Cannot read a range of bytes."""

    def __init__(self, image: bytes, *, patient: bool = True) -> None:
        super().__init__(image)
        self.bad = range(0)
        self._patient = patient

    def read(self, offset: int, length: int) -> bytes:
        if offset < self.bad.stop and offset + length > self.bad.start:
            raise OSError(errno.EIO, "Input/output error")
        return super().read(offset, length)

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        return self.read(offset, length) if self._patient else None

    def close(self) -> None:
        pass


async def opened(storage: FrozenStorage) -> Image:
    return await open_storage(storage, KEY, read_only=True, path="/disks/one.vde")


async def test_an_extent_is_opened_once_for_all_its_runs_in_a_request() -> None:
    image = await opened(FrozenStorage(await image_with_an_overwritten_extent()))
    kinds: list[int] = []
    opening, decoding = Sealer.open, Decoder.many
    frames: list[tuple[bytes, int, int]] = []

    def open_noted(self: Sealer, number: int, kind: int, sealed: Buffer, *, blocks: int = 0, domain: int = 0) -> bytes:
        kinds.append(kind)
        return opening(self, number, kind, sealed, blocks=blocks, domain=domain)

    def many_noted(self: Decoder, wanted: Sequence[tuple[bytes, int, int]]) -> list[Buffer]:
        frames.extend(wanted)
        return decoding(self, wanted)

    with mock.patch.object(Sealer, "open", open_noted), mock.patch.object(Decoder, "many", many_noted):
        pieces = await image.disk().read(0, 32 * BLOCK)
    assert b"".join(map(bytes, pieces)) == EXPECTED
    assert kinds.count(Kind.EXTENT) == 2
    assert len(frames) == len(set(frames)) == 8 + 3, "each frame of the first, and of the second with eleven"


async def read(disk: Volume, offset: int, length: int) -> None:
    """At once if that can be, as a session does it."""
    if disk.read_nowait(offset, length) is None:
        await disk.read(offset, length)


def whole(storage: Failing) -> None:
    storage.bad = range(131072, 1 << 40)


@pytest.mark.parametrize("patient", [True, False])
@pytest.mark.parametrize("leaf_first", [True, False])
async def test_an_error_of_the_device_is_one_clear_line_to_the_request(patient: bool, leaf_first: bool) -> None:
    storage = Failing(await image_with_an_overwritten_extent(), patient=patient)
    image = await opened(storage)
    disk = image.disk()
    if leaf_first:
        await disk.read(40 * BLOCK, BLOCK)
    whole(storage)
    for offset, length in ((0, BLOCK), (0, 32 * BLOCK)):
        with pytest.raises(DamageError, match=r"one\.vde: cannot be read at byte \d+: input/output error") as caught:
            await read(disk, offset, length)
        assert caught.value.nbd_errno is NbdErrno.EIO
    with pytest.raises(DamageError, match="cannot be read"):
        await disk.status(ALLOCATION, 600 * BLOCK, BLOCK, 9)


async def test_an_error_of_the_device_under_the_root_is_a_clear_error_of_opening() -> None:
    storage = Failing(await image_with_an_overwritten_extent())
    whole(storage)
    with pytest.raises(DamageError, match="cannot be read at byte"):
        recovery.load(storage, master_of)


async def test_check_reports_what_the_device_cannot_read_and_goes_on() -> None:
    storage = Failing(await image_with_an_overwritten_extent())
    loaded = recovery.load(storage, master_of)
    log = min((s for s in loaded.segments.states.values() if s.index_ref), key=lambda s: s.segment.offset)
    storage.bad = range(log.segment.offset, log.segment.offset + 4096)
    report = check_storage(storage, master_of)
    assert not report.ok
    assert any("input/output error" in error.what for error in report.errors)
    assert [(error.disk, error.offset) for error in report.errors if error.disk], "the bytes of the disk are named"


@pytest.mark.parametrize(("copies", "look"), [(SUPERBLOCKS, recovery.read_superblocks), (KEY_AREAS, load_key_area)])
async def test_a_copy_that_cannot_be_read_counts_as_damaged(
    copies: tuple[int, int], look: Callable[..., object]
) -> None:
    storage = Failing(await image_with_an_overwritten_extent())
    for offset in copies:
        storage.bad = range(offset, offset + BLOCK)
        assert look(storage)
        loaded = recovery.load(storage, lambda superblock: master_key(storage, superblock, KEY))
        assert loaded.catalogue.members
        assert not check_storage(storage, master_of).ok
