"""QEMU's block layer as a process, driven by its control protocol (QMP)."""

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.interop.harness import need
from tests.interop.later import later

TIMEOUT_S = 60


class StorageDaemon:
    """A `qemu-storage-daemon` that is told everything on its standard input."""

    def __init__(self, folder: Path, program: Sequence[str | Path]) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [*program, "--chardev", "stdio,id=qmp", "--monitor", "chardev=qmp"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._events: list[dict[str, Any]] = []
        assert "QMP" in self._receive()
        self.do("qmp_capabilities")

    def do(self, command: str, **arguments: object) -> Any:
        """Execute a command, its arguments with `_` for `-`; what it returns."""
        spelled = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self.execute({"execute": command, "arguments": spelled})

    def execute(self, command: dict[str, Any]) -> Any:
        """Execute a command as QMP spells it; what it returns."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        while "event" in (answer := self._receive()):
            self._events.append(answer)
        assert "return" in answer, answer
        return answer["return"]

    def wait(self, event: str) -> dict[str, Any]:
        """Data of the next event of this name; others are forgotten."""
        while True:
            while self._events:
                found = self._events.pop(0)
                if found["event"] == event:
                    data: dict[str, Any] = found["data"]
                    return data
            self._events.append(self._receive())

    def attach(self, node: str, socket: Path, **options: object) -> None:
        """Connect to an NBD server of ours."""
        server = {"type": "unix", "path": str(socket)}
        self.do("blockdev-add", driver="nbd", node_name=node, server=server, export="disk", **options)

    def export(self, node: str) -> Path:
        """Serve a node under its name by NBD; the socket."""
        socket = self._folder / f"{node}.sock"
        self.do("nbd-server-start", addr={"type": "unix", "data": {"path": str(socket)}})
        self.do("block-export-add", type="nbd", id=node, node_name=node, name=node, writable=True)
        return socket

    def close(self) -> None:
        """Flush everything and end."""
        self.do("quit")
        assert self._process.wait(TIMEOUT_S) == 0

    def kill(self) -> None:
        """Leave nothing behind."""
        self._process.kill()
        self._process.communicate()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, "qemu-storage-daemon ended"
        message: dict[str, Any] = json.loads(line)
        return message


@contextmanager
def storage_daemon(folder: Path, *, newer: bool) -> Iterator[StorageDaemon]:
    """A daemon without disks, the host's or a newer one, which has extended headers; it must end well."""
    if not newer:
        need("qemu-storage-daemon")
    daemon = StorageDaemon(folder, later("qemu-storage-daemon") if newer else ["qemu-storage-daemon"])
    try:
        yield daemon
        daemon.close()
    finally:
        daemon.kill()
