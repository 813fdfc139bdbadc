"""No crash loses a passport, a verification or a revocation that was acknowledged, or leaves half of one."""

import random

import trio

from nbdvde.disk import BLOCK
from nbdvde.engine.access import format_storage, open_storage
from nbdvde.engine.image import Image
from nbdvde.engine.managed.vault import Vault
from nbdvde.engine.regions.vault import VERIFIED, Record
from tests.crash.recording import RecordingStorage
from tests.crash.session import KEY as MASTER
from tests.crash.states import crashes
from tests.engine.regions.passports import KEY, NOW, PUBLIC, event, passport

LONG = "n" * 256
SIGNED = [passport(number, notes=LONG) for number in range(1, 11)]
RECORDS: list[Record] = [
    *SIGNED[:9], event(SIGNED[0], 50, VERIFIED), event(SIGNED[3], 51).signed_with(KEY), SIGNED[9],
]  # fmt: skip
"""In this order, over the end of a block."""
SEGMENT = 64 << 10


def fresh() -> RecordingStorage:
    storage = RecordingStorage()
    format_storage(storage, 1 << 20, MASTER, segment_bytes=SEGMENT)
    return RecordingStorage(bytes(storage.image))


async def fill(storage: RecordingStorage) -> None:
    """Records between writes to the disk; marked with how many of them a crash may leave."""
    storage.mark(0, 0)
    image = await open_storage(storage, MASTER, checkpoint_bytes=48 << 10)
    chance = random.Random(1)
    await Vault.create(await image.regions.area(image.disk()), 64 << 10)
    vault = await image.regions.get(Vault, image.disk())
    for number, record in enumerate(RECORDS):
        await image.disk().write(chance.randrange(200) * BLOCK, memoryview(chance.randbytes(BLOCK)))
        storage.mark(number, number + 1)
        await vault.add(record, PUBLIC if any(record.signature) else None, NOW)
        storage.mark(number + 1, number + 1)
    await image.close()


async def held(image: Image) -> int:
    """How many of the records are there: those before the others."""
    area = await image.regions.area(image.disk())
    if area.find(Vault.FORM) is None:
        return 0
    vault = await image.regions.get(Vault, image.disk())
    found = {record for entry in vault.query() for record in (entry.passport, *entry.events)}
    assert found == set(RECORDS[: len(found)])
    return len(found)


async def held_after(image: bytes) -> int:
    opened = await open_storage(RecordingStorage(image), MASTER, read_only=True)
    try:
        return await held(opened)
    finally:
        await opened.close()


def test_what_was_acknowledged_survives_every_crash() -> None:
    storage = fresh()
    trio.run(fill, storage)
    seen, numbers = dict[bytes, int](), set[int]()
    for crash in crashes(storage.base, storage.events, random.Random(1), 8, 2):
        if crash.image not in seen:
            seen[crash.image] = trio.run(held_after, crash.image)
        numbers.add(seen[crash.image])
        assert any(low <= seen[crash.image] <= high for low, high in crash.windows), crash.what
    assert numbers == set(range(len(RECORDS) + 1))
    assert len(seen) > 100
