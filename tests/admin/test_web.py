"""What a stranger may ask over TCP."""

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdvde.admin import web
from nbdvde.admin.catalog import CALLS
from nbdvde.admin.http import Asked, Page
from nbdvde.admin.service import handlers
from nbdvde.admin.web import StrangersPolicy
from tests.admin.test_http import ROUTES, ask, post

READING, CHANGING = (StrangersPolicy(["disks.example"], changes=changes) for changes in (False, True))
JSON = {"content-type": "application/json"}


def status(policy: StrangersPolicy, method: str, path: str, **headers: str) -> int:
    named = {"host": "localhost:9000", **{name.replace("_", "-"): value for name, value in headers.items()}}
    refusal = policy.refusal(Asked(method, path, b"{}", named))
    return 200 if refusal is None else refusal.status


def test_every_path_is_for_everybody_or_for_changes_or_for_the_control_socket_only() -> None:
    own = {"/v1/keys", "/v1/keys/add", "/v1/keys/remove", "/v1/keys/change", "/v1/exports/add", "/v1/import"}
    paths = {*handlers(), *(f"/v1/{call.path}" for call in CALLS)}
    assert not web.READABLE & web.CHANGES
    assert own <= paths - web.READABLE - web.CHANGES
    assert {path for path, (how, _) in handlers().items() if how == "GET"} - web.READABLE == {"/v1/keys"}
    assert web.CHANGES <= {path for path, (how, _) in handlers().items() if how == "POST"}
    assert all(not call.changes for call in CALLS if f"/v1/{call.path}" in web.READABLE)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", 200),
        ("LOCALHOST:9000", 200),
        ("localhost.:9000", 200),
        ("127.0.0.1:9000", 200),
        ("[::1]:9000", 200),
        ("192.0.2.7", 200),
        ("disks.example:9000", 200),
        ("Disks.Example.", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("", 421),
        ("[::1", 421),
    ],
)
def test_names_of_others(host: str, expected: int) -> None:
    assert status(READING, "GET", "/v1/status", host=host) == expected


@pytest.mark.parametrize(
    ("path", "headers", "expected"),
    [
        ("/v1/status", {"sec_fetch_site": "same-origin"}, 200),
        ("/v1/status", {"sec_fetch_site": "none"}, 200),
        ("/v1/status", {"sec_fetch_site": "cross-site"}, 403),
        ("/v1/status", {"sec_fetch_site": "same-site"}, 403),
        ("/v1/status", {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}, 403),
        ("/", {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}, 200),
        ("/", {"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"}, 403),
        ("/v1/status", {"origin": "http://localhost:9000"}, 200),
        ("/v1/status", {"origin": "https://localhost:9000"}, 200),
        ("/v1/status", {"origin": "http://localhost:8000"}, 403),
        ("/v1/status", {"origin": "null"}, 403),
    ],
)
def test_pages_of_others(path: str, headers: dict[str, str], expected: int) -> None:
    assert status(READING, "GET", path, **headers) == expected
    assert status(CHANGING, "GET", path, **headers) == expected


def test_changes() -> None:
    for path in web.CHANGES:
        assert status(READING, "POST", path, **JSON) == 403
        assert status(CHANGING, "POST", path, content_type="application/json; charset=utf-8") == 200
        assert status(CHANGING, "POST", path) == status(CHANGING, "POST", path, content_type="text/plain") == 415
        assert status(CHANGING, "POST", path, content_type="application/json", origin="http://evil.example") == 403
    for path in ("/v1/keys", "/v1/keys/add", "/v1/import", "/v1/what/comes/later"):
        assert status(CHANGING, "POST", path, content_type="application/json") == 403


async def test_refusals_say_what_to_do() -> None:
    code, (line,) = await ask(post("/v1/echo").replace(b"Host: x", b"Host: ::"), ROUTES, READING)
    assert (code, line["error"]["code"]) == (421, 9)
    code, (line,) = await ask(post("/v1/echo").replace(b"Host: x", b"Host: localhost"), ROUTES, READING)
    assert (code, line["error"]["hint"]) == (403, "ask there")


def test_what_is_shown_is_packaged() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["nbdvde"]
    folder = Path(web.__file__).parent / "web"
    names = {f"admin/web/{path.name}" for path in folder.iterdir()}
    assert names == {f"admin/web/{name}" for name, _ in web.PAGES.values()}
    assert all(any(fnmatch(name, pattern) for pattern in patterns) for name in names)


@given(st.text(st.characters(max_codepoint=255)), st.text(), st.text())
def test_any_header_gets_an_answer(host: str, site: str, origin: str) -> None:
    headers = {"host": host, "sec-fetch-site": site, "origin": origin}
    for policy in (READING, CHANGING):
        refusal = policy.refusal(Asked("POST", "/v1/flush", b"{}", headers))
        assert refusal is not None
        assert refusal.status in (403, 415, 421)


async def test_pages() -> None:
    routes = web.routes({})
    assert set(routes) == set(web.PAGES)
    for method, handler in routes.values():
        page = await handler(b"", None)  # type: ignore[arg-type]
        assert isinstance(page, Page)
        assert (method, page.status) == ("GET", 200)
    text = (await routes["/"][1](b"", None)).body.decode()  # type: ignore[arg-type, attr-defined]
    links = re.findall(r'(?:href|src)="([^"#]+)"', text)
    assert {f"/{link}" for link in links} <= {*web.READABLE, *web.PAGES}
    assert not re.search(r"<script(?![^>]*src=)|<style| style=| on[a-z]+=", text), "the policy forbids what is inline"
