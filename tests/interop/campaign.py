"""A cluster, clients that tell what they see, faults, and what must hold in the end."""

import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from nbdvde import check_image
from nbdvde.admin.clustercalls import VERIFY, VerifyRequest
from nbdvde.admin.messages import VolumeRequest
from tests.interop import history
from tests.interop.cluster import has_applied
from tests.interop.faults import Machines, deck, happen, may_mount
from tests.interop.harness import ROOT, libnbd_python
from tests.interop.records import unpack

_SIZE = 8 << 20
_DISKS = ("disk", "shared", "shared")
"""Which disk each client uses: two take theirs from each other all the time."""
_GOES_ON_S = 120
"""Within which each client must get on when nothing fails any more."""


@dataclass
class Outcome:
    """Of a round."""

    faults: Counter[str] = field(default_factory=Counter)
    writes: int = 0
    """Blocks that were written and acknowledged."""
    unknown: int = 0
    """Blocks of which nobody knows."""
    reads: int = 0


class Client:
    """A process that uses a disk, and its story."""

    def __init__(self, folder: Path, number: int, seed: int, machines: Machines) -> None:
        self.disk, self.result = _DISKS[number], folder / f"client{number}"
        self.result.touch()
        self._log = (folder / f"client{number}.log").open("w+")
        uris = [member.uri.replace(":///", f":///{self.disk}", 1) for member in machines.members]
        command = [libnbd_python(), "-m", "tests.interop.libnbd_history", str(self.result), str(number + 1), str(seed)]
        self.process = subprocess.Popen([*command, *uris], cwd=ROOT, stderr=self._log)

    @property
    def told(self) -> int:
        """Bytes, so far."""
        return self.result.stat().st_size

    def expect_running(self) -> None:
        """Raise AssertionError with what it says."""
        if self.process.poll() is not None:
            self._log.seek(0)
            raise AssertionError(f"a client of {self.disk} ended: {self._log.read()}")

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


def play(folder: Path, seed: int, count: int, pace: float = 1.0) -> Outcome:
    """A round with so many faults, as `happen`. Raises AssertionError, or whatever else went wrong."""
    chance = random.Random(seed)
    kinds = [kind for kind in deck(chance, count) if kind != "full" or may_mount()]
    with closing(Machines(folder, _SIZE, chance)) as machines:
        machines.cluster.leader().control.change_volume("disks/create", VolumeRequest("shared", size=_SIZE))
        with _clients(folder, seed, machines) as clients:
            happen(machines, kinds, chance, partial(_expect_running, machines, clients), pace)
            _recover(machines, clients)
            for client in clients:
                client.end()
        outcome = Outcome(Counter(kinds))
        for disk in set(_DISKS):
            _judge([client for client in clients if client.disk == disk], outcome)
        _compare(machines)
    return outcome


@contextmanager
def _clients(folder: Path, seed: int, machines: Machines) -> Iterator[list[Client]]:
    clients = [Client(folder, number, seed, machines) for number in range(len(_DISKS))]
    try:
        yield clients
    finally:
        for client in clients:
            client.close()


def _recover(machines: Machines, clients: list[Client]) -> None:
    """Nothing fails any more: everybody has to get on."""
    before = [client.told for client in clients]
    deadline = time.monotonic() + _GOES_ON_S
    while any(client.told <= told for client, told in zip(clients, before, strict=True)):
        _expect_running(machines, clients)
        assert time.monotonic() < deadline, [member.status() for member in machines.members]
        time.sleep(0.05)
    index = machines.cluster.leader().status().committed
    for member in machines.members:
        machines.cluster.wait(partial(has_applied, member.number, index))


def _expect_running(machines: Machines, clients: list[Client]) -> None:
    machines.expect_running()
    for client in clients:
        client.expect_running()


def _judge(clients: list[Client], outcome: Outcome) -> None:
    records = [record for client in clients for record in unpack(client.result.read_bytes())]
    wrong = history.problem(records)
    assert not wrong, f"disk {clients[0].disk}: {wrong}"
    outcome.writes += sum(record.wrote and record.acknowledged for record in records)
    outcome.unknown += sum(record.wrote and not record.acknowledged for record in records)
    outcome.reads += sum(not record.wrote for record in records)


def _compare(machines: Machines) -> None:
    leader = machines.cluster.leader()
    for line in leader.control.feed(VERIFY, VerifyRequest()):
        assert not line.differences, line
    for member in machines.members:
        assert not member.status().problem
        member.stop()
        report = check_image(member.image, key=member.key)
        assert report.ok, report
