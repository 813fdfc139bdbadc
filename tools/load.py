"""Many clients that read and write at once, and check what they read.

    python tools/load.py                            64 clients, ten minutes, a disk in memory
    python tools/load.py --image DIR --seconds 60   an encrypted image made in that directory

Each client has a part of the disk of its own and a copy of what has to be there; it writes, zeroes, trims, flushes and
reads in an order that its seed decides. One JSON object goes to standard output. Exit code 1: an error, wrong data,
memory that grows, or a client that got less than half of the mean.
"""

import argparse
import json
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nbdvde import create_image
from nbdvde.engine.keys import KeyFile
from tests.protocol.client import request
from tools.serving import Server, entered, exactly, serving

PART = 1 << 20
"""Bytes that one client uses."""
LONGEST = 1 << 16
FAIR, GROWTH = 0.5, 1.1
_GROWTH_BYTES = 16 << 20
_READ, _WRITE, _FLUSH, _TRIM, _ZEROES = 0, 1, 3, 4, 6
_MIX = (_READ,) * 10 + (_WRITE,) * 7 + (_TRIM, _ZEROES, _FLUSH)


class Client(threading.Thread):
    """One client: what it did, and what went wrong."""

    def __init__(self, path: Path, number: int, until: float) -> None:
        super().__init__(daemon=True)
        self._path, self._base, self._until = path, number * PART, until
        self._chance = random.Random(number)
        self._expected = bytearray(PART)
        self.done = 0
        self.failure: str | None = None

    def run(self) -> None:
        """See `Thread`."""
        try:
            with entered(self._path) as sock:
                while time.monotonic() < self._until:
                    self._one(sock)
                    self.done += 1
        except Exception as error:  # noqa: BLE001 - told by the main thread
            self.failure = repr(error)

    def _one(self, sock: socket.socket) -> None:
        chance = self._chance
        command, length = chance.choice(_MIX), chance.choice((512, 4096, 4096, 16384, LONGEST))
        offset = chance.randrange((PART - length) // 512) * 512
        payload = chance.randbytes(length) if command == _WRITE else None
        place = 0 if command == _FLUSH else self._base + offset
        sock.sendall(request(command, place, 0 if command == _FLUSH else length, cookie=self.done, payload=payload))
        header = exactly(sock, 16)
        if header != (0x67446698).to_bytes(4, "big") + bytes(4) + self.done.to_bytes(8, "big"):
            raise ValueError(f"answer {header.hex()} to command {command}")
        if command == _READ:
            if exactly(sock, length) != self._expected[offset : offset + length]:
                raise ValueError(f"wrong data at {place}, {length} bytes")
        elif command != _FLUSH:
            self._expected[offset : offset + length] = payload or bytes(length)


def main() -> int:
    """Load and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64, metavar="N")
    parser.add_argument("--seconds", type=float, default=600.0, metavar="S")
    parser.add_argument("--image", type=Path, metavar="DIR")
    options = parser.parse_args()
    size = options.clients * PART
    with tempfile.TemporaryDirectory(dir=options.image) as name:
        folder = Path(name)
        arguments = _image(folder, size) if options.image else ["--memory", str(size)]
        with serving(folder, arguments, {}) as server:
            found, failures = _load(server, options.clients, options.seconds)
    print(json.dumps(found | {"failures": failures[:5]}))
    flat = found["memory_late_mib"] <= found["memory_early_mib"] * GROWTH + (_GROWTH_BYTES >> 20)
    return int(bool(failures) or not flat or found["slowest_of_mean"] < FAIR)


def _image(folder: Path, size: int) -> list[str]:
    key = folder / "key"
    key.touch(mode=0o600)
    key.write_bytes(random.Random(0).randbytes(32))
    create_image(folder / "image.vde", size, secret=KeyFile(key.read_bytes()))
    return [str(folder / "image.vde"), "--key-file", str(key)]


def _load(server: Server, count: int, seconds: float) -> tuple[dict[str, float], list[str]]:
    begun = time.monotonic()
    clients = [Client(server.path, number, begun + seconds) for number in range(count)]
    for client in clients:
        client.start()
    memory = []
    while any(client.is_alive() for client in clients):
        time.sleep(min(1.0, seconds / 20))
        memory.append(server.resident_bytes >> 20)
    took, done = time.monotonic() - begun, [client.done for client in clients]
    quarter = max(1, len(memory) // 4)
    found = {
        "clients": count, "seconds": round(took, 1), "requests": sum(done), "iops": round(sum(done) / took),
        "slowest_of_mean": round(min(done) / statistics.mean(done), 3),
        "memory_early_mib": max(memory[quarter : 2 * quarter] or memory), "memory_late_mib": max(memory[-quarter:]),
        "stop_s": round(server.stop(), 2),
    }  # fmt: skip
    return found, [client.failure for client in clients if client.failure]


if __name__ == "__main__":
    sys.exit(main())
