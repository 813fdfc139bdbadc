"""Images that version 1 of the format wrote are read by every later version, and stay sound when used."""

import shutil
from pathlib import Path

import pytest

from nbdvde import open_image
from nbdvde.engine.access import check_image, read_info
from nbdvde.engine.keys import MasterKey
from nbdvde.engine.layout import KIND_COMPACT
from nbdvde.errors import KeyFailure
from tools.make_fixture import HISTORY, IMAGES, KEY, SIZE, History, expected

FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture(params=IMAGES)
def image(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, MasterKey | None]:
    """A copy, and its key."""
    return Path(shutil.copy(FIXTURES / request.param, tmp_path)), IMAGES[request.param]


async def read_all(path: Path, key: MasterKey | None) -> bytes:
    async with open_image(path, key=key, read_only=True) as opened:
        return b"".join(bytes(piece) for piece in await opened.disk().read(0, SIZE))


async def test_an_image_of_version_1_reads_as_it_was_written(image: tuple[Path, MasterKey | None]) -> None:
    path, key = image
    before = path.read_bytes()
    assert await read_all(path, key) == expected()
    assert check_image(path, key=key).ok
    assert path.read_bytes() == before, "reading changes nothing"
    assert [(disk.name, disk.size) for disk in read_info(path).disks] == [("disk", SIZE)]


async def test_an_image_of_version_1_can_be_written_on(image: tuple[Path, MasterKey | None]) -> None:
    path, key = image
    async with open_image(path, key=key) as opened:
        await opened.disk().write(123_456, memoryview(b"new data"))
    content = bytearray(expected())
    content[123_456:123_464] = b"new data"
    assert await read_all(path, key) == content
    assert check_image(path, key=key).ok


async def test_an_encrypted_image_of_version_1_wants_its_key(tmp_path: Path) -> None:
    path = Path(shutil.copy(FIXTURES / "v1-encrypted.vde", tmp_path))
    for key in (None, MasterKey(b"\1" * 32)):
        with pytest.raises(KeyFailure):
            await read_all(path, key)


async def contents(path: Path) -> dict[str, bytes]:
    """Of all disks and snapshots."""
    async with open_image(path, key=KEY, read_only=True) as opened:
        names = [disk.name for disk in opened.volumes.disks]
        names += [
            f"{disk.name}@{member.name}" for disk in opened.volumes.disks for member in opened.volumes.snapshots(disk)
        ]
        return {name: b"".join(map(bytes, await opened.disk(name).read(0, SIZE))) for name in names}


async def test_snapshots_clones_duplicates_and_dictionaries_of_version_1(tmp_path: Path) -> None:
    path = Path(shutil.copy(FIXTURES / HISTORY, tmp_path))
    history = History(None)
    await history.all()
    assert await contents(path) == history.disks
    report = check_image(path, key=KEY)
    assert report.ok, report.errors
    async with open_image(path, key=KEY) as opened:
        assert any(state.kind == KIND_COMPACT for state in opened.segments.states.values())
        assert opened.statistics["blocks_shared"] >= 32
        assert len(list(opened.dictionaries.table)) == 1
        await opened.volumes.rollback("disk@first")
        await opened.volumes.delete("disk@second")
        await opened.clean(0.05)
    history.disks["disk"] = history.disks["disk@first"]
    del history.disks["disk@second"]
    assert await contents(path) == history.disks
    assert check_image(path, key=KEY).ok
