"""What a service manager does with a server: sockets passed in, and news of its state."""

import socket
from pathlib import Path

import pytest

from tests.interop.harness import Process, need, run


def test_passed_sockets(tmp_path: Path) -> None:
    need("nbdinfo")
    path = tmp_path / "passed.sock"
    with socket.socket(socket.AF_UNIX) as unix, socket.create_server(("127.0.0.1", 0)) as tcp:
        unix.bind(str(path))
        unix.listen()
        server = Process(tmp_path, ["--memory", "1M"], listen="systemd", passed=[unix.fileno(), tcp.fileno()])
        assert server.uri == f"nbd+unix:///?socket={path}"
        assert run("nbdinfo", "--size", server.uri) == "1048576\n"
        assert run("nbdinfo", "--size", f"nbd://127.0.0.1:{tcp.getsockname()[1]}") == "1048576\n"
        server.stop()
    assert path.is_socket(), "it belongs to whoever made it"


def test_readiness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notify"
    monkeypatch.setenv("NOTIFY_SOCKET", str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(path))
        told.settimeout(20)
        server = Process(tmp_path, ["--memory", "1M"])
        assert told.recv(100) == b"READY=1"
        server.stop()
        assert told.recv(100) == b"STOPPING=1"
