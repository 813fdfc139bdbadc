"""A real `nbdvde serve` for the tools, and a blocking client of it."""

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.protocol.client import FLAGS, info_data, option

ROOT = Path(__file__).resolve().parents[1]
START_S = 30.0
_PAGE = resource.getpagesize()


class Server:
    """A server as a process."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path) -> None:
        self.process, self.path = process, path

    @property
    def resident_bytes(self) -> int:
        """Memory in use."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * _PAGE

    def stop(self) -> float:
        """Seconds from SIGTERM to the end. Raises RuntimeError when it did not end well."""
        begun = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        if self.process.wait(60):
            raise RuntimeError(f"the server ended with {self.process.returncode}")
        return time.monotonic() - begun


@contextmanager
def serving(folder: Path, arguments: list[str], environment: Mapping[str, str]) -> Iterator[Server]:
    """A server on the Unix socket `folder/sock`."""
    path = folder / "sock"
    command = [sys.executable, "-m", "nbdvde", "serve", *arguments, "--listen", f"unix:{path}", "--control", "none"]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment})
    try:
        deadline = time.monotonic() + START_S
        while not path.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the server did not start")
            time.sleep(0.01)
        yield Server(process, path)
    finally:
        process.kill()
        process.wait()


def allow_files() -> int:
    """Let this process and its children have as many files as the system allows; how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def connected(path: Path) -> socket.socket:
    """A connection of which nothing was read yet."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    return sock


HANDSHAKE = FLAGS + option(7, info_data())
_ANSWERS = 18 + 20 + 12 + 20
"""Greeting, INFO with EXPORT, ACK."""


def entered(path: Path) -> socket.socket:
    """A connection in transmission, with simple replies."""
    sock = connected(path)
    sock.sendall(HANDSHAKE)
    exactly(sock, _ANSWERS)
    return sock


def exactly(sock: socket.socket, count: int) -> bytes:
    """The next bytes. Raises EOFError when the server closes first."""
    data = bytearray()
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise EOFError
        data += more
    return bytes(data)
