"""What thousands of half-open and stalled connections cost a client that works.

    python tools/strangers.py                       10,000 of them
    python tools/strangers.py --strangers 1000 --seconds 2

Two real servers, each a process, with the limit of connections raised; the strangers are at one of them. An honest
client of each reads 4 KiB blocks, 16 at a time; they take turns, and the median of the quotients counts. Then the
crowded server is stopped. One JSON object goes to standard output. Exit code 1: the client kept less than 90 % of
its speed, or the stop took 2 s or more.
"""

import argparse
import json
import random
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.protocol.client import FLAGS, info_data, option, request
from tools.serving import HANDSHAKE, Server, allow_files, connected, entered, exactly, serving

DISK, BLOCK, DEPTH = 64 << 20, 4096, 16
KEPT, STOP_S = 0.9, 2.0
ROUNDS = 7
_SPARE_FILES = 200
STATES = {
    "silent": b"",
    "half an option": FLAGS + option(7, info_data("disk"))[:20],
    "transmission": HANDSHAKE,
    "half a request": HANDSHAKE + request(0, 0, BLOCK)[:20],
    "half a payload": HANDSHAKE + request(1, DISK // 2, payload=bytes(100_000))[:50_000],
    "answers not taken": HANDSHAKE + request(0, 0, 1 << 18),
}
"""What a stranger sends before it falls silent; it reads nothing."""


def main() -> int:
    """Measure and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strangers", type=int, default=10_000, metavar="N")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="of each measurement")
    options = parser.parse_args()
    most = allow_files() - _SPARE_FILES
    if options.strangers > most:
        parser.error(f"this system allows {most} files")
    limits = {
        "NBDVDE_LIMITS_CONNECTIONS": str(options.strangers + 10),
        "NBDVDE_LIMITS_HANDSHAKE_S": "3600",
        "NBDVDE_LIMITS_SERVER_BYTES_IN_FLIGHT": "1G",
    }
    with tempfile.TemporaryDirectory() as crowded, tempfile.TemporaryDirectory() as quiet:
        arguments = ["--memory", str(DISK)]
        with serving(Path(crowded), arguments, limits) as one, serving(Path(quiet), arguments, limits) as other:
            found = _measure(one, other, options.strangers, options.seconds)
    print(json.dumps(found))
    return int(found["kept"] < KEPT or found["stop_s"] >= STOP_S)


def _measure(crowded: Server, quiet: Server, strangers: int, seconds: float) -> dict[str, float]:
    with entered(crowded.path) as honest, entered(quiet.path) as reference:
        _fill(honest)
        _fill(reference)
        memory_before, begun = crowded.resident_bytes, time.monotonic()
        socks = [_stranger(crowded.path, number) for number in range(strangers)]
        arrival_s = time.monotonic() - begun
        rates = [(_rate(honest, seconds), _rate(reference, seconds)) for _ in range(ROUNDS)]
        memory = crowded.resident_bytes
        stop_s = crowded.stop()
    for sock in socks:
        sock.close()
    return {
        "strangers": strangers, "iops": round(statistics.median(rate for rate, _ in rates)),
        "iops_without": round(statistics.median(rate for _, rate in rates)),
        "kept": round(statistics.median(rate / without for rate, without in rates), 3),
        "arrival_s": round(arrival_s, 2), "stop_s": round(stop_s, 2),
        "memory_before_mib": memory_before >> 20, "memory_mib": memory >> 20,
    }  # fmt: skip


def _stranger(path: Path, number: int) -> socket.socket:
    sock = connected(path)
    sock.setblocking(False)
    sock.send([*STATES.values()][number % len(STATES)])
    return sock


def _fill(sock: socket.socket) -> None:
    data = random.Random(1).randbytes(1 << 20)
    for offset in range(0, DISK, len(data)):
        sock.sendall(request(1, offset, payload=data))
        exactly(sock, 16)


def _rate(sock: socket.socket, seconds: float) -> float:
    """Reads per second."""
    chance, done, begun = random.Random(2), 0, time.monotonic()
    while time.monotonic() - begun < seconds:
        places = [chance.randrange(DISK // BLOCK) * BLOCK for _ in range(DEPTH)]
        sock.sendall(b"".join(request(0, place, BLOCK) for place in places))
        exactly(sock, DEPTH * (16 + BLOCK))
        done += DEPTH
    return done / (time.monotonic() - begun)


if __name__ == "__main__":
    sys.exit(main())
