"""A WORM region in the hands of real clients: tar written through it comes back, and nothing in it changes."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

import nbdvde
from nbdvde import Worm
from tests.interop.harness import Process, need, run

SIZE = 1 << 20
CAPACITY = 32 << 20
TREE = Path(os.__file__).parent / "email"


@pytest.fixture
def uri(tmp_path: Path) -> Iterator[str]:
    """Of the export."""
    path = tmp_path / "disk.vde"
    nbdvde.create_image(path, SIZE, secret=None)

    async def make() -> None:
        async with nbdvde.open_image(path) as image:
            await Worm.create(image.regions, image.disk(), CAPACITY // 4096, 0, 0)

    trio.run(make)
    server = Process(tmp_path, [path])
    yield server.uri.replace("///disk?", "///disk/worm?").replace("///?", "///disk/worm?")
    server.stop()


def test_tar_through_nbdcopy(uri: str, tmp_path: Path) -> None:
    need("nbdcopy", "nbdinfo", "tar", "qemu-io")
    assert run("nbdinfo", "--size", uri) == f"{CAPACITY}\n"
    assert subprocess.run(["nbdinfo", "--can", "multi-conn", uri], check=False).returncode == 2
    run("tar", "--create", "--file", tmp_path / "tree.tar", "--directory", TREE, ".")
    run("nbdcopy", "--flush", tmp_path / "tree.tar", uri)
    run("nbdcopy", uri, tmp_path / "back")
    length = (tmp_path / "tree.tar").stat().st_size
    whole = (tmp_path / "back").read_bytes()
    assert whole[:length] == (tmp_path / "tree.tar").read_bytes()
    assert not any(whole[length:])
    out = tmp_path / "out"
    out.mkdir()
    run("tar", "--extract", "--ignore-zeros", "--file", tmp_path / "back", "--directory", out)
    assert run("diff", "-r", TREE, out) == ""
    for command in ("write 0 4k", "write -z 0 4k", "discard 0 4k"):
        refused = subprocess.run(
            ["qemu-io", "-f", "raw", "-c", command, uri], capture_output=True, text=True, check=False
        )
        assert "Operation not permitted" in refused.stdout + refused.stderr, command
    beyond = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write 30M 4k", uri], capture_output=True, text=True, check=False
    )
    assert "Invalid argument" in beyond.stdout + beyond.stderr
    run("nbdcopy", uri, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == whole
