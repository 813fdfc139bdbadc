"""Three nodes on one machine, TLS between them, beside the same build alone."""

import random
import socket
import statistics
import struct
import sys
import time
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from nbdvde.protocol.constants import Command, CommandFlag
from tests.interop.cluster import Cluster
from tests.interop.harness import NBDVDE, Process, run
from tools.bench.report import Section, Table, mib_per_s, number
from tools.bench.servers import Work
from tools.bench.wire import exactly, negotiate

_SIZE = 128 << 20
_CASES = (
    ("4K randwrite FUA QD32", Command.WRITE, 4096, 32),
    ("4K randwrite FUA QD1", Command.WRITE, 4096, 1),
    ("1M write FUA QD8", Command.WRITE, 1 << 20, 8),
    ("4K randread QD32", Command.READ, 4096, 32),
)
_REQUEST = struct.Struct(">IHHQQI")
_MAGIC, _REPLY_BYTES = 0x25609513, 16


def measure(work: Work, *, rounds: int, seconds: float) -> Section:
    """The leader and another node of three, and an image that is not replicated, taken in turn."""
    rates: dict[tuple[str, str], list[float]] = {}
    alone = work.directory / "alone"
    alone.mkdir()
    key = alone / "key"
    key.write_bytes(bytes(range(32)))
    key.chmod(0o600)
    run(NBDVDE, "create", alone / "disk.vde", str(_SIZE), "--key-file", key)
    server = Process(alone, [alone / "disk.vde", "--key-file", key])
    with closing(Cluster(work.directory, _SIZE)) as cluster:
        leader = cluster.leader()
        other = next(member for member in cluster.members if member is not leader)
        sockets = {
            "alone": alone / "nbd.sock", "at the leader": leader.folder / "nbd.sock",
            "at another node": other.folder / "nbd.sock",
        }  # fmt: skip
        for _ in range(rounds):
            for name, path in sockets.items():
                for case, command, block, depth in _CASES:
                    rates.setdefault((case, name), []).append(_rate(path, command, block, depth, seconds))
        for member in cluster.members:
            member.stop()
    server.stop()
    return _section({key: statistics.median(found) for key, found in rates.items()}, rounds, seconds)


def _section(rates: dict[tuple[str, str], float], rounds: int, seconds: float) -> Section:
    table = Table(["case", "alone", "at the leader", "at another node", "leader to alone"])
    for case, _, block, _ in _CASES:
        found = [rates[case, name] for name in ("alone", "at the leader", "at another node")]
        shown = [mib_per_s(rate * block) if block > 4096 else f"{number(rate)}/s" for rate in found]
        table.add(case, *shown, f"{found[1] / found[0]:.2f}")
    text = (
        "Three nodes as processes of one machine, TLS between them, clients at Unix sockets; beside an image that is "
        "not replicated. Writes are new data that does not compress, each durable when it is answered. Medians of "
        f"{rounds} rounds of {seconds:g} s."
    )
    figures = {f"{case}, {name}": rate for (case, name), rate in rates.items()}
    return Section("replication", text, [table], ["python -m tools.bench replication"], figures)


def _rate(path: Path, command: Command, block: int, depth: int, seconds: float) -> float:
    """Requests a second, `depth` in flight."""
    chance = random.Random(1)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(str(path))
        negotiate(sock, "simple")
        answer = _REPLY_BYTES + (block if command == Command.READ else 0)
        begun, done, pending = time.perf_counter(), 0, bytearray()
        for _ in range(depth):
            sock.sendall(_request(command, chance, block))
        while (taken := time.perf_counter() - begun) < seconds:
            pending += sock.recv(1 << 20)
            count = len(pending) // answer
            if any(pending[at * answer + 4 : at * answer + 8] != bytes(4) for at in range(count)):
                raise ConnectionError("a request was refused")
            del pending[: count * answer]
            done += count
            sock.sendall(b"".join(_request(command, chance, block) for _ in range(count)))
        exactly(sock, depth * answer - len(pending))
        return done / taken


def _request(command: Command, chance: random.Random, block: int) -> bytes:
    flags = CommandFlag.FUA if command == Command.WRITE else 0
    head = _REQUEST.pack(_MAGIC, flags, command, 0, chance.randrange(_SIZE // block) * block, block)
    return head + (chance.randbytes(block) if command == Command.WRITE else b"")
