"""Three nodes, a client that reconnects, and what may happen to machines."""

import json
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nbdvde import check_image
from tests.interop.cluster import WAIT_S, Cluster, Member, has_applied
from tests.interop.harness import ROOT, libnbd, libnbd_python, nbdvde, nbdvde_json, need, run

SIZE = 8 << 20
BEFORE = bytes(SIZE - (1 << 20)) + random.Random(9).randbytes(1 << 20)
"""What the first image holds when it becomes a cluster."""
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    need("nbdinfo", "nbdcopy", "qemu-io")
    with closing(Cluster(tmp_path_factory.mktemp("cluster"), SIZE, log_size="2M", content=BEFORE)) as made:
        yield made
        for member in made.running:
            member.stop()
        for member in made.members:
            report = check_image(member.image, key=member.key)
            assert report.ok, report


@contextmanager
def client(cluster: Cluster, folder: Path, first: int = 0) -> Iterator[Callable[[], dict[str, Any]]]:
    """Somebody writes and reads meanwhile; what is given ends that, checks every node, and tells how it went."""
    result = folder / "result.json"
    members = cluster.members[first:] + cluster.members[:first]
    uris = [member.uri for member in members]
    command = [libnbd_python(), "-m", "tests.interop.libnbd_cluster", "use", str(result), "1", *uris]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    def end() -> dict[str, Any]:
        process.terminate()
        _, errors = process.communicate(timeout=90)
        assert process.returncode == 0, errors
        libnbd("verify", str(result), *(member.uri for member in cluster.running), module="libnbd_cluster")
        told: dict[str, Any] = json.loads(result.read_text())
        return told

    try:
        yield end
    finally:
        process.kill()
        process.communicate()


def test_what_there_was_before_is_everywhere(cluster: Cluster, tmp_path: Path) -> None:
    for member in cluster.members:
        for number, uri in enumerate((member.uri, snapshot_uri(member.uri, "before"))):
            copy = tmp_path / f"{member.number}-{number}"
            run("nbdcopy", uri, copy)
            assert copy.read_bytes() == BEFORE
    assert "differs" not in nbdvde("cluster", "verify", cluster.members[0].image)


def snapshot_uri(uri: str, name: str) -> str:
    """`nbd+unix:///EXPORT?...` of a snapshot of the default disk."""
    start, _, rest = uri.partition(":///")
    return f"{start}:///disk@{name}?{rest.partition('?')[2]}"


def test_snapshots_are_taken_on_all_nodes(cluster: Cluster) -> None:
    nbdvde("snapshot", "create", cluster.members[2].image, "disk@first")
    index = cluster.leader().status().committed
    for member in cluster.members:
        cluster.wait(partial(has_applied, member.number, index))
        found = nbdvde_json("snapshot", "list", member.image, "--key-file", member.key_file, "--json")
        assert [snapshot["name"] for snapshot in found["snapshots"]] == ["before", "first"]


def test_who_comes_through_another_node_takes_the_disk_over(cluster: Cluster) -> None:
    first, second, third = (member.uri for member in cluster.members)
    libnbd("take_over", first, second, module="libnbd_cluster")
    libnbd("take_over", third, first, module="libnbd_cluster")
    blank = b"\0" * (2 * 4096)
    run("qemu-io", "-f", "raw", "-c", f"write -z 0 {len(blank)}", cluster.leader().uri)


def test_leadership_is_handed_over(cluster: Cluster, tmp_path: Path) -> None:
    """No connection ends, and nothing fails: clients see a pause."""
    leader = cluster.leader()
    other = next(member for member in cluster.members if member is not leader)
    with client(cluster, tmp_path, first=leader.number % 3) as end:
        time.sleep(0.5)
        nbdvde("cluster", "transfer", leader.image, "--node", str(other.number))
        assert cluster.leader() is other
        time.sleep(0.5)
        told = end()
    assert (told["writes"] > 10, told["connections"]) == (True, 1)


def test_a_replica_that_differs_is_found_and_mended(cluster: Cluster) -> None:
    """Somebody changed the image of a node behind the back of the cluster."""
    member = cluster.members[2]
    _apply_everything(cluster, member)
    member.stop()
    member.change(lambda image: image.disk().write(4 << 20, memoryview(b"changed behind its back")))
    member.start()
    leader = cluster.leader()
    cluster.wait(lambda status: status.node == leader.number and all(node.connected for node in status.nodes))
    found = nbdvde("cluster", "verify", leader.image, code=6)
    assert "disk disk, 1 MiB at 4194304: differs on node 3, not repaired\n" in found
    assert found.endswith("M compared on nodes 1, 2, 3\n")
    assert "repaired" in nbdvde("cluster", "verify", cluster.members[1].image, "--repair")
    assert "differs" not in nbdvde("cluster", "verify", leader.image)


def test_what_differs_is_mended_in_the_background(tmp_path: Path) -> None:
    """And reads by lease."""
    with closing(Cluster(tmp_path, SIZE, compare_every=1, lease=True)) as cluster:
        member = cluster.members[1]
        run("qemu-io", "-f", "raw", "-c", "write -P 7 0 4M", member.uri)
        _apply_everything(cluster, member)
        member.stop()
        member.change(lambda image: image.disk().write(1 << 20, memoryview(b"changed behind its back")))
        member.start()
        deadline = time.monotonic() + WAIT_S
        while not any(_repaired(other) for other in cluster.members):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        for other in cluster.members:
            run("qemu-io", "-f", "raw", "-c", "read -P 7 0 4M", other.uri)
        for other in cluster.members:
            other.stop()


def _apply_everything(cluster: Cluster, member: Member) -> None:
    """Wait until a node has: a write that it has yet to apply would mend what is changed behind its back."""
    cluster.wait(partial(has_applied, member.number, cluster.leader().status().committed))


def _repaired(member: Member) -> int:
    """Differences that a node had repaired in the background."""
    [image] = member.control.metrics().images
    return image.cluster.repaired if image.cluster else 0


def test_regions_are_changed_on_all_nodes(cluster: Cluster, tmp_path: Path) -> None:
    first, second, third = (member.image for member in cluster.members)
    entry = tmp_path / "entry"
    for member in cluster.members[1:]:
        entry.write_text(member.name)
        nbdvde("stream", "append", member.image, entry)
    assert nbdvde("stream", "read", first, "--raw") == "beforenode-2node-3"
    nbdvde("worm", "create", second, "--capacity", "1M", "--retention", "1s")
    nbdvde("worm", "append", third, entry)
    assert nbdvde_json("worm", "verify", first, "--json")["records"] == 1
    compared = [json.loads(line)["disk"] for line in nbdvde("cluster", "verify", first, "--json").splitlines()]
    assert sorted(set(compared)) == ["disk", "disk/0", "disk/1", "disk/2"]


def test_an_import_reaches_all_nodes(cluster: Cluster, tmp_path: Path) -> None:
    first, second, third = (member.image for member in cluster.members)
    content = random.Random(8).randbytes(3 << 20)
    (tmp_path / "content").write_bytes(content)
    nbdvde("import", third, tmp_path / "content")
    for number, image in enumerate((first, second)):
        nbdvde("export", image, tmp_path / f"copy{number}")
        assert (tmp_path / f"copy{number}").read_bytes() == content + bytes(SIZE - len(content))


def test_who_was_away_for_long_takes_over_the_state(cluster: Cluster, tmp_path: Path) -> None:
    """The log has forgotten what it missed; snapshots and regions come along."""
    leader = cluster.leader()
    away, other = (member for member in cluster.members if member is not leader)
    away.stop()
    data = tmp_path / "data"
    data.write_bytes(random.Random(2).randbytes(SIZE))
    for _ in range(2):
        run("nbdcopy", data, other.uri)
    nbdvde("snapshot", "create", leader.image, "disk@while-away")
    entry = tmp_path / "entry"
    entry.write_text("while away")
    nbdvde("stream", "append", leader.image, entry)
    assert leader.status().log_bytes < SIZE
    away.start()
    index = cluster.leader().status().committed
    cluster.wait(partial(has_applied, away.number, index))
    copy = tmp_path / "copy"
    run("nbdcopy", away.uri, copy)
    assert copy.read_bytes() == data.read_bytes()
    found = nbdvde_json("snapshot", "list", away.image, "--key-file", away.key_file, "--json")
    assert [snapshot["name"] for snapshot in found["snapshots"]][-1] == "while-away"
    assert nbdvde("stream", "read", away.image, "--raw").endswith("while away")
    assert "differs" not in nbdvde("cluster", "verify", leader.image)
    assert "taking over the state" in (away.folder / "server.log").read_text()
    run("qemu-io", "-f", "raw", "-c", f"write -z 0 {SIZE}", away.uri)


def test_who_has_left_ends(tmp_path: Path) -> None:
    """Sent away while it is off, or by itself: its clients go to another node."""
    with closing(Cluster(tmp_path, SIZE)) as cluster:
        first, second, third = cluster.members
        third.kill()
        nbdvde("cluster", "leave", first.image, "--node", "3")
        third.start()
        assert nbdvde_json("cluster", "leave", second.image, "--json")["node"] == 2
        for member in (second, third):
            assert member.process
            assert member.process.ends() == 9
            line = f"node {member.number}: belongs to its cluster no more (delete its image, or "
            assert line in (member.folder / "server.log").read_text()
        run("qemu-io", "-f", "raw", "-c", "write -P 8 0 4k", first.uri)
        first.stop()


def test_a_lost_majority(tmp_path: Path) -> None:
    """One node of three is left: it becomes a cluster of its own, and another one joins that."""
    with closing(Cluster(tmp_path, SIZE)) as cluster:
        first, second, third = cluster.members
        run("qemu-io", "-f", "raw", "-c", "write -P 7 0 1M", second.uri)
        first.kill()
        second.kill()
        third.stop()
        old = nbdvde_json("cluster", "status", third.image, "--key-file", third.key_file, "--json")
        new = nbdvde_json("cluster", "recover", third.image, "--key-file", third.key_file, "--json")
        assert (new["node"], new["cluster"] != old["cluster"]) == (3, True)
        third.start()
        assert cluster.leader() is third
        run("qemu-io", "-f", "raw", "-c", "read -P 7 0 1M", "-c", "write -P 8 0 4k", third.uri)
        first.start()
        assert not first.status().leader
        first.kill()
        third.stop()


def test_full_images(tmp_path: Path) -> None:
    """Clients are told in time, nothing that was acknowledged is lost, and trims make room again."""
    with closing(Cluster(tmp_path, 256 << 20, capacity=64 << 20)) as cluster:
        libnbd("fill", *(member.uri for member in cluster.members), module="libnbd_cluster")
        index = cluster.leader().status().committed
        for member in cluster.members:
            cluster.wait(partial(has_applied, member.number, index))
        assert "differs" not in nbdvde("cluster", "verify", cluster.members[0].image)
        for member in cluster.members:
            assert not member.status().problem
            member.stop()
