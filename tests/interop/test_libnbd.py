"""The reference client finds what the protocol promises."""

import pytest

from tests.interop.harness import CHECKS, Served, libnbd


def check_names() -> list[str]:
    """Names of the checks, without importing libnbd."""
    listed = CHECKS.read_text().partition("CHECKS = (")[2].partition(")")[0]
    return [line.strip(' ,"') for line in listed.splitlines() if line]


@pytest.mark.parametrize("name", check_names())
def test_libnbd(served: Served, name: str) -> None:
    libnbd(name, served.uri)
