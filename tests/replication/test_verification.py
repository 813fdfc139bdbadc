"""Replicas compared, their regions too."""

from collections.abc import Mapping, Sequence
from typing import cast

from nbdvde.admin.streamcalls import CreateStream
from nbdvde.admin.wormcalls import CreateWorm
from nbdvde.disk import BLOCK
from nbdvde.engine.access import open_storage
from nbdvde.engine.image import Image
from nbdvde.engine.managed.stream import Stream
from nbdvde.engine.managed.worm import Worm
from nbdvde.replication.assembly import DEFAULT
from nbdvde.replication.compare import read_chunk
from nbdvde.replication.machine import ImageMachine
from nbdvde.replication.operations import Operation
from nbdvde.replication.regioncopy import found
from nbdvde.replication.replica import Replica
from nbdvde.replication.verification import Difference, verify
from tests.crash.recording import RecordingStorage
from tests.crash.session import KEY
from tests.replication.entries import Author, machine_of
from tests.replication.test_regions import append, call, fresh


class Three:
    """Node 1 of a group whose machines are all at hand."""

    def __init__(self, images: Sequence[Image], machines: Sequence[ImageMachine]) -> None:
        self.images, self.machines, self.author = images, machines, Author()
        self.image, self.assembly = images[0], machines[0]._assembly
        self.node, self.number, self.name = self, 1, DEFAULT

    async def lane(self, group: str) -> "Three":
        assert group == DEFAULT
        return self

    async def propose(self, operation: Operation, *, growth: int = 0) -> object:
        entry = self.author.entry(operation)
        results = [(await machine.apply([entry]))[0] for machine in self.machines]
        return results[0]

    async def compared(self, group: str, index: int) -> Mapping[int, bytes]:
        return {number: machine.comparisons.of(index) or b"" for number, machine in enumerate(self.machines, 1)}

    async def chunk_of(self, node: int, disk: str, chunk: int) -> bytes:
        return await read_chunk(await found(self.images[node - 1], disk), chunk)


async def compared(three: Three, *, repair: bool) -> tuple[list[str], list[Difference]]:
    """(what was compared, how nodes differ)."""
    lines = [line async for line in verify(cast(Replica, three), repair=repair)]
    return [line.disk for line in lines], [difference for line in lines for difference in line.differences]


async def test_regions_are_mended_where_their_directories_agree() -> None:
    images = [await open_storage(fresh(), KEY) for _ in range(3)]
    three = Three(images, [await machine_of(image) for image in images])
    for operation in (
        call("stream/create", CreateStream(16 * BLOCK, increment=BLOCK)), append(b"a", b"b"),
        call("worm/create", CreateWorm(4 * BLOCK, 0)),
    ):  # fmt: skip
        await three.propose(operation)
    assert await compared(three, repair=True) == (["disk", "disk/0", "disk/1", "disk/2"], [])
    await (await images[1].regions.get(Stream, images[1].disk())).append(b"only here")
    _, differences = await compared(three, repair=True)
    assert differences == [Difference("disk/1", 0, [2], True)]
    assert (await compared(three, repair=False))[1] == []
    await (await images[2].regions.get(Worm, images[2].disk())).append(b"only here")
    _, differences = await compared(three, repair=True)
    assert differences == [Difference("disk/0", 0, [3], False), Difference("disk/2", 0, [3], False)]
    for image in images:
        await image.close()


async def test_what_belongs_to_a_cluster_notes_nothing_by_itself() -> None:
    """Whoever opens it: the clock of a WORM region is that of all nodes."""
    storage = fresh()
    image = await open_storage(storage, KEY)
    machine = await machine_of(image)
    await machine.apply(Author().entries([call("worm/create", CreateWorm(4 * BLOCK, 0))]))
    await machine.durable()
    image.regions.alone = False
    await image.close()
    image = await open_storage(RecordingStorage(bytes(storage.image)), KEY)
    worm = await image.regions.get(Worm, image.disk())
    await image.regions.tend()
    assert worm.header.clock_ns == 0
    await image.close()
