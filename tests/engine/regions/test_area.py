"""The regions of a disk in an open image: made, changed all or nothing, found again, and gone with their disk."""

from pathlib import Path
from typing import ClassVar, Self

import pytest

import nbdvde
from nbdvde import MasterKey
from nbdvde.disk import BLOCK
from nbdvde.engine.image import Image
from nbdvde.engine.layout import REGIONS
from nbdvde.engine.managed.area import Area
from nbdvde.engine.regions.directory import FORM as DIRECTORY
from nbdvde.engine.regions.form import Form
from nbdvde.errors import RefusedError, UsageError

KEY = MasterKey(bytes(range(32)))
SIZE = 64 << 20
FORM, OTHER = Form("TEST", 4, 16), Form("ELSE", 4, 16)


class Toy:
    """A region with one block."""

    FORM: ClassVar[Form] = FORM

    def __init__(self, text: bytes) -> None:
        self.text = text

    @classmethod
    async def load(cls, area: Area) -> Self:
        body, _ = FORM.opened(await area.read(FORM, 0))
        return cls(body.rstrip(b"\0"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "image.vde"
    nbdvde.create_image(path, SIZE, secret=KEY, segment_bytes=256 << 10)
    return path


async def make(image: Image, text: bytes = b"first", disk: str | None = None, form: Form = FORM) -> Area:
    area = await image.regions.area(image.disk(disk))
    await area.create(form, 8, {0: form.block(text, 1)}, 1)
    return area


async def test_a_region_is_there_again(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        assert not image.superblock.incompatible & REGIONS
        area = await make(image)
        await make(image, b"another", form=OTHER)
        assert (await image.regions.get(Toy, image.disk())).text == b"first"
        await area.change(FORM, {0: FORM.block(b"second", 2), 5: b"x" * BLOCK})
        await area.flush()
    assert nbdvde.check_image(path, key=KEY).ok
    async with nbdvde.open_image(path, key=KEY) as image:
        assert image.superblock.incompatible & REGIONS
        area = await image.regions.area(image.disk())
        assert (await image.regions.get(Toy, image.disk())).text == b"second"
        assert await image.regions.get(Toy, image.disk()) is await image.regions.get(Toy, image.disk())
        assert await area.read(FORM, 4, 3) == bytes(BLOCK) + b"x" * BLOCK + bytes(BLOCK)
        assert (await area.read(OTHER, 0)).startswith(b"another")


async def test_what_it_uses_is_told_by_the_directory(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        area = await make(image)
        await area.change(FORM, {1: FORM.block(b"more", 2)}, used=2)
    async with nbdvde.open_image(path, key=KEY) as image:
        area = await image.regions.area(image.disk())
        assert area.get(FORM).used == 2


async def test_blocks_are_given_up(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        area = await make(image)
        await area.change(FORM, dict.fromkeys(range(1, 5), b"x" * BLOCK))
        await area.change(FORM, {1: b"y" * BLOCK}, holes=[(2, 4)])
        assert await area.read(FORM, 1, 4) == b"y" * BLOCK + bytes(2 * BLOCK) + b"x" * BLOCK


async def test_a_region_goes(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        area = await make(image)
        await make(image, form=OTHER)
        await image.regions.get(Toy, image.disk())
        await area.remove(FORM)
        image.regions.forget(Toy, image.disk())
        with pytest.raises(UsageError, match="disk disk: has no "):
            await image.regions.get(Toy, image.disk())
        await make(image, b"again")
        assert (await image.regions.get(Toy, image.disk())).text == b"again"
    assert nbdvde.check_image(path, key=KEY).ok


async def test_each_disk_has_its_own(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        await image.volumes.create("two", SIZE)
        await make(image, b"of disk")
        await make(image, b"of two", "two")
        assert [member.name for member in image.volumes] == ["disk", "two"]
        assert (await image.regions.get(Toy, image.disk("two"))).text == b"of two"
    async with nbdvde.open_image(path, key=KEY) as image:
        assert (await image.regions.get(Toy, image.disk("disk"))).text == b"of disk"


async def test_they_go_with_their_disk(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        await image.volumes.create("two", SIZE)
        area = await make(image, disk="two")
        await area.change(FORM, {1: b"x" * BLOCK})
        await image.volumes.delete("two")
        assert image.volumes.existing_region(DIRECTORY, area.disk.number) is None
        with pytest.raises(RefusedError, match="disk two: was deleted"):
            await area.change(FORM, {1: b"y" * BLOCK})
        await image.volumes.create("two", SIZE)
        with pytest.raises(UsageError, match="disk two: has no "):
            await image.regions.get(Toy, image.disk("two"))
    assert nbdvde.check_image(path, key=KEY).ok


async def test_damage_is_found_by_a_check(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        await make(image)
        volume = image.volumes.existing_region(DIRECTORY, image.disk().number)
        assert volume is not None
        await volume.write_together({0: DIRECTORY.block(b"\1", 9)})
    report = nbdvde.check_image(path, key=KEY)
    assert [(error.where, error.what) for error in report.errors] == [
        ("region RDIR of disk, directory", "a slot makes no sense")
    ]


async def test_of_an_image_that_is_only_read_they_can_be_looked_at(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        await make(image)
    async with nbdvde.open_image(path, key=KEY, read_only=True) as image:
        assert (await image.regions.get(Toy, image.disk())).text == b"first"
        with pytest.raises(RefusedError, match="image: is open for reading only"):
            await make(image, form=OTHER)


async def test_a_snapshot_is_told_from_a_disk_that_has_none(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        await image.volumes.snapshot("disk", "s")
        with pytest.raises(UsageError, match=r"snapshot disk@s: has no regions \(name the disk itself\)"):
            await image.regions.get(Toy, image.disk("disk@s"))


async def test_a_snapshot_has_none(path: Path) -> None:
    async with nbdvde.open_image(path, key=KEY) as image:
        await image.volumes.snapshot("disk", "s")
        with pytest.raises(UsageError, match="snapshot disk@s: has no regions"):
            await make(image, disk="disk@s")
        assert not image.superblock.incompatible & REGIONS
