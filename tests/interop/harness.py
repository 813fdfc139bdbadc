"""Real servers and real clients as processes."""

import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from nbdvde import KeyFile, check_image, create_image
from nbdvde.cli import run as commands

NBDVDE = str(Path(sys.executable).parent / "nbdvde")
ROOT = Path(__file__).parents[2]
CHECKS = Path(__file__).with_name("libnbd_checks.py")
_SYSTEM_MODULE = Path("/usr/lib/python3/dist-packages/nbd.py")
STOP_S = 60
"""A clean stop writes a checkpoint; more than this is a hang."""


def need(*programs: str) -> None:
    """Skip the test when a program is missing; with CI=true that is a failure."""
    missing = [
        program for program in programs if not shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    ]
    if missing:
        unavailable(f"{', '.join(missing)} not found: tools/prerequisites test installs it")


def unavailable(why: str) -> None:
    """Skip the test; with CI=true it fails."""
    if os.environ.get("CI") == "true":
        pytest.fail(why)
    pytest.skip(why)


def run(
    *command: str | Path,
    input: bytes | None = None,  # noqa: A002 - as subprocess.run names it
    variables: Mapping[str, str] | None = None,
) -> str:
    """Run a program to its end and give its standard output; the test fails when it does."""
    environment = {**_environment(), **(variables or {})}
    done = subprocess.run([*map(str, command)], input=input, capture_output=True, check=False, env=environment)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout.decode()}{done.stderr.decode()}"
    return done.stdout.decode()


def nbdvde(*command: str | Path, code: int = 0) -> str:
    """The output of one of our own commands, called in this process: starting one takes longer than what most do."""
    out, errors = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    with redirect_stdout(out), redirect_stderr(errors):
        ended = commands.run([*map(str, command)])
    said, complained = (text.buffer.getvalue().decode() for text in (out, errors))
    assert ended == code, f"{command}: {ended}\n{said}{complained}"
    return said


def nbdvde_json(*command: str | Path) -> Any:
    """As `nbdvde`; the output is JSON."""
    return json.loads(nbdvde(*command))


def libnbd(name: str, *arguments: str, module: str = "libnbd_checks") -> None:
    """Call a function of a module of this package that needs libnbd.

    Here, or in the system's Python when libnbd was built for another one; tests/conftest.py makes libnbd importable
    where it can be.
    """
    module = f"{__package__}.{module}"
    if importlib.util.find_spec("nbd"):
        getattr(importlib.import_module(module), name)(*arguments)
        return
    if not _SYSTEM_MODULE.exists():
        unavailable("python3-libnbd is not installed")
    run("/usr/bin/python3", "-m", module, name, *arguments, variables={"PYTHONPATH": str(ROOT)})


def libnbd_python() -> str:
    """A Python that has libnbd."""
    return "/usr/bin/python3" if _SYSTEM_MODULE.exists() else sys.executable


def run_json(*command: str | Path) -> Any:
    """As `run`; the output is JSON."""
    return json.loads(run(*command))


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NBDVDE_")}
    return {**kept, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "LC_ALL": "C"}


class Process:
    """A started `nbdvde serve`."""

    def __init__(
        self, folder: Path, what: Sequence[str | Path], listen: str | None = None, passed: Sequence[int] = ()
    ) -> None:
        """`passed` are descriptors of listening sockets, given on as systemd does."""
        self.socket = folder / "nbd.sock"
        self._log = folder / "server.log"
        address = listen or f"unix:{self.socket}"
        command = [NBDVDE, "serve", *map(str, what), "--listen", address, "--print-uri"]
        if passed:
            places = " ".join(f"{number}<&{fd}" for number, fd in enumerate(passed, 3))
            command = ["bash", "-c", f'LISTEN_PID=$$ LISTEN_FDS={len(passed)} exec "$0" "$@" {places}', *command]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=_environment(), pass_fds=passed
            )
        assert self._process.stdout
        self.uri = self._process.stdout.readline().strip()
        """The address it said it is ready at."""
        if not self.uri:
            self.kill()
            pytest.fail(f"the server did not start: {self._log.read_text()}")

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Not stopped by us."""
        return self._process.returncode is None

    def expect_running(self) -> None:
        """Fail when it ended by itself."""
        assert self._process.poll() is None, f"{self._process.returncode}\n{self._log.read_text()}"

    def ends(self) -> int:
        """Wait until it ends by itself; its exit code."""
        return self._process.wait(STOP_S)

    def stop(self) -> None:
        """SIGTERM; it must end with 0 and have met no bug."""
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(STOP_S)
        finally:
            self.kill()
        log = self._log.read_text()
        assert code == 0, log
        assert "Traceback" not in log

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdout
        self._process.stdout.close()


class Served:
    """A disk that is being served, and can be stopped and served again."""

    def __init__(self, folder: Path, what: Sequence[str | Path], size: int, image: Path | None = None) -> None:
        self.folder, self.size, self.image = folder, size, image
        self._what = what
        self.server = Process(folder, what)

    @property
    def uri(self) -> str:
        """For clients."""
        return self.server.uri

    @property
    def key_file(self) -> Path:
        """Of the image."""
        return self.folder / "key"

    def start(self, *options: str) -> None:
        """Serve it again."""
        self.server = Process(self.folder, [*self._what, *options])

    def restart(self, *options: str) -> None:
        """Stop it cleanly and serve it again."""
        self.server.stop()
        self.start(*options)

    def crash(self) -> None:
        """Kill the server and serve what it left."""
        self.server.kill()
        self.start()

    def close(self) -> None:
        """Stop cleanly; everything in the image must verify."""
        if self.server.running:
            self.server.stop()
        if self.image:
            report = check_image(self.image, key=KeyFile(self.key_file.read_bytes()))
            assert report.ok, report


def serve_memory(folder: Path, size: int) -> Served:
    """An empty disk in memory."""
    return Served(folder, ["--memory", str(size)], size)


def serve_image(folder: Path, size: int) -> Served:
    """A new encrypted and compressed image."""
    key = folder / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(32))
    image = folder / "disk.vde"
    create_image(image, size, secret=KeyFile(key.read_bytes()))
    return Served(folder, [image, "--key-file", key], size, image)
