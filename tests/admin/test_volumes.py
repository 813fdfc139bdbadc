"""Disks and snapshots by way of the control socket, beyond what tests/cli asks of the commands."""

from contextlib import nullcontext
from pathlib import Path

import msgspec
import pytest

import nbdvde
from nbdvde.admin import difference as differences
from nbdvde.admin.difference import Ranges, difference
from nbdvde.admin.messages import (
    CopyRequest,
    DictionaryReport,
    DictionaryRequest,
    DiffRequest,
    VolumeInfo,
    VolumeRequest,
)
from nbdvde.engine.image import Image
from nbdvde.errors import InUseError, RefusedError, UsageError
from nbdvde.hosting import ExportSpec
from tests.admin.test_control import serving
from tests.test_hosting import Hosted, hosted, path

__all__ = ["hosted", "path"]
BLOCK = 4096


async def test_requests_and_answers(path: Path) -> None:
    async with nbdvde.open_image(path) as image, serving(path.parent, image) as control:
        change = control.client.change_volume
        made = await control.ask(change, "snapshots/create", VolumeRequest("disk@a"))
        assert (made.name, made.size) == ("disk@a", image.disk().size)
        assert made == await control.ask(change, "snapshots/delete", VolumeRequest("disk@a"))
        with pytest.raises(UsageError, match="does not exist"):
            await control.ask(change, "snapshots/delete", VolumeRequest("disk@a"))
        for action in ("disks/create", "disks/resize"):
            with pytest.raises(UsageError, match="there is no size"):
                await control.ask(change, action, VolumeRequest("disk"))
        with pytest.raises(UsageError, match="there is no source"):
            await control.ask(change, "disks/clone", VolumeRequest("new"))
        for size in (0, -512, 513, 1 << 63):
            with pytest.raises(UsageError, match="size"):
                await control.ask(change, "disks/create", VolumeRequest("new", size=size))
        for body in (b"", b"{}", b'{"name":1}', b'{"name":"disk","x":1}', b'{"name":"d","size":"1M"}', b"[]"):
            with pytest.raises(UsageError, match="request"):
                await control.ask(control.client._call, "POST", "/v1/disks/resize", VolumeInfo, body)
            with pytest.raises(UsageError, match="request"):
                await control.ask(control.client._call, "POST", "/v1/snapshots/diff", msgspec.Raw, body)
        assert image.disks == ["disk"]


async def test_an_image_open_for_reading(path: Path) -> None:
    async with nbdvde.open_image(path, read_only=True) as image, serving(path.parent, image) as control:
        with pytest.raises(RefusedError, match="reading only"):
            await control.ask(control.client.change_volume, "snapshots/create", VolumeRequest("disk@a"))


async def changed(image: Image, since: str, until: str | None = None) -> Ranges:
    found: Ranges = []

    async def tell(part: Ranges) -> None:
        found.extend(part)

    await difference(image, DiffRequest(since, until), tell, lambda _disk: nullcontext())
    return found


@pytest.mark.parametrize("extents", [1, 2, 3, 1024])
async def test_ranges_are_whole_wherever_an_answer_ends(
    path: Path, extents: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(differences, "EXTENTS", extents)
    async with nbdvde.open_image(path) as image:
        disk = image.disk()
        await image.volumes.snapshot("disk", "a")
        for first, count in ((0, 1), (3, 2), (7, 1), (255, 1)):
            await disk.write(first * BLOCK, memoryview(b"x" * (count * BLOCK)))
        await image.volumes.snapshot("disk", "b")
        await disk.write(4 * BLOCK, memoryview(b"y" * BLOCK))
        expected = [(0, BLOCK), (3 * BLOCK, 2 * BLOCK), (7 * BLOCK, BLOCK), (255 * BLOCK, BLOCK)]
        assert await changed(image, "disk@a") == await changed(image, "disk@a", "disk@b") == expected
        assert await changed(image, "disk@b") == [(4 * BLOCK, BLOCK)]


async def test_a_disk_that_is_read_stays_as_it_is(hosted: Hosted, path: Path) -> None:
    """And one that is being changed is not read meanwhile."""
    await hosted.host.add(ExportSpec(name="a", image=path), lambda: None)
    disk = hosted.host.exports[0].disk
    with hosted.host.reading(disk), hosted.host.reading(disk):
        for force in (False, True):
            with pytest.raises(InUseError, match="being copied"):
                async with hosted.host.unused(disk, force=force):
                    raise AssertionError
    async with hosted.host.unused(disk):
        with pytest.raises(InUseError, match="being changed"), hosted.host.reading(disk):
            raise AssertionError
        with pytest.raises(InUseError, match="changed"):
            async with hosted.host.unused(disk):
                raise AssertionError
        with pytest.raises(InUseError, match="changed"), hosted.host.reading(disk):
            raise AssertionError("still held")
    with pytest.raises(InUseError, match="served as export a"):
        async with hosted.host.unused(disk, ending=True):
            raise AssertionError


async def test_dictionaries(path: Path) -> None:
    async with nbdvde.open_image(path) as image, serving(path.parent, image) as control:
        change = control.client.change_dictionaries
        told: list[int] = []
        for action in ("remove", "replace"):
            with pytest.raises(UsageError, match="there is no id"):
                await control.ask(change, action, DictionaryRequest(), told.append)
            with pytest.raises(UsageError, match="dictionary 3: does not exist"):
                await control.ask(change, action, DictionaryRequest(3), told.append)
        with pytest.raises(RefusedError, match="holds no data"):
            await control.ask(change, "train", DictionaryRequest(), told.append)
        for body in (b"", b"[]", b'{"id":"1"}', b'{"slot":1}', b'{"classes":"text"}'):
            with pytest.raises(UsageError, match="request"):
                await control.ask(control.client._call, "POST", "/v1/dictionaries/train", DictionaryReport, body)
        assert (await control.ask(control.client.dictionaries)).dictionaries == []


async def test_changes_are_in_the_log(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (path.parent / "raw").write_bytes(b"x" * BLOCK)
    async with nbdvde.open_image(path) as image, serving(path.parent, image) as control:
        change = control.client.change_volume
        await control.ask(change, "snapshots/create", VolumeRequest("disk@a"))
        await control.ask(change, "snapshots/rollback", VolumeRequest("disk@a", force=True))
        copied = CopyRequest(str(path.parent / "raw"), "disk")
        await control.ask(control.client.copy, "import", copied, lambda done, total: None)
    assert [record.getMessage() for record in caplog.records if record.name == "nbdvde.admin.imageservice"] == [
        f"{path}: snapshots/create disk@a",
        f"{path}: snapshots/rollback disk@a by force",
        f"{path}: disk disk is overwritten with {path.parent / 'raw'}",
    ]
