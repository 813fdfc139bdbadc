"""Standard input and output as a connection."""

import os

import pytest
import trio
import trio.testing

from nbdvde import stdio

ORDERS = 16
"""Attempts, for trio runs tasks in any order."""


@pytest.mark.parametrize("steps", [*range(8)] * ORDERS)
async def test_a_client_that_vanishes_ends_its_connection_only(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both pipes break, at almost the same time, while others may be served."""
    our_in, their_out = os.pipe()
    their_in, our_out = os.pipe()
    monkeypatch.setattr(stdio, "_IN", our_in)
    monkeypatch.setattr(stdio, "_OUT", our_out)
    async with stdio.standard_streams() as sock:
        await trio.testing.wait_all_tasks_blocked()
        sock.sendall(b"nobody reads this")
        os.close(their_in)
        for _ in range(steps):
            await trio.lowlevel.checkpoint()
        os.close(their_out)
        await trio.testing.wait_all_tasks_blocked()
        assert sock.recv(1) == b""
        sock.close()
    os.close(our_in)
    os.close(our_out)
