"""How long nobody can write when the leader is killed, or when leadership is handed over."""

import math
import random
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from threading import Thread

sys.path.insert(0, str(Path(__file__).parents[2]))

from nbdvde.admin.clustercalls import TRANSFER, ClusterStatus, NodeRequest
from nbdvde.protocol.constants import Command, CommandFlag
from tests.interop.cluster import Cluster, Member
from tools.bench.report import Section, Table
from tools.bench.servers import Work
from tools.bench.wire import exactly, negotiate

_SIZE = 32 << 20
_BLOCK = 4096
_REQUEST = struct.Struct(">IHHQQI")
_MAGIC, _REPLY_BYTES = 0x25609513, 16
_HOMES = ("the old leader", "the new leader", "another node")
_SETTLED_S = 0.3
"""Of writes, before anything happens and after."""


def measure(work: Work, *, kills: int) -> Section:
    """With the default election timeout."""
    found: dict[str, list[float]] = {}
    errors: dict[str, int] = {}
    with closing(Cluster(work.directory, _SIZE)) as cluster:
        for number in range(kills):
            at_leader = number % 2 == 0
            name = f"leader killed, client at {'it' if at_leader else 'another node'}"
            _note(found, errors, name, _killed(cluster, at_leader=at_leader))
        for number in range(kills // 2):
            home = number % len(_HOMES)
            _note(found, errors, f"handed over, client at {_HOMES[home]}", _handed_over(cluster, home))
        for member in cluster.members:
            member.stop()
    table, figures = Table(["", "times", "p50", "p99", "longest", "connections that ended"]), {}
    for name, pauses in found.items():
        shown = [_at(pauses, 0.5), _at(pauses, 0.99), max(pauses)]
        table.add(name, str(len(pauses)), *(f"{pause * 1e3:.0f} ms" for pause in shown), str(errors[name]))
        figures[name] = dict(zip(("p50", "p99", "longest"), shown, strict=True)) | {"errors": errors[name]}
    text = (
        "Three nodes as processes of one machine, TLS between them, the default election timeout. One client writes "
        "4 KiB after 4 KiB, each durable when it is answered, and connects again when its connection ends. SIGKILL of "
        "the leader: until the first write is answered that was sent after it. Leadership handed over: the longest "
        "time between two answers."
    )
    return Section("failover", text, [table], ["python -m tools.bench failover"], figures)


def _note(found: dict[str, list[float]], errors: dict[str, int], name: str, seen: tuple[float, int]) -> None:
    found.setdefault(name, []).append(seen[0])
    errors[name] = errors.get(name, 0) + seen[1]


def _at(pauses: Sequence[float], share: float) -> float:
    """The pause that so many are not longer than."""
    return sorted(pauses)[min(len(pauses) - 1, int(share * len(pauses)))]


class _Writer:
    """A client at one node after the other."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members, self._chance = list(members), random.Random(1)
        self.ended = 0
        """Connections."""
        self._sock = self._connected()

    def write(self) -> float:
        """Write one block; the time at which the request was sent that was answered."""
        while True:
            begun = time.monotonic()
            try:
                offset = self._chance.randrange(_SIZE // _BLOCK) * _BLOCK
                head = _REQUEST.pack(_MAGIC, CommandFlag.FUA, Command.WRITE, 0, offset, _BLOCK)
                self._sock.sendall(head + self._chance.randbytes(_BLOCK))
                if exactly(self._sock, _REPLY_BYTES)[4:8] != bytes(4):
                    raise ConnectionError("a request was refused")
            except OSError:
                self.ended += 1
                self.close()
                self._sock = self._connected()
            else:
                return begun

    def close(self) -> None:
        """End the connection."""
        self._sock.close()

    def _connected(self) -> socket.socket:
        while True:
            member = self._members.pop(0)
            self._members.append(member)
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(30)
            try:
                sock.connect(str(member.folder / "nbd.sock"))
                negotiate(sock, "simple")
            except OSError:
                sock.close()
                time.sleep(0.01)
            else:
                return sock


def _killed(cluster: Cluster, *, at_leader: bool) -> tuple[float, int]:
    """Seconds, and connections that ended."""
    leader = _healthy(cluster)
    others = [member for member in cluster.members if member is not leader]
    with closing(_Writer([leader, *others] if at_leader else [*others, leader])) as writer:
        times: list[float] = []

        def kill() -> None:
            times.append(time.monotonic())
            leader.kill()

        _write_on(writer, lambda since: since < _SETTLED_S)
        thread = Thread(target=kill)
        thread.start()
        while writer.write() < (times[0] if times else math.inf):
            pass
        pause = time.monotonic() - times[0]
        thread.join()
        leader.start()
        return pause, writer.ended


def _handed_over(cluster: Cluster, home: int) -> tuple[float, int]:
    """Seconds, and connections that ended, of a client at the node that leads, will lead, or neither."""
    leader = _healthy(cluster)
    target, other = (member for member in cluster.members if member is not leader)
    order = [leader, target, other]
    with closing(_Writer(order[home:] + order[:home])) as writer:
        _write_on(writer, lambda since: since < _SETTLED_S)
        thread = Thread(target=partial(leader.control.call, TRANSFER, NodeRequest(target.number)))
        thread.start()
        pause = _write_on(writer, lambda since: thread.is_alive() or since < _SETTLED_S)
        thread.join()
        return pause, writer.ended


def _write_on(writer: _Writer, going: Callable[[float], bool]) -> float:
    """Write as long as `going` of the seconds since now says so; the longest time between two answers."""
    begun = last = time.monotonic()
    longest = 0.0
    while going(last - begun):
        writer.write()
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    return longest


def _healthy(cluster: Cluster) -> Member:
    """Wait until all nodes have everything; who leads."""

    def is_healthy(status: ClusterStatus) -> bool:
        everybody = all(node.connected and node.behind in (None, 0) for node in status.nodes)
        return status.role == "leader" and everybody and len(status.nodes) == len(cluster.members)

    found = cluster.wait(is_healthy)
    return next(member for member in cluster.members if member.number == found.node)
