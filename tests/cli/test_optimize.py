"""`nbdvde optimize`: at rest, interrupted, killed, and beside a server's clients."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

import nbdvde
from nbdvde.disk import BLOCK
from tests.cli.conftest import ENVIRONMENT, Command, serving
from tests.cli.test_commands import ok
from tests.engine.test_learning import log

BLOCKS = 6 << 8
PAGES = [bytes(3 * BLOCK // 4) + os.urandom(BLOCK // 4) for _ in range(64)]


@pytest.fixture
def wasteful(tmp_path: Path) -> Path:
    """An image that could be smaller."""
    path = tmp_path / "wasteful.vde"
    nbdvde.create_image(path, BLOCKS * BLOCK, secret=None, compression="none", segment_bytes=1 << 20, dedup=False)

    async def fill() -> None:
        async with nbdvde.open_image(path) as image:
            await image.disk().write(0, memoryview(_contents()))

    trio.run(fill)
    return path


def _contents() -> bytes:
    return b"".join(PAGES[number * number % 61] for number in range(BLOCKS))


def _is_sound(command: Command, path: Path) -> bool:
    Path("raw").unlink(missing_ok=True)
    command("export", path, "raw")
    return command("check", path).code == 0 and Path("raw").read_bytes() == _contents()


def test_at_rest(command: Command, wasteful: Path) -> None:
    before = wasteful.stat().st_blocks * 512
    report = ok(command, "optimize", wasteful, "--level", 3)
    assert report["segments_recompressed"] > 3
    assert (report["file_bytes_before"], report["file_bytes_after"]) == (before, wasteful.stat().st_blocks * 512)
    assert report["file_bytes_after"] < before // 2
    assert _is_sound(command, wasteful)
    assert ok(command, "optimize", wasteful, "--level", 3)["segments_recompressed"] == 0


def test_text_and_bad_input(command: Command, wasteful: Path) -> None:
    lines = command("optimize", wasteful, "--level", 3, "--only", "recompress").out.splitlines()
    assert lines[0].startswith("file ")
    assert lines[0].endswith(" less")
    command("optimize", wasteful, "--rate", 0).fails(2, "rate 0")
    command("optimize", wasteful, "--level", 23).fails(2, "level 23")
    command("optimize", wasteful, "--only", "magic").fails(2, "pass magic", "recompress")
    command("optimize", "missing.vde").fails(3, "missing.vde")


@contextmanager
def _begun(path: Path) -> Iterator[subprocess.Popen[str]]:
    """The command at a rate that it will not come to an end with, once it works at the image."""
    untouched = path.stat().st_mtime_ns
    words = [sys.executable, "-m", "nbdvde", "optimize", str(path), "--level", "3", "--rate", "64K"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        while path.stat().st_mtime_ns == untouched and process.poll() is None:
            time.sleep(0.01)
        yield process


@pytest.mark.parametrize(
    ("number", "code", "err"), [(signal.SIGINT, 130, "nbdvde: interrupted\n"), (signal.SIGKILL, -9, "")]
)
def test_interrupted_and_killed(command: Command, wasteful: Path, number: int, code: int, err: str) -> None:
    with _begun(wasteful) as process:
        process.send_signal(number)
        assert process.communicate(timeout=30)[1] == err
        assert process.returncode == code
    assert _is_sound(command, wasteful)
    assert ok(command, "optimize", wasteful, "--level", 3)["file_bytes_after"] < BLOCKS * BLOCK // 2


def test_served(command: Command, wasteful: Path) -> None:
    with serving(wasteful, "--listen", "unix:socket", cwd=wasteful.parent):
        command("optimize", wasteful, "--level", 0).fails(2, "level 0")
        assert ok(command, "optimize", wasteful, "--level", 3, "--rate", "1G")["segments_recompressed"] > 3
    assert _is_sound(command, wasteful)


def test_a_server_ends_though_it_optimizes(command: Command, wasteful: Path) -> None:
    with serving(wasteful, "--listen", "unix:socket", cwd=wasteful.parent) as server, _begun(wasteful) as process:
        command("optimize", wasteful).fails(9, "already")
        assert server.stop()[0] == 0
        assert process.communicate(timeout=30)[1].startswith("nbdvde: ")
        assert process.returncode in (8, 9), "the image is closed, or the server gone"
    assert _is_sound(command, wasteful)


def test_dictionaries_are_trained_where_they_pay(command: Command) -> None:
    Path("logs").write_bytes(b"".join(map(log, range(600))))
    assert command("create", "i.vde", "8M", "--encryption", "none", "--extent-size", "4K").code == 0
    assert command("import", "i.vde", "logs").code == 0
    line = command("optimize", "i.vde", "--only", "train").out.splitlines()[4]
    assert re.fullmatch(r"dictionaries +json, \d\d% less", line)
    report = ok(command, "optimize", "i.vde", "--only", "recompress")
    assert (report["dictionaries"], report["dictionaries_note"]) == ([], "nobody asked for any")
    assert report["recompressed_bytes"] > 100_000
    report = ok(command, "optimize", "i.vde")
    assert [(one["name"], one["id"], one["note"]) for one in report["dictionaries"]] == [
        ("json", None, "dictionary 0 does as well")
    ]
    assert command("export", "i.vde", "raw").code == 0
    assert Path("raw").read_bytes()[: 600 * BLOCK] == Path("logs").read_bytes()
    assert command("check", "i.vde").code == 0
