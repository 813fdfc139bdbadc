"""Key files and passphrases."""

import os
import pty
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE, STDOUT

import pytest

from nbdvde import keysource
from nbdvde.engine.keys import KeyFile, Passphrase
from nbdvde.errors import KeyFailure


def key_file(directory: Path, data: bytes = b"k" * 32, mode: int = 0o600) -> Path:
    path = directory / "key"
    path.write_bytes(data)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("length", [32, 33, 8192])
@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_key_file_is_its_exact_bytes(tmp_path: Path, length: int, mode: int) -> None:
    data = (b"line\n\r\0" * 2000)[:length]
    assert keysource.secret(key_file(tmp_path, data, mode)) == KeyFile(data)


@pytest.mark.parametrize("length", [0, 31, 8193, 100_000])
def test_key_file_of_another_length(tmp_path: Path, length: int) -> None:
    with pytest.raises(KeyFailure, match="32 to 8192"):
        keysource.read_key_file(key_file(tmp_path, bytes(length)))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o610, 0o602, 0o666])
def test_key_file_that_others_can_use(tmp_path: Path, mode: int) -> None:
    with pytest.raises(KeyFailure, match=f"{mode:04o}"):
        keysource.read_key_file(key_file(tmp_path, mode=mode))


def test_key_file_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = key_file(tmp_path)
    owner = path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    if owner == 0:
        assert keysource.read_key_file(path)
        os.chown(path, 12345, -1)
    with pytest.raises(KeyFailure, match="another user"):
        keysource.read_key_file(path)


def test_key_file_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    for path, why in ((tmp_path / "none", "no such file"), (tmp_path, "not a regular"), (tmp_path / "fifo", "regular")):
        with pytest.raises(KeyFailure, match=why) as caught:
            keysource.read_key_file(path)
        assert "\n" not in str(caught.value)


def test_shared_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.psk"
    path.write_text(f"# made by hand\nalice:{'0f' * 16}\n\n b:c:{'AB' * 32}\n")
    path.chmod(0o600)
    assert keysource.read_shared_keys(path) == {"alice": b"\x0f" * 16, "b:c": b"\xab" * 32}
    path.chmod(0o640)
    with pytest.raises(KeyFailure, match="chmod 600"):
        keysource.read_shared_keys(path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "holds none"),
        ("# nothing\n", "holds none"),
        ("alice\n", "line 1"),
        (":" + "00" * 16, "line 1"),
        (f"a:{'00' * 16}\nb:{'00' * 15}", "line 2"),
        ("alice:" + "xy" * 16, "line 1"),
        (b"\xff\xfe".decode("latin-1"), "line 1"),
    ],
)
def test_what_holds_no_shared_keys(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "keys.psk"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(KeyFailure, match=why):
        keysource.read_shared_keys(path)


def test_passphrase_is_normalised() -> None:
    assert keysource.passphrase("e\u0301") == keysource.passphrase("\u00e9") == Passphrase("é".encode())
    with pytest.raises(KeyFailure):
        keysource.passphrase("")


PROGRAM = """
import os, sys
from nbdvde import keysource
from nbdvde.errors import KeyFailure
os.open(sys.argv[1], os.O_RDWR)  # the first terminal a session leader opens becomes its own
try:
    print("got", keysource.ask_passphrase("Pass? ", confirm=True).data.hex())
except KeyFailure as error:
    sys.exit(f"{error}")
"""


def on_a_terminal(*typed: bytes) -> tuple[int, bytes, bytes]:
    """Exit code, output, and what the terminal shows, of a process that asks on its own terminal."""
    master, slave = pty.openpty()
    command = [sys.executable, "-c", PROGRAM, os.ttyname(slave)]
    with subprocess.Popen(command, start_new_session=True, stdout=PIPE, stderr=STDOUT) as process:
        shown = b""
        for line in typed:
            while not shown.endswith((b"Pass? ", b"again: ")):
                shown += os.read(master, 1024)
            os.write(master, line)
            shown += os.read(master, 1024)
        output = process.communicate(timeout=30)[0]
    os.close(master)
    os.close(slave)
    return process.returncode, output, shown


def test_asks_twice_on_a_terminal_without_echo() -> None:
    code, output, shown = on_a_terminal("pä\n".encode(), "pä\n".encode())
    assert (code, output) == (0, b"got " + "pä".encode().hex().encode() + b"\n")
    assert b"The same again: " in shown
    assert "pä".encode() not in shown


def test_two_that_differ() -> None:
    code, output, _ = on_a_terminal(b"one\n", b"two\n")
    assert code == 1
    assert b"not the same" in output


def test_no_terminal_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, flags: int) -> int:
        raise OSError(6, "No such device or address", path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(KeyFailure, match="no terminal") as caught:
        keysource.secret(None)
    assert "--key-file" in str(caught.value)
