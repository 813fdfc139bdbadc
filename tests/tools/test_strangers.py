"""The tools that load a server, small; their figures are for people, only their verdicts on errors are tested here."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools import load, strangers


def run(
    main: Callable[[], int], arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Any:
    monkeypatch.setattr(sys, "argv", ["tool", *arguments])
    main()
    return json.loads(capfd.readouterr().out)


def test_strangers(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(strangers, "ROUNDS", 1)
    monkeypatch.setattr(strangers, "allow_files", lambda: 1000)
    found = run(strangers.main, ["--strangers", "60", "--seconds", "0.1"], monkeypatch, capfd)
    assert found["strangers"] == 60
    assert found["iops"] > 0


@pytest.mark.parametrize("image", [False, True])
def test_many_clients_find_what_they_wrote(
    image: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A moment; ten minutes are for `python tools/load.py`."""
    arguments = ["--seconds", "8", *(["--image", str(tmp_path)] if image else [])]
    found = run(load.main, arguments, monkeypatch, capfd)
    assert found["failures"] == []
    assert found["requests"] > 64
    if not image:  # whose caches and buffers have to fill first
        assert found["memory_late_mib"] <= found["memory_early_mib"] * load.GROWTH + 16


def test_wrong_data_are_noticed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(load, "bytearray", lambda size: bytearray(b"\1" * size), raising=False)
    found = run(load.main, ["--seconds", "0.5", "--clients", "2"], monkeypatch, capfd)
    assert any("wrong data" in failure for failure in found["failures"])
