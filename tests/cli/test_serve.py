"""The real `nbdvde serve`, from its start to a clean stop."""

import json
import signal
import socket
import stat
from pathlib import Path

import pytest

from nbdvde.admin.client import ControlClient
from nbdvde.cli.serve import uris_of
from nbdvde.engine.access import read_info
from nbdvde.server import Listener, TcpAddress, UnixAddress
from tests.cli.conftest import Command, serving


def greets(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(str(path))
        return client.recv(8) == b"NBDMAGIC"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_and_stop(image: Path, key_file: Path, number: signal.Signals) -> None:
    folder = image.parent
    listeners = ["--listen", "unix:sock", "--listen", "127.0.0.1:0"]
    with serving(image, "--key-file", key_file, *listeners, "--pid-file", "pid", cwd=folder) as server:
        assert server.uris[0] == f"nbd+unix:///?socket={folder}/sock"
        assert server.uris[1].startswith("nbd://127.0.0.1:")
        assert greets(folder / "sock")
        assert (folder / "pid").read_text() == f"{server.process.pid}\n"
        assert stat.S_IMODE((folder / "image.vde.ctl").stat().st_mode) == 0o600
        code, err = server.stop(number)
    assert code == 0
    assert err.splitlines() == [f"nbdvde: serving disk on {uri}" for uri in server.uris]
    assert sorted(path.name for path in folder.iterdir()) == ["image.vde", "key"]


def test_second_server_is_refused(command: Command, image: Path, key_file: Path) -> None:
    with serving(image, "--key-file", key_file, "--listen", "unix:sock", cwd=image.parent):
        again = ["serve", image, "--key-file", key_file, "--listen", "unix:other"]
        command(*again).fails(5, "a server answers at")
        command(*again, "--control", "none").fails(5, "in use")
        assert greets(image.parent / "sock")


def test_commands_use_the_control_socket(command: Command, image: Path, key_file: Path) -> None:
    with serving(image, "--key-file", key_file, "--listen", "unix:sock", cwd=image.parent):
        assert command("info", image, "--json").json["statistics"]["commits"] == 0
        assert command("check", image, "--json").json["ok"] is True
        listed = command("key", "list", image, "--json").json
        assert [slot["slot"] for slot in listed["slots"]] == [0]
        wrong = key_file.with_name("wrong")
        wrong.write_bytes(b"w" * 32)
        wrong.chmod(0o600)
        command("key", "remove", image, "--key-file", wrong).fails(4, "wrong key")
        command("key", "remove", image, "--key-file", key_file).fails(9, "last one")
        added = command("key", "add", image, "--key-file", key_file, "--new-key-file", wrong, "--json").json
        assert [slot["slot"] for slot in added["slots"]] == [0, 1]
    assert command("check", image, "--key-file", wrong).code == 0


def test_control_socket_elsewhere(command: Command, image: Path, key_file: Path) -> None:
    with serving(image, "--key-file", key_file, "--listen", "unix:sock", "--control", "ctl", cwd=image.parent):
        command("check", image, "--key-file", key_file).fails(5, "--control")
        assert command("check", image, "--control", "ctl").code == 0
    with serving(image, "--key-file", key_file, "--listen", "unix:sock", "--control", "none", cwd=image.parent):
        assert not image.with_name("image.vde.ctl").exists()


def test_stale_sockets_are_replaced(image: Path, key_file: Path) -> None:
    for name in ("sock", "image.vde.ctl"):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(image.with_name(name)))
    with serving(image, "--key-file", key_file, "--listen", "unix:sock", cwd=image.parent):
        assert greets(image.with_name("sock"))


def test_memory_with_a_configuration_file(tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text('[server]\nlisten = ["unix:sock"]\nlog_format = "json"\nexport = "fast"\n')
    with serving("--memory", "1M", "--config", "server.toml", cwd=tmp_path) as server:
        assert greets(tmp_path / "sock")
        code, err = server.stop()
    assert code == 0
    record = json.loads(err)
    assert (record["level"], record["export"], record["uri"]) == ("info", "fast", server.uris[0])
    assert record["message"] == f"serving fast on {server.uris[0]}"


def test_stop_by_the_control_socket(tmp_path: Path) -> None:
    with serving("--memory", "1M", "--listen", "unix:sock", "--control", "ctl", cwd=tmp_path) as server:
        client = ControlClient(tmp_path / "ctl")
        assert client.status().pid == server.process.pid
        client.stop()
        assert server.wait()[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_killed_server_leaves_an_image_that_opens(command: Command, image: Path, key_file: Path) -> None:
    options = [image, "--key-file", key_file, "--listen", "unix:sock"]
    with serving(*options, cwd=image.parent) as server:
        server.stop(signal.SIGKILL)
    assert read_info(image).disks[0].name == "disk"
    with serving(*options, cwd=image.parent):
        assert command("check", image).code == 0


def test_uris() -> None:
    assert uris_of(Listener(UnixAddress(Path("/a b/&")), [])) == ["nbd+unix:///?socket=/a%20b/%26"]
    assert uris_of(Listener(TcpAddress("localhost", 10809), [])) == ["nbd://localhost:10809/"]
    assert uris_of(Listener(TcpAddress("::1", 1), [])) == ["nbd://[::1]:1/"]
