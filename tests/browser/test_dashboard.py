"""The dashboard in a real browser."""

import json
import re
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

import nbdvde
from nbdvde.replication import membership
from nbdvde.replication.notes import Place
from tests.browser import chromium
from tests.browser.chromium import Chromium
from tests.certificates import make_authority
from tests.cli.conftest import serving
from tests.interop.harness import need

REFRESH = "document.dispatchEvent(new Event('visibilitychange')) && "
"""Before a condition: have the page ask now, and not in two seconds."""
PHONE = 360
OVERFLOWING = """[...document.querySelectorAll("table")].filter((table) =>
    table.scrollWidth > table.parentElement.clientWidth).map((table) => table.innerText)"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    name = chromium.program()
    if name is None:
        need(chromium.PROGRAMS[0])
    assert name is not None
    with chromium.running(name, tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def browser(running: Chromium) -> Iterator[Chromium]:
    """With nothing to complain of when the test is over."""
    running.complaints.clear()
    running.size(1280, 900)
    yield running
    running.open("about:blank")
    assert running.complaints == []


@contextmanager
def watched(*arguments: object, cwd: Path, port: int = 0) -> Iterator[str]:
    """The URL of the dashboard of a server."""
    with serving(*arguments, "--listen", "unix:sock", "--admin", f"127.0.0.1:{port}", cwd=cwd) as server:
        assert server.process.stderr is not None
        found = re.search(r"http://\S+", server.process.stderr.readline())
        assert found
        yield found[0]


@contextmanager
def client(folder: Path) -> Iterator[socket.socket]:
    """A client of the default export (NBD proto.md, NBD_OPT_EXPORT_NAME)."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(folder / "sock"))
        sock.recv(18, socket.MSG_WAITALL)
        sock.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 0))
        sock.recv(10, socket.MSG_WAITALL)
        yield sock


def work(sock: socket.socket) -> None:
    """Write 4 MiB, flush, and read 2 MiB."""
    for number in range(64):
        request = struct.pack(">IHHQQI", 0x25609513, 0, 1, number, number << 16, 1 << 16)
        sock.sendall(request + bytes([number + 1]) * (1 << 16))
        sock.recv(16, socket.MSG_WAITALL)
    sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 3, 0, 0, 0))
    sock.recv(16, socket.MSG_WAITALL)
    for number in range(32):
        sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, number, number << 16, 1 << 16))
        sock.recv(16 + (1 << 16), socket.MSG_WAITALL)


def test_figures(browser: Chromium, tmp_path: Path) -> None:
    nbdvde.create_image(tmp_path / "image.vde", 1 << 30, secret=None)
    with watched("image.vde", cwd=tmp_path) as url, client(tmp_path) as sock:
        browser.open(url)
        browser.until("document.querySelector('#state.good')")
        work(sock)
        browser.until(REFRESH + "document.querySelector('#write').innerText.includes('MiB/s')")
        commands = browser.text("#commands")
        assert re.search(r"write\s+\S+.*\s(µs|ms)", commands)
        assert re.search(r"flush\s", commands)
        assert re.search(r"disk\s+1\.00 GiB\s+read-write\s+1\s", browser.text("#exports"))
        assert "image.vde" in browser.text("#images")
        assert "4.00 MiB as clients see it" in browser.text("#images")
        assert "unix" in browser.text("#connections")
        assert browser.ask("document.querySelectorAll('#throughput-chart path.line').length") == 2
        assert "NaN" not in browser.ask("document.documentElement.outerHTML")
        assert browser.ask("document.querySelector('#snapshots-section').hidden") is True
        browser.until("!document.querySelector('#map-section').hidden")
        assert browser.text("#map-title") == "Map of disk, 1.00 GiB"


MAP = {
    "disk": "disk", "size": 1 << 30, "since": None, "cells": 4096, "blocks": 262144, "shared_known": True,
    "bytes": {"hole": 1 << 29, "compressed": 1 << 28, "shared": 1 << 28},
    "counts": {"compressed": [64] * 1024 + [0] * 3072, "shared": [0] * 1024 + [32] * 1024 + [0] * 2048},
}  # fmt: skip
PIXELS = """(() => {
    const map = document.querySelector("#map").getContext("2d").getImageData(0, 0, 128, 32).data;
    return [0, 8, 31].map((row) => [...map.slice(512 * row, 512 * row + 4)]);
})()"""


def test_a_map_of_the_disk(browser: Chromium, tmp_path: Path) -> None:
    answer = f"new Response({json.dumps(MAP)!r})"
    paths = 'new Response(\'{"paths": {"/v1/map": {}}}\')'
    answers = f"{{'v1/map': () => {answer}, 'v1/openapi.json': () => {paths}}}"
    fetch = "window.fetch = async (url, how) => (fakes[url.split('?')[0]] ?? real)(url, how)"
    script = f"const real = fetch, fakes = {answers}; {fetch}"
    nbdvde.create_image(tmp_path / "image.vde", 1 << 30, secret=None)
    with watched("image.vde", cwd=tmp_path) as url, browser.prepared(script):
        browser.open(url)
        browser.until("!document.querySelector('#map-section').hidden")
        assert browser.text("#map-title") == "Map of disk, 1.00 GiB"
        assert browser.text("#map-legend").split() == ["compressed", "256", "MiB", "shared", "256", "MiB"]
        size = "[document.querySelector('#map').width, document.querySelector('#map').height]"
        assert browser.ask(size) == [128, 32]
        compressed, half_shared, hole = browser.ask(PIXELS)
        assert compressed == [0, 114, 178, 255]
        assert 100 < half_shared[3] < 200
        assert hole[3] == 0


async def _furnish(path: Path) -> None:
    """Two disks, one of them with a region of each kind and a snapshot."""
    async with nbdvde.open_image(path) as image:
        await image.volumes.create("second", 1 << 20)
        await image.volumes.snapshot("second", "monday")
        disk = image.disk("second")
        await disk.write(0, memoryview(b"x" * 4096))
        area = await image.regions.area(disk)
        for make in (nbdvde.Vault.create, nbdvde.AnonTable.create, nbdvde.MetricsLog.create):
            await make(area)
        await (await nbdvde.Stream.create(image.regions, disk, 4)).append(b"x")
        await (await nbdvde.Worm.create(image.regions, disk, 10, 3 * 86400 * 10**9, 0)).append(b"x")


ROWS = "[...document.querySelectorAll('#regions tbody tr')]"
CHOOSE = """(() => {
    const list = document.querySelector("#disk");
    list.value = [...list.options].find((option) => option.text === "second").value;
    list.dispatchEvent(new Event("change"));
})()"""


@pytest.mark.parametrize("width", [1280, PHONE])
def test_every_disk_of_every_image_can_be_looked_at(browser: Chromium, tmp_path: Path, width: int) -> None:
    for name in ("one.vde", "two.vde"):
        nbdvde.create_image(tmp_path / name, 1 << 30, secret=None)
    trio.run(_furnish, tmp_path / "two.vde")
    browser.size(width, 900, phone=width == PHONE)
    with watched("one.vde", "two.vde", cwd=tmp_path) as url:
        browser.open(url)
        browser.until("!document.querySelector('#map-section').hidden")
        assert browser.text("#map-title") == "Map of disk in one.vde, 1.00 GiB"
        assert browser.ask("[...document.querySelectorAll('#disk optgroup')].map((group) => group.label)") == [
            "one.vde", "two.vde",
        ]  # fmt: skip
        assert browser.ask("document.querySelector('#regions-section').hidden") is True
        browser.ask(CHOOSE)
        browser.until("document.querySelector('#map-title').innerText === 'Map of second in two.vde, 1.00 MiB'")
        assert browser.text("#regions-title") == "Regions of two.vde"
        rows = (
            "[...document.querySelectorAll('#regions tbody tr')].map((row) => [...row.cells].map((c) => c.innerText))"
        )
        assert browser.ask(rows) == [
            ["anonymisation of second", "0 mappings of 0 subjects, 0 erased", "0 %"],
            ["compliance vault of second", "0 passports", "0 %"],
            ["metrics log of second", "no samples yet", "0 %"],
            ["stream of second", "1 entry of 4, the next is number 1; when full: overwrite", "25 %"],
            ["write once of second", "1 append, 4.00 KiB; kept for another 3 days", "10 %"],
        ]
        assert browser.text("#snapshots-title") == "Snapshots of two.vde"
        assert "second@monday" in browser.text("#snapshots")
        assert browser.ask("document.documentElement.scrollWidth") == width
        assert browser.ask(OVERFLOWING) == []
        browser.call("Page.reload")  # what was chosen stands behind the #
        browser.until("document.querySelector('#map-title')?.innerText === 'Map of second in two.vde, 1.00 MiB'")


BROKEN = """const real = fetch;
window.fetch = async (url, how) => {
    const answer = await real(url, how);
    if (url !== "v1/metrics") return answer;
    const found = await answer.json();
    Object.assign(found.images[0], {failure: "syncing failed: no such device", damaged_segments: 2});
    return new Response(JSON.stringify(found));
}"""


def test_what_is_wrong_with_an_image_is_said_first(browser: Chromium, tmp_path: Path) -> None:
    nbdvde.create_image(tmp_path / "image.vde", 1 << 30, secret=None)
    with watched("image.vde", cwd=tmp_path) as url, browser.prepared(BROKEN):
        browser.open(url)
        browser.until("document.querySelector('#state.good')")
        alerts = browser.text("#alerts")
        assert "image.vde takes no more writes: syncing failed: no such device." in alerts
        assert "damage was found in 2 segments. Run nbdvde check." in alerts
        assert browser.ask("document.querySelector('main').firstElementChild.id") == "alerts"


def member(folder: Path) -> Path:
    """The only node of a cluster; its configuration."""

    async def found() -> None:
        async with nbdvde.open_image(folder / "image.vde") as image:
            await membership.found(image, Place("127.0.0.1:1", "node-1"))

    nbdvde.create_image(folder / "image.vde", 1 << 30, secret=None)
    trio.run(found)
    authority = make_authority(folder / "authority")
    certificate, key = authority.node("node-1")
    table = {"listen": "127.0.0.1:0", "cert": str(certificate), "key": str(key), "ca": str(authority.ca)}
    lines = [f"{name} = {json.dumps(value)}" for name, value in table.items()]
    (folder / "node.toml").write_text("\n".join(["[cluster]", *lines]) + "\n")
    return folder / "node.toml"


def test_the_cluster_of_an_image(browser: Chromium, tmp_path: Path) -> None:
    with watched("image.vde", "--config", member(tmp_path), cwd=tmp_path) as url:
        browser.open(url)
        browser.until("!document.querySelector('#cluster-section').hidden")
        browser.until(REFRESH + "document.querySelector('#cluster-state').innerText.startsWith('Node 1 leads')")
        assert [cell for row in browser.ask(NODES) for cell in (*row[:3], row[4])] == [
            "1 · node-1", "leader", "127.0.0.1:1", "this node",
        ]  # fmt: skip
        browser.open("about:blank")  # a node takes a moment to end, and the page would ask


NODES = "[...document.querySelectorAll('#nodes tbody tr')].map((row) => [...row.cells].map((c) => c.innerText))"
NODE = {"connected": True, "behind": 0, "role": "voter"}
CLUSTER = {
    "cluster": "c" * 32, "node": 1, "leader": 1, "role": "leader", "term": 7, "committed": 12345678,
    "applied": 12345600, "log_bytes": 9 << 20, "elections": 2, "problem": "",
    "nodes": [
        {**NODE, "node": 1, "name": "a-rather-long-name.of-a-machine.example", "address": "[2001:db8::1]:10810",
         "role": "leader", "behind": None},
        {**NODE, "node": 2, "name": "two.example", "address": "192.0.2.2:10810"},
        {**NODE, "node": 13, "name": "<b>three</b>", "address": "192.0.2.3:10810", "role": "learner", "behind": 1234567,
         "connected": False},
    ],
}  # fmt: skip
REPLICATED = f"""const real = fetch;
window.fetch = async (url, how) => {{
    if (url.startsWith("v1/cluster/status")) return new Response({json.dumps(CLUSTER)!r});
    const answer = await real(url, how);
    if (url !== "v1/metrics") return answer;
    const found = await answer.json();
    found.images[0].cluster = {{received_bytes: 5 * 2 ** 20, compared_bytes: 3 * 2 ** 30, differences: 7,
        repaired: 5, problem: "the image is full"}};
    return new Response(JSON.stringify(found));
}}"""


@pytest.mark.parametrize("width", [1280, PHONE])
def test_nodes_that_are_away_and_behind(browser: Chromium, tmp_path: Path, width: int) -> None:
    nbdvde.create_image(tmp_path / "image.vde", 1 << 30, secret=None)
    browser.size(width, 900, phone=width == PHONE)
    with watched("image.vde", cwd=tmp_path) as url, browser.prepared(REPLICATED):
        browser.open(url)
        browser.until("!document.querySelector('#cluster-section').hidden")
        assert browser.text("#cluster-state") == "Node 1 leads, in term 7."
        facts = browser.text("#cluster-facts")
        assert "78 entries agreed on and not yet applied here" in facts
        assert "5.00 MiB taken over to catch up" in facts
        assert "3.00 GiB compared with the other nodes" in facts
        assert "5 differences repaired" in facts
        rows = browser.ask(NODES)
        assert [row[0] for row in rows[1:]] == ["2 · two.example", "13 · <b>three</b>"]
        assert rows[2][3:] == ["1.23 M", "none"]
        assert browser.ask("[...document.querySelectorAll('#nodes .bad')].map((cell) => cell.innerText)") == ["none"]
        browser.until("document.querySelector('#state.good')")
        alerts = browser.text("#alerts")
        assert "image.vde: this node takes no part in its cluster: the image is full." in alerts
        assert "image.vde: nodes differ in 2 chunks of 1 MiB: see nbdvde cluster verify." in alerts
        assert browser.ask("document.documentElement.scrollWidth") == width
        assert browser.ask(OVERFLOWING) == []


def test_a_server_that_goes_and_comes_back(browser: Chromium, tmp_path: Path) -> None:
    with watched("--memory", "1M", cwd=tmp_path) as url:
        browser.open(url)
        browser.until("document.querySelector('#state.good')")
        port = int(url.rstrip("/").rpartition(":")[2])
    browser.until(REFRESH + "document.querySelector('#state.bad')")
    assert "has not answered since" in browser.text("#alerts")
    assert browser.ask("getComputedStyle(document.querySelector('.tiles')).opacity") < "0.6"
    assert any("CONNECTION_REFUSED" in complaint for complaint in browser.complaints)
    with watched("--memory", "2M", cwd=tmp_path, port=port):
        browser.until(REFRESH + "document.querySelector('#state.good')")
        assert browser.text("#alerts") == ""
        assert "2.00 MiB" in browser.text("#exports")
    browser.complaints.clear()


def hundred(folder: Path) -> Path:
    """A configuration with 100 exports, of which one has a name that would do harm as markup."""
    names = [f"tenant-{number:03}.a-rather-long-name.example" for number in range(99)]
    tables = [f'[[disk]]\nname = "{name}"\nmemory = "1M"\n' for name in [*names, "<img src=x onerror=alert(1)>"]]
    (folder / "many.toml").write_text("".join(tables))
    return folder / "many.toml"


def find(browser: Chromium, text: str) -> None:
    """Type into the field above the table of exports."""
    browser.ask(f"document.querySelector('#exports input').value = {text!r}")
    browser.ask("document.querySelector('#exports input').dispatchEvent(new Event('input'))")


def test_many_exports_on_a_phone(browser: Chromium, tmp_path: Path) -> None:
    rows = "document.querySelectorAll('#exports tbody tr').length"
    words = ["--config", hundred(tmp_path), "--memory", "4M", "--export", "first"]
    with watched(*words, cwd=tmp_path) as url, client(tmp_path) as sock:
        browser.size(PHONE, 740, phone=True)
        browser.open(url)
        browser.until("document.querySelector('#state.good')")
        work(sock)
        browser.until(REFRESH + "document.querySelector('#write').innerText.includes('iB/s')")
        assert browser.ask("document.documentElement.scrollWidth") == PHONE
        assert browser.ask(OVERFLOWING) == []
        assert browser.text("#exports-title") == "Exports (101)"
        assert browser.ask(rows) == 12
        assert "12 of 101" in browser.text("#exports")
        browser.ask("document.querySelector('#exports [aria-label=\"Next page\"]').click()")
        assert "24 of 101" in browser.text("#exports")
        browser.ask("document.querySelector('#exports thead button').click()")
        assert browser.ask("document.querySelector('#exports th').getAttribute('aria-sort')") == "ascending"
        find(browser, "TENANT-04")
        assert browser.ask(rows) == 10
        find(browser, "onerror")
        assert "<img src=x onerror=alert(1)>" in browser.text("#exports tbody")
        assert browser.ask("document.querySelectorAll('#exports img').length") == 0
        find(browser, "nothing like that")
        assert "None of that name." in browser.text("#exports")


CONTRAST = """(() => {
    const channel = (value) => (value /= 255, value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    const light = (color) => {
        const [r, g, b] = color.match(/[\\d.]+/g).map(Number).map(channel);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (node) => {
        for (; node; node = node.parentElement) {
            const color = getComputedStyle(node).backgroundColor;
            if (color !== "rgba(0, 0, 0, 0)") return color;
        }
    };
    const texts = [...document.querySelectorAll("body *")].filter((node) => node.offsetParent && !node.disabled
        && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()));
    return texts.map((node) => {
        const pair = [light(getComputedStyle(node).color), light(behind(node))].sort((a, b) => b - a);
        return [(pair[0] + 0.05) / (pair[1] + 0.05), node.outerHTML.slice(0, 80)];
    }).sort((a, b) => a[0] - b[0])[0];
})()"""
"""The text on the page that is the hardest to read, by WCAG 2.2."""


NAMELESS = """[...document.querySelectorAll("button, input, a, img, svg[role]")].filter((node) =>
    !(node.textContent.trim() || node.hasAttribute("alt") || node.ariaLabel || node.hasAttribute("aria-labelledby"))
).length"""
"""Things of which nobody can say what they are who does not see them."""
INLINE = "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.bad = 1'}))"


def test_it_can_be_read_and_runs_nothing_of_others(browser: Chromium, tmp_path: Path) -> None:
    with watched("--memory", "1M", cwd=tmp_path) as url:
        browser.open(url)
        browser.until("document.querySelector('#state.good')")
        assert browser.ask(NAMELESS) == 0
        for dark in (False, True):
            browser.size(1280, 900, dark=dark)
            ratio, text = browser.ask(CONTRAST)
            assert ratio >= 4.5, text
        browser.ask(INLINE)
        assert browser.ask("window.bad") is None
        browser.ask("fetch('http://127.0.0.2:9/').catch(() => 0)")
        assert sum("Content Security Policy" in complaint for complaint in browser.complaints) >= 2
    browser.complaints.clear()
