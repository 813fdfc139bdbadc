"""Images that cost no key derivation, and the command line called in-process."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

import nbdvde
from nbdvde import MasterKey
from nbdvde.cli.run import run
from nbdvde.engine.access import fresh
from nbdvde.engine.keys import Cost, KeyFile, Secret

MASTER = MasterKey(bytes(range(32)))
KEY = b"the key file of the tests, 40 bytes long"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(nbdvde.__file__).parent.parent)}
CHEAP = Cost(64, 1, 1)
SIZE = 1 << 20


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.out)

    def fails(self, code: int, *words: str) -> None:
        """One clear line on standard error with these words, this exit code, and nothing else."""
        assert self.code == code, self
        assert self.err.startswith("nbdvde: ")
        assert self.err.count("\n") == 1
        assert self.err.endswith("\n")
        assert self.out == ""
        for word in words:
            assert word in self.err


Command = Callable[..., Result]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Run a command in-process, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    for variable in [name for name in os.environ if name.startswith("NBDVDE_")]:
        monkeypatch.delenv(variable)

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def write_key(path: Path, data: bytes = KEY) -> Path:
    path.write_bytes(data)
    path.chmod(0o600)
    return path


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return write_key(tmp_path / "key")


def add_cheaply(path: Path, secret: Secret) -> None:
    """A key slot that is derived at once."""
    nbdvde.update_keys(path, lambda area: area.with_slot(MASTER, secret, fresh(), cost=CHEAP))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An encrypted image that `key_file` opens."""
    path = tmp_path / "image.vde"
    nbdvde.create_image(path, SIZE, secret=MASTER)
    add_cheaply(path, KeyFile(KEY))
    return path


@pytest.fixture
def plain_image(tmp_path: Path) -> Path:
    """An image without encryption."""
    path = tmp_path / "plain.vde"
    nbdvde.create_image(path, SIZE, secret=None)
    return path


@dataclass
class Running:
    """A real `nbdvde serve` that is ready."""

    process: subprocess.Popen[str]
    uris: list[str]

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Exit code and standard error after a signal."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> tuple[int, str]:
        """Exit code and standard error."""
        err = self.process.communicate(timeout=30)[1]
        return self.process.returncode, err


@contextmanager
def serving(*arguments: object, cwd: Path) -> Iterator[Running]:
    """Serve until the end, which comes by SIGTERM if not before."""
    whole = [sys.executable, "-m", "nbdvde", "serve", "--print-uri", *map(str, arguments)]
    with subprocess.Popen(
        whole, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env=ENVIRONMENT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            yield Running(process, [process.stdout.readline().strip() for _ in range(max(1, whole.count("--listen")))])
        finally:
            if process.returncode is None:
                process.terminate()
                process.communicate(timeout=30)
