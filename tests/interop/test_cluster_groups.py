"""Several groups share the disks of a cluster: clients notice nothing of that."""

import json
import random
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.interop.cluster import Cluster, Member
from tests.interop.harness import NBDVDE, need, run

SIZE = 64 << 20
"""Four stripes."""
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    need("nbdcopy", "qemu-io")
    with closing(Cluster(tmp_path_factory.mktemp("groups"), SIZE, log_size="2M")) as made:
        yield made
        for member in made.running:
            member.stop()
        for member in made.members:
            run(NBDVDE, "check", member.image, "--key-file", member.key_file)


def groups_of(member: Member) -> list[str]:
    found = json.loads(run(NBDVDE, "cluster", "groups", member.image, "--json"))
    return [group["group"] for group in found if group["slots"]]


def holds(member: Member, folder: Path, wanted: bytes, snapshot: str = "") -> bool:
    """Whether a disk, or a snapshot, holds this as a node tells it."""
    copy = folder / "copy"
    copy.unlink(missing_ok=True)
    run("nbdcopy", member.uri.replace(":///", f":///disk@{snapshot}" if snapshot else ":///"), copy)
    return copy.read_bytes() == wanted


def test_groups_come_and_go_under_clients(cluster: Cluster, tmp_path: Path) -> None:
    first, second, third = cluster.members
    source, wanted = tmp_path / "source", random.Random(1).randbytes(SIZE)
    source.write_bytes(wanted)
    copying = subprocess.Popen(["nbdcopy", "--requests=16", source, first.uri])
    run(NBDVDE, "cluster", "groups", second.image, "--add", "2")
    assert copying.wait(100) == 0
    assert holds(third, tmp_path, wanted)
    run(NBDVDE, "snapshot", "create", third.image, "disk@full")
    writing = subprocess.Popen(["qemu-io", "-f", "raw", "-c", f"write -P 7 0 {SIZE}", first.uri])
    run(NBDVDE, "snapshot", "create", second.image, "disk@between")
    run(NBDVDE, "cluster", "groups", third.image, "--remove", groups_of(first)[1])
    assert writing.wait(100) == 0
    assert holds(second, tmp_path, wanted, "full")
    assert holds(second, tmp_path, b"\7" * SIZE)
    assert len(groups_of(third)) == 2
    assert "differs" not in run(NBDVDE, "cluster", "verify", third.image)


def test_a_node_that_was_away_catches_up_in_all_groups(cluster: Cluster, tmp_path: Path) -> None:
    away = cluster.members[2]
    away.stop()
    run("qemu-io", "-f", "raw", "-c", f"write -P 8 0 {SIZE}", cluster.members[0].uri)
    run(NBDVDE, "cluster", "groups", cluster.members[0].image, "--add", "1")
    run("qemu-io", "-f", "raw", "-c", "write -P 9 20M 1M", cluster.members[0].uri)
    away.start()
    wanted = bytearray(b"\10" * SIZE)
    wanted[20 << 20 : 21 << 20] = b"\11" * (1 << 20)
    assert holds(away, tmp_path, bytes(wanted))
    assert groups_of(away) == groups_of(cluster.members[0])


def test_leaders_of_all_groups_are_lost(cluster: Cluster, tmp_path: Path) -> None:
    leader = cluster.leader()
    other = next(member for member in cluster.members if member is not leader)
    leader.kill()
    run("qemu-io", "-f", "raw", "-c", f"write -P 10 0 {SIZE}", other.uri)
    leader.start()
    assert holds(leader, tmp_path, b"\n" * SIZE)
    assert "differs" not in run(NBDVDE, "cluster", "verify", other.image)
