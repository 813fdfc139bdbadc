"""A cluster, clients that tell what they see, faults, and what must hold in the end."""

import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from nbdvde import check_image, open_image
from nbdvde.admin.clustercalls import GROUPS, VERIFY, GroupsRequest, VerifyRequest
from nbdvde.admin.messages import VolumeRequest
from nbdvde.engine.catalogue import SEPARATOR
from nbdvde.engine.image import Image
from nbdvde.replication.compare import joined
from tests.interop import history
from tests.interop.cluster import Member, has_applied
from tests.interop.faults import Machines, deck, happen, may_mount
from tests.interop.harness import ROOT, libnbd_python
from tests.interop.records import BLOCK, BLOCKS, SIZE, offset_of, unpack, unpack_shown, version_in
from tests.interop.rulers import Ruler

_DISKS = ("disk", "shared", "shared")
"""Which disk each client uses: two take theirs from each other all the time."""
_PAUSE_S = 2.0
"""At most, between what the ruler asks for."""
_GOES_ON_S = 120
"""Within which each client must get on when nothing fails any more."""


@dataclass
class Outcome:
    """Of a round."""

    faults: Counter[str] = field(default_factory=Counter)
    writes: int = 0
    """Blocks that were written, or zeroed, and acknowledged."""
    unknown: int = 0
    """Blocks of which nobody knows."""
    reads: int = 0
    snapshots: int = 0
    """That were acknowledged."""
    shown: int = 0
    """How often one was read, while all that happened."""
    rollbacks: int = 0
    arranged: int = 0
    """How often there were other groups."""
    lease: bool = False
    """Whether reads were answered by lease."""


class Client:
    """A process that uses the cluster, and its story."""

    def __init__(self, folder: Path, name: str, module: str, arguments: Sequence[str], uris: Sequence[str]) -> None:
        """Runs a module of this package with the file of its story, `arguments`, and where there are nodes."""
        self._name, self.result = name, folder / name
        self.result.touch()
        self._log = (folder / f"{name}.log").open("w+")
        command = [libnbd_python(), "-m", f"{__package__}.{module}", str(self.result), *arguments, *uris]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=self._log)

    @property
    def told(self) -> int:
        """Bytes, so far."""
        return self.result.stat().st_size

    def expect_running(self) -> None:
        """Raise AssertionError with what it says."""
        if self.process.poll() is not None:
            self._log.seek(0)
            raise AssertionError(f"{self._name} ended: {self._log.read()}")

    def end(self) -> None:
        """Let it read everything once more. Raises AssertionError."""
        self.process.send_signal(signal.SIGTERM)
        if self.process.wait(_GOES_ON_S):
            self.expect_running()

    def close(self) -> None:
        """End it if it still runs."""
        self.process.kill()
        self.process.wait()
        self._log.close()


@dataclass
class Users:
    """All who use the cluster."""

    clients: list[Client]
    """In the order of `_DISKS`."""
    reader: Client
    """Of snapshots."""
    ruler: Ruler

    def expect_running(self) -> None:
        """Raise AssertionError when a process ended."""
        for process in (*self.clients, self.reader):
            process.expect_running()
        self.ruler.expect_running()

    def end(self) -> None:
        """Let all come to their end. Raises AssertionError, TimeoutError."""
        self.ruler.end()
        for process in (*self.clients, self.reader):
            process.end()


def play(folder: Path, seed: int, count: int, pace: float = 1.0) -> Outcome:
    """A round with so many faults, as `happen`. Raises AssertionError, or whatever else went wrong."""
    chance = random.Random(seed)
    kinds = [kind for kind in deck(chance, count) if kind != "full" or may_mount()]
    ruler = Ruler(sorted({*_DISKS}), random.Random(f"ruler {seed}"), _PAUSE_S / pace)
    lease = chance.random() < 1 / 3
    with closing(ruler), closing(Machines(folder, SIZE, chance, lease=lease)) as machines:
        control = machines.cluster.leader().control
        control.change_volume("disks/create", VolumeRequest("shared", size=SIZE))
        control.call(GROUPS, GroupsRequest(add=2))
        with _users(folder, seed, machines, ruler) as users:
            happen(machines, kinds, chance, partial(_expect_running, machines, users), pace)
            _recover(machines, users)
            users.end()
        contents = _compare(machines)
    done = ruler.done
    outcome = Outcome(
        Counter(kinds), snapshots=done["snapshot"], shown=_show(users, contents), rollbacks=done["rollback"],
        arranged=done["groups"], lease=lease,
    )  # fmt: skip
    for disk in set(_DISKS):
        _judge(disk, users, outcome)
    return outcome


@contextmanager
def _users(folder: Path, seed: int, machines: Machines, ruler: Ruler) -> Iterator[Users]:
    uris = [member.uri for member in machines.members]
    clients = [
        Client(
            folder, f"client{number}", "libnbd_history", (str(number + 1), str(seed)),
            [uri.replace(":///", f":///{disk}", 1) for uri in uris],
        )
        for number, disk in enumerate(_DISKS)
    ]  # fmt: skip
    reader = Client(folder, "reader", "libnbd_snapshots", (str(seed),), uris)
    ruler.start(machines)
    try:
        yield Users(clients, reader, ruler)
    finally:
        for process in (*clients, reader):
            process.close()


def _recover(machines: Machines, users: Users) -> None:
    """Nothing fails any more: everybody has to get on."""
    before = [client.told for client in users.clients]
    deadline = time.monotonic() + _GOES_ON_S
    while any(client.told <= told for client, told in zip(users.clients, before, strict=True)):
        _expect_running(machines, users)
        assert time.monotonic() < deadline, [member.status() for member in machines.members]
        time.sleep(0.05)
    index = machines.cluster.leader().status().committed
    for member in machines.members:
        machines.cluster.wait(partial(has_applied, member.number, index))


def _expect_running(machines: Machines, users: Users) -> None:
    machines.expect_running()
    users.expect_running()


# What must hold


def _compare(machines: Machines) -> Mapping[str, list[int]]:
    """What all nodes hold of snapshots. Raises AssertionError when it is not the same."""
    leader = machines.cluster.leader()
    for line in leader.control.feed(VERIFY, VerifyRequest()):
        assert not line.differences, line
    for member in machines.members:
        assert not member.status().problem
        member.stop()
        report = check_image(member.image, key=member.key)
        assert report.ok, report
    first, *others = [trio.run(_held, member) for member in machines.members]
    for other in others:
        assert other == first, "snapshots differ"
    return first


async def _held(member: Member) -> Mapping[str, list[int]]:
    """The versions that snapshots hold, by their labels."""
    async with open_image(member.image, key=member.key, read_only=True) as image:
        volumes = image.volumes
        labels = [f"{disk.name}{SEPARATOR}{made.name}" for disk in volumes.disks for made in volumes.snapshots(disk)]
        return {label: [await _version(image, label, block) for block in range(BLOCKS)] for label in labels}


async def _version(image: Image, label: str, block: int) -> int:
    return version_in(joined(await image.disk(label).read(offset_of(block), BLOCK)), block)


def _show(users: Users, contents: Mapping[str, list[int]]) -> int:
    """Give snapshots what anybody saw in them; how often somebody did. Raises AssertionError when that is not one."""
    snapshots = {snapshot.label: snapshot for snapshot in users.ruler.snapshots}
    for label, versions in contents.items():
        snapshots[label].versions = versions
    for label, snapshot in snapshots.items():
        assert label in contents or snapshot.doomed or not snapshot.sure, f"{label} is gone"
    seen = unpack_shown(users.reader.result.read_bytes())
    for label, end_ns, versions in seen:
        snapshot = snapshots[label]
        snapshot.end_ns = min(snapshot.end_ns, end_ns)
        snapshot.versions = snapshot.versions or versions
        assert versions == snapshot.versions, f"{label} was {versions}, and {snapshot.versions}"
    return len(seen)


def _judge(disk: str, users: Users, outcome: Outcome) -> None:
    clients = [client for client, used in zip(users.clients, _DISKS, strict=True) if used == disk]
    records = [record for client in clients for record in unpack(client.result.read_bytes())]
    snapshots = [made for made in users.ruler.snapshots if made.label.startswith(f"{disk}{SEPARATOR}")]
    wrong = history.problem(records, snapshots, [back for back in users.ruler.rollbacks if back.snapshot in snapshots])
    assert not wrong, f"disk {disk}: {wrong}"
    outcome.writes += sum(record.wrote and record.acknowledged for record in records)
    outcome.unknown += sum(record.wrote and not record.acknowledged for record in records)
    outcome.reads += sum(not record.wrote for record in records)
