"""One image becomes what another one is; only what differs travels."""

import random
from collections.abc import Callable, Mapping

import pytest
import trio

from nbdvde.disk import BLOCK
from nbdvde.engine.access import format_storage, open_storage
from nbdvde.engine.image import Image
from nbdvde.errors import NetworkError
from nbdvde.raft.messages import Snapshot
from nbdvde.replication.catchup import Taker
from nbdvde.replication.compare import CHUNK, HASH_BYTES
from nbdvde.replication.giving import Giver
from nbdvde.replication.notes import Note
from tests.crash.recording import RecordingStorage
from tests.crash.session import KEY
from tests.replication.entries import CLUSTER, GROUP, MEMBERS

SIZE = 8 * CHUNK - 3 * 512
NOTE = Note(GROUP, Snapshot(7, 2, MEMBERS), {"disk": (5, 1)})


async def image(size: int = SIZE) -> Image:
    storage = RecordingStorage()
    format_storage(storage, size, KEY)
    return await open_storage(storage, KEY)


def giver(source: Image, changing: Callable[[], int] = lambda: 0, note: Note = NOTE) -> Giver:
    async def compared(group: str, index: int) -> bytes:
        raise AssertionError(index)

    return Giver(source, CLUSTER.key, lambda: [note], compared, changing=changing)


def taker(image: Image, source: Image) -> Taker:
    return Taker(image, CLUSTER.key, giver(source).answer)


async def run(taker: Taker, have: int = 0) -> Mapping[str, Note]:
    """Take everything over."""
    return await taker.run({GROUP: have}, trio.lowlevel.checkpoint)


async def scatter(image: Image, chance: random.Random, count: int, disk: str = "disk") -> None:
    """Write blocks anywhere, and now and then forget some."""
    for _ in range(count):
        offset = chance.randrange(SIZE // BLOCK) * BLOCK
        if chance.random() < 0.2:
            await image.disk(disk).trim(offset, BLOCK)
        else:
            await image.disk(disk).write(offset, memoryview(chance.randbytes(BLOCK)))


async def everything(image: Image) -> dict[str, tuple[int, int, bytes]]:
    """Size, time and content of all disks and snapshots."""
    labels = [image.volumes._catalogue.label(member) for member in image.volumes]
    found = {}
    for label in labels:
        volume, member = image.disk(label), image.volumes.find(label)
        assert member is not None
        pieces = await volume.read(0, volume.size)
        created = member.created_ns if member.parent else 0
        found[label] = volume.size, created, b"".join(map(bytes, pieces))
    return found


@pytest.mark.parametrize("seed", range(3))
async def test_everything_is_taken_over(seed: int) -> None:
    chance = random.Random(seed)
    source, behind = await image(), await image()
    await source.volumes.create("second", CHUNK)
    for name in ("a", "b", "c"):
        await scatter(source, chance, 60)
        await source.volumes.snapshot("disk", name)
    await source.disk("second").write(512, memoryview(b"x" * 700))
    await behind.volumes.create("other", CHUNK)
    await scatter(behind, chance, 30)
    await behind.volumes.snapshot("disk", "theirs")
    assert await run(taker(behind, source)) == {GROUP: NOTE}
    assert await everything(behind) == await everything(source)
    again = taker(behind, source)
    await run(again)
    assert again.copied == again.compared == 0
    await source.close()
    await behind.close()


async def test_only_changed_blocks_travel_to_who_was_away() -> None:
    chance = random.Random(5)
    source, behind = await image(), await image()
    whole = chance.randbytes(SIZE)
    for one in (source, behind):
        await one.disk().write(0, memoryview(whole))
    changed = sorted(chance.sample(range(2 * CHUNK // BLOCK), 40))
    for block in changed:
        await source.disk().write(block * BLOCK, memoryview(chance.randbytes(BLOCK)))
    catching = taker(behind, source)
    await run(catching)
    assert catching.copied == len(changed)
    chunks = -(-SIZE // CHUNK)
    assert catching.received <= 1.1 * len(changed) * BLOCK + HASH_BYTES * (catching.compared + chunks) + 1000
    assert catching.compared == 2 * CHUNK // BLOCK
    await source.close()
    await behind.close()


async def test_a_new_node_gets_allocated_data_only() -> None:
    source, new = await image(), await image()
    await source.disk().write(3 * CHUNK, memoryview(b"z" * BLOCK))
    catching = taker(new, source)
    await run(catching)
    assert (catching.compared, catching.received < 2000) == (0, True)
    await source.close()
    await new.close()


async def test_it_begins_again_when_the_catalogue_changes() -> None:
    source, behind = await image(), await image()
    answer, asked = giver(source).answer, 0

    async def ask(question: bytes) -> bytes:
        nonlocal asked
        asked += 1
        if asked == 2:
            await source.volumes.snapshot("disk", "late")
        return await answer(question)

    await run(Taker(behind, CLUSTER.key, ask))
    assert await everything(behind) == await everything(source)
    await source.close()
    await behind.close()


async def test_nothing_is_taken_over_from_who_is_behind() -> None:
    source, ahead = await image(), await image()
    await ahead.disk().write(0, memoryview(b"x" * BLOCK))
    before = await everything(ahead)
    with pytest.raises(NetworkError, match="not as far"):
        await run(taker(ahead, source), have=8)
    assert await everything(ahead) == before
    await source.close()
    await ahead.close()


@pytest.mark.parametrize("question", [b"", b"\xff\x00", b"\x92\x09\x01"])
async def test_malformed_questions_are_refused(question: bytes) -> None:
    source = await image()
    with pytest.raises(NetworkError, match="malformed"):
        await giver(source).answer(question)
    await source.close()


async def test_it_takes_no_more_than_it_may(autojump_clock: object) -> None:
    source, behind = await image(), await image()
    await source.disk().write(0, memoryview(random.Random(1).randbytes(SIZE)))
    begun_s = trio.current_time()
    catching = Taker(behind, CLUSTER.key, giver(source).answer, rate=1 << 20)
    await run(catching)
    assert trio.current_time() - begun_s > catching.received / (1 << 20) - 1
    assert await everything(behind) == await everything(source)
    await source.close()
    await behind.close()


async def test_who_answers_need_not_wait_for_who_asks(autojump_clock: object) -> None:
    """Some questions are on their way at a time; a failure of one ends it all, and is told as it is."""
    source, behind = await image(48 * CHUNK), await image(48 * CHUNK)
    for chunk in range(48):
        await source.disk().write(chunk * CHUNK, memoryview(bytes([chunk + 1]) * BLOCK))
    answer, asking, most, failing = giver(source).answer, 0, 0, False

    async def ask(question: bytes) -> bytes:
        nonlocal asking, most
        asking += 1
        most = max(most, asking)
        try:
            await trio.sleep(0.1)
            if failing and asking > 1:
                raise NetworkError("node 2", "is not connected any more")
            return await answer(question)
        finally:
            asking -= 1

    failing = True
    with pytest.raises(NetworkError, match="not connected any more"):
        await run(Taker(behind, CLUSTER.key, ask))
    failing = False
    await run(Taker(behind, CLUSTER.key, ask))
    assert (most, asking) == (3, 0)
    whole = await source.disk().read(0, 48 * CHUNK), await behind.disk().read(0, 48 * CHUNK)
    assert b"".join(map(bytes, whole[0])) == b"".join(map(bytes, whole[1]))
    await source.close()
    await behind.close()
