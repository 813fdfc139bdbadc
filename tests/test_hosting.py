"""Exports that come and go while clients are served."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

import nbdvde
from nbdvde.engine.image import Image
from nbdvde.engine.managed.stream import Stream
from nbdvde.errors import InUseError, NoSpaceError, RefusedError
from nbdvde.exports import Access, Export, Exports, Peer, Visitor
from nbdvde.hosting import ExportSpec, Host
from nbdvde.limits import Limits
from nbdvde.listeners import UnixAddress, open_listener
from nbdvde.protocol.constants import Command
from nbdvde.server import Server
from tests.protocol.client import request
from tests.serving import Connect, running
from tests.test_session import SlowDisk

SIZE = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    nbdvde.create_image(tmp_path / "image", SIZE, secret=None)
    return tmp_path / "image"


class Hosted:
    """A host and what it did."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.open: list[Path] = []
        self.exports = Exports(default="a")
        self.server = Server(self.exports, limits=Limits(linger_s=0))
        self.host = Host(self.server, self.exports, nursery, self.attend, {})

    @asynccontextmanager
    async def attend(self, path: Path) -> AsyncIterator[Callable[[Image], Awaitable[None]]]:
        async def present(_image: Image) -> None:
            self.open.append(path)

        yield present
        self.open.remove(path)

    async def add(self, name: str, image: Path | None = None, *, read_only: bool = False) -> None:
        spec = ExportSpec(name=name, image=image, memory_bytes=0 if image else SIZE, read_only=read_only)
        await self.host.add(spec, lambda: None)


@pytest.fixture
async def hosted() -> AsyncIterator[Hosted]:
    async with trio.open_nursery() as nursery:
        made = Hosted(nursery)
        yield made
        await made.host.close()
        assert made.open == []


async def test_an_image_is_open_while_an_export_shows_it(hosted: Hosted, path: Path) -> None:
    await hosted.add("a", path)
    await hosted.add("b", path.parent / "." / path.name, read_only=True)
    assert hosted.open == [path]
    first, second = hosted.host.exports
    assert first.disk is second.disk
    await hosted.host.remove("a")
    assert hosted.open == [path]
    await hosted.host.remove("b")
    assert hosted.open == []
    await hosted.add("a", path)
    assert hosted.open == [path]


async def test_an_image_open_for_reading_cannot_be_written(hosted: Hosted, path: Path) -> None:
    await hosted.add("a", path, read_only=True)
    with pytest.raises(RefusedError, match="reading only"):
        await hosted.add("b", path)
    await hosted.host.remove("a")
    assert hosted.open == []


async def test_an_image_somebody_else_has(hosted: Hosted, path: Path) -> None:
    async with nbdvde.open_image(path):
        with pytest.raises(InUseError):
            await hosted.add("a", path)
    await hosted.add("a", path)


async def test_failing_to_close_an_image_is_told(hosted: Hosted, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await hosted.add("a", path)
    await hosted.add("b")

    async def close(_image: Image) -> None:
        await real(_image)
        raise NoSpaceError("host", "is full")

    real = Image.close
    monkeypatch.setattr(Image, "close", close)
    with pytest.raises(NoSpaceError):
        await hosted.host.remove("a")
    assert [export.name for export in hosted.host.exports] == ["b"]
    assert hosted.open == []


async def test_links_may_change_while_an_image_is_open(hosted: Hosted, path: Path) -> None:
    """What is open is known by its file: a link that leads elsewhere by now stands in nobody's way."""
    link = path.with_name("link")
    link.symlink_to(path)
    await hosted.add("a", link)
    shown = hosted.host.specs["a"].shown
    nbdvde.create_image(path.with_name("other"), SIZE, secret=None)
    link.unlink()
    link.symlink_to("other")
    assert ExportSpec(name="a", image=link).shown != shown, "a reload notices"
    await hosted.host.remove("a")
    assert hosted.open == []


async def test_a_removal_is_done_even_if_who_asked_has_gone(
    hosted: Hosted, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dismiss(_export: Export) -> None:
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(hosted.server, "dismiss", dismiss)
    await hosted.add("a", path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hosted.host.remove, "a")
        while hosted.host.exports:
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert hosted.open == []
    await hosted.add("a", path)


async def test_nothing_is_opened_once_all_is_closed(hosted: Hosted, path: Path) -> None:
    """An image that a reload would open during a stop would be open for ever."""
    await hosted.host.close()
    with pytest.raises(RefusedError, match="stopping"):
        await hosted.add("a", path)


async def test_names_are_used_once(hosted: Hosted) -> None:
    await hosted.add("a")
    with pytest.raises(RefusedError, match="exists already"):
        await hosted.add("a")
    with pytest.raises(RefusedError, match="does not exist"):
        await hosted.host.remove("b")


async def test_rules_change_for_new_clients(hosted: Hosted) -> None:
    await hosted.add("a")
    spec = ExportSpec(name="a", memory_bytes=SIZE, description="new", access=Access.parse(["::1"]))
    hosted.host.adjust(spec)
    assert hosted.host.specs == {"a": spec}
    assert Visitor(hosted.exports, Peer.at("::2")).find("a") is None
    found = Visitor(hosted.exports, Peer.at("::1")).find("a")
    assert found is not None
    assert found.description == "new"


async def test_clients_of_a_removed_export(hosted: Hosted, address: UnixAddress, connect: Connect) -> None:
    """What they asked for is answered; then they are disconnected, and nobody else is."""
    await hosted.add("a")
    await hosted.add("b")
    slow = SlowDisk()
    hosted.host.exports[0].disk = slow
    async with running(hosted.server, await open_listener(address)):
        one, two = connect(address), connect(address)
        await one.go("a")
        await two.go("b")
        with pytest.raises(InUseError, match="1 client uses it"):
            await hosted.host.remove("a")
        await one.stream.send_all(request(int(Command.READ), 0, 512, cookie=7))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: hosted.host.remove("a", force=True))
            await trio.testing.wait_all_tasks_blocked()
            assert [export.name for export in hosted.host.exports] == ["b"]
            slow.go.set()
            assert (await one.reply()).cookie == 7
            assert await one.stream.receive_some(1) == b""
            one.socket.close()
        await two.stream.send_all(request(int(Command.READ), 0, 512, cookie=8))
        assert (await two.reply()).cookie == 8


async def test_clients_of_the_regions_of_a_deleted_disk(
    hosted: Hosted, path: Path, address: UnixAddress, connect: Connect
) -> None:
    async with nbdvde.open_image(path) as image:
        await image.volumes.create("two", SIZE)
        await Stream.create(image.regions, image.disk("two"), 4)
    await hosted.host.add(ExportSpec(name="a", image=path, whole=True), lambda: None)
    disk = hosted.host.images[0].disk("two")
    async with running(hosted.server, await open_listener(address)):
        one, two = connect(address), connect(address)
        await one.go("two/stream")
        await two.go("a")
        async with hosted.host.unused(disk):
            assert [export.name for export in hosted.exports.used()] == ["a", "two/stream"], "it may go on"
        with pytest.raises(InUseError, match="disk two: 1 client uses it"):
            async with hosted.host.unused(disk, ending=True):
                raise AssertionError
        async with hosted.host.unused(disk, ending=True, force=True):
            assert await one.stream.receive_some(1) == b""
            assert [export.name for export in hosted.exports.used()] == ["a"]
            visitor = Visitor(hosted.exports, Peer.at("::1"))
            assert visitor.enter("two/stream") == "its disk is being changed, try again"
        assert visitor.enter("two/stream") is None
        visitor.leave()
