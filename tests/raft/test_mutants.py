"""The directed tests notice faults: each deliberate one in the core makes one of them fail."""

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType

import pytest

from tests.crash.mutants import Mutant
from tests.raft import (
    test_changes,
    test_election,
    test_flow,
    test_install,
    test_log,
    test_membership,
    test_progress,
    test_quiet,
    test_reads,
    test_replication,
    test_transfer,
)
from tests.raft.mutants import MUTANTS

DIRECTED = (
    test_election,
    test_replication,
    test_flow,
    test_reads,
    test_changes,
    test_membership,
    test_transfer,
    test_install,
    test_quiet,
    test_log,
    test_progress,
)


def _cases(module: ModuleType) -> Iterator[tuple[str, Callable[[], None]]]:
    """Tests of a module, each with each of its parameters."""
    for name, test in vars(module).items():
        if name.startswith("test_") and not hasattr(test, "hypothesis"):
            marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
            if not marks:
                yield name, test
            for names, rows in (mark.args for mark in marks):
                keys = names if isinstance(names, tuple) else (names,)
                for row in rows:
                    values = getattr(row, "values", row)
                    values = values if isinstance(values, tuple) else (values,)
                    yield name, partial(test, **dict(zip(keys, values, strict=True)))


def first_to_fail() -> str | None:
    """The first directed test that fails."""
    for module in DIRECTED:
        for name, test in _cases(module):
            try:
                test()
            except (Exception, pytest.fail.Exception):  # a mutated core may fail in any way
                return f"{module.__name__.rpartition('.')[2]}.{name}"
    return None


def test_without_a_fault_none_fails() -> None:
    assert first_to_fail() is None


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_is_noticed(mutant: Mutant) -> None:
    with mutant.applied():
        assert first_to_fail(), "no directed test fails"
