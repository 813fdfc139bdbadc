"""The directed tests notice faults of what replicates an image: each deliberate one makes one of them fail."""

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.crash.mutants import Mutant
from tests.replication import (
    test_arranging,
    test_batches,
    test_catchup,
    test_disk,
    test_everywhere,
    test_groups,
    test_holds,
    test_machine,
    test_regions,
    test_replica,
    test_sealing,
    test_taking_over,
)
from tests.replication.group_mutants import GROUPS
from tests.replication.mutants import MUTANTS, REGIONS

_PATIENCE_S = 5.0
"""Of real time: virtual time runs while threads work."""
_SLOW = (
    "test_after_a_crash_the_rest_is_applied_to_what_is_there",
    "test_all_groups_come_to_what_was_asked_for",
    "test_after_a_crash_all_groups_go_on_from_what_is_there",
)
DIRECTED = (test_disk, test_sealing, test_replica, test_batches, test_machine, test_catchup)
OF_REGIONS = (test_everywhere, test_regions)
OF_GROUPS = {
    module.__name__.rpartition(".")[2]: module
    for module in (test_holds, test_arranging, test_taking_over, test_groups, test_machine)
}


def _cases(modules: Sequence[ModuleType]) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The tests, each with each of its parameters."""
    for module in modules:
        for name, test in vars(module).items():
            if name.startswith("test_") and callable(test) and name not in _SLOW:
                for parameters in _parameters(test):
                    yield name, partial(test, **parameters)


def _parameters(test: object) -> Iterator[dict[str, Any]]:
    marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    if not marks:
        yield {}
    for names, rows in (mark.args for mark in marks):
        keys = names if isinstance(names, tuple) else (names,)
        for row in rows:
            yield dict(zip(keys, row if isinstance(names, tuple) else (row,), strict=True))


def _run(test: Callable[..., Any]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        clock = MockClock(autojump_threshold=0) if "autojump_clock" in inspect.signature(test).parameters else None
        known = {"autojump_clock": clock, "monkeypatch": monkeypatch, "ways": test_disk.Ways(test_disk.Volume())}
        wanted = inspect.signature(test).parameters
        call = partial(test, **{name: value for name, value in known.items() if name in wanted})
        if not inspect.iscoroutinefunction(test.func if isinstance(test, partial) else test):
            call()
            return

        async def main() -> None:
            with trio.CancelScope() as scope:
                cancel = partial(trio.lowlevel.current_trio_token().run_sync_soon, scope.cancel)
                timer = threading.Timer(_PATIENCE_S, cancel)
                timer.start()
                try:
                    await call()
                finally:
                    timer.cancel()
            assert not scope.cancelled_caught, "it takes too long"

        trio.run(main, clock=clock)


def first_to_fail(modules: Sequence[ModuleType] = DIRECTED) -> str | None:
    """The first directed test that fails."""
    for name, test in _cases(modules):
        try:
            _run(test)
        except (Exception, BaseExceptionGroup, pytest.fail.Exception):  # a server with a fault may fail in any way
            return name
    return None


def test_without_a_fault_none_fails() -> None:
    assert first_to_fail() is None
    assert first_to_fail([*OF_GROUPS.values()]) is None


@pytest.mark.parametrize("mutant", REGIONS, ids=lambda mutant: mutant.name)
def test_of_regions_is_noticed(mutant: Mutant) -> None:
    with mutant.applied():
        assert first_to_fail(OF_REGIONS), "no test of regions fails"


@pytest.mark.parametrize("mutant", GROUPS, ids=lambda mutant: mutant.name)
def test_of_groups_is_noticed(mutant: Mutant) -> None:
    with mutant.applied():
        assert first_to_fail([OF_GROUPS[mutant.found_by]]), "no test of groups fails"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_is_noticed(mutant: Mutant) -> None:
    with mutant.applied():
        assert first_to_fail(), "no directed test fails"
