"""Disks served by the real program."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.interop.harness import Served, serve_image, serve_memory

SIZE = 64 << 20
Serve = Callable[[int], Served]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Serve a new encrypted image of so many bytes; stopped cleanly and checked at the end."""
    with ExitStack() as stack:
        yield lambda size: stack.enter_context(closing(serve_image(tmp_path, size)))


@pytest.fixture(params=["memory", "image"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    """An empty disk of 64 MiB, in memory or in an encrypted image; stopped cleanly and checked at the end."""
    with closing({"memory": serve_memory, "image": serve_image}[request.param](tmp_path, SIZE)) as disk:
        yield disk
