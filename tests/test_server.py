"""Listeners and clients over real sockets."""

import errno
import logging
import os
import socket
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from nbdvde.disk import Disk
from nbdvde.errors import ExitCode, NetworkError, UsageError
from nbdvde.exports import Access, Export, Exports
from nbdvde.limits import SMALL_BYTES, Limits
from nbdvde.listeners import (
    ANY_CID,
    Address,
    PassedAddress,
    StdioAddress,
    TcpAddress,
    UnixAddress,
    VsockAddress,
    open_listener,
    parse_listen,
)
from nbdvde.memory import MemoryDisk
from nbdvde.protocol.connection import Batch
from nbdvde.protocol.constants import Command, Option, OptionReply
from nbdvde.server import Server
from tests.protocol.client import info_data, request
from tests.serving import Connect, running
from tests.test_session import SlowDisk

READ, WRITE, DISC = int(Command.READ), int(Command.WRITE), int(Command.DISC)


IMPATIENT = Limits(linger_s=0)


def server_of(disk: Disk | None = None, limits: Limits = IMPATIENT) -> Server:
    return Server(Exports([Export("disk", disk or MemoryDisk(1 << 20))], default="disk"), limits=limits)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unix:/run/nbd.sock", UnixAddress(Path("/run/nbd.sock"))),
        ("unix:a:b", UnixAddress(Path("a:b"))),
        ("localhost:10809", TcpAddress("localhost", 10809)),
        ("127.0.0.1:0", TcpAddress("127.0.0.1", 0)),
        ("[::1]:10809", TcpAddress("::1", 10809)),
        ("[fe80::1%eth0]:1", TcpAddress("fe80::1%eth0", 1)),
        ("vsock:2:10809", VsockAddress(2, 10809)),
        ("vsock:any:4294967295", VsockAddress(ANY_CID, 4294967295)),
        ("systemd", PassedAddress()),
        ("stdio", StdioAddress()),
    ],
)
def test_listen_addresses(text: str, expected: Address) -> None:
    assert parse_listen(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "unix:",
        "unix:a\0b",
        "localhost",
        "localhost:",
        ":1",
        "[]:1",
        "::1:1",
        "a:65536",
        "a:-1",
        "a:b",
        "a:²",
        "vsock:",
        "vsock:1",
        "vsock:a:1",
        "vsock:4294967296:1",
        "vsock:1:4294967296",
        "systemd:",
    ],
)
def test_bad_listen_addresses(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_listen(text)
    assert "\n" not in str(caught.value)


async def test_a_unix_socket_from_first_client_to_stop(address: UnixAddress, connect: Connect) -> None:
    listener = await open_listener(address)
    assert listener.bound == [address]
    server = server_of()
    async with running(server, listener) as ended:
        client = connect(address)
        await client.go("disk", contexts=("base:allocation",))
        assert (await client.ask(WRITE, 0, payload=b"hello")).error == 0
        (connection,) = server.connections
        assert (connection.number, connection.peer) == (1, "unix")
        assert connection.visitor.export is not None
        assert connection.visitor.export.name == "disk"
        assert server.metrics.connections == 1
        await client.send(DISC)
        assert await client.at_end()
        await trio.testing.wait_all_tasks_blocked()
        assert server.connections == []
        server.stop()
        await ended.wait()
    assert not address.path.exists()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
async def test_tcp(host: str, connect: Connect) -> None:
    listener = await open_listener(TcpAddress(host, 0))
    server = server_of()
    places: list[TcpAddress] = []
    async with running(server, listener):
        for bound in listener.bound:
            client = connect(bound)
            await client.go("", structured=False)
            assert (await client.ask(READ, 0, 5)).bytes == bytes(5)
            assert isinstance(bound, TcpAddress)
            assert server.connections[-1].peer.startswith(("127.0.0.1:", "[::1]:"))
            places.append(bound)
    for bound in places:
        with pytest.raises(ConnectionRefusedError):
            connect(bound)


async def test_nagle_is_off(connect: Connect) -> None:
    listener = await open_listener(TcpAddress("127.0.0.1", 0))
    server = server_of()
    async with running(server, listener):
        await connect(listener.bound[0]).go()
        (connection,) = server.connections
        assert connection.transport is not None
        assert connection.transport.detach().getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert connection.transport.detach().getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert connection.transport.detach().getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60


async def test_vsock_is_listened_on_or_said_to_be_missing() -> None:
    any_port = VsockAddress(ANY_CID, 4294967295)
    try:
        listener = await open_listener(any_port)
    except NetworkError as error:
        assert "vsock" in str(error)  # noqa: PT017 - a machine has it or has not
        return
    (bound,) = listener.bound
    assert isinstance(bound, VsockAddress)
    assert bound.port < any_port.port
    listener.close()


async def test_two_servers_cannot_have_one_port() -> None:
    listener = await open_listener(TcpAddress("127.0.0.1", 0))
    with pytest.raises(NetworkError) as caught:
        await open_listener(listener.bound[0])
    assert caught.value.exit_code == ExitCode.NETWORK
    assert "address already in use" in str(caught.value)
    assert caught.value.hint
    listener.close()


async def test_a_live_unix_socket_is_refused_and_stays(address: UnixAddress) -> None:
    listener = await open_listener(address)
    with pytest.raises(NetworkError, match="address already in use"):
        await open_listener(address)
    assert address.path.exists()
    listener.close()


async def test_a_stale_unix_socket_is_replaced(address: UnixAddress, connect: Connect) -> None:
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(address.path))
    listener = await open_listener(address)
    async with running(server_of(), listener):
        await connect(address).go()


async def test_a_file_in_the_way_is_refused_and_stays(address: UnixAddress) -> None:
    address.path.write_text("precious")
    with pytest.raises(NetworkError, match="not a socket"):
        await open_listener(address)
    assert address.path.read_text() == "precious"


@pytest.mark.parametrize(
    "text",
    [
        "unix:/no/such/directory/x",
        "256.0.0.1:1",
        "192.0.2.1:1",
        "unix:/" + "x" * 200,
        "x" * 70 + ":1",
        "ü..x:1",
        "a\0b:1",
    ],
)
async def test_what_cannot_be_listened_on_is_one_line(text: str) -> None:
    address = parse_listen(text)
    assert not isinstance(address, StdioAddress)
    with pytest.raises(NetworkError) as caught:
        await open_listener(address)
    assert "\n" not in str(caught.value)


async def test_a_socket_another_server_took_over_is_left_alone(address: UnixAddress) -> None:
    first = await open_listener(address)
    address.path.unlink()
    second = await open_listener(address)
    first.close()
    assert stat.S_ISSOCK(address.path.lstat().st_mode)
    second.close()
    assert not address.path.exists()


async def test_clients_above_the_limit_are_sent_away(address: UnixAddress, connect: Connect) -> None:
    server = server_of(limits=replace(IMPATIENT, connections=2))
    async with running(server, await open_listener(address)):
        clients = [connect(address) for _ in range(2)]
        for client in clients:
            await client.go()
        assert await connect(address).at_end()
        assert server.metrics.connections_refused == 1
        await clients[0].stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        await connect(address).go()


async def test_clients_sent_away_do_not_flood_the_log(
    address: UnixAddress, connect: Connect, mock_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    server = server_of(limits=replace(IMPATIENT, connections=0))
    async with running(server, await open_listener(address)):
        for lines in (1, 2):
            mock_clock.jump(10 * (lines - 1))
            for _ in range(5):
                assert await connect(address).at_end()
            assert len(caplog.records) == lines
        assert server.metrics.connections_refused == 10


async def test_a_stalled_handshake_ends_at_its_deadline(
    address: UnixAddress, autojump_clock: trio.testing.MockClock, connect: Connect
) -> None:
    server = server_of()
    async with running(server, await open_listener(address)):
        client = connect(address)
        await client.greet()
        await trio.testing.wait_all_tasks_blocked()
        start = trio.current_time()
        assert await client.at_end()
        assert trio.current_time() - start == pytest.approx(10)


async def test_transmission_has_no_deadline(
    address: UnixAddress, autojump_clock: trio.testing.MockClock, connect: Connect
) -> None:
    async with running(server_of(), await open_listener(address)):
        client = connect(address)
        await client.go()
        with trio.move_on_after(15):
            await trio.sleep(11)
        assert (await client.ask(READ, 0, 1)).bytes == b"\0"


async def test_stop_does_not_wait_for_stalled_strangers(address: UnixAddress, connect: Connect) -> None:
    server = server_of(limits=replace(IMPATIENT, handshake_s=1000, stop_s=1000))
    async with running(server, await open_listener(address)) as ended:
        for _ in range(300):
            stranger = connect(address)
            await stranger.exactly(18)
        assert len(server.connections) == 300
        server.stop()
        await ended.wait()
        assert server.connections == []


async def test_stop_answers_what_is_in_flight_and_then_closes(address: UnixAddress, connect: Connect) -> None:
    disk = SlowDisk(1 << 20)
    server = server_of(disk)
    async with running(server, await open_listener(address)) as ended:
        client = connect(address)
        await client.go()
        await client.send(WRITE, 0, payload=b"x", cookie=9)
        await trio.testing.wait_all_tasks_blocked()
        server.stop()
        await trio.testing.wait_all_tasks_blocked()
        assert not ended.is_set()
        assert not address.path.exists()
        disk.go.set()
        reply = await client.reply()
        assert (reply.cookie, reply.error) == (9, 0)
        assert await client.at_end()
        await client.stream.aclose()
        await ended.wait()


async def test_a_client_that_keeps_its_side_open_does_not_hold_up_the_stop(
    address: UnixAddress, autojump_clock: trio.testing.MockClock, connect: Connect
) -> None:
    server = server_of(limits=Limits())
    async with running(server, await open_listener(address)) as ended:
        client = connect(address)
        await client.go()
        start = trio.current_time()
        server.stop()
        await ended.wait()
        assert trio.current_time() - start == pytest.approx(1)


async def test_a_stop_that_cannot_finish_breaks_off(
    address: UnixAddress, autojump_clock: trio.testing.MockClock, connect: Connect
) -> None:
    server = server_of(SlowDisk(1 << 20))
    async with running(server, await open_listener(address)) as ended:
        client = connect(address)
        await client.go()
        await client.send(READ, 0, 1)
        await trio.testing.wait_all_tasks_blocked()
        start = trio.current_time()
        server.stop()
        await ended.wait()
        assert trio.current_time() - start == pytest.approx(10)


async def test_bad_clients_end_alone_cve_2013_7441(address: UnixAddress, connect: Connect) -> None:
    """nbd-server ended when one client failed to agree with it."""
    server = server_of()
    async with running(server, await open_listener(address)):
        good = connect(address)
        await good.go()
        for junk in (b"", b"GET / HTTP/1.1\r\n\r\n" * 10, b"\x80" * 10, b"\0\0\0\3" + b"\xff" * 100):
            bad = connect(address)
            await bad.stream.send_all(junk)
            bad.socket.shutdown(socket.SHUT_WR)
            with pytest.raises((trio.BrokenResourceError, EOFError)):
                await bad.exactly(1000)
            await bad.stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert server.metrics.protocol_errors == 3
        assert (await good.ask(READ, 0, 1)).bytes == b"\0"


async def test_a_bug_met_by_one_client_ends_only_that_client(
    address: UnixAddress, caplog: pytest.LogCaptureFixture, connect: Connect
) -> None:
    class Buggy(Exports):
        def __iter__(self) -> Iterator[Export]:
            raise ZeroDivisionError

    server = Server(Buggy([Export("disk", MemoryDisk(512))]), limits=IMPATIENT)
    async with running(server, await open_listener(address)):
        bad, good = connect(address), connect(address)
        await good.go("disk")
        await bad.greet()
        with pytest.raises(EOFError):
            await bad.option(Option.LIST)
        assert (await good.ask(READ, 0, 1)).bytes == b"\0"
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


async def test_running_out_of_descriptors_is_a_pause(
    address: UnixAddress, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture, connect: Connect
) -> None:
    listener = await open_listener(address)

    class Exhausted(socket.socket):
        failures = 3

        def accept(self) -> tuple[socket.socket, object]:
            if self.failures:
                self.failures -= 1
                raise OSError(errno.EMFILE, "too many open files")
            return super().accept()

    exhausted = Exhausted(fileno=os.dup(listener.sockets[0].fileno()))
    exhausted.setblocking(False)
    for sock in listener.sockets:
        sock.close()
    listener.sockets = (exhausted,)
    async with running(server_of(), listener):
        start = trio.current_time()
        await connect(address).go()
        assert trio.current_time() - start == pytest.approx(0.3)
    assert len(caplog.records) == 1


async def test_no_export_no_transmission(address: UnixAddress, connect: Connect) -> None:
    async with running(server_of(), await open_listener(address)):
        client = connect(address)
        await client.greet()
        assert (await client.option(Option.GO, info_data("other")))[-1][0] >> 31
        assert (await client.option(Option.GO, info_data("")))[-1] == (1, b"")
        assert (await client.ask(READ, 0, 1)).bytes == b"\0"


@pytest.mark.parametrize("changed", [False, True])
async def test_who_is_at_a_standstill_while_memory_is_short_is_closed(
    address: UnixAddress, connect: Connect, mock_clock: trio.testing.MockClock, changed: bool
) -> None:
    """Eight clients that never read cannot keep a ninth from being served, with limits of a reload as well."""
    disk, listener = MemoryDisk(16 << 20), await open_listener(address)
    disk.write_nowait(0, memoryview(bytearray(b"x" * (16 << 20))), owned=True)
    limits = replace(IMPATIENT, server_bytes_in_flight=8 << 20, stall_s=5.0)
    server = server_of(disk, replace(limits, stall_s=1e6) if changed else limits)
    async with running(server, listener):
        await trio.testing.wait_all_tasks_blocked()
        server.change(limits, None)
        stalled = [connect(address) for _ in range(8)]
        for client in stalled:
            await client.go()
            for _ in range(4):
                await client.send(READ, 0, 4 << 20)
        honest = connect(address)
        await honest.go()
        await trio.testing.wait_all_tasks_blocked()
        memory = server._shared.memory
        assert memory.used >= memory.limit
        assert (await honest.ask(READ, 0, 4096)).bytes == b"x" * 4096, "who holds nothing does not wait"
        with trio.fail_after(4):
            mock_clock.jump(3)
            assert (await honest.ask(WRITE, 0, payload=bytes(4096))).error == 0
            mock_clock.jump(0.5)
        assert server.metrics.stalled == 0
        mock_clock.jump(2)
        while server.metrics.connections > 1:
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(1)
        assert server.metrics.stalled == 8
        assert memory.used == 0
        assert (await honest.ask(READ, 0, 4096)).bytes == bytes(4096)


async def test_the_memory_of_many_clients_that_never_read_is_bounded(
    address: UnixAddress, connect: Connect, mock_clock: trio.testing.MockClock
) -> None:
    disk, listener, large = MemoryDisk(8 << 20), await open_listener(address), 8 << 20
    disk.write_nowait(0, memoryview(bytearray(b"x" * large)), owned=True)
    limits = replace(IMPATIENT, server_bytes_in_flight=8 << 20, stall_s=0.1, batch=Batch(read_bytes=1 << 20))
    server = server_of(disk, limits)
    async with running(server, listener):
        memory = server._shared.memory
        for _ in range(24):
            client = connect(address)
            await client.go()
            for _ in range(8):
                await client.send(READ, 0, large)
            await trio.testing.wait_all_tasks_blocked()
            assert memory.used <= memory.limit + large, "the limit and one batch"
        assert memory.used >= memory.limit
        honest = connect(address)
        await honest.go()
        assert (await honest.ask(READ, 0, SMALL_BYTES)).bytes == b"x" * SMALL_BYTES
        await honest.send(READ, 0, SMALL_BYTES + 1)
        while server.metrics.connections > 1:
            await trio.testing.wait_all_tasks_blocked()
            assert memory.used <= memory.limit + large
            mock_clock.jump(0.2)
        assert (await honest.reply()).bytes == b"x" * (SMALL_BYTES + 1)
        assert server.metrics.stalled == 24
        assert memory.used == 0


@pytest.mark.parametrize(("sent", "closed"), [(200 << 10, 1), (1 << 20, 0)])
async def test_who_moves_too_little_for_what_it_holds_is_at_a_standstill(
    address: UnixAddress, connect: Connect, mock_clock: trio.testing.MockClock, sent: int, closed: int
) -> None:
    listener = await open_listener(address)
    server = server_of(MemoryDisk(16 << 20), replace(IMPATIENT, server_bytes_in_flight=1 << 20))
    async with running(server, listener):
        client, data = connect(address), request(WRITE, 0, payload=bytes(8 << 20))
        await client.go()
        await client.stream.send_all(data[: 1 << 16])
        await trio.testing.wait_all_tasks_blocked()
        await client.stream.send_all(data[1 << 16 : (1 << 16) + sent])
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(5)
        await trio.testing.wait_all_tasks_blocked()
        assert server.metrics.stalled == closed


async def test_a_slow_disk_is_not_the_fault_of_its_clients(
    address: UnixAddress, connect: Connect, mock_clock: trio.testing.MockClock
) -> None:
    disk, listener = SlowDisk(), await open_listener(address)
    server = server_of(disk, replace(IMPATIENT, server_bytes_in_flight=1 << 20, stall_s=5.0))
    async with running(server, listener):
        client = connect(address)
        await client.go()
        await client.send(READ, 0, 1 << 20)
        for _ in range(4):
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(4)
        assert server.metrics.stalled == 0
        disk.go.set()
        assert (await client.reply()).error == 0


async def test_who_began_to_haggle_and_fell_silent_holds_up_a_stop_for_a_moment_only(
    address: UnixAddress, autojump_clock: trio.testing.MockClock, connect: Connect
) -> None:
    server = server_of(limits=Limits(handshake_s=8, linger_s=2))
    async with running(server, await open_listener(address)) as ended:
        client = connect(address)
        await client.greet()
        await trio.testing.wait_all_tasks_blocked()
        start = trio.current_time()
        server.stop()
        assert await client.at_end()
        await ended.wait()
        assert trio.current_time() - start == pytest.approx(2)


async def test_who_haggles_during_a_stop_is_told(address: UnixAddress, connect: Connect) -> None:
    listener = await open_listener(address)
    server = server_of(limits=Limits(linger_s=5))
    async with running(server, listener) as ended:
        haggling, silent = connect(address), connect(address)
        await haggling.greet()
        await trio.testing.wait_all_tasks_blocked()
        server.stop()
        await trio.testing.wait_all_tasks_blocked()
        assert [reply for reply, _ in await haggling.option(Option.LIST)] == [OptionReply.ERR_SHUTDOWN]
        assert [reply for reply, _ in await haggling.option(Option.GO, info_data(""))] == [OptionReply.ERR_SHUTDOWN]
        assert [reply for reply, _ in await haggling.option(Option.ABORT)] == [OptionReply.ACK]
        assert await haggling.at_end()
        await silent.exactly(18)
        assert await silent.at_end()
        with trio.fail_after(4):
            await ended.wait()


async def test_vsock_where_the_host_has_it() -> None:
    try:
        socket.socket(socket.AF_VSOCK).close()
    except (OSError, AttributeError):
        with pytest.raises(NetworkError):
            await open_listener(VsockAddress(ANY_CID, 10809))
        return
    listener = await open_listener(VsockAddress(ANY_CID, 10809))
    assert listener.bound == [VsockAddress(ANY_CID, 10809)]
    listener.close()


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"LISTEN_FDS": "1", "LISTEN_PID": "1"},
        {"LISTEN_FDS": "0", "LISTEN_PID": str(os.getpid())},
        {"LISTEN_FDS": "x", "LISTEN_PID": str(os.getpid())},
    ],
)
async def test_nothing_passed(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LISTEN_FDS", "LISTEN_PID"):
        monkeypatch.setenv(name, variables.get(name, ""))
    with pytest.raises(NetworkError, match="passed no sockets"):
        await open_listener(PassedAddress())
    assert "LISTEN_FDS" not in os.environ


async def test_one_address_cannot_take_all_connections(connect: Connect) -> None:
    listener = await open_listener(TcpAddress("127.0.0.1", 0))
    server = server_of(limits=replace(IMPATIENT, address_connections=2))
    async with running(server, listener):
        clients = [connect(listener.bound[0]) for _ in range(3)]
        await clients[0].greet()
        await clients[1].greet()
        assert await clients[2].at_end()
        assert server.metrics.connections_refused == 1
        clients[0].socket.close()
        await trio.testing.wait_all_tasks_blocked()
        await connect(listener.bound[0]).greet()


async def test_clients_of_a_unix_socket_have_no_address(address: UnixAddress, connect: Connect) -> None:
    server = server_of(limits=replace(IMPATIENT, address_connections=1))
    async with running(server, await open_listener(address)):
        for _ in range(3):
            await connect(address).greet()


async def test_exports_for_some_addresses(connect: Connect) -> None:
    listener = await open_listener(TcpAddress("localhost", 0))
    exports = Exports([Export("disk", MemoryDisk(512), access=Access.parse(["::1"]))], default="disk")
    async with running(Server(exports, limits=IMPATIENT), listener):
        for place in listener.bound:
            assert isinstance(place, TcpAddress)
            client = connect(place)
            await client.greet()
            allowed = place.host == "::1"
            expected = OptionReply.ACK if allowed else OptionReply.ERR_UNKNOWN
            assert (await client.option(Option.GO, info_data("disk")))[-1][0] == expected


async def test_an_export_for_one_client_at_a_time(address: UnixAddress, connect: Connect) -> None:
    exports = Exports([Export("disk", MemoryDisk(512), access=Access(connections=1))], default="disk")
    async with running(Server(exports, limits=IMPATIENT), await open_listener(address)):
        first, second = connect(address), connect(address)
        await first.go()
        await second.greet()
        assert (await second.option(Option.GO, info_data("disk")))[-1][0] == OptionReply.ERR_POLICY
        first.socket.close()
        await trio.testing.wait_all_tasks_blocked()
        assert (await second.option(Option.GO, info_data("disk")))[-1][0] == OptionReply.ACK


async def test_idle_clients_are_disconnected(
    address: UnixAddress, autojump_clock: trio.testing.MockClock, connect: Connect
) -> None:
    slow = SlowDisk()
    exports = Exports([Export("disk", MemoryDisk(512)), Export("slow", slow)])
    async with running(Server(exports, limits=replace(IMPATIENT, idle_s=8)), await open_listener(address)):
        idle, busy, waiting = connect(address), connect(address), connect(address)
        await idle.go("disk")
        await busy.go("disk")
        await waiting.go("slow")
        await waiting.send(READ, 0, 512)
        for _ in range(6):
            assert (await busy.ask(READ, 0, 1)).error == 0
            await trio.sleep(2)
        assert await idle.at_end()
        slow.go.set()
        assert (await waiting.reply()).error == 0


class SlowFlush(MemoryDisk):
    """A flush takes half a minute."""

    def flush_nowait(self, mark: int) -> bool:
        return False

    async def flush(self, mark: int | None = None, *, alone: bool = False) -> None:
        await trio.sleep(30)


async def test_who_waits_for_a_flush_is_not_idle(
    address: UnixAddress, autojump_clock: trio.testing.MockClock, connect: Connect
) -> None:
    """The flush of a lone client, which has no task of its own, either."""
    exports = Exports([Export("disk", SlowFlush(512))])
    async with running(
        Server(exports, limits=replace(IMPATIENT, idle_s=8)), await open_listener(address), patience_s=99
    ):
        client = connect(address)
        await client.go("disk")
        for _ in range(20):
            assert (await client.ask(READ, 0, 1)).error == 0
        assert (await client.ask(int(Command.FLUSH))).error == 0
        assert (await client.ask(READ, 0, 1)).error == 0


async def test_limits_change_for_those_who_come_later(address: UnixAddress, connect: Connect) -> None:
    server = server_of()
    async with running(server, await open_listener(address)):
        first = connect(address)
        await first.go()
        server.change(replace(IMPATIENT, connections=1, server_bytes_in_flight=1 << 20), None)
        assert await connect(address).at_end()
        assert (await first.ask(WRITE, 0, payload=bytes(1 << 20))).error == 0
        assert (await first.ask(READ, 0, 4)).bytes == bytes(4)
