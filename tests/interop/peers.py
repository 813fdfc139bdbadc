"""Other servers as processes, each with an empty disk of the same size under the same name."""

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.interop.harness import STOP_S, Process, run
from tests.interop.later import later, nbdkit_plugin

SIZE = 256 << 20
NAME = "disk"
START_S = 30
Command = list[str | Path]


def _nbdkit(_folder: Path, path: Path, read_only: bool) -> Command:
    options = ["--readonly"] if read_only else []
    return later("nbdkit", "--foreground", *options, "--unix", path, nbdkit_plugin("memory"), f"size={SIZE}")


def _qemu_nbd(folder: Path, path: Path, read_only: bool) -> Command:
    """In a format of QEMU's own, so that the host's file system does not matter."""
    disk = folder / "disk.qcow2"
    run(*later("qemu-img", "create", "-q", "-f", "qcow2", disk, str(SIZE)))
    options = ["--read-only"] if read_only else []
    return later(
        "qemu-nbd", *options, "--persistent", "--shared=0", "--format=qcow2", "--discard=unmap", "--allocation-depth",
        f"--export-name={NAME}", f"--socket={path}", disk,
    )  # fmt: skip


def _nbd_server(folder: Path, path: Path, read_only: bool) -> Command:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]  # it listens on TCP as well, whatever it is told
    disk, configuration = folder / "disk.raw", folder / "nbd-server.conf"
    with disk.open("wb") as file:
        file.truncate(SIZE)
    configuration.write_text(
        f"[generic]\nunixsock = {path}\nlistenaddr = 127.0.0.1\nport = {port}\nallowlist = true\n"
        f"[{NAME}]\nexportname = {disk}\ntrim = true\nflush = true\nfua = true\n"
        f"readonly = {str(read_only).lower()}\n"
    )
    return later("nbd-server", "-C", configuration, "-n")


PEERS: dict[str, Callable[[Path, Path, bool], Command]] = {
    "nbdkit": _nbdkit,
    "qemu-nbd": _qemu_nbd,
    "nbd-server": _nbd_server,
}


@contextmanager
def serving(name: str, folder: Path, *, read_only: bool = False) -> Iterator[Path]:
    """A Unix socket of one of these servers, or of ours when the name is `nbdvde`."""
    folder.mkdir()
    if name == "nbdvde":
        ours = Process(folder, ["--memory", str(SIZE), *(["--read-only"] if read_only else [])])
        try:
            yield ours.socket
        finally:
            ours.stop()
        return
    path = folder / "nbd.sock"
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(PEERS[name](folder, path, read_only), stdout=log, stderr=log)
    try:
        _wait_for(path, process, folder / "server.log")
        yield path
    finally:
        process.terminate()
        process.wait(STOP_S)


def _wait_for(path: Path, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Poll: these servers tell nobody that they are ready."""
    until = time.monotonic() + START_S
    while True:
        assert process.poll() is None, log.read_text()
        with socket.socket(socket.AF_UNIX) as probe:
            if not probe.connect_ex(str(path)):
                return
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.01)
