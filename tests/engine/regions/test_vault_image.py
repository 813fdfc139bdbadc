"""The compliance vault in an open image: durable when it says so, found again, full at last, never half."""

import itertools
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

import nbdvde
from nbdvde import MasterKey
from nbdvde.disk import BLOCK
from nbdvde.engine.image import Image
from nbdvde.engine.managed.vault import Vault
from nbdvde.engine.regions.vault import FORM, VERIFIED, Entry, Record, header
from nbdvde.errors import NoSpaceError, RefusedError, UsageError
from tests.engine.regions.passports import DISK, KEY, NOW, PUBLIC, event, passport

MASTER = MasterKey(bytes(range(32)))


def new(folder: Path) -> Path:
    path = folder / "image.vde"
    nbdvde.create_image(path, 1 << 20, secret=MASTER, segment_bytes=256 << 10)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return new(tmp_path)


async def made(image: Image, capacity: int = 64 << 10) -> Vault:
    await Vault.create(await image.regions.area(image.disk()), capacity)
    return await opened(image)


async def opened(image: Image) -> Vault:
    return await image.regions.get(Vault, image.disk())


async def test_what_was_added_is_there_again(path: Path) -> None:
    texts = ["n" * (number * 11 % 257) for number in range(40)]
    async with nbdvde.open_image(path, key=MASTER) as image:
        vault = await made(image)
        for number, text in enumerate(texts, 1):
            await vault.add(passport(number, notes=text), PUBLIC, NOW)
        await vault.add(event(passport(3), 100, VERIFIED), None, NOW)
        await vault.add(event(passport(3), 101).signed_with(KEY), PUBLIC, NOW)
    assert nbdvde.check_image(path, key=MASTER).ok
    async with nbdvde.open_image(path, key=MASTER, read_only=True) as image:
        vault = await opened(image)
        found = list(vault.query(about=DISK))
        assert [entry.passport.notes for entry in found] == texts
        revoked = vault.find(found[2].passport.id)
        assert isinstance(revoked, Entry)
        assert [one.status for one in revoked.events] == [1, 2]
        assert revoked.state(NOW) == "revoked"
        with pytest.raises(RefusedError, match="image: is open for reading only"):
            await vault.add(passport(99), PUBLIC, NOW)
        assert len(list(vault.query())) == 40


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("issuer_bytes", [1, 128])
async def test_a_full_one_says_so_and_still_takes_all_revocations(path: Path, blocks: int, issuer_bytes: int) -> None:
    """Whatever becomes of the keys: what was said can be taken back."""
    added = list[Record]()

    async def fill(vault: Vault) -> None:
        for number, length in zip(itertools.count(), itertools.cycle((3, 250, 97)), strict=False):
            one = replace(passport(number, notes="n" * length), issuer="i" * issuer_bytes).signed_with(KEY)
            await vault.add(one, PUBLIC, NOW)
            added.append(one)

    def revocation(number: int, notes: str = "") -> Record:
        of = added[number]
        return replace(event(of, 1000 + number), issuer=of.issuer, notes=notes).signed_with(KEY)

    async with nbdvde.open_image(path, key=MASTER) as image:
        vault = await made(image, blocks * BLOCK)
        with pytest.raises(NoSpaceError, match=f"its {blocks * BLOCK} bytes are full, but for revocations"):
            await fill(vault)
        with suppress(NoSpaceError):
            for number in itertools.count(2000):
                await vault.add(event(added[0], number, VERIFIED), None, NOW)
        assert len(added) * (132 + issuer_bytes) * 2 < blocks * BLOCK < len(added) * 1000
        with pytest.raises(NoSpaceError, match="revoke it without a reason"):
            await vault.add(revocation(0, "n" * 256), PUBLIC, NOW)
        for number in range(len(added)):
            await vault.add(revocation(number), PUBLIC, NOW)
    assert nbdvde.check_image(path, key=MASTER).ok
    async with nbdvde.open_image(path, key=MASTER) as image:
        found = list((await opened(image)).query())
        assert [entry.passport for entry in found] == added
        assert {entry.state(NOW) for entry in found} == {"revoked"}


@pytest.mark.parametrize("capacity", [4095, (4 << 30) + 1])
async def test_capacities_that_cannot_be(path: Path, capacity: int) -> None:
    async with nbdvde.open_image(path, key=MASTER) as image:
        with pytest.raises(UsageError, match="between 4K and 4G"):
            await made(image, capacity)


async def test_there_is_one_vault_of_a_disk(path: Path) -> None:
    async with nbdvde.open_image(path, key=MASTER) as image:
        await made(image)
        with pytest.raises(RefusedError, match="disk disk: has a compliance vault already"):
            await made(image)


async def test_a_check_finds_a_header_that_lies(path: Path) -> None:
    async with nbdvde.open_image(path, key=MASTER) as image:
        vault = await made(image)
        await vault.add(passport(), PUBLIC, NOW)
        area = await image.regions.area(image.disk())
        await area.change(FORM, {0: FORM.block(header(2) + passport().pack(), 3)})
    [error] = nbdvde.check_image(path, key=MASTER).errors
    assert (error.where, error.what) == (
        "region RDIR of disk, CMVT", "has a header that does not fit its records",
    )  # fmt: skip


async def test_uuids_of_disks_and_snapshots_stay_and_are_never_given_again(path: Path) -> None:
    async with nbdvde.open_image(path, key=MASTER) as image:
        await image.volumes.snapshot("disk", "one")
        first = image.info().disks[0]
        await image.volumes.delete("disk@one")
        await image.volumes.snapshot("disk", "one")
        second = image.info().disks[0]
    assert first.uuid == second.uuid
    assert first.snapshots[0].uuid != second.snapshots[0].uuid
    async with nbdvde.open_image(path, key=MASTER) as image:
        [again] = image.info().disks
    assert (again.uuid, again.snapshots) == (second.uuid, second.snapshots)
    assert nbdvde.read_info(path).disks[0].uuid is None
