"""docs/reference/bad-input.md: each case by its command, on images at rest and served."""

import os
import re
import shlex
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from uuid import UUID

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import nbdvde
from nbdvde.engine.identity import subject_uuid
from nbdvde.engine.managed.anon import AnonTable
from nbdvde.engine.regions.stream import StreamPolicy
from nbdvde.errors import NoSpaceError
from tests.cli.conftest import Command, serving, write_key
from tests.docs.tables import tables
from tests.engine.regions.passports import KEY, NOW, OTHER, PUBLIC, named, passport
from tests.engine.regions.test_signature import RSA, private_pem

CASES = tables("reference/bad-input.md")["bad input"]
BAD = os.fsdecode(b"bad \xff")
CENTURY_NS = 100 * 366 * 86400 * 10**9


async def _furnish(path: Path) -> None:
    """Regions of 4 KiB, all but full."""
    async with nbdvde.open_image(path) as image:
        disk, regions = image.disk(), image.regions
        area = await regions.area(disk)
        await nbdvde.Vault.create(area, 4096)
        vault = await regions.get(nbdvde.Vault, disk)
        expired = replace(passport(2), issued_ns=1, expires_ns=2).signed_with(KEY)
        with suppress(NoSpaceError):
            for one in (passport(1), expired, *(passport(number, notes="n" * 256) for number in range(3, 20))):
                await vault.add(one, PUBLIC, NOW)
        await AnonTable.create(area, 4096)
        await _fill(await regions.get(AnonTable, disk), image.superblock.uuid)
        await (await nbdvde.Stream.create(regions, disk, 1, policy=StreamPolicy.REJECT)).append(b"x")
        await (await nbdvde.Worm.create(regions, disk, 1, 30 * 86400 * 10**9, 1)).append(b"x")
        await nbdvde.MetricsLog.create(area)
        log = await regions.get(nbdvde.MetricsLog, disk)
        await log.append([nbdvde.Sample(5000, time_ns, 1.0) for time_ns in (NOW, NOW - 10**12, NOW - 5)])


async def _fill(table: AnonTable, image: bytes) -> None:
    erased, full = (subject_uuid(image, name).bytes for name in ("erased", "full"))
    await table.map(erased, 1, b"value", NOW, b"e" * 48)
    await table.erase(erased, NOW)
    with suppress(NoSpaceError):
        for number in count(1):
            await table.map(full, 1, b"%d" % number, NOW, b"%016d" % number * 3)


def public_pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@pytest.fixture(params=["at rest", "served"])
def target(request: pytest.FixtureRequest, command: Command, plain_image: Path) -> Iterator[Path]:
    """The image of the page, beside its files."""
    for name, key in (("key", KEY), ("other", OTHER), ("rsa", RSA)):
        write_key(Path(f"{name}.pem"), private_pem(key))
        Path(f"{name}.pub").write_bytes(public_pem(key))
    Path("value").write_bytes(b"value")
    Path("large").write_bytes(b"v" * 4097)
    trio.run(_furnish, plain_image)
    with serving(plain_image, "--listen", "unix:s", cwd=Path()) if request.param == "served" else nullcontext():
        yield plain_image


def test_the_page_says_what_happens(command: Command, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = {name: str(UUID(bytes=named(number))) for name, number in (("GOOD", 1), ("EXPIRED", 2))}
    given = {"IMAGE": str(target), "LONG": "x" * 300, "BAD": BAD, **ids}
    assert len(CASES) > 30
    for case, words, code, said in CASES:
        with monkeypatch.context() as patched:
            if "clock" in case:
                patched.setattr("time.time_ns", lambda: NOW + CENTURY_NS)
            found = command(*(given.get(word, word) for word in shlex.split(words.strip("`"))))
        text = said.split("`")[1]
        for name, value in ids.items():
            text = text.replace(name, value)
        pattern = ".*".join(map(re.escape, text.split("…")))
        told = (found.err.removeprefix("nbdvde: ") if found.err else found.out).rstrip("\n")
        assert (case, found.code) == (case, int(code)), found
        assert re.fullmatch(pattern, told, re.DOTALL), (case, told)
    assert command("check", target).code == 0
