"""The servers that are compared: how each makes its disk, is started, and is stopped.

Every command runs inside the working directory and names its files relative to it, so that what is printed can be
run by anybody.
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_S = 60.0
"""Longest time from starting a server to its greeting."""
_KEY, _LUKS_KEY = "disk.key", "luks.key"
"""The second one is text, as QEMU takes no other."""
_GREETING = b"NBDMAGIC"
_BIN = Path(sys.executable).parent

Command = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Server:
    """One row of the table."""

    name: str
    disk: str
    """File that holds the disk; empty when it is in memory."""
    create: Callable[[int], tuple[Command, ...]]
    """Commands that make a disk of so many bytes."""
    serve: Callable[[int], Command]
    """Command that serves it on the Unix socket `NAME.sock`."""
    scheme: str = "nbd+unix"
    query: str = ""
    """What comes in the URI after the socket."""

    @property
    def socket(self) -> str:
        """The Unix socket, relative to the working directory."""
        return f"{self.name}.sock"

    @property
    def uri(self) -> str:
        """What clients started in the working directory connect to."""
        return f"{self.scheme}:///?socket={self.socket}{self.query}"


def _nothing(_: int) -> tuple[Command, ...]:
    return ()


def _sparse(disk: str, extra: int = 0) -> Callable[[int], tuple[Command, ...]]:
    return lambda size: (("truncate", f"--size={size + extra}", disk),)


def _qemu(name: str, *rest: str) -> Callable[[int], Command]:
    return lambda _: (
        "qemu-nbd", "--persistent", "--shared=8", "--cache=writeback", f"--socket=$PWD/{name}.sock", *rest,
    )  # fmt: skip


def _luks(size: int) -> tuple[Command, ...]:
    """`qemu-img create` measures the processor for seconds and may fail; the key is random, so few iterations do."""
    header = 2 << 20
    return (
        ("truncate", f"--size={size + header}", "luks.raw"),
        (
            "cryptsetup", "luksFormat", "--batch-mode", "--type=luks1", "--cipher=aes-xts-plain64", "--key-size=512",
            "--pbkdf-force-iterations=1000", f"--key-file={_LUKS_KEY}", "luks.raw",
        ),
    )  # fmt: skip


SERVERS = {
    server.name: server
    for server in (
        Server(
            "nbdvde-memory", "", _nothing,
            lambda size: ("nbdvde", "serve", f"--memory={size}", "--listen=unix:nbdvde-memory.sock"),
        ),
        Server(
            "nbdkit-memory", "", _nothing,
            lambda size: ("nbdkit", "-f", "-U", "nbdkit-memory.sock", "memory", f"{size}"),
        ),
        Server(
            "nbdvde", "disk.vde",
            lambda size: (("nbdvde", "create", "disk.vde", f"{size}", f"--key-file={_KEY}"),),
            lambda _: ("nbdvde", "serve", "disk.vde", f"--key-file={_KEY}", "--listen=unix:nbdvde.sock"),
        ),
        Server(
            "qemu-luks", "luks.raw", _luks,
            _qemu(
                "qemu-luks", f"--object=secret,id=key,file={_LUKS_KEY}", "--image-opts",
                "driver=luks,key-secret=key,file.driver=file,file.filename=luks.raw",
            ),
        ),
        Server("qemu-raw", "disk.raw", _sparse("disk.raw"), _qemu("qemu-raw", "--format=raw", "disk.raw")),
        Server(
            "qemu-qcow2", "disk.qcow2",
            lambda size: (("qemu-img", "create", "-q", "-f", "qcow2", "disk.qcow2", f"{size}"),),
            _qemu("qemu-qcow2", "--format=qcow2", "disk.qcow2"),
        ),
        Server(
            "nbdkit-file", "file.raw", _sparse("file.raw"),
            lambda _: ("nbdkit", "-f", "-U", "nbdkit-file.sock", "file", "file.raw"),
        ),
    )
}  # fmt: skip


def show(command: Command) -> str:
    """The command as one would type it."""
    return shlex.join(part.replace("$PWD", "_PWD_") for part in command).replace("_PWD_", "$PWD")


class Work:
    """The working directory: disks, sockets, the key."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name, data in ((_KEY, os.urandom(32)), (_LUKS_KEY, os.urandom(32).hex().encode())):
            (directory / name).touch(mode=0o600)
            (directory / name).write_bytes(data)

    def found(self, command: Command) -> Command:
        """The command with our own program looked up beside this Python, and `$PWD` filled in."""
        program = _BIN / command[0]
        rest = (part.replace("$PWD", str(self.directory.absolute())) for part in command[1:])
        return (str(program) if program.exists() else command[0], *rest)

    def run(self, command: Command) -> None:
        """Run a command to its end; its output is shown only when it fails."""
        done = subprocess.run(self.found(command), cwd=self.directory, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{show(command)} failed with {done.returncode}: {done.stderr or done.stdout}")

    def create(self, server: Server, size: int) -> None:
        """Make the server's disk anew."""
        if server.disk:
            (self.directory / server.disk).unlink(missing_ok=True)
        for command in server.create(size):
            self.run(command)

    @contextmanager
    def serving(self, server: Server, size: int, *, launcher: Command = ()) -> Iterator["Running"]:
        """The server, started and greeting; stopped by SIGTERM at the end. `launcher` replaces its program."""
        command = server.serve(size)
        running = Running(self, server, (*launcher, *command[1:]) if launcher else command)
        try:
            yield running
        finally:
            running.stop()

    def drop_caches(self, server: Server) -> None:
        """Make the host forget what it holds of the disk in memory."""
        os.sync()
        drop = Path("/proc/sys/vm/drop_caches")
        if os.access(drop, os.W_OK):
            drop.write_text("1\n")
            return
        fd = os.open(self.directory / server.disk, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


class Running:
    """A started server."""

    def __init__(self, work: Work, server: Server, command: Command) -> None:
        self._socket = work.directory / server.socket
        self._socket.unlink(missing_ok=True)
        started = time.perf_counter()
        with (work.directory / f"{server.name}.log").open("wb") as log:
            self._process = subprocess.Popen(work.found(command), cwd=work.directory, stdout=log, stderr=log)
        self._name, self._log = server.name, work.directory / f"{server.name}.log"
        self._wait_for_greeting(started + START_S)
        self.start_s = time.perf_counter() - started
        """From starting the program to its greeting."""

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def peak_memory(self) -> int:
        """Largest resident size so far, bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        match = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert match
        return int(match[1]) << 10

    def wait_written(self, length: int) -> None:
        """Wait until the server has had the kernel write so many bytes."""
        counters = Path(f"/proc/{self.pid}/io")
        while int(re.findall(r"^write_bytes: (\d+)", counters.read_text(), re.MULTILINE)[0]) < length:
            time.sleep(0.02)

    def stop(self) -> int:
        """End it cleanly; returns the bytes that it had the kernel write during its life, 0 if it was gone."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a crash would."""
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> int:
        if self._process.returncode is not None:
            return 0
        self._process.send_signal(number)
        _, status, usage = os.wait4(self.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self._socket.unlink(missing_ok=True)
        return usage.ru_oublock * 512

    def _wait_for_greeting(self, until: float) -> None:
        while time.perf_counter() < until and self._process.poll() is None:
            try:
                with socket.socket(socket.AF_UNIX) as client:
                    client.settimeout(until - time.perf_counter())
                    client.connect(str(self._socket))
                    if client.recv(8) == _GREETING:
                        return
            except OSError:
                time.sleep(0.002)
        self._end(signal.SIGKILL)
        sys.exit(f"{self._name} did not start: {self._log.read_text()}")
