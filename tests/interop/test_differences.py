"""The same sessions with our server and with others; docs/reference/protocol.md explains every difference."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from nbdvde.listeners import UnixAddress
from tests.docs.tables import tables
from tests.interop.harness import ROOT, run
from tests.interop.later import later, need_later
from tests.interop.peers import PEERS, serving
from tests.interop.scripts import HANDSHAKES, OFFERED, READ_ONLY, REQUESTS, Script, outcome
from tests.interop.wide_scripts import WIDE
from tests.serving import Connect

SERVERS = ("nbdvde", *PEERS)
EQUAL = "="
PAGE = ROOT / "docs/reference/protocol.md"
TABLES = tables("reference/protocol.md")
KINDS = {"handshake": HANDSHAKES, "requests": REQUESTS, "read-only": READ_ONLY}
Outcomes = dict[str, list[str]]
"""What a session came to with each of the servers."""


async def hold(
    scripts: Mapping[str, Script], folder: Path, *, servers: Sequence[str] = SERVERS, read_only: bool = False
) -> Outcomes:
    """Hold each session with each server, on a connection of its own."""
    found: Outcomes = {name: [] for name in scripts}
    for server in servers:
        with serving(server, folder / server, read_only=read_only) as path:
            for name, script in scripts.items():
                connect = Connect()
                found[name].append(await outcome(script, connect(UnixAddress(path))))
                connect.clients[0].socket.close()
    return found


def cells(outcomes: list[str]) -> list[str]:
    """As the table has them: `=` for the same as ours."""
    return [outcomes[0], *(EQUAL if other == outcomes[0] else other for other in outcomes[1:])]


def rows(outcomes: Outcomes) -> dict[str, list[str]]:
    """Cells of a table by the name of the session."""
    return {name: cells(found) for name, found in outcomes.items()}


async def test_what_servers_offer(tmp_path: Path) -> None:
    need_later()
    assert rows(await hold(OFFERED, tmp_path)) == {name: said for name, *said in TABLES["offered"]}


async def test_extended_headers(tmp_path: Path) -> None:
    need_later()
    found = rows(await hold(WIDE, tmp_path, servers=("nbdvde", "qemu-nbd")))
    assert found == {name: said for name, *said, rule in TABLES["extended headers"] if rule}


@pytest.mark.parametrize("kind", KINDS)
async def test_differences_are_explained(kind: str, tmp_path: Path) -> None:
    """Every session whose outcome is not that of all others is in the table, with this outcome and the rule."""
    need_later()
    found = rows(await hold(KINDS[kind], tmp_path, read_only=kind == "read-only"))
    explained = {name: said for name, *said, rule in TABLES["differences"] if rule and name in KINDS[kind]}
    assert {name: said for name, said in found.items() if set(said[1:]) != {EQUAL}} == explained


def test_no_other_session_is_in_the_table() -> None:
    named = [name for name, *_ in TABLES["differences"]]
    assert len(named) == len(set(named))
    sessions = {name for scripts in KINDS.values() for name in scripts}
    assert set(named) <= sessions
    assert f"of {len(sessions)} sessions" in PAGE.read_text()


def test_versions_are_named() -> None:
    for program, pattern in (("nbdkit", r"nbdkit (\d+\.\d+)"), ("qemu-nbd", r"qemu-nbd (\d+\.\d+)"),
                             ("nbd-server", r"nbd-server version (\d+\.\d+)")):  # fmt: skip
        found = re.search(pattern, run("sh", "-c", '"$@" 2>&1', "sh", *later(program, "--version")))
        assert found
        assert f"{program} {found[1]}" in PAGE.read_text()
