"""A replicated disk as one client uses it, and who uses it together."""

from collections.abc import Callable
from typing import Any, cast

import pytest

from nbdvde.disk import Done
from nbdvde.errors import DetachedError
from nbdvde.replication.disk import Attachment, ReplicatedDisk
from nbdvde.replication.operations import Change


class Volume:
    """Stands for one of the image."""

    def __init__(self) -> None:
        self.size, self.held = 1 << 20, b"old"

    def read_nowait(self, offset: int, length: int) -> list[bytes]:
        return [self.held]


class Ways:
    """A group whose latest entry is applied when somebody waits for that."""

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self.changes: list[Change] = []
        self.released: list[str] = []
        self.attachment = Attachment(7)
        self.latest: Callable[[], object] = lambda: None

    async def put(self, change: Change) -> None:
        self.changes.append(change)

    def begin(self, change: Change, done: Done) -> None:
        self.changes.append(change)
        done(None)

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        raise AssertionError("nothing is under way")

    taken = 0

    async def barrier(self, disk: str = "", offset: int = 0, length: int = 0) -> None:
        self.latest()

    def release(self, disk: str, attachment: Attachment) -> None:
        self.released.append(disk)

    async def attach(self, disk: str, abort: Callable[[], None]) -> Attachment:
        self.attachment.join(abort)
        return self.attachment


@pytest.fixture
def ways() -> Ways:
    return Ways(Volume())


async def attached(ways: Ways, abort: Callable[[], None] = lambda: None) -> Any:
    disk = ReplicatedDisk("disk", lambda: cast(Any, ways.volume), ways)
    return await disk.attach(abort)


async def test_a_read_waits_for_what_is_agreed_on(ways: Ways) -> None:
    disk = await attached(ways)
    ways.latest = lambda: setattr(ways.volume, "held", b"new")
    assert await disk.read(0, 3) == [b"new"]


async def test_changes_are_of_the_attachment_until_it_is_over(ways: Ways) -> None:
    disk = await attached(ways)
    await disk.write(0, memoryview(b"x"))
    assert [change.epoch for change in ways.changes] == [7]
    ways.attachment.end()
    with pytest.raises(DetachedError):
        await disk.write(0, memoryview(b"x"))


async def test_who_comes_learns_that_the_disk_was_taken_over_already(ways: Ways) -> None:
    told = list[str]()
    ways.latest = ways.attachment.end
    await attached(ways, lambda: told.append("end"))
    assert told == ["end"]


async def test_who_was_told_another_size_is_not_let_in(ways: Ways) -> None:
    ways.latest = lambda: setattr(ways.volume, "size", 1 << 19)
    with pytest.raises(DetachedError):
        await attached(ways)
    assert ways.released == ["disk"], "nobody else would let go of it"


async def test_whose_requests_may_be_on_their_way_is_not_joined(ways: Ways) -> None:
    one, _ = await attached(ways, lambda: None), await attached(ways, lambda: None)
    one.falter()
    assert not ways.attachment.open


def test_whose_connection_broke_is_not_joined() -> None:
    attachment = Attachment(1)
    aborts = [lambda: None, lambda: None]
    for abort in aborts:
        attachment.join(abort)
    attachment.leave(aborts[0], clean=True)
    assert attachment.open
    attachment.join(aborts[0])
    attachment.leave(aborts[0], clean=False)
    assert not attachment.open


async def test_a_write_is_begun_unless_it_takes_several_entries_or_the_disk_was_taken_over(ways: Ways) -> None:
    disk, ended = await attached(ways), list[object]()
    assert disk.begin_write(0, memoryview(b"data"), ended.append)
    assert not disk.begin_write(0, memoryview(bytes((1 << 20) + 1)), ended.append)
    ways.attachment.end()
    assert not disk.begin_write(0, memoryview(b"data"), ended.append)
    assert (ended, [(change.epoch, change.length) for change in ways.changes]) == ([None], [(7, 4)])
