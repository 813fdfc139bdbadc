"""A crash leaves a metrics log as it was after one of its changes.

Samples are durable once anything was flushed after them, and until then may be there or not, the older ones first.
"""

import random

import numpy as np
import trio

from nbdvde.disk import BLOCK
from nbdvde.engine.access import format_storage, open_storage
from nbdvde.engine.image import Image
from nbdvde.engine.managed.metricslog import MetricsLog
from nbdvde.engine.regions.query import Question, Series, ask
from nbdvde.engine.regions.samples import FORM, Sample
from nbdvde.engine.regions.tiers import CAPACITY_MIN, DAY_NS
from tests.crash.recording import RecordingStorage
from tests.crash.session import KEY
from tests.crash.states import crashes

SEGMENT = 64 << 10
NOW_NS = 1_700_000_000 * 10**9
SAMPLES = [Sample(number % 3, NOW_NS + number * 10**10, float(number * 7 % 1000)) for number in range(3200)]
BATCH = 320


async def fill(storage: RecordingStorage) -> None:
    """Batches between writes to the disk, every second one flushed; marked with how many samples a crash may leave."""
    storage.mark(0, 0)
    image = await open_storage(storage, KEY, checkpoint_bytes=96 << 10)
    chance = random.Random(1)
    await MetricsLog.create(await image.regions.area(image.disk()), CAPACITY_MIN, 0.5)
    log = await image.regions.get(MetricsLog, image.disk())
    durable = 0
    for begin in range(0, len(SAMPLES), BATCH):
        await image.disk().write(chance.randrange(200) * BLOCK, memoryview(chance.randbytes(BLOCK)))
        end = begin + BATCH
        storage.mark(durable, end)
        await log.append(SAMPLES[begin:end])
        if begin // BATCH % 2:
            await image.disk().flush()
            durable = end
            storage.mark(durable, end)
    assert log.history.tiers[1].ring.used, "samples were taken together meanwhile"
    await image.close()
    storage.mark(end, end)


async def held(image: Image) -> int:
    """How many samples are there, which are the first ones."""
    area = await image.regions.area(image.disk())
    if area.find(FORM) is None:
        return 0
    history = (await image.regions.get(MetricsLog, image.disk())).history
    for metric in range(3):
        values = [sample.value for sample in SAMPLES[: history.samples] if sample.metric == metric]
        rows = ask(history, Question(Series(metric), resolution_ns=30 * DAY_NS)).windows.rows
        found = (rows["count"].sum(), rows["sum"].sum(), *(rows["minimum"], rows["maximum"]))
        assert found[:2] == (len(values), sum(values))
        if values:
            assert (np.min(found[2]), np.max(found[3])) == (min(values), max(values))
    return history.samples


async def held_after(image: bytes) -> int:
    opened = await open_storage(RecordingStorage(image), KEY, read_only=True)
    try:
        return await held(opened)
    finally:
        await opened.close()


def test_a_crash_leaves_the_first_samples_whole() -> None:
    storage = RecordingStorage()
    format_storage(storage, 1 << 20, KEY, segment_bytes=SEGMENT)
    storage = RecordingStorage(bytes(storage.image))
    trio.run(fill, storage)
    seen, numbers = dict[bytes, int](), set[int]()
    for crash in crashes(storage.base, storage.events, random.Random(1), 8, 2):
        if crash.image not in seen:
            seen[crash.image] = trio.run(held_after, crash.image)
        numbers.add(seen[crash.image])
        assert any(low <= seen[crash.image] <= high for low, high in crash.windows), crash.what
    assert {0, len(SAMPLES)} < numbers
    assert len(numbers) > 4
    assert len(seen) > 50
