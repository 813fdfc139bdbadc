"""Clients that do what no client should: the server goes on, keeps nothing of theirs, and serves the others."""

import logging
import resource
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
import trio.testing

from nbdvde.disk import Disk
from nbdvde.exports import Export, Exports
from nbdvde.limits import Limits
from nbdvde.listeners import TcpAddress, UnixAddress, open_listener
from nbdvde.memory import MemoryDisk
from nbdvde.protocol.constants import Command, Option
from nbdvde.server import Server
from tests.protocol.client import FLAGS, Client, info_data, meta_data, option, request
from tests.serving import Connect, running
from tests.test_session import SlowDisk

READ, WRITE, FLUSH, TRIM, STATUS = Command.READ, Command.WRITE, Command.FLUSH, Command.TRIM, Command.BLOCK_STATUS
SIZE = 1 << 24
HANDSHAKE = (
    FLAGS
    + option(Option.STRUCTURED_REPLY)
    + option(Option.SET_META_CONTEXT, meta_data("disk", "base:allocation"))
    + option(Option.GO, info_data("disk"))
)
REQUESTS = (
    request(WRITE, 1 << 20, payload=bytes(range(100)))
    + request(READ, 1 << 20, 5000)
    + request(STATUS, 0, SIZE)
    + request(TRIM, 1 << 20, 4096)
    + request(WRITE, SIZE, payload=b"past the end")
    + request(FLUSH)
    + request(Command.DISC)
)
SESSION = HANDSHAKE + REQUESTS


class Place:
    """A server with one honest client."""

    def __init__(self, server: Server, honest: Client, ended: trio.Event) -> None:
        self.server, self.honest, self.ended = server, honest, ended
        self._tasks = trio.lowlevel.current_statistics().tasks_living

    async def check_honest(self) -> None:
        """It is served as if it were alone."""
        assert (await self.honest.ask(WRITE, 0, payload=b"honest")).error == 0
        assert (await self.honest.ask(READ, 0, 6)).bytes == b"honest"

    async def check_nothing_left(self) -> None:
        """No task, no memory and no request of anybody else; the honest client is still there."""
        while len(self.server.connections) > 1 or trio.lowlevel.current_statistics().tasks_living > self._tasks:
            await trio.lowlevel.checkpoint()
        (connection,) = self.server.connections
        assert connection.session is not None
        assert connection.session.requests_in_flight.used == 0
        assert self.server._shared.memory.used == 0
        assert not self.server._shared.memory.dependents


@asynccontextmanager
async def place(
    address: UnixAddress | TcpAddress, connect: Connect, *, disk: Disk | None = None, limits: Limits | None = None
) -> AsyncIterator[Place]:
    server = Server(Exports([Export("disk", disk or MemoryDisk(SIZE))]), limits=limits or Limits(linger_s=0))
    listener = await open_listener(address)
    async with running(server, listener, patience_s=1000) as ended:
        (bound,) = listener.bound
        honest = connect(bound)
        await honest.go("disk")
        await trio.testing.wait_all_tasks_blocked()
        yield Place(server, honest, ended)


@pytest.mark.parametrize("slow", [False, True])
async def test_a_client_may_leave_at_every_byte_of_a_session(
    address: UnixAddress, connect: Connect, slow: bool, caplog: pytest.LogCaptureFixture
) -> None:
    disk = SlowDisk(SIZE) if slow else None
    if disk is not None:
        disk.go.set()
    async with place(address, connect, disk=disk) as here:
        for length in range(len(SESSION) + 1):
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.connect(str(address.path))
                stranger.sendall(SESSION[:length])
            if not length % 16:
                await trio.testing.wait_all_tasks_blocked()
                await here.check_honest()
        await here.check_nothing_left()
        await here.check_honest()
        assert here.server.metrics.protocol_errors == 0
    assert not caplog.records


async def test_a_client_that_breaks_off_at_every_request_over_tcp(connect: Connect) -> None:
    """With a reset, while answers are on their way (nbdkit 1.32.5 ended there)."""
    async with place(TcpAddress("127.0.0.1", 0), connect) as here:
        where = here.honest.socket.getpeername()
        for length in range(len(HANDSHAKE), len(SESSION) + 1):
            stranger = socket.create_connection(where)
            stranger.sendall(SESSION[:length])
            if length % 2:
                await trio.testing.wait_all_tasks_blocked()
            reset(stranger)
        await here.check_nothing_left()
        await here.check_honest()


def reset(sock: socket.socket) -> None:
    """Close with a reset instead of an end."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


async def test_a_client_that_reads_nothing_keeps_nobody_from_being_served(
    address: UnixAddress, connect: Connect
) -> None:
    disk = MemoryDisk(SIZE)
    disk.write_nowait(0, memoryview(bytearray(b"x" * SIZE)), owned=True)
    limits = Limits(linger_s=0, bytes_in_flight=8 << 20)
    async with place(address, connect, disk=disk, limits=limits) as here:
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(str(address.path))
            stranger.setblocking(False)
            stranger.send(HANDSHAKE)
            for _ in range(1500):
                try:
                    stranger.send(request(READ, 0, 4 << 20) * 100)
                except BlockingIOError:
                    break
                await trio.testing.wait_all_tasks_blocked()
            else:
                pytest.fail("4 MiB of requests were received from who does not read")
            assert here.server._shared.memory.used < (8 << 20) + (4 << 20) + SIZE
            await here.check_honest()
        await here.check_nothing_left()
        await here.check_honest()


async def test_a_byte_a_second_is_too_slow_for_a_handshake(
    address: UnixAddress, connect: Connect, mock_clock: trio.testing.MockClock
) -> None:
    async with place(address, connect) as here:
        stranger = connect(address)
        seconds = 0
        for byte in HANDSHAKE:
            await stranger.stream.send_all(bytes([byte]))
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(1)
            seconds += 1
            await trio.testing.wait_all_tasks_blocked()
            if len(here.server.connections) == 1:
                break
        assert seconds == 10
        await here.check_nothing_left()
        await here.check_honest()


async def test_a_byte_a_second_is_served_and_holds_up_nobody(
    address: UnixAddress, connect: Connect, mock_clock: trio.testing.MockClock
) -> None:
    async with place(address, connect) as here:
        stranger = connect(address)
        await stranger.go("disk")
        data = request(WRITE, 1 << 20, payload=bytes(range(200)), cookie=7)
        for byte in data:
            await stranger.stream.send_all(bytes([byte]))
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(1)
            await here.check_honest()
        reply = await stranger.reply()
        assert (reply.cookie, reply.error) == (7, 0)
        assert (await here.honest.ask(READ, 1 << 20, 200)).bytes == bytes(range(200))
        await stranger.stream.aclose()
        await here.check_nothing_left()


TLS_HELLO = bytes.fromhex("16030100c8010000c40303") + bytes(range(192))
SCANS: dict[str, bytes] = {
    "connect": b"",
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "TLS": TLS_HELLO,
    "SSH": b"SSH-2.0-OpenSSH_9.2\r\n",
    "zeroes": bytes(64),
    "wrong option": FLAGS + b"IHAVEOPS" + bytes(100),
    "wrong request": HANDSHAKE + bytes(100),
}


@pytest.mark.parametrize("end", [socket.socket.close, reset])
async def test_port_scans_do_not_flood_the_log(
    connect: Connect, caplog: pytest.LogCaptureFixture, end: Callable[[socket.socket], None]
) -> None:
    caplog.set_level(logging.INFO)
    async with place(TcpAddress("127.0.0.1", 0), connect) as here:
        where = here.honest.socket.getpeername()
        for _ in range(20):
            for data in SCANS.values():
                stranger = socket.create_connection(where)
                stranger.sendall(data)
                await trio.testing.wait_all_tasks_blocked()
                end(stranger)
        await here.check_nothing_left()
        await here.check_honest()
        assert here.server.metrics.protocol_errors > 50
    assert [record.levelno for record in caplog.records] == [logging.INFO]


async def test_lines_kept_back_are_counted(
    connect: Connect, caplog: pytest.LogCaptureFixture, mock_clock: trio.testing.MockClock
) -> None:
    caplog.set_level(logging.INFO)
    async with place(TcpAddress("127.0.0.1", 0), connect) as here:
        for pause in (0, 0, 0, 11):
            mock_clock.jump(pause)
            with socket.create_connection(here.honest.socket.getpeername()) as stranger:
                stranger.sendall(SCANS["HTTP"])
                await trio.testing.wait_all_tasks_blocked()
    first, second = (record.getMessage() for record in caplog.records)
    assert first.endswith("unknown bits in 0x47455420")
    assert second.endswith("; 2 more like it since the last line")


STATES: dict[str, bytes] = {
    "silent": b"",
    "flags": FLAGS,
    "half an option": FLAGS + option(Option.GO, info_data("disk"))[:20],
    "transmission": HANDSHAKE,
    "half a header": HANDSHAKE + request(READ, 0, 1)[:10],
    "half a payload": HANDSHAKE + request(WRITE, 0, payload=bytes(200_000))[:100_000],
    "answers not taken": HANDSHAKE + request(READ, 0, SIZE),
}
"""Where a client may stop."""
STALLED = 1000


@pytest.fixture
def many_files() -> None:
    """Two for each connection, where the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * STALLED + 200
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))


@pytest.mark.usefixtures("many_files")
async def test_a_thousand_stalled_clients_hold_up_neither_others_nor_a_stop_cve_2024_7409(
    address: UnixAddress, connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    """QEMU's server could be stopped only with difficulty; since then it has a deadline for the handshake."""
    autojump_clock.autojump_threshold = float("inf")
    disk = MemoryDisk(SIZE)
    disk.write_nowait(0, memoryview(bytearray(b"x" * SIZE)), owned=True)
    limits = replace(Limits(), connections=2 * STALLED)
    async with place(address, connect, disk=disk, limits=limits) as here:
        states = list(STATES.values())
        for number in range(STALLED):
            await connect(address).stream.send_all(states[number % len(states)])
        await trio.testing.wait_all_tasks_blocked()
        assert len(here.server.connections) == STALLED + 1
        assert here.server._shared.memory.used <= limits.server_bytes_in_flight + 2 * SIZE
        await here.check_honest()
        start = trio.current_time()
        autojump_clock.autojump_threshold = 0.01
        here.server.stop()
        await here.ended.wait()
        assert trio.current_time() - start < 2
