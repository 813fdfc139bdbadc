"""A crash at any write of an erasure leaves a subject erased or not; once acknowledged, no key is left anywhere."""

import random
from dataclasses import dataclass

import trio

from nbdvde.disk import BLOCK
from nbdvde.engine.access import format_storage, open_storage
from nbdvde.engine.image import Image
from nbdvde.engine.managed.anon import AnonTable
from nbdvde.engine.subjectkeys import HEADS
from nbdvde.engine.subjectstore import load_head
from nbdvde.errors import RefusedError
from tests.crash.recording import FrozenStorage, RecordingStorage
from tests.crash.session import KEY as MASTER
from tests.crash.states import Crash, crashes
from tests.engine.regions.adversary import entries, everything_sealed

ONE, TWO = b"subject one 1234", b"subject two 5678"
VALUES = {ONE: b"one@example.org", TWO: b"two@example.org"}
NOW = 1_800_000_000 * 10**9


def fresh(number: int) -> bytes:
    return number.to_bytes(2, "big") * 24


async def opened(storage: RecordingStorage | FrozenStorage, *, read_only: bool = False) -> Image:
    return await open_storage(storage, MASTER, checkpoint_bytes=48 << 10, read_only=read_only)


async def table_of(image: Image) -> AnonTable:
    return await image.regions.get(AnonTable, image.disk())


@dataclass(frozen=True)
class Made:
    """An image with mappings of two subjects."""

    image: bytes
    uuid: bytes
    keys: dict[bytes, bytes]

    @classmethod
    async def make(cls) -> "Made":
        storage = RecordingStorage()
        format_storage(storage, 1 << 20, MASTER, 0, segment_bytes=64 << 10)
        image = await opened(storage)
        await AnonTable.create(await image.regions.area(image.disk()), 64 << 10)
        table = await table_of(image)
        for number in range(60):
            subject = (ONE, TWO)[number % 2]
            value = VALUES[subject] if number < 2 else b"%d" % number
            await table.map(subject, 1, value, NOW + number, fresh(number + 1))
        uuid = image.superblock.uuid
        await image.close()
        found = {entry.subject: entry.key for entry in entries(bytes(storage.image), MASTER.data, uuid)}
        assert found.keys() == VALUES.keys(), "the adversary finds what is there"
        return cls(bytes(storage.image), uuid, found)

    @property
    def page(self) -> bytes:
        """The keys as they were sealed: what a device may have kept of a place that was overwritten."""
        head = load_head(FrozenStorage(self.image), MASTER.data, self.uuid)
        return self.image[head.offsets[0] :][:BLOCK]

    def leaks(self, file: bytes) -> bool:
        """Whether the key of ONE can be had from these bytes and the master key."""
        return self.keys[ONE] in {entry.key for entry in entries(file, MASTER.data, self.uuid)}


async def erase(storage: RecordingStorage) -> None:
    """Erase ONE between writes to the disk; marked with 1 from when on it must be erased after a crash."""
    storage.mark(0, 0)
    image = await opened(storage)
    table, chance = await table_of(image), random.Random(1)
    await image.disk().write(0, memoryview(chance.randbytes(BLOCK)))
    storage.mark(0, 1)
    await table.erase(ONE, NOW + 999)
    storage.mark(1, 1)
    await image.disk().write(0, memoryview(chance.randbytes(BLOCK)))
    await image.close()


async def looked_at(image: Image) -> bool:
    """Whether ONE is erased, wholly; TWO is not touched."""
    table = await table_of(image)
    assert [found.created_ns for found in await table.look_up(TWO, VALUES[TWO])] == [NOW + 1]
    assert len(list(table.mappings())) == 60
    flags = {record.flags for record in table.mappings(ONE)}
    if not table.proofs:
        assert flags == {1}
        assert [found.created_ns for found in await table.look_up(ONE, VALUES[ONE])] == [NOW]
        return False
    assert flags == {2}
    assert await table.doubts(ONE) == []
    try:
        await table.look_up(ONE, VALUES[ONE])
    except RefusedError:
        return True
    raise AssertionError("it was looked up")


async def verdict(made: Made, crash: Crash) -> bool:
    """Whether ONE is erased after a crash: in a look at it, and when it was opened again."""
    image = await opened(FrozenStorage(crash.image), read_only=True)
    erased = await looked_at(image)
    await image.close()
    if all(low == 1 for low, _ in crash.windows):
        assert not made.leaks(crash.image + made.page), f"{crash.what}: acknowledged, and there is the key"
    storage = RecordingStorage(crash.image)
    image = await opened(storage)
    assert await looked_at(image) == erased
    if erased:
        assert not made.leaks(bytes(storage.image) + made.page), f"{crash.what}: opened again, and there is the key"
    await image.close()
    assert storage.image[HEADS[0] :][:BLOCK] == storage.image[HEADS[1] :][:BLOCK]
    return erased


def test_a_crash_leaves_a_subject_erased_or_not() -> None:
    made = trio.run(Made.make)
    storage = RecordingStorage(made.image)
    trio.run(erase, storage)
    assert not made.leaks(bytes(storage.image))
    found = dict[bytes, bool]()
    for crash in crashes(storage.base, storage.events, random.Random(1), 8, 3):
        if crash.image not in found:
            found[crash.image] = trio.run(verdict, made, crash)
        assert any(low <= found[crash.image] <= high for low, high in crash.windows), crash.what
    assert set(found.values()) == {False, True}
    assert len(found) > 30


def test_nothing_that_the_master_key_opens_ever_held_a_key() -> None:
    """Segments old and new, snapshots and all; and pages kept from before do not open with what the file holds now."""
    with everything_sealed() as sealed:
        made = trio.run(Made.make)
        storage = RecordingStorage(made.image)
        trio.run(erase, storage)
    assert len(sealed) > 100
    for secret in made.keys.values():
        assert not any(secret in plaintext for plaintext in sealed)
        assert secret not in made.image
    assert not made.leaks(bytes(storage.image) + made.page), "the vault key is another one"
    assert made.leaks(bytes(storage.image) + made.image), "only an older copy of the file has it"
