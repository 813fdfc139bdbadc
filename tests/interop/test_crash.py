"""`kill -9` takes nothing that a flush or FUA acknowledged."""

from pathlib import Path

import pytest

from tests.interop.conftest import Serve
from tests.interop.harness import libnbd, need, run

MIB = 1 << 20


def test_what_qemu_flushed_survives(serve: Serve) -> None:
    need("qemu-io")
    disk = serve(64 * MIB)
    run("qemu-io", "-f", "raw", "-c", "write -P 1 0 8M", "-c", "discard 1M 1M", "-c", "flush", disk.uri)
    disk.crash()
    run("qemu-io", "-f", "raw", "-c", "write -f -P 2 4M 64k", disk.uri)
    disk.crash()
    checks = ["read -P 1 0 1M", "read -P 0 1M 1M", "read -P 1 2M 2M", "read -P 2 4M 64k", "read -P 0 8M 8M"]
    output = run("qemu-io", "-f", "raw", *(part for check in checks for part in ("-c", check)), disk.uri)
    assert "failed" not in output
    assert output.count("ops; ") == len(checks)


@pytest.mark.parametrize("by", ["flush", "fua"])
def test_killed_while_writing(serve: Serve, by: str) -> None:
    """Round after round of overwrites; in the middle of each the server dies."""
    disk = serve(64 * MIB)
    for generation in "1234":
        libnbd("write_a_generation", disk.uri, generation, by)
        disk.crash()
        libnbd("find_a_generation", disk.uri, generation)


@pytest.mark.parametrize("seed", ["first", "second", "third"])
def test_eight_connections_share_one_cache(serve: Serve, seed: str, tmp_path: Path) -> None:
    """Killed in the middle: what a flush on any connection covered of all connections is there."""
    disk, record = serve(64 * MIB), str(tmp_path / "record")
    libnbd("write_and_kill", disk.uri, str(disk.server.pid), seed, record, module="libnbd_eight")
    disk.crash()
    libnbd("find", disk.uri, record, module="libnbd_eight")
