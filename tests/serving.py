"""Servers on real sockets, and clients of theirs."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from nbdvde.listeners import Address, Listener, TcpAddress, UnixAddress
from nbdvde.server import Server
from tests.protocol.client import Client


class Connect:
    """Makes clients, and closes them when the test is over."""

    def __init__(self) -> None:
        self.clients: list[Client] = []

    def __call__(self, address: Address) -> Client:
        if isinstance(address, UnixAddress):
            family, where = socket.AF_UNIX, str(address.path)
        else:
            assert isinstance(address, TcpAddress)
            family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
            where = (address.host, address.port)  # type: ignore[assignment]
        sock = socket.socket(family)
        try:
            sock.connect(where)
        except OSError:
            sock.close()
            raise
        self.clients.append(Client(sock))
        return self.clients[-1]


@asynccontextmanager
async def running(server: Server, *listeners: Listener, patience_s: float = 20) -> AsyncIterator[trio.Event]:
    """The server in the background; the event tells when it ended. `patience_s` ends a test that hangs."""
    ended = trio.Event()

    async def run(task_status: trio.TaskStatus[None]) -> None:
        await server.run(listeners, task_status=task_status)
        ended.set()

    with trio.fail_after(patience_s):
        async with trio.open_nursery() as nursery:
            await nursery.start(run)
            yield ended
            server.stop()
