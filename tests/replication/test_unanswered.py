"""Disks of a replicated image as clients use them."""

from collections.abc import Awaitable, Callable
from typing import cast

import pytest
import trio

from nbdvde.disk import BLOCK, Disk, Done
from nbdvde.engine.access import open_storage
from nbdvde.engine.image import Image
from nbdvde.engine.managed.exported import RegionDisks
from nbdvde.engine.managed.stream import Stream
from nbdvde.engine.volume import Volume
from nbdvde.errors import DetachedError, NoSpaceError, RefusedError
from nbdvde.exports import Export
from nbdvde.inventory import Inventory
from nbdvde.moment import NO_CLOCK, RetentionClock
from nbdvde.replication.disk import Attachment, ReplicatedDisk
from nbdvde.replication.operations import Change
from nbdvde.replication.regionexport import shown_through
from tests.crash.session import KEY
from tests.replication.test_regions import fresh


class Silent:
    """The group has no leader; or nothing to wait for."""

    def __init__(self, *, leader: bool = False) -> None:
        self.leader, self.barriers = leader, 0

    async def put(self, change: Change) -> None:
        await trio.sleep_forever()

    def begin(self, change: Change, done: Done) -> None:
        self.begun = done

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        self.given_up = seconds, call

    taken = 0

    async def barrier(self, disk: str = "", offset: int = 0, length: int = 0) -> None:
        self.barriers += 1
        if not self.leader:
            await trio.sleep_forever()

    async def call(self, path: str, request: bytes, clock: RetentionClock = NO_CLOCK) -> bytes:
        raise AssertionError("nobody appends")

    def release(self, disk: str, attachment: Attachment) -> None: ...

    async def attach(self, disk: str, abort: Callable[[], None]) -> Attachment:
        raise AssertionError("nobody comes")


async def refused(work: Awaitable[object], found: list[float]) -> None:
    with pytest.raises(DetachedError, match="did not answer in time"):
        await work
    found.append(trio.current_time())


async def test_nobody_waits_for_ever_who_cannot_be_answered(autojump_clock: object) -> None:
    """Or an export could not be removed while there is no majority."""
    image = await open_storage(fresh(), KEY)
    disk = ReplicatedDisk("disk", image.disk, Silent())
    found: list[float] = []
    begun = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(refused, disk.write(0, memoryview(bytes(BLOCK))), found)
        nursery.start_soon(refused, disk.read(0, BLOCK), found)
        await trio.sleep(100)
        assert not found
        disk.falter()
        nursery.start_soon(refused, disk.status("base:allocation", 0, BLOCK, 1), found)
    assert [round(at - begun) for at in found] == [105] * 3
    await image.close()


async def test_a_write_that_was_begun_is_given_up_as_well() -> None:
    """What becomes of it later nobody hears any more."""
    ways, ends = Silent(), list[object]()
    disk = ReplicatedDisk("disk", lambda: cast(Volume, None), ways)
    disk.falter()
    assert not hasattr(ways, "given_up"), "there is nothing to give up"
    assert disk.begin_write(0, memoryview(b"data"), ends.append)
    disk.falter()
    seconds, give_up = ways.given_up
    assert (seconds, ends) == (5, [])
    give_up()
    ways.begun(None)
    assert [type(end) for end in ends] == [DetachedError]


async def listed(image: Image, disk: Disk, inventory: Inventory) -> list[str]:
    export = Export("main", disk, kin=inventory)
    return [info.name for info in inventory.listing(export)]


async def test_snapshots_and_regions_are_listed_and_read_up_to_date() -> None:
    image, ways = await open_storage(fresh(), KEY), Silent(leader=True)
    await image.volumes.snapshot("disk", "a")
    stream = await Stream.create(image.regions, image.disk(), 16, increment=1)
    await stream.append(b"x" * BLOCK)
    disk = ReplicatedDisk("disk", image.disk, ways)
    inventory = Inventory(
        image.volumes, RegionDisks(image.regions), whole=False, shown=lambda name: disk,
        up_to_date=shown_through(ways),
    )  # fmt: skip
    assert await listed(image, disk, inventory) == ["main/stream", "main@a"]
    export = Export("main", disk)
    first, again = (cast(Export, inventory.find(export, "main/stream")) for _ in range(2))
    assert first.disk is again.disk
    assert first.disk.read_only
    assert b"".join(map(bytes, await first.disk.read(0, BLOCK))) == b"x" * BLOCK
    assert await first.disk.status("base:allocation", 0, 2 * BLOCK, 4) == [(BLOCK, 0), (BLOCK, 3)]
    assert ways.barriers == 2
    with pytest.raises(RefusedError):
        await first.disk.write(BLOCK, memoryview(bytes(BLOCK)))
    assert cast(Export, inventory.find(export, "main@a")).disk.name == "disk@a"
    await image.close()


async def test_the_parts_of_a_long_write_are_under_way_together(autojump_clock: object) -> None:
    """And one that fails is told as if there were no others."""

    class Slow(Silent):
        async def put(self, change: Change) -> None:
            await trio.sleep(10)
            if change.offset:
                raise NoSpaceError("cluster", "is full")

    image = await open_storage(fresh(), KEY)
    disk, begun_s = ReplicatedDisk("disk", image.disk, Slow()), trio.current_time()
    await disk.write(0, memoryview(bytes(1 << 20)))
    with pytest.raises(NoSpaceError, match="is full"):
        await disk.write(0, memoryview(bytes(8 << 20)))
    assert trio.current_time() - begun_s == pytest.approx(20)
    await image.close()
