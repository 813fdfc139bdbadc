"""`nbdvde serve --admin`: where it listens, and what may be done there."""

import http.client
import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Command, Running, serving

LISTEN = ("--listen", "unix:sock")


@contextmanager
def watched(*arguments: object, cwd: Path) -> Iterator[tuple[Running, "Web"]]:
    with serving(*arguments, *LISTEN, "--admin", "127.0.0.1:0", cwd=cwd) as server:
        assert server.process.stderr is not None
        line = server.process.stderr.readline()
        found = re.fullmatch(r"nbdvde: dashboard at http://127\.0\.0\.1:(\d+)/\n", line)
        assert found, line
        yield server, Web(int(found[1]))


class Web:
    """What is asked over HTTP."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, None if body is None else json.dumps(body), named)
        answer = connection.getresponse()
        found = answer.status, answer.read()
        connection.close()
        return found

    def json(self, path: str) -> Any:
        status, body = self.ask("GET", path)
        assert status == 200, body
        return json.loads(body)


def test_reading(command: Command, plain_image: Path) -> None:
    with watched(plain_image, cwd=plain_image.parent) as (server, web):
        assert web.json("/v1/info")["path"] == str(plain_image)
        assert web.json("/v1/metrics")["images"][0]["path"] == str(plain_image)
        assert web.json("/healthz") == web.json("/readyz") == {"ok": True, "problems": []}
        assert b'nbdvde_export_clients{export="disk"} 0.0' in web.ask("GET", "/metrics")[1]
        assert command("ctl", plain_image, "status", "--json").json["admin"] == [f"http://127.0.0.1:{web.port}/"]
        assert f"dashboard  http://127.0.0.1:{web.port}/\n" in command("ctl", plain_image, "status").out
        for path in ("/v1/stop", "/v1/snapshots/create", "/v1/keys/add", "/v1/import"):
            status, body = web.ask("POST", path, {}, Content_Type="application/json")
            assert (status, json.loads(body)["error"]["code"]) == (403, 9)
        assert server.stop()[0] == 0


def test_changes_when_they_are_allowed(command: Command, plain_image: Path) -> None:
    with watched(plain_image, "--admin-allow", "changes", cwd=plain_image.parent) as (server, web):
        asked: dict[str, Any] = {"body": {"name": "disk@now"}, "Content_Type": "application/json"}
        assert web.ask("POST", "/v1/snapshots/create", **{**asked, "Content_Type": "text/plain"})[0] == 415
        assert web.ask("POST", "/v1/snapshots/create", **asked)[0] == 200
        assert web.ask("POST", "/v1/keys/add", **asked)[0] == 403
        assert web.json("/v1/info")["disks"][0]["snapshots"][0]["name"] == "now"
        assert web.ask("POST", "/v1/stop", Content_Type="application/json") == (200, b'{"done":true}\n')
        assert server.wait()[0] == 0
    assert command("check", plain_image).code == 0


def test_without_an_image_and_by_name(tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text('[server]\nadmin_names = ["disks.example"]\n')
    with watched("--memory", "1M", "--config", "server.toml", cwd=tmp_path) as (_, web):
        assert web.json("/v1/metrics")["images"] == []
        assert web.ask("GET", "/v1/info")[0] == 409
        for host, status in (("disks.example", 200), (socket.gethostname(), 200), ("evil.example", 421)):
            assert web.ask("GET", "/v1/status", Host=host)[0] == status


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--admin", "0.0.0.0:0"], 9, "other machines could reach it"),
        (["--admin", "[::]:0"], 9, "add --admin-allow remote"),
        (["--admin", "unix:web"], 2, "no TCP address"),
        (["--admin", "9000"], 2, "--admin 9000: not understood (use HOST:PORT, like localhost:8080)"),
        (["--admin", "256.0.0.1:0"], 8, "cannot listen on 256.0.0.1:0"),
        (["--admin-allow", "changes"], 2, "of no use without --admin"),
        (["--admin", "localhost:0", "--admin-allow", "all"], 2, "'all', expected remote or changes"),
    ],
)
def test_what_is_refused(command: Command, plain_image: Path, words: list[str], code: int, text: str) -> None:
    before = plain_image.read_bytes()
    command("serve", plain_image, *LISTEN, *words).fails(code, text)
    assert plain_image.read_bytes() == before


def test_an_address_for_others(tmp_path: Path) -> None:
    words = ["--memory", "1M", *LISTEN, "--admin", "0.0.0.0:0", "--admin-allow", "remote"]
    with serving(*words, cwd=tmp_path) as server:
        assert server.process.stderr is not None
        assert "dashboard at http://0.0.0.0:" in server.process.stderr.readline()


def test_a_port_in_use(command: Command, plain_image: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        words = ["serve", plain_image, *LISTEN, "--admin", f"127.0.0.1:{other.getsockname()[1]}"]
        command(*words).fails(8, "cannot listen on 127.0.0.1")
