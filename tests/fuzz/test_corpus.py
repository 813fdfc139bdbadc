"""Everything that fuzzing started from or found worth keeping is run again; and the oracles do notice faults."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdvde import config, session
from nbdvde.admin import calls
from nbdvde.limits import Account
from nbdvde.memory import MemoryDisk
from nbdvde.protocol import connection, wire
from nbdvde.protocol.connection import RequestParser
from nbdvde.protocol.handshake import Handshake
from tests.fuzz.seeds import SEEDS
from tests.fuzz.targets import TARGETS
from tools.fuzz.minimise import minimised

CORPUS = Path(__file__).parents[1] / "corpus"
MOST_BYTES = 1 << 20


@pytest.mark.parametrize("name", TARGETS)
def test_replay(name: str) -> None:
    kept = sorted((CORPUS / name).iterdir())
    assert kept
    for path in kept:
        try:
            TARGETS[name](path.read_bytes())
        except Exception as error:
            error.add_note(f"python -m tools.fuzz {name} --input {path}")
            raise


@pytest.mark.parametrize("name", TARGETS)
def test_seeds(name: str) -> None:
    for seed in SEEDS[name]:
        TARGETS[name](seed)


def test_the_corpus_is_small() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)
    assert sum(path.stat().st_size for path in CORPUS.glob("*/*")) < MOST_BYTES


@pytest.mark.parametrize("name", TARGETS)
@given(data=st.binary(max_size=300))
def test_any_bytes(name: str, data: bytes) -> None:
    TARGETS[name](data)


def _wrong(result: object) -> Callable[..., object]:
    return lambda *arguments, **options: result


@pytest.mark.parametrize(
    ("name", "place", "attribute", "fault"),
    [
        ("handshake", Handshake, "_count_option", _wrong(None)),
        ("handshake", Handshake, "_oversized", _wrong(b"")),
        ("handshake", wire, "OPTION_REPLY_MAGIC", 1),
        ("handshake", wire, "encode_string", _wrong(b"\xff")),
        ("transmission", RequestParser, "_length_refusal", _wrong(None)),
        ("transmission", RequestParser, "_is_filter", _wrong(False)),
        ("transmission", RequestParser, "_skipped", _wrong(0)),
        ("transmission", connection, "_MAX_SKIP", 100),
        ("session", Account, "give", _wrong(None)),
        ("session", MemoryDisk, "zero_nowait", _wrong(True)),
        ("session", session.Session, "_settle", _wrong(None)),
        ("session", wire, "encode_string", _wrong(b"\xff")),
        ("control", calls, "parse", None),
        ("config", config, "_convert", None),
    ],
)
def test_faults_are_noticed(
    name: str, place: Any, attribute: str, fault: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, attribute, fault)
    failed = []
    for seed in SEEDS[name]:
        try:
            TARGETS[name](seed)
        except Exception as error:
            failed.append(error)
    assert failed, "nothing noticed"


def test_minimising_keeps_what_adds_something() -> None:
    kept = minimised(TARGETS["handshake"], SEEDS["handshake"] * 2)
    assert 1 < len(kept) < len(SEEDS["handshake"])
    assert minimised(TARGETS["handshake"], kept) == kept
