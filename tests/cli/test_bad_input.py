"""Bad input: one clear line, an exit code of its own, nothing lost."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from blake3 import blake3

from nbdvde import keysource
from nbdvde.engine.keys import KeyFile
from nbdvde.engine.layout import KEY_AREAS, SUPERBLOCKS
from tests.cli.conftest import ENVIRONMENT, KEY, Command, add_cheaply, write_key

EXITS = ("info", "check", "serve")


def test_wrong_key(command: Command, image: Path, tmp_path: Path) -> None:
    wrong = write_key(tmp_path / "wrong", b"w" * 32)
    serve = ["serve", image, "--listen", f"unix:{tmp_path}/socket"]
    for words in (["check", image], ["info", image], serve, ["key", "remove", image]):
        command(*words, "--key-file", wrong).fails(4, "wrong key or passphrase", "it takes a key file")


def test_wrong_passphrase(command: Command, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keysource, "_ask", lambda prompt: keysource.passphrase("wrong"))
    command("check", image).fails(4, "wrong key or passphrase")


@pytest.mark.parametrize(
    "words", [["check", "image.vde"], ["serve", "image.vde"], ["create", "new.vde", "1M"], ["key", "add", "image.vde"]]
)
def test_no_terminal_to_ask_on(image: Path, words: list[str]) -> None:
    whole = [sys.executable, "-m", "nbdvde", *words]
    done = subprocess.run(
        whole, cwd=image.parent, stdin=subprocess.DEVNULL, capture_output=True, text=True, start_new_session=True,
        timeout=60, check=False, env=ENVIRONMENT,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == "nbdvde: passphrase: there is no terminal to ask on (use --key-file)\n"
    assert not (image.parent / "new.vde").exists()


@pytest.mark.parametrize("subcommand", EXITS)
@pytest.mark.parametrize("content", [b"", b"x", b"\0" * 200_000, b"QFI\xfb" * 50_000])
def test_not_an_image(command: Command, key_file: Path, content: bytes, subcommand: str) -> None:
    path = key_file.with_name("other.vde")
    path.write_bytes(content)
    command(subcommand, path, "--key-file", key_file).fails(3, str(path))
    assert path.read_bytes() == content


@pytest.mark.parametrize("subcommand", EXITS)
def test_no_file(command: Command, key_file: Path, subcommand: str) -> None:
    command(subcommand, "none.vde", "--key-file", key_file).fails(3, "none.vde", "no such file")
    command(subcommand, key_file.parent, "--key-file", key_file).fails(3)
    command(subcommand, key_file / "x", "--key-file", key_file).fails(3, "not a directory")


@pytest.mark.parametrize("length", [1, 4095, 4096, 36864, 65536, 70000, 131072, 131073])
def test_truncated_image(command: Command, image: Path, key_file: Path, length: int) -> None:
    data = image.read_bytes()
    assert length < len(data)
    image.write_bytes(data[:length])
    result = command("serve", image, "--key-file", key_file, "--listen", "unix:sock")
    assert result.code in (3, 6)
    result.fails(result.code)
    result = command("check", image, "--key-file", key_file)
    assert result.code in (3, 6)
    assert image.read_bytes() == data[:length]


def newer(image: Path, offset: int, data: bytes) -> None:
    """Change the superblocks as a later version would have written them."""
    with image.open("r+b") as file:
        for at in SUPERBLOCKS:
            file.seek(at)
            block = bytearray(file.read(4096))
            block[offset : offset + len(data)] = data
            block[-64:-32] = blake3(block[:-64]).digest()
            file.seek(at)
            file.write(block)


@pytest.mark.parametrize("subcommand", EXITS)
def test_newer_format_says_which(command: Command, image: Path, key_file: Path, subcommand: str) -> None:
    newer(image, 8, b"\x02\0")
    command(subcommand, image, "--key-file", key_file).fails(3, "version 2")


@pytest.mark.parametrize("subcommand", EXITS)
def test_newer_feature_says_which(command: Command, image: Path, key_file: Path, subcommand: str) -> None:
    newer(image, 16, (1 << 5).to_bytes(8, "little"))
    command(subcommand, image, "--key-file", key_file).fails(3, "feature 5")


@pytest.mark.parametrize("words", [["check"], ["serve", "--listen", "unix:s"], ["key", "remove"]])
def test_image_in_use(command: Command, image: Path, key_file: Path, words: list[str]) -> None:
    with image.open("rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        split = 2 if words[0] == "key" else 1
        result = command(*words[:split], image, *words[split:], "--key-file", key_file)
    result.fails(5, str(image), "in use")
    if words[0] != "serve":
        assert "no control socket answers at" in result.err


def test_info_in_use_tells_what_it_can(command: Command, image: Path, plain_image: Path, key_file: Path) -> None:
    for path in (image, plain_image):
        with path.open("rb") as holder:
            fcntl.flock(holder, fcntl.LOCK_EX)
            assert command("info", path).code == 0
            assert command("key", "list", image).code == 0
    with image.open("rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        command("info", image, "--key-file", key_file).fails(5, "in use")


def test_create_keeps_an_existing_file(command: Command, key_file: Path) -> None:
    path = key_file.with_name("precious")
    path.write_bytes(b"data")
    command("create", path, "1M", "--key-file", key_file).fails(9, "exists already")
    assert path.read_bytes() == b"data"


@pytest.mark.parametrize("size", ["0", "1", "513", "8192P", "16384P", "-5", "ten", ""])
def test_absurd_sizes(command: Command, key_file: Path, size: str) -> None:
    command("create", "new.vde", "--key-file", key_file, "--", size).fails(2, "size")
    command("serve", f"--memory={size}", "--listen", "unix:s").fails(2)
    assert not Path("new.vde").exists()


def test_address_in_use(command: Command, image: Path, key_file: Path) -> None:
    before = image.read_bytes()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        command("serve", image, "--key-file", key_file, "--listen", f"127.0.0.1:{port}").fails(8, "in use")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind("sock")
        other.listen()
        command("serve", image, "--key-file", key_file, "--listen", "unix:sock").fails(8, "in use")
    assert image.read_bytes() == before


@pytest.mark.parametrize(
    "address", ["unix:", "localhost", ":10809", "localhost:99999", "[::1", "unix:/no/such/directory/s", "no.invalid:1"]
)
def test_bad_address(command: Command, address: str) -> None:
    result = command("serve", "--memory", "1M", "--listen", address)
    result.fails(result.code, address)
    assert result.code in (2, 8)


def test_bad_key_files(command: Command, image: Path, key_file: Path) -> None:
    command("check", image, "--key-file", "none").fails(4, "none", "no such file")
    key_file.chmod(0o640)
    command("check", image, "--key-file", key_file).fails(4, "0640", "chmod 600")
    command("create", "new.vde", "1M", "--key-file", key_file).fails(4, "0640")
    short = write_key(key_file.with_name("short"), KEY[:31])
    command("create", "new.vde", "1M", "--key-file", short).fails(4, "31 bytes")
    assert not Path("new.vde").exists()


def test_files_of_others(command: Command, image: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be opened is told by whoever opens it, with the exit code that belongs to it."""
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    assert command("check", image, "--key-file", key_file).code == 0

    def refuse(path: str, *_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "open", refuse)
    command("check", image, "--key-file", key_file).fails(3, f"{image}: permission denied")


@pytest.mark.parametrize("place", ["", ".", "/", "..", "folder"])
def test_directory_as_image(command: Command, tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    for words in (["info"], ["check"], ["serve", "--listen", "unix:s"], ["key", "list"]):
        command(*words, place).fails(3)


@pytest.mark.parametrize("words", [["info"], ["check"], ["serve", "--listen", "unix:s"], ["key", "list"]])
def test_fifo_as_image(command: Command, tmp_path: Path, words: list[str]) -> None:
    os.mkfifo(tmp_path / "fifo")
    command(*words, "fifo").fails(3, "neither a file nor a block device")


def test_fifo_as_configuration(command: Command, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    command("serve", "--memory", "1M", "--config", "fifo").fails(2, "fifo", "not a regular file")


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_image_that_cannot_be_written(
    command: Command, plain_image: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real = os.open

    def read_only(path: object, flags: int, *mode: int) -> int:
        if flags & os.O_RDWR and str(path) == str(plain_image):
            raise OSError(number, os.strerror(number), path)
        return real(path, flags, *mode)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", read_only)
    command("serve", plain_image, "--listen", "unix:s").fails(9, str(plain_image), "--read-only")


def test_damaged_key_area(command: Command, image: Path) -> None:
    with image.open("r+b") as file:
        for offset in KEY_AREAS:
            file.seek(offset)
            file.write(b"\0" * 4096)
    command("info", image).fails(6, "key area")


def test_key_that_opens_the_image_already(command: Command, image: Path, key_file: Path) -> None:
    two = write_key(key_file.with_name("two"), b"2" * 32)
    add_cheaply(image, KeyFile(b"2" * 32))
    given = ["--key-file", key_file, "--new-key-file"]
    command("key", "add", image, *given, key_file).fails(9, "already", "slot 0")
    command("key", "change", image, *given, two).fails(9, "already", "slot 1")
    assert command("key", "change", image, *given, key_file).code == 0


def test_nothing_to_listen_on(command: Command, tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text("[server]\nlisten = []\n")
    command("serve", "--memory", "1M", "--config", "server.toml").fails(2, "server.toml", "server.listen")


@pytest.mark.parametrize("content", ["my diary\n", "1234 5678\n", "x" * 100])
def test_pid_file_that_is_something_else(command: Command, tmp_path: Path, content: str) -> None:
    (tmp_path / "pid").write_text(content)
    result = command("serve", "--memory", "1M", "--listen", "unix:s", "--pid-file", "pid")
    assert result.code == 2
    assert "pid file pid: exists and holds something else" in result.err
    assert (tmp_path / "pid").read_text() == content


def test_hints(command: Command, image: Path, key_file: Path, tmp_path: Path) -> None:
    wrong = write_key(tmp_path / "wrong", b"w" * 32)
    command("check", image, "--key-file", wrong).fails(4, f"{image}: wrong key")
    command("serve", "--memory", "1000", "--listen", "unix:s").fails(2, "(a multiple of 512, like 1K)")
    command("serve", "--memory", "1M", "--listen", "192.0.2.1:1234").fails(8, "another address of this machine")
    command("serve", "--memory", "1M", "--listen", "unix:" + "x" * 108).fails(8, "shorter path")
    command("key", "remove", image, "--key-file", key_file, "--slot", 16).fails(2, "nbdvde key list")


def test_nobody_to_ask(command: Command, image: Path) -> None:
    command("ctl", image, "stop").fails(8, "no server listens", "--control")
    command("ctl", image, "dance").fails(2, "dance")


def test_unknown_configuration(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "server.toml"
    file.write_text("[server]\nlisten_to = 'x'\n")
    command("serve", "--memory", "1M", "--config", file).fails(2, "unknown key server.listen_to", str(file))
    command("serve", "--memory", "1M", "--config", "none.toml").fails(2, "none.toml")
    monkeypatch.setenv("NBDVDE_SERVER_LISTEN_TO", "x")
    command("serve", "--memory", "1M").fails(2, "NBDVDE_SERVER_LISTEN_TO")


@pytest.mark.parametrize(
    "words",
    [
        "",
        "frobnicate",
        "create",
        "create new.vde",
        "create new.vde 1M extra",
        "create new.vde 1M --frob",
        "create new.vde 1M --compression best --encryption none",
        "create new.vde 1M --extent-size 3K --encryption none",
        "create new.vde 1M --encryption rot13",
        "create / 1M",
        "create new.vde 1M --encryption none --key-file key",
        "serve",
        "serve a b --memory 1M",
        "serve a --memory 1M",
        "serve --memory 1M --log-format xml",
        "key",
        "key add image.vde --slot x",
        "info",
    ],
)
def test_usage(command: Command, words: str) -> None:
    command(*words.split()).fails(2)
    assert not Path("new.vde").exists()


def test_usage_hints(command: Command) -> None:
    command("info", "--jso", "x").fails(2, "no such option: --jso, did you mean --json? (see nbdvde info --help)")
    wrong = command("create", "x", "1M", "--encryption", "rot13")
    wrong.fails(2, "invalid value for '--encryption': 'rot13' is not one of 'aes-256-gcm', 'none'")


@pytest.mark.parametrize("name", ["x" * 4097, "\udcff"])
def test_bad_export_names(command: Command, name: str) -> None:
    command("serve", "--memory", "1M", "--listen", "unix:s", "--export", name).fails(2, "export name")


def test_image_without_keys(command: Command, plain_image: Path, key_file: Path) -> None:
    command("key", "list", plain_image).fails(9, "not encrypted")
    command("key", "add", plain_image, "--key-file", key_file).fails(9, "not encrypted")


def test_slots_that_cannot_be(command: Command, image: Path, key_file: Path) -> None:
    new = write_key(key_file.with_name("new"), b"n" * 32)
    add = ["key", "add", image, "--key-file", key_file, "--new-key-file", new]
    command(*add, "--slot", 16).fails(2, "0 to 15")
    command(*add, "--slot", 0).fails(9, "in use")
    command(*add, "--label", "x" * 65).fails(2, "64 bytes")
    command("key", "remove", image, "--key-file", key_file).fails(9, "last one")
    command("key", "change", image, "--key-file", key_file, "--new-key-file", new, "--slot", 3).fails(2, "not in use")


def test_errors_as_json(command: Command, image: Path, tmp_path: Path) -> None:
    result = command("check", image, "--json", "--key-file", tmp_path / "none")
    assert result.code == 4
    error = result.json["error"]
    assert error["code"] == 4
    assert result.err == f"nbdvde: {error['message']} ({error['hint']})\n"
    assert command("frobnicate", "--json").json["error"]["code"] == 2


def test_pid_file_that_cannot_be_written(command: Command) -> None:
    result = command("serve", "--memory", "1M", "--listen", "unix:s", "--pid-file", "/no/such/directory/pid")
    assert result.code == 2
    assert "pid file /no/such/directory/pid" in result.err.splitlines()[-1]


@pytest.mark.parametrize("words", ["import", "export"])
def test_a_dash_is_no_pipe(command: Command, plain_image: Path, words: str) -> None:
    command(words, plain_image, "-").fails(2, "file -")
    assert not Path("-").exists()


def test_long_names_are_shortened(command: Command, plain_image: Path) -> None:
    for words in (["info", "x" * 3000], ["disk", "delete", plain_image, "x" * 3000]):
        result = command(*words)
        result.fails(result.code, "…")
        assert len(result.err) < 600
    command("disk", "delete", plain_image, "").fails(2, "''")


@pytest.mark.parametrize("name", [".", "..", "-x", "_"])
def test_names_begin_with_a_letter_or_digit(command: Command, plain_image: Path, name: str) -> None:
    command("disk", "create", plain_image, "--", name, "1M").fails(2, name, "letter or digit first")
    command("create", "new.vde", "1M", "--encryption", "none", f"--disk={name}").fails(2, "letter or digit first")
