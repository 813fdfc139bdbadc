"""What may happen to the machines of a cluster, and to what is between them. Each fault ends again."""

import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from threading import Thread

from nbdvde.admin.clustercalls import TRANSFER, NodeRequest
from nbdvde.errors import NbdvdeError
from tests.interop.cluster import Cluster, Member, free_ports
from tests.interop.lines import Lines

SPACE = 320 << 20
"""Of the file system of a machine."""


def may_mount() -> bool:
    """Whether machines can have file systems of their own, which can be full."""
    return os.geteuid() == 0


class Machines:
    """Those of a cluster, as far as things may happen to them."""

    def __init__(self, folder: Path, size: int, chance: random.Random, count: int = 3, *, lease: bool = False) -> None:
        """`lease` has them answer reads without asking each other, when they may."""
        self._chance = chance
        ports = free_ports(count)
        self.lines = Lines(ports, self._pids)
        self.members = [
            Member(folder / f"machine{number}", number, port, called)
            for number, (port, called) in enumerate(zip(ports, self.lines.addresses, strict=True), 1)
        ]
        self._mounted: list[Path] = []
        self._calls: list[Thread] = []
        try:
            if may_mount():
                for member in self.members:
                    store = member.image.parent
                    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SPACE}", "tmpfs", store], check=True)
                    self._mounted.append(store)
            self.cluster = Cluster(folder, size, election_s=0.5, log_size="2M", members=self.members, lease=lease)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End everything that still runs."""
        for member in self.members:
            member.kill()
        for call in self._calls:
            call.join()
        self.lines.close()
        for store in self._mounted:
            subprocess.run(["umount", "-l", store], check=True)

    def _pids(self) -> dict[int, int]:
        members = enumerate(self.members)
        return {machine: member.process.pid for machine, member in members if member.process}

    def expect_running(self) -> None:
        """Raise AssertionError when a server ended that nobody ended."""
        for member in self.members:
            if member.process:
                member.process.expect_running()

    # Faults

    def draw(self) -> Member:
        """A machine that nothing happens to: the leader as often as all others."""
        healthy = self.cluster.running
        if self._chance.random() < 0.5:
            for member in healthy:
                with suppress(NbdvdeError):
                    if member.status().role == "leader":
                        return member
        return self._chance.choice(healthy)

    @contextmanager
    def killed(self) -> Iterator[None]:
        """SIGKILL."""
        member = self.draw()
        member.kill()
        yield
        member.start()

    @contextmanager
    def all_killed(self) -> Iterator[None]:
        """All of them at once."""
        ended = self.cluster.running
        for member in ended:
            member.kill()
        yield
        for member in ended:
            member.start()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """SIGTERM, in order."""
        member = self.draw()
        member.stop()
        yield
        member.start()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """SIGSTOP, SIGCONT."""
        member = self.draw()
        member.pause()
        yield
        member.resume()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A machine is cut off from all others, at once or by silence."""
        one, others = self._apart()
        silently = self._chance.random() < 0.5
        for other in others:
            if silently:
                self.lines.way(one, other).hold()
                self.lines.way(other, one).hold()
            else:
                self.lines.cut(one, other)
        yield
        self._mend(one, others)

    @contextmanager
    def parted(self) -> Iterator[None]:
        """Two machines do not reach each other; the third one reaches both."""
        one, (other, *_) = self._apart()
        self.lines.cut(one, other)
        yield
        self._mend(one, [other])

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """A machine is heard by some and does not hear them."""
        one, others = self._apart()
        some = others[: self._chance.randint(1, len(others))]
        for other in some:
            self.lines.way(other, one).hold()
        yield
        self._mend(one, some)

    @contextmanager
    def unheard(self) -> Iterator[None]:
        """A machine hears some who do not hear it."""
        one, others = self._apart()
        some = others[: self._chance.randint(1, len(others))]
        for other in some:
            self.lines.way(one, other).hold()
        yield
        self._mend(one, some)

    @contextmanager
    def slow(self) -> Iterator[None]:
        """What a machine says, or hears, takes long."""
        one, others = self._apart()
        for other in others:
            for way in ((one, other), (other, one)):
                self.lines.way(*way).delay_s = self._chance.choice((0, 0.005, 0.05))
        yield
        self.lines.mend()

    @contextmanager
    def full(self) -> Iterator[None]:
        """There is no space on a machine, or next to none; maybe it is killed then."""
        member = self._chance.choice(self.members)
        ballast = member.image.with_name("ballast")
        _fill(ballast, self._chance.choice((0, 1 << 16, 1 << 20, 9 << 20)))
        yield
        killed = self._chance.random() < 0.3
        if killed:
            member.kill()
        ballast.unlink()
        if killed:
            member.start()

    @contextmanager
    def handed_over(self) -> Iterator[None]:
        """Another node is to lead. It may not be able to."""
        asked, target = self.draw(), self._chance.choice(self.members)

        def hand_over() -> None:
            with suppress(NbdvdeError):
                asked.control.call(TRANSFER, NodeRequest(target.number))

        self._calls.append(Thread(target=hand_over))  # whoever is cut off does not answer
        self._calls[-1].start()
        yield

    @contextmanager
    def wiped(self) -> Iterator[None]:
        """A machine loses all that it has, and joins as another node."""
        member = self.draw()
        member.kill()
        yield
        for path in member.image.parent.iterdir():
            subprocess.run(["rm", "-r", path], check=True)
        self.cluster.add(member)

    def _apart(self) -> tuple[int, list[int]]:
        """A machine, and the others in any order."""
        one = self.members.index(self.draw())
        others = [machine for machine in range(len(self.members)) if machine != one]
        self._chance.shuffle(others)
        return one, others

    def _mend(self, one: int, others: Sequence[int]) -> None:
        """What was held comes late, or never since connections were given up."""
        self.lines.mend()
        if self._chance.random() < 0.5:
            for other in others:
                self.lines.end(one, other)


def _fill(ballast: Path, leave: int) -> None:
    """Leave so many bytes of a file system, or fewer."""
    with ballast.open("wb") as file:
        while (free := _free(ballast)) > leave:
            with suppress(OSError):  # its server may write meanwhile
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), free - leave)


def _free(path: Path) -> int:
    system = os.statvfs(path)
    return system.f_bavail * system.f_frsize


KINDS: dict[str, tuple[int, Callable[[Machines], AbstractContextManager[None]]]] = {
    "killed": (8, Machines.killed),
    "all killed": (2, Machines.all_killed),
    "stopped": (3, Machines.stopped),
    "frozen": (5, Machines.frozen),
    "alone": (4, Machines.alone),
    "parted": (2, Machines.parted),
    "deaf": (3, Machines.deaf),
    "unheard": (3, Machines.unheard),
    "slow": (2, Machines.slow),
    "full": (3, Machines.full),
    "handed over": (4, Machines.handed_over),
    "wiped": (1, Machines.wiped),
}
"""How many of each there are among forty."""
ALONE = ("all killed", "full", "wiped")
"""Kinds during which nothing else happens."""


def deck(chance: random.Random, count: int) -> list[str]:
    """So many kinds of faults, in any order."""
    kinds: list[str] = []
    while len(kinds) < count:
        forty = [kind for kind, (times, _) in KINDS.items() for _ in range(times)]
        chance.shuffle(forty)
        kinds += forty
    return kinds[:count]


def happen(
    machines: Machines, kinds: Sequence[str], chance: random.Random, look: Callable[[], None], pace: float
) -> None:
    """Let faults happen, one after the other or two at a time; `look` after each. Raises AssertionError.

    Each takes up to 1.5 s / `pace`, and what it takes to be over.
    """
    left = list(kinds)
    while left:
        kind = left.pop()
        with KINDS[kind][1](machines):
            time.sleep(chance.uniform(0.1, 1.5) / pace)
            if left and kind not in ALONE and left[-1] not in ALONE and chance.random() < 0.3:
                with KINDS[left.pop()][1](machines):
                    time.sleep(chance.uniform(0.1, 1.0) / pace)
        look()
        time.sleep(chance.uniform(0, 0.5) / pace)
