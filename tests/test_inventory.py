"""What of an image can be asked for besides the exports that show its first disk."""

from pathlib import Path

import pytest

from nbdvde import inventory
from nbdvde.disk import BLOCK
from nbdvde.engine.managed.stream import Stream
from nbdvde.engine.volumes import Volumes
from nbdvde.errors import InUseError
from nbdvde.exports import LOCAL, Access, Peer, Visitor
from nbdvde.hosting import ExportSpec
from nbdvde.inventory import Inventory
from nbdvde.listeners import UnixAddress, open_listener
from nbdvde.protocol.constants import Command, Option, OptionReply
from nbdvde.protocol.messages import ExportInfo
from tests.protocol.client import info_data, request
from tests.serving import Connect, running
from tests.test_hosting import SIZE, Hosted, hosted, path

__all__ = ["hosted", "path"]
HERE = Peer(LOCAL)


async def serve(hosted: Hosted, spec: ExportSpec) -> Inventory:
    await hosted.host.add(spec, lambda: None)
    export = hosted.exports.get(spec.name)
    assert export is not None
    assert isinstance(export.kin, Inventory)
    return export.kin


@pytest.fixture
async def volumes(hosted: Hosted, path: Path) -> Volumes:
    """Of an image that is served as `a`, with the disks `disk` and `more`, and the snapshots `disk@s` and `more@t`."""
    volumes = (await serve(hosted, ExportSpec(name="a", image=path, whole=True)))._volumes
    await volumes.snapshot("disk", "s")
    await volumes.create("more", SIZE * 2)
    await volumes.snapshot("more", "t")
    return volumes


def find(hosted: Hosted, name: str, peer: Peer = HERE) -> ExportInfo | None:
    return Visitor(hosted.exports, peer).find(name)


def names(hosted: Hosted, peer: Peer = HERE) -> list[str]:
    return [info.name for info in Visitor(hosted.exports, peer).listing()]


async def test_disks_and_snapshots_are_found_when_they_are_there(hosted: Hosted, volumes: Volumes) -> None:
    assert names(hosted) == ["a", "more", "more@t", "a@s"]
    snapshot, more = find(hosted, "a@s"), find(hosted, "more")
    assert snapshot is not None
    assert more is not None
    assert (snapshot.name, snapshot.size, snapshot.read_only) == ("a@s", SIZE, True)
    assert snapshot.description.startswith("snapshot of 20")
    assert (more.size, more.read_only) == (SIZE * 2, False)
    for name in ("disk", "disk@s", "a@t", "a@", "@s", "more@s", "a@s@s", "a@t", "none@s", "none", "a@s ", "@"):
        assert find(hosted, name) is None, name
    await volumes.delete("more@t")
    assert find(hosted, "more@t") is None
    await volumes.delete("more")
    assert names(hosted) == ["a", "a@s"]


async def test_the_default_export_has_snapshots_under_its_name_alone(hosted: Hosted, volumes: Volumes) -> None:
    assert find(hosted, "") == find(hosted, "a")
    assert find(hosted, "@s") is None


async def test_without_whole_there_are_snapshots_alone(hosted: Hosted, path: Path) -> None:
    volumes = (await serve(hosted, ExportSpec(name="x/y", image=path, read_only=True)))._volumes
    assert names(hosted) == ["x/y"]
    await hosted.add("a", path, read_only=True)
    assert [disk.name for disk in volumes.disks] == ["disk"]
    assert find(hosted, "disk") is None


async def test_an_export_that_was_asked_for_comes_first(hosted: Hosted, volumes: Volumes) -> None:
    await hosted.add("more")
    found = find(hosted, "more")
    assert found is not None
    assert found.size == SIZE, "the one in memory"
    assert names(hosted).count("more") == 1


async def test_an_export_of_another_disk_or_of_a_snapshot(hosted: Hosted, volumes: Volumes, path: Path) -> None:
    await hosted.host.add(ExportSpec(name="b", image=path, disk="more"), lambda: None)
    await hosted.host.add(ExportSpec(name="c", image=path, disk="disk@s"), lambda: None)
    assert [export.disk.name for export in hosted.exports] == ["disk", "more", "disk@s"]
    found = find(hosted, "c")
    assert found is not None
    assert found.read_only
    assert find(hosted, "b@t") is not None
    assert find(hosted, "c@s") is None


async def test_rules_are_inherited(hosted: Hosted, volumes: Volumes, path: Path) -> None:
    allowed, stranger = Peer.at("192.0.2.1"), Peer.at("192.0.2.2")
    spec = ExportSpec(name="a", image=path, whole=True, access=Access.parse(["192.0.2.1"], connections=1))
    user = Visitor(hosted.exports, HERE)
    assert user.find("a@s")
    assert user.enter("a@s") is None
    hosted.host.adjust(spec)
    assert names(hosted, allowed) == ["a", "more", "more@t", "a@s"]
    assert names(hosted, stranger) == []
    for name in ("a@s", "more", "more@t"):
        assert find(hosted, name, stranger) is None
        assert find(hosted, name, allowed) is not None
    assert "as many clients" in str(Visitor(hosted.exports, allowed).enter("a@s"))
    user.leave()


async def test_of_many_snapshots_the_newest_are_listed(
    hosted: Hosted, volumes: Volumes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inventory, "LISTED", 2)
    for number in range(5):
        await volumes.snapshot("disk", f"n{number}")
    assert names(hosted) == ["a", "more", "a@n4", "a@n3"]
    assert find(hosted, "a@n0") is not None


async def test_a_name_too_long_to_be_told_is_not_listed(hosted: Hosted, path: Path) -> None:
    volumes = (await serve(hosted, ExportSpec(name="x" * 4090, image=path)))._volumes
    await volumes.snapshot("disk", "short")
    await volumes.snapshot("disk", "longer")
    assert [len(name) for name in names(hosted)] == [4090, 4096]


async def test_a_client_of_a_snapshot(hosted: Hosted, volumes: Volumes, address: UnixAddress, connect: Connect) -> None:
    """It keeps the base and the snapshot from being removed, unless they are forced; then it is disconnected."""
    disk = volumes.get("disk")
    async with running(hosted.server, await open_listener(address)):
        client = connect(address)
        await client.go("a@s")
        assert [export.name for export in hosted.host.exports] == ["a", "more", "a@s"]
        with pytest.raises(InUseError, match="1 client uses it"):
            await hosted.host.remove("a")
        with pytest.raises(InUseError, match="disk disk@s: 1 client uses it"):
            async with hosted.host.unused(volumes.get("disk@s")):
                raise AssertionError
        async with hosted.host.unused(disk):
            waiting = connect(address)
            await waiting.greet()
            assert (await waiting.option(Option.GO, info_data("a")))[-1][0] == OptionReply.ERR_POLICY
        async with hosted.host.unused(volumes.get("disk@s"), force=True):
            assert await client.stream.receive_some(1) == b""
        again = connect(address)
        await again.go("a@s")
        await again.stream.send_all(request(int(Command.READ), 0, 512, cookie=8))
        assert (await again.reply()).cookie == 8
        await hosted.host.remove("a", force=True)
        assert await again.stream.receive_some(1) == b""
    assert hosted.open == []


async def test_a_stream_is_an_export_to_read(hosted: Hosted, path: Path) -> None:
    kin = await serve(hosted, ExportSpec(name="a", image=path, whole=True))
    disk = kin._volumes.disks[0]
    stream = await Stream.create(kin._regions._regions, disk, 4)
    await stream.append_many([b"0", b"1"])
    found = find(hosted, "a/stream")
    assert found is not None
    assert (found.size, found.read_only) == (4 * BLOCK, True)
    assert names(hosted) == ["a", "a/stream"]
    for name in ("a/", "/stream", "stream", "a/stream/stream", "a@s/stream", "none/stream", "a/worms"):
        assert find(hosted, name) is None, name
    first = Visitor(hosted.exports, HERE)
    assert first.enter("a/stream") is None
    await stream.advance_read_tail(1)
    second = Visitor(hosted.exports, HERE)
    assert second.enter("a/stream") is None
    assert first.export is not None
    assert second.export is not None
    shown = [b"".join(map(bytes, await export.disk.read(0, 2 * BLOCK))) for export in (first.export, second.export)]
    assert [(page[:1], page[BLOCK : BLOCK + 1]) for page in shown] == [(b"\0", b"1"), (b"1", b"\0")]
    assert {export.clients for export in hosted.exports.used()} == {1}
    with pytest.raises(InUseError, match="2 clients use it"):
        await hosted.host.remove("a")
    first.leave()
    second.leave()
