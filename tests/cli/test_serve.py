"""The real `nbdvde serve`, from its start to a clean stop."""

import json
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from nbdvde import hosting
from nbdvde.admin.client import ControlClient
from nbdvde.cli import serve
from nbdvde.cli.plan import Plan
from nbdvde.cli.ready import uris_of
from nbdvde.config import LimitOptions, Options, ServerOptions
from nbdvde.engine.access import read_info
from nbdvde.errors import RefusedError
from nbdvde.listeners import Listener, TcpAddress, UnixAddress
from nbdvde.memory import MemoryDisk
from tests.cli.conftest import ENVIRONMENT, Command, Result, serving


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


def test_signals_that_come_at_any_time_cve_2015_0847(image: Path, key_file: Path) -> None:
    """nbd-server did in its signal handlers what may not be done there, and stood still."""
    config = image.parent / "options.toml"
    config.write_text("")
    arguments = ["--key-file", key_file, "--listen", "unix:sock", "--config", config]
    with serving(image, *arguments, cwd=image.parent) as server:
        for _ in range(50):
            server.process.send_signal(signal.SIGHUP)
            assert greets(image.parent / "sock")
        code, _ = server.stop(signal.SIGTERM)
    assert code == 0


def test_second_server_is_refused(command: Command, image: Path, key_file: Path) -> None:
    with serving(image, "--key-file", key_file, "--listen", "unix:sock", cwd=image.parent):
        again = ["serve", image, "--key-file", key_file, "--listen", "unix:other"]
        command(*again).fails(5, "a server answers at")
        command(*again, "--control", "none").fails(5, "in use")
        assert greets(image.parent / "sock")


def test_commands_use_the_control_socket(command: Command, image: Path, key_file: Path) -> None:
    with serving(image, "--key-file", key_file, "--listen", "unix:sock", cwd=image.parent):
        assert command("info", image, "--json").json["statistics"] != {}
        assert command("check", image, "--json").json["ok"] is True
        assert command("scrub", image, "--rate", "1G", "--json").json["ok"] is True
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


def test_no_place_for_a_control_socket(command: Command, image: Path, key_file: Path) -> None:
    before = image.read_bytes()
    for control in ("x" * 108, "key", "/no/such/directory/ctl"):
        words = ["serve", image, "--key-file", key_file, "--listen", "unix:sock", "--control", control]
        command(*words).fails(8, control, "--control, or none")
    assert image.read_bytes() == before
    assert not image.with_name("sock").exists()


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


def test_ctl(command: Command, image: Path, key_file: Path) -> None:
    with serving(image, "--key-file", key_file, "--listen", "unix:sock", cwd=image.parent) as server:
        status = command("ctl", image, "status", "--json").json
        assert (status["pid"], status["image"], status["addresses"]) == (server.process.pid, str(image), server.uris)
        lines = command("ctl", image, "status").out.splitlines()
        assert ["pid", str(server.process.pid)] in [line.split() for line in lines]
        assert command("ctl", image, "flush") == Result(0, "", "")
        assert command("ctl", image, "flush", "--json").json == {"done": True}
        assert command("ctl", image, "stop").code == 0
        assert server.wait()[0] == 0


async def test_second_stop_ends_the_wait_for_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(self: object, mark: int, **_: bool) -> None:
        flushing.set()
        await trio.sleep_forever()

    flushing, ended = trio.Event(), trio.Event()
    monkeypatch.setattr(MemoryDisk, "flush_nowait", lambda *_: False)
    monkeypatch.setattr(MemoryDisk, "flush", never)
    options = Options(server=ServerOptions(listen=(f"unix:{tmp_path}/sock",)), limits=LimitOptions(stop_s=600))
    server = serve._Serving(Plan.make([], "1M", lambda: options), {})

    async def run() -> None:
        await server.run()
        ended.set()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await trio.testing.wait_all_tasks_blocked()
            async with await trio.open_unix_socket(str(tmp_path / "sock")) as client:
                await client.send_all(FLUSH_AT_ONCE)
                await flushing.wait()
                server.stop()
                await trio.testing.wait_all_tasks_blocked()
                assert not ended.is_set()
                server.stop()
                await ended.wait()


FLUSH_AT_ONCE = (
    struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 0)  # NBD_OPT_EXPORT_NAME of the default export (NBD proto.md)
    + struct.pack(">IHHQQI", 0x25609513, 0, 3, 0, 0, 0)
)


def test_pid_file_of_an_ended_server(tmp_path: Path) -> None:
    (tmp_path / "pid").write_text("4194304\n")
    with serving("--memory", "1M", "--listen", "unix:sock", "--pid-file", "pid", cwd=tmp_path) as server:
        assert (tmp_path / "pid").read_text() == f"{server.process.pid}\n"
        (tmp_path / "pid").write_text("1\n")  # of another server
        assert server.stop()[0] == 0
    assert (tmp_path / "pid").read_text() == "1\n"


def test_names_that_are_no_text(plain_image: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    folder = plain_image.parent
    plain_image.rename(folder / f"{name}.vde")
    with serving(f"{name}.vde", "--listen", f"unix:{name}", "--log-format", "json", cwd=folder) as server:
        assert server.uris == [f"nbd+unix:///?socket={folder}/caf%E9"]
        assert server.stop()[0] == 0


def test_killed_server_leaves_an_image_that_opens(command: Command, image: Path, key_file: Path) -> None:
    options = [image, "--key-file", key_file, "--listen", "unix:sock"]
    with serving(*options, cwd=image.parent) as server:
        server.stop(signal.SIGKILL)
    assert read_info(image).disks[0].name == "disk"
    with serving(*options, cwd=image.parent):
        assert command("check", image).code == 0


def test_limits_reach_the_server(tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text("[limits]\nconnections = 1\n")
    words = ["--memory", "1M", "--listen", "unix:sock", "--config", "server.toml"]
    with serving(*words, cwd=tmp_path), socket.socket(socket.AF_UNIX) as first:
        first.connect(str(tmp_path / "sock"))
        assert first.recv(8) == b"NBDMAGIC"
        assert not greets(tmp_path / "sock")


def test_sizes_reach_the_engine(
    command: Command, plain_image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_image(path: Path, **options: object) -> None:
        raise RefusedError(f"{options}")

    monkeypatch.setattr(hosting, "open_image", open_image)
    (tmp_path / "server.toml").write_text("[engine]\ncache_size = '1M'\nwrite_buffer_size = 4096\n")
    words = ["serve", plain_image, "--listen", "unix:sock", "--config", "server.toml", "--read-only"]
    command(*words).fails(9, "'read_only': True", "'cache_bytes': 1048576", "'buffer_bytes': 4096")


async def test_stop_while_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(address: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(serve, "open_listener", never)
    starting = serve._Serving(Plan.make([], "1M", Options), {})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(starting.run)
        await trio.testing.wait_all_tasks_blocked()
        starting.stop()


SEVERAL = """
[server]
listen = ["unix:sock"]
[[disk]]
name = "extra"
memory = "1M"
description = "for tests"
[[disk]]
name = "same"
image = "image.vde"
key_file = "key"
read_only = true
"""


def test_several_exports(command: Command, image: Path, plain_image: Path, key_file: Path) -> None:
    folder = image.parent
    (folder / "server.toml").write_text(SEVERAL)
    with serving(plain_image, "--config", "server.toml", "--export", "main", cwd=folder) as server:
        place = f"?socket={folder}/sock"
        assert server.process.stdout is not None
        lines = [*server.uris, *(server.process.stdout.readline().strip() for _ in range(2))]
        assert lines == [f"nbd+unix:///{name}{place}" for name in ("", "extra", "same")]
        assert status_of(command, plain_image) == {"main": "plain.vde", "extra": None, "same": "image.vde"}
        assert status_of(command, image) == status_of(command, plain_image)
        assert command("info", image, "--json").json["encryption"] != "none"
        command("ctl", image, "export-remove", "nothing").fails(9, "does not exist")
        command("ctl", image, "export-add", "extra", "--memory", "1M").fails(9, "exists already")
        command("ctl", image, "export-add", "x", "--memory", "1M", "--address", "1.2").fails(2, "1.2")
        command("ctl", image, "export-add", "x", "--image", "nothing").fails(3, "nothing")
        command("ctl", image, "export-add", "x").fails(2, "image or memory")
        assert "added" in command("ctl", image, "export-add", "added", "--memory", "1M").out
        assert "added" not in command("ctl", plain_image, "export-remove", "added").out
        assert command("ctl", plain_image, "export-remove", "same", "--json").code == 0
        command("ctl", image, "status").fails(8, "no server")
        assert command("check", image, "--key-file", key_file).code == 0
    assert sorted(path.name for path in folder.iterdir()) == ["image.vde", "key", "plain.vde", "server.toml"]


def status_of(command: Command, image: Path) -> dict[str, str | None]:
    exports = command("ctl", image, "exports", "--json").json["exports"]
    return {export["name"]: export["image"] and Path(export["image"]).name for export in exports}


def test_several_images(command: Command, plain_image: Path) -> None:
    folder = plain_image.parent
    command("create", "other.vde", "1M", "--encryption", "none")
    with serving("plain.vde", "other.vde", "--listen", "unix:sock", "--export", "other", cwd=folder):
        assert status_of(command, plain_image) == {"plain": "plain.vde", "other": "other.vde"}
    command("serve", "plain.vde", "plain.vde").fails(2, "export plain", "twice")
    command("serve", "plain.vde", "other.vde", "--export", "third").fails(2, "third", "plain, other")


def test_one_image_by_several_paths(command: Command, plain_image: Path) -> None:
    """It is opened as the most demanding export needs it, and its control socket is not in its own way."""
    folder = plain_image.parent
    (folder / "link.vde").symlink_to(plain_image)
    disks = [f"[[disk]]\nname = '{name}'\nimage = '{name}.vde'\n" for name in ("plain", "link")]
    (folder / "server.toml").write_text(f"{disks[0]}read_only = true\n{disks[1]}")
    with serving("--config", "server.toml", "--listen", "unix:sock", cwd=folder):
        assert status_of(command, plain_image) == {"plain": "plain.vde", "link": "link.vde"}
    command("create", "other.vde", "1M", "--encryption", "none")
    with serving("plain.vde", "--listen", "unix:sock", "--control", "other.vde.ctl", cwd=folder):
        add = ["ctl", "plain.vde", "export-add", "other", "--image", "other.vde", "--control", "other.vde.ctl"]
        command(*add).fails(5, "a server answers")


@pytest.mark.parametrize("by_signal", [True, False])
def test_reload(command: Command, image: Path, plain_image: Path, key_file: Path, by_signal: bool) -> None:
    folder = image.parent
    configuration = folder / "server.toml"
    configuration.write_text(SEVERAL)

    def reload(failure: str | None = None) -> None:
        if by_signal:
            server.process.send_signal(signal.SIGHUP)
            assert server.process.stderr is not None
            while not (line := server.process.stderr.readline()).startswith(("nbdvde: reloaded", "nbdvde: cannot")):
                pass
            assert (failure or "reloaded") in line
        elif failure:
            command("ctl", plain_image, "reload").fails(2, failure)
        else:
            assert command("ctl", plain_image, "reload").code == 0

    with serving(plain_image, "--config", "server.toml", cwd=folder) as server:
        command("ctl", plain_image, "export-add", "by-hand", "--memory", "1M")
        configuration.write_text(SEVERAL.replace("extra", "another").replace("key_file", "no_such_key"))
        reload("no_such_key")
        assert list(status_of(command, plain_image)) == ["disk", "extra", "same", "by-hand"]
        configuration.write_text(SEVERAL.replace("extra", "another").replace("read_only = true", "read_only = false"))
        reload()
        assert sorted(status_of(command, plain_image)) == ["another", "by-hand", "disk", "same"]
        configuration.write_text("")
        reload()
        assert list(status_of(command, plain_image)) == ["disk", "by-hand"]
        assert command("check", image, "--key-file", key_file).code == 0


def test_reload_cannot_ask(command: Command, image: Path, plain_image: Path) -> None:
    with serving(plain_image, "--config", "server.toml", cwd=configured(image.parent, "")):
        configured(image.parent, SEVERAL.replace('key_file = "key"', ""))
        command("ctl", plain_image, "reload").fails(2, "same", "encrypted", "key_file")
        assert list(status_of(command, plain_image)) == ["disk", "extra"], "the others are there"


def configured(folder: Path, text: str) -> Path:
    (folder / "server.toml").write_text(text or "[server]\nlisten = ['unix:sock']\n")
    return folder


def test_one_client_on_standard_streams(tmp_path: Path) -> None:
    """By two pipes, as ssh has them, and by one socket, as inetd and libnbd have it."""
    command = [sys.executable, "-m", "nbdvde", "serve", "--memory", "1M", "--listen", "stdio"]
    done = subprocess.run(command, input=FLUSH_AT_ONCE, capture_output=True, check=True, env=ENVIRONMENT, timeout=30)
    assert done.stdout[:8] == b"NBDMAGIC"
    assert done.stdout[-16:] == struct.pack(">IIQ", 0x67446698, 0, 0)
    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        subprocess.Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno(), env=ENVIRONMENT) as server,
    ):
        theirs.close()
        ours.sendall(FLUSH_AT_ONCE)
        ours.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: ours.recv(4096), b""))
        assert received == done.stdout
        assert server.wait(30) == 0


def test_stdio_has_its_output_for_itself(command: Command) -> None:
    serve = ["serve", "--memory", "1M", "--listen", "stdio"]
    command(*serve, "--print-uri").fails(2, "--print-uri", "standard output")
    command(*serve, "--listen", "stdio").fails(2, "--listen", "stdio twice")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-"])
def test_closed_standard_streams(closed: str) -> None:
    words = [sys.executable, "-m", "nbdvde", "serve", "--memory", "1M", "--listen", "stdio"]
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *words]
    done = subprocess.run(
        shell, capture_output=True, stdin=subprocess.DEVNULL, env=ENVIRONMENT, timeout=30, check=False
    )
    assert (done.returncode, done.stdout) == (8, b"")
    assert done.stderr == b"nbdvde: cannot serve on stdio: it is closed (let a client start this command)\n"


@pytest.mark.parametrize("key", ["cert", "key", "client_ca", "psk"])
def test_an_empty_name_of_a_file_is_not_tls_turned_off(
    command: Command, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"NBDVDE_TLS_{key.upper()}", "")
    assert command("serve", "--memory", "1M", "--listen", "no.invalid:1").code in (2, 4)


def test_uris() -> None:
    assert uris_of(Listener(UnixAddress(Path("/a b/&")), [])) == ["nbd+unix:///?socket=/a%20b/%26"]
    assert uris_of(Listener(TcpAddress("localhost", 10809), [])) == ["nbd://localhost:10809/"]
    assert uris_of(Listener(TcpAddress("::1", 1), [])) == ["nbd://[::1]:1/"]
    assert uris_of(Listener(TcpAddress("::1", 1), []), "a/b", tls=True) == ["nbds://[::1]:1/a%2Fb"]
    assert uris_of(Listener(UnixAddress(Path("/x")), []), "d") == ["nbd+unix:///d?socket=/x"]


def test_control_and_clients_need_two_sockets(command: Command, plain_image: Path) -> None:
    command("serve", plain_image, "--listen", "unix:x", "--control", "x").fails(2, "--control", "--listen")
