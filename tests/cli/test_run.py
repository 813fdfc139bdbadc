"""How a command ends, whatever happens in it."""

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdvde.cli import images
from nbdvde.cli.progress import ProgressBar
from nbdvde.cli.ready import uris_of
from nbdvde.errors import NetworkError
from nbdvde.listeners import Listener, UnixAddress
from tests.cli.conftest import ENVIRONMENT, Command


@pytest.fixture
def failing(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run a command whose work raises what is given; logs of bugs go to `tmp_path`."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def run(error: BaseException):
        def info(self: object) -> None:
            raise error

        monkeypatch.setattr(images.ImageByPath, "info", info)
        return command("info", "x.vde")

    return run


def test_bug_is_one_line_and_a_log(failing, tmp_path: Path) -> None:
    result = failing(ValueError("two\nlines"))
    result.fails(1, "unexpected failure: ValueError: two lines", "bug")
    (log,) = tmp_path.glob("nbdvde-*.log")
    assert str(log) in result.err
    assert "Traceback" in log.read_text()


def test_bug_as_json(failing, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(ValueError("bad"))
    result = command("info", "x.vde", "--json")
    assert result.code == result.json["error"]["code"] == 1
    assert result.json["error"]["message"] == "unexpected failure: ValueError: bad"

    def nowhere(*_: object, **__: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", nowhere)
    failing(ValueError("bad")).fails(1, "ValueError: bad", "no place for a log")


def test_interrupt(failing) -> None:
    for error in (KeyboardInterrupt(), BaseExceptionGroup("", [KeyboardInterrupt()])):
        result = failing(error)
        assert (result.code, result.out, result.err) == (130, "", "nbdvde: interrupted\n")


def test_an_interrupt_in_disguise(failing) -> None:
    error = RuntimeError("Error calling __set_name__ on an attribute")
    error.__cause__ = KeyboardInterrupt()
    result = failing(error)
    assert (result.code, result.out, result.err) == (130, "", "nbdvde: interrupted\n")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), BaseExceptionGroup("", [KeyboardInterrupt()])])
def test_an_interrupted_import_tells_of_the_disk(
    command: Command, plain_image: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def copy_in(*_: object) -> None:
        raise error

    monkeypatch.setattr(images.ImageByPath, "copy_in", copy_in)
    result = command("import", plain_image, "raw")
    assert (result.code, result.err.splitlines()[-1]) == (130, "nbdvde: interrupted")
    assert "overwritten in part" in result.err


def test_error_of_a_nursery(failing) -> None:
    failing(ExceptionGroup("", [ExceptionGroup("", [NetworkError("a", "b", "c")])])).fails(8, "nbdvde: a: b (c)\n")


def test_bug_beside_an_error_is_told(failing) -> None:
    failing(ExceptionGroup("", [NetworkError("a", "b"), ValueError("bug")])).fails(1, "unexpected failure")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 7),
        (OSError(errno.EDQUOT, "Quota", "/x"), 7),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 3),
    ],
)
def test_errors_of_the_host(failing, error: OSError, code: int) -> None:
    failing(error).fails(code, "/x")


@contextmanager
def broken_pipe() -> Iterator[int]:
    """Where nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        yield writer
    finally:
        os.close(writer)


def real(*arguments: object, stdout: int = subprocess.PIPE, stderr: int = subprocess.PIPE):
    """Run the program itself."""
    words = [sys.executable, "-m", "nbdvde", *map(str, arguments)]
    return subprocess.run(
        words, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, text=True, timeout=60,
        check=False,
    )  # fmt: skip


def test_reader_that_goes_away(plain_image: Path) -> None:
    for words in (["info", plain_image], ["check", plain_image, "--json"], ["--version"], ["--help"]):
        with broken_pipe() as nobody:
            done = real(*words, stdout=nobody)
        assert (done.returncode, done.stderr) == (141, "")


def test_failure_that_nobody_reads(tmp_path: Path) -> None:
    missing = tmp_path / "missing.vde"
    with broken_pipe() as nobody:
        assert real("info", missing, stderr=nobody).returncode == 3
        done = real("info", missing, "--json", stdout=nobody)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1


def test_full_output(plain_image: Path) -> None:
    with open("/dev/full", "w") as full:
        for words in (["info", plain_image], ["info", plain_image, "--json"]):
            done = real(*words, stdout=full.fileno())
            assert done.returncode == 7
            assert done.stderr.startswith("nbdvde: standard output: no space left")
            assert done.stderr.count("\n") == 1
        assert real("info", plain_image.with_name("missing"), stderr=full.fileno()).returncode == 3


@pytest.mark.parametrize(
    ("words", "closed", "code"),
    [("info", ">&-", 3), ("--help", ">&-", 3), ("info", "2>&-", 0), ("info", "<&- >&- 2>&-", 3), ("flush", ">&-", 2)],
)
def test_closed_output(plain_image: Path, words: str, closed: str, code: int) -> None:
    """What somebody asked for and cannot be told is an error."""
    line = ["bash", "-c", f'"$0" -m nbdvde {words} "$1" {closed}', sys.executable, str(plain_image)]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (code, int(code != 0 and "2>&-" not in closed))
    if code == 3 and done.stderr:
        assert done.stderr.startswith("nbdvde: standard output: is closed (")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_a_command_in_order(plain_image: Path, tmp_path: Path, number: signal.Signals) -> None:
    """While it waits for a file to copy to, and even while modules are imported."""
    program = (
        "import os, signal, sys\nfrom nbdvde import cli, transfer\n"
        "async def stop(*_):\n    os.write(1, b'half a file'); signal.pause(); await transfer.trio.sleep_forever()\n"
        "transfer._write_out = stop\nsys.argv[1:] = ['export', sys.argv[1], sys.argv[2]]\ncli.main()\n"
    )
    words = [sys.executable, "-c", program, str(plain_image), str(tmp_path / "out")]
    with subprocess.Popen(
        words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(11) == "half a file"
        made = [*tmp_path.glob("out*")]
        process.send_signal(number)
        assert (process.wait(30), process.communicate()[1]) == (130, "nbdvde: interrupted\n")
    assert [path.suffix for path in made] == [".part"]
    assert not [*tmp_path.glob("out*")]


def test_a_signal_while_modules_are_imported() -> None:
    program = (
        "import signal, sys\nfrom nbdvde import cli\n"
        "class Finder:\n    def find_spec(self, *_):\n        signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\ncli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (130, "nbdvde: interrupted\n")


def test_server_goes_on_when_nobody_reads_its_uris(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "nbdvde", "serve", "--memory", "1M", "--listen", "unix:s", "--print-uri"]
    with (
        broken_pipe() as nobody,
        subprocess.Popen(
            words, env=ENVIRONMENT, cwd=tmp_path, stdout=nobody, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        ) as server,
    ):  # fmt: skip
        assert server.stderr is not None
        lines = [server.stderr.readline() for _ in range(2)]
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(tmp_path / "s"))
            assert client.recv(8) == b"NBDMAGIC"
        server.terminate()
        assert (server.wait(30), server.stderr.read()) == (0, "")
    uri = uris_of(Listener(UnixAddress(tmp_path / "s"), []))[0]
    told = "nbdvde: cannot print the URI on standard output: broken pipe\n"
    assert lines == [f"nbdvde: serving disk on {uri}\n", told]


def test_version_imports_little() -> None:
    program = (
        "import sys\nfrom nbdvde.cli.run import run\nassert run(['--version']) == 0\n"
        "print([name for name in ('trio', 'numpy', 'rich', 'cryptography', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_shell_completion() -> None:
    environment = {**ENVIRONMENT, "_NBDVDE_COMPLETE": "complete_bash", "COMP_WORDS": "nbdvde ch", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "nbdvde"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.split()) == (0, ["check"])


def test_completion_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENVIRONMENT, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # there may be no shell
    done = real("--show-completion", "bash")
    assert (done.returncode, done.stderr) == (0, "")
    assert "complete" in done.stdout


def test_progress_bar_waits_a_second(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr("nbdvde.cli.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with ProgressBar("checking") as bar:
        bar(1, 10)
        assert bar._bar is None
        now[0] = 1.5
        bar(5, 10)
        assert bar._bar is not None
        assert bar._bar.tasks[0].completed == 5
    assert "checking" in capsys.readouterr().err


def test_no_progress_bar_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdvde.cli.progress.PATIENCE_S", 0)
    with ProgressBar("checking") as bar:
        bar(5, 10)
    assert capsys.readouterr().err == ""
