"""The OpenAPI document against the server, in both directions."""

import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

import nbdvde
from nbdvde.admin import openapi, web
from nbdvde.admin.messages import SecretBody
from nbdvde.admin.openapi import REQUESTS, document
from nbdvde.admin.service import Service
from nbdvde.engine.access import fresh
from nbdvde.engine.keys import Cost, Passphrase
from tests.admin.schema import Mismatch, check, resolved
from tests.admin.test_control import FIRST, MASTER, SECOND, serving

DOCS = Path(__file__).parents[2] / "docs"
SECRETS = {"secret": SecretBody.of(FIRST), "new_secret": SecretBody.of(SECOND)}
BODIES: tuple[tuple[str, Any], ...] = (
    ("/v1/exports/add", {"name": "more", "memory": 1 << 20}),
    ("/v1/exports/remove", {"name": "more"}),
    ("/v1/disks/create", {"name": "second", "size": 1 << 20}),
    ("/v1/disks/resize", {"name": "second", "size": 2 << 20}),
    ("/v1/snapshots/create", {"name": "second@now"}),
    ("/v1/disks/clone", {"name": "third", "source": "second@now"}),
    ("/v1/snapshots/diff", {"since": "second@now"}),
    ("/v1/snapshots/rollback", {"name": "second@now"}),
    ("/v1/import", {"file": "{folder}/raw", "disk": "second"}),
    ("/v1/export", {"file": "{folder}/copy", "disk": "second"}),
    ("/v1/disks/delete", {"name": "third"}),
    ("/v1/dictionaries/train", {"dry_run": True, "disk": "second"}),
    ("/v1/scrub", {"rate": 1 << 30}),
    ("/v1/optimize", {"rate": 1 << 30}),
    ("/v1/snapshots/delete", {"name": "second@now"}),
    ("/v1/keys/add", SECRETS),
    ("/v1/keys/change", {**SECRETS, "new_secret": SecretBody.of(Passphrase(b"third")), "slot": 0}),
    ("/v1/keys/remove", {"secret": SECRETS["new_secret"], "slot": 0}),
)
"""What is asked, in this order. Of what else there is comes the failure that an empty object leads to."""


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


def ask(path: Path, method: str, target: str, body: bytes | None = None) -> tuple[int, str, bytes]:
    """Status, content type and body of the answer."""
    connection = UnixConnection(path)
    connection.request(method, target, body)
    answer = connection.getresponse()
    found = answer.status, (answer.getheader("Content-Type") or "").partition(";")[0], answer.read()
    connection.close()
    return found


def operations() -> Iterator[tuple[str, str, Any]]:
    for path, methods in document()["paths"].items():
        for method, operation in methods.items():
            yield path, method.upper(), operation


def conforms(path: str, method: str, status: int, content_type: str, body: bytes) -> None:
    """Check an answer against the document."""
    operation = document()["paths"][path][method.lower()]
    response = operation["responses"].get(str(status), operation["responses"]["default"])
    schema = response["content"][content_type]["schema"]
    lines = [body.decode()] if content_type == "text/plain" else list(map(json.loads, body.splitlines()))
    assert lines
    assert len(lines) == 1 or content_type == "application/jsonl"
    for line in lines:
        check(line, schema, document())


def test_the_copy_in_the_documents() -> None:
    again = json.dumps(document(), indent=1) + "\n"
    assert (DOCS / "openapi.json").read_text() == again, "run: python -m nbdvde.admin.openapi > docs/openapi.json"


async def test_every_route_is_described_and_the_other_way_round(tmp_path: Path) -> None:
    async with serving(tmp_path, None):
        routes = Service(None, lambda: None, None, [], None).routes()  # type: ignore[arg-type]
    assert {(path, method) for path, (method, _) in routes.items()} == {(path, how) for path, how, _ in operations()}


def test_the_document_is_whole() -> None:
    found = document()
    assert found["openapi"].startswith("3.1.")
    names = [operation["operationId"] for *_, operation in operations()]
    assert len(set(names)) == len(names)
    assert all(operation["summary"] and operation["summary"].endswith(".") for *_, operation in operations())
    reachable = {path: operation.get("x-nbdvde-admin") for path, _, operation in operations()}
    assert all(reachable[path] == "read" for path in web.READABLE if path in reachable)
    assert all(reachable[path] == "change" for path in web.CHANGES)
    assert reachable["/v1/keys/add"] is None

    def walk(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from ([node["$ref"]] if "$ref" in node else [])
            for child in node.values():
                yield from walk(child)
        elif isinstance(node, list):
            for child in node:
                yield from walk(child)

    assert all(resolved(reference, found) for reference in walk(found))
    assert "in seconds" in found["components"]["schemas"]["Latency"]["description"]
    status = found["components"]["schemas"]["Status"]["properties"]
    assert status["addresses"]["description"] == "URIs under which the default export is served."


async def test_every_path_answers_as_it_is_described(tmp_path: Path) -> None:
    image_path, control_path = tmp_path / "image.vde", tmp_path / "ctl"
    nbdvde.create_image(image_path, 4 << 20, secret=MASTER)
    nbdvde.update_keys(image_path, lambda area: area.with_slot(MASTER, FIRST, fresh(), cost=Cost(64, 1, 1)))
    (tmp_path / "raw").write_bytes(bytes(range(256)) * 4096)
    bodies = dict(BODIES)
    asked = [(path, "POST") for path, _ in BODIES]
    asked += [(path, how) for path, how, _ in operations() if path not in bodies and path != "/v1/stop"]
    good = set()
    async with nbdvde.open_image(image_path, key=MASTER) as image, serving(tmp_path, image):
        for path, method in [*asked, ("/v1/stop", "POST")]:
            text = msgspec.json.encode(bodies.get(path, {})).replace(b"{folder}", str(tmp_path).encode())
            answer = await trio.to_thread.run_sync(ask, control_path, method, path, text if method == "POST" else None)
            conforms(path, method, *answer)
            assert answer[0] == 200 or path not in bodies, (path, answer)
            good |= {path} if answer[0] == 200 else set()
    assert good >= {*bodies, *openapi._SPECIAL, "/v1/status", "/v1/metrics", "/v1/info", "/v1/df", "/v1/check"}


async def test_bodies_are_looked_at_where_they_are_described(tmp_path: Path) -> None:
    nbdvde.create_image(tmp_path / "image.vde", 1 << 20, secret=MASTER)
    described = {path for path, _, operation in operations() if "requestBody" in operation}
    async with nbdvde.open_image(tmp_path / "image.vde", key=MASTER) as image, serving(tmp_path, image):
        for path, method, _ in operations():
            if method == "POST":
                answer = await trio.to_thread.run_sync(ask, tmp_path / "ctl", method, path, b"[")
                assert (b'"request: ' in answer[2]) == (path in described), path
    assert described >= set(REQUESTS)


@pytest.mark.parametrize(
    "line",
    [
        b'{"ok":1,"problems":[]}',
        b'{"ok":true,"problems":[1]}',
        b'{"problems":[]}',
        b'{"ok":true,"problems":[],"more":1}',
        b"[]",
    ],
)
def test_other_answers_are_noticed(line: bytes) -> None:
    with pytest.raises(Mismatch):
        conforms("/healthz", "GET", 200, "application/json", line)
