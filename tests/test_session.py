"""One client over a socket pair: what is answered, when, and what a bad client cannot do."""

import itertools
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
import trio.testing

from nbdvde.answers import MAX_EXTENTS
from nbdvde.disk import ALLOCATION, ALLOCATION_DEPTH, Buffer, Disk, Piece
from nbdvde.errors import DamageError, NbdErrno, NoSpaceError
from nbdvde.exports import LOCAL, Exports, Peer, Visitor
from nbdvde.limits import SMALL_BYTES, Budget, Limits, Shared
from nbdvde.memory import MemoryDisk
from nbdvde.metrics import Metrics
from nbdvde.protocol.connection import LARGE_PAYLOAD
from nbdvde.protocol.constants import MAX_PAYLOAD, Command, CommandFlag
from nbdvde.protocol.handshake import Handshake
from nbdvde.protocol.messages import ExportInfo, Negotiated, ProtocolError
from nbdvde.session import Session, negotiate
from nbdvde.transport import BufferPool, Transport
from tests.protocol.client import Client, request, status_filter

SIZE = 1 << 24
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, _ = (int(flag) for flag in CommandFlag)
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = (int(command) for command in Command)


class SlowDisk(Disk):
    """A memory disk whose `*_nowait` forms decline, and whose other forms wait until `go` is set, and record."""

    def __init__(self, size: int = SIZE) -> None:
        self.name, self.size, self.read_only = "slow", size, False
        self.memory = MemoryDisk(size)
        self.go = trio.Event()
        self.calls: list[tuple[object, ...]] = []
        self.error: Exception | None = None

    async def _wait(self, *call: object) -> None:
        self.calls.append(call)
        await self.go.wait()
        if self.error is not None:
            raise self.error

    def read_nowait(self, offset: int, length: int) -> Sequence[Piece] | None:
        return None

    async def read(self, offset: int, length: int) -> Sequence[Piece]:
        await self._wait("read", offset, length)
        return self.memory.read_nowait(offset, length)

    def write_nowait(self, offset: int, data: memoryview, *, owned: bool) -> bool:
        return False

    async def write(self, offset: int, data: memoryview, *, owned: bool = False) -> None:
        await self._wait("write", offset, len(data), owned)
        self.memory.write_nowait(offset, data, owned=owned)

    def zero_nowait(self, offset: int, length: int, *, allocate: bool) -> bool:
        return False

    async def zero(self, offset: int, length: int, *, allocate: bool = False) -> None:
        await self._wait("zero", offset, length, allocate)
        self.memory.zero_nowait(offset, length, allocate=allocate)

    async def status(self, context: str, offset: int, length: int, max_extents: int) -> list[tuple[int, int]]:
        await self._wait("status", offset, length, max_extents)
        return await self.memory.status(context, offset, length, max_extents)

    async def cache(self, offset: int, length: int) -> None:
        await self._wait("cache", offset, length)

    async def flush(self, mark: int | None = None, *, alone: bool = False) -> None:
        await self._wait("flush")


def shared(limits: Limits | None = None) -> Shared:
    return Shared(limits or Limits(), Metrics())


class Server:
    """A session with one client, started after the handshake."""

    def __init__(self, disk: Disk, common: Shared, negotiated: Negotiated) -> None:
        ours, theirs = socket.socketpair()
        self.shared = common
        self.transport = Transport(ours)
        buffer = self.shared.buffers.take()
        self.session = Session(self.transport, disk, negotiated, buffer, self.shared)
        self.client = Client(theirs)
        self.client.structured, self.client.extended = negotiated.structured, negotiated.extended
        self.failure: BaseException | None = None
        self.ended = trio.Event()

    async def run(self) -> None:
        try:
            await self.session.run()
        except (ProtocolError, trio.BrokenResourceError) as error:
            self.failure = error
        finally:
            self.transport.close()
            self.ended.set()


@asynccontextmanager
async def serving(
    disk: Disk, *, limits: Limits | None = None, structured: bool = True, contexts: tuple[str, ...] = (),
    common: Shared | None = None, wide: bool = False,
) -> AsyncIterator[Server]:  # fmt: skip
    negotiated = Negotiated(ExportInfo(disk.name, disk.size, disk.read_only), structured, contexts, extended=wide)
    server = Server(disk, common or shared(limits), negotiated)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run)
        yield server
        await server.client.stream.aclose()
        with trio.fail_after(5):
            await server.ended.wait()


BOTH = pytest.mark.parametrize("structured", [False, True])
SPEEDS = pytest.mark.parametrize("slow", [False, True])


def contents(disk: MemoryDisk, offset: int, length: int) -> bytes:
    return b"".join(map(bytes, disk.read_nowait(offset, length)))


def disk_of(slow: bool) -> MemoryDisk | SlowDisk:
    if not slow:
        return MemoryDisk(SIZE)
    disk = SlowDisk()
    disk.go.set()
    return disk


@pytest.mark.parametrize(("structured", "wide"), [(False, False), (True, False), (True, True)])
@SPEEDS
async def test_every_command(structured: bool, wide: bool, slow: bool) -> None:
    disk = disk_of(slow)
    contexts = (ALLOCATION,) if structured else ()
    async with serving(disk, structured=structured, contexts=contexts, wide=wide) as server:
        client = server.client
        page = bytes(range(256)) * 16
        assert (await client.ask(WRITE, 4000, payload=page, cookie=2**64 - 1)).cookie == 2**64 - 1
        assert (await client.ask(READ, 4000, 4096)).bytes == page
        assert (await client.ask(WRITE, 8000, payload=b"fua", flags=FUA)).error == 0
        assert (await client.ask(FLUSH)).error == 0
        assert (await client.ask(CACHE, 0, 4096)).error == 0
        assert (await client.ask(WRITE_ZEROES, 4001, 1)).error == 0
        assert (await client.ask(READ, 4000, 3)).bytes == b"\x00\x00\x02"
        assert (await client.ask(TRIM, 0, SIZE, flags=FUA)).error == 0
        assert (await client.ask(READ, 0, 5 << 20)).bytes == bytes(5 << 20)
        assert (await client.ask(WRITE_ZEROES, 0, 65536, flags=NO_HOLE | FUA)).error == 0
        if structured:
            status = await client.ask(BLOCK_STATUS, 0, 1 << 20)
            assert status.contexts == {0: [(65536, 2), ((1 << 20) - 65536, 3)]}
            assert (await client.ask(BLOCK_STATUS, 0, 1 << 20, flags=REQ_ONE)).contexts == {0: [(65536, 2)]}
        metrics = server.shared.metrics.snapshot()
    assert (metrics["requests_write"], metrics["request_bytes_write"], metrics["errors"]) == (2, 4099, 0)
    traffic = server.shared.metrics.traffic
    for command in (FLUSH, CACHE, WRITE_ZEROES, TRIM, *((BLOCK_STATUS,) if structured else ())):
        assert traffic.latency(command).count == traffic.requests[command] > 0
    assert traffic.latency(WRITE).count == 2


@SPEEDS
async def test_latencies(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request of a batch is timed, until its answer is sent; of lone ones one in four, which counts for all."""
    ticks = iter(range(0, 10**9, 10_000))
    for module in ("session", "answers"):
        monkeypatch.setattr(f"nbdvde.{module}.perf_counter_ns", lambda: next(ticks))
    async with serving(disk_of(slow)) as server:
        client, traffic = server.client, server.session.traffic
        parts = [request(READ, 0, 1), request(WRITE, 0, payload=b"x"), request(FLUSH), request(READ, 1, 1)]
        await client.stream.send_all(b"".join(parts))
        for _ in parts:
            await client.reply()
        await trio.testing.wait_all_tasks_blocked()
        assert [traffic.latency(command).count for command in (READ, WRITE, FLUSH)] == [2, 1, 1]
        assert all(traffic.latency(command).max_ns >= 10_000 for command in (READ, WRITE, FLUSH))
        for _ in range(9):
            await client.ask(READ, 0, 1)
        await trio.testing.wait_all_tasks_blocked()
        assert traffic.latency(READ).count == 11


async def test_a_lone_write_that_asks_only_for_a_flush_is_counted() -> None:
    async with serving(MemoryDisk(SIZE), wide=True) as server:
        assert (await server.client.ask(TRIM, 4096, 0, flags=FUA)).error == 0
        await trio.testing.wait_all_tasks_blocked()
        traffic = server.session.traffic
        assert traffic.requests[TRIM] == traffic.latency(TRIM).count == 1


@SPEEDS
async def test_every_failure_with_extended_headers(slow: bool) -> None:
    """The client checks that each reply repeats the offset of its request."""
    disk = disk_of(slow)
    async with serving(disk, wide=True) as server:
        assert (await server.client.ask(READ, SIZE, 4096)).error == NbdErrno.EINVAL
        assert (await server.client.ask(WRITE, SIZE - 1, payload=bytes(70_000))).error == NbdErrno.ENOSPC
        assert (await server.client.ask(BLOCK_STATUS, 512, 512)).error == NbdErrno.EINVAL
        assert (await server.client.ask(FLUSH, 7, payload=bytes(7))).error == NbdErrno.EINVAL
        assert (await server.client.ask(TRIM, 4096, 0, flags=FUA)).error == 0
        assert (await server.client.ask(READ, 4096, 0)).bytes == b""


async def test_status_of_the_contexts_that_are_asked_for() -> None:
    disk = MemoryDisk(SIZE)
    disk.zero_nowait(0, 65536, allocate=True)
    async with serving(disk, contexts=(ALLOCATION, ALLOCATION_DEPTH), wide=True) as server:
        rest = SIZE - 65536
        both = {0: [(65536, 2), (rest, 3)], 1: [(65536, 1), (rest, 0)]}
        assert (await server.client.ask(BLOCK_STATUS, 0, SIZE)).contexts == both
        for ids in ((0,), (1,), (1, 0)):
            reply = await server.client.ask(BLOCK_STATUS, 0, payload=status_filter(SIZE, *ids))
            assert reply.contexts == {number: both[number] for number in ids}
        reply = await server.client.ask(BLOCK_STATUS, 0, payload=status_filter(SIZE, 1), flags=REQ_ONE)
        assert reply.contexts == {1: [(65536, 1)]}


@BOTH
async def test_requests_of_length_zero_change_nothing_and_succeed(structured: bool) -> None:
    async with serving(MemoryDisk(SIZE), structured=structured) as server:
        for command in (READ, WRITE, TRIM, WRITE_ZEROES, CACHE):
            reply = await server.client.ask(command, 512, 0)
            assert (reply.error, reply.data) == (0, {})
        assert (await server.client.ask(READ, 0, 1)).bytes == b"\0"


@BOTH
async def test_refused_requests_keep_the_connection_in_step(structured: bool) -> None:
    async with serving(MemoryDisk(SIZE, read_only=True), structured=structured) as server:
        reply = await server.client.ask(WRITE, 0, payload=b"x" * 200000)
        assert (reply.error, reply.message) == (NbdErrno.EPERM, "the export is read-only" if structured else "")
        assert (await server.client.ask(READ, SIZE, 1)).error == NbdErrno.EINVAL
        assert (await server.client.ask(77)).error == NbdErrno.EINVAL
        assert (await server.client.ask(READ, 0, 4)).bytes == bytes(4)
        assert server.shared.metrics.traffic.errors == 3


async def test_holes_are_sent_as_holes_and_df_is_kept() -> None:
    disk = MemoryDisk(SIZE)
    disk.write_nowait(1 << 17, memoryview(b"x" * 65536), owned=False)
    async with serving(disk) as server:
        assert (await server.client.ask(READ, 0, 1 << 20)).holes == [(0, 1 << 17), (196608, (1 << 20) - 196608)]
        whole = await server.client.ask(READ, 0, 1 << 20, flags=DF)
        assert (len(whole.data), whole.holes) == (1, [])
        assert whole.bytes[1 << 17 : 196608] == b"x" * 65536


@SPEEDS
async def test_a_fast_zero_is_done_at_once_or_not_at_all(slow: bool) -> None:
    disk = disk_of(slow)
    memory = disk.memory if isinstance(disk, SlowDisk) else disk
    memory.write_nowait(0, memoryview(b"x" * 8), owned=False)
    async with serving(disk) as server:
        for flags in (FAST_ZERO, FAST_ZERO | FUA, FAST_ZERO | NO_HOLE):
            error = (await server.client.ask(WRITE_ZEROES, 0, 4, flags=flags)).error
            assert error == (NbdErrno.ENOTSUP if slow else 0)
        assert (await server.client.ask(READ, 0, 8)).bytes == (b"x" * 8 if slow else bytes(4) + b"xxxx")


async def test_a_fast_zero_longer_than_any_write_is_done() -> None:
    disk = SlowDisk(MAX_PAYLOAD + 1)
    disk.go.set()
    async with serving(disk) as server:
        assert (await server.client.ask(WRITE_ZEROES, 0, MAX_PAYLOAD, flags=FAST_ZERO)).error == NbdErrno.ENOTSUP
        assert (await server.client.ask(WRITE_ZEROES, 0, MAX_PAYLOAD + 1, flags=FAST_ZERO)).error == 0
        assert disk.calls == [("zero", 0, MAX_PAYLOAD + 1, False)]


@pytest.mark.parametrize("command", [WRITE, TRIM, WRITE_ZEROES])
async def test_fua_is_answered_after_the_flush_that_follows(command: int) -> None:
    disk = SlowDisk()
    disk.go.set()
    async with serving(disk) as server:
        payload = b"data" if command == WRITE else None
        assert (await server.client.ask(command, 0, 4, payload=payload, flags=FUA)).error == 0
        assert [call[0] for call in disk.calls] == ["write" if command == WRITE else "zero", "flush"]
        assert (await server.client.ask(CACHE, 0, 4, flags=FUA)).error == 0
        assert (await server.client.ask(READ, 0, 4, flags=FUA)).error == 0
        assert [call[0] for call in disk.calls[2:]] == ["cache", "read"]


async def test_a_fua_write_whose_flush_fails_is_answered_with_the_error() -> None:
    class Failing(MemoryDisk):
        def flush_nowait(self, mark: int) -> bool:
            return False

        async def flush(self, mark: int | None = None, *, alone: bool = False) -> None:
            raise DamageError("flush", "the device failed")

    async with serving(Failing(SIZE)) as server:
        for reply in (await server.client.ask(WRITE, 0, payload=b"x", flags=FUA), await server.client.ask(FLUSH)):
            assert (reply.error, reply.message) == (NbdErrno.EIO, "input/output error")


@BOTH
@pytest.mark.parametrize("command", [READ, WRITE, FLUSH, TRIM, WRITE_ZEROES, CACHE])
async def test_errors_of_the_disk_reach_the_client(structured: bool, command: int) -> None:
    disk = SlowDisk()
    disk.go.set()
    disk.error = NoSpaceError("image", "full", "make room")
    async with serving(disk, structured=structured) as server:
        length = 0 if command == FLUSH else 4
        reply = await server.client.ask(command, 0, length, payload=b"data" if command == WRITE else None)
        message = "no space left on device" if structured else ""
        assert (reply.error, reply.message) == (NbdErrno.ENOSPC, message), "what the image is called is not for clients"


@SPEEDS
async def test_a_bug_in_a_disk_is_an_io_error_and_logged(slow: bool, caplog: pytest.LogCaptureFixture) -> None:
    class Buggy(SlowDisk):
        def read_nowait(self, offset: int, length: int) -> Sequence[Piece] | None:
            return None if slow else {-1: ()}[offset]

    disk = Buggy()
    disk.go.set()
    disk.error = ZeroDivisionError()
    async with serving(disk) as server:
        reply = await server.client.ask(READ, 0, 4)
        assert (reply.error, reply.message) == (NbdErrno.EIO, "internal error")
        disk.error = None
        assert (await server.client.ask(WRITE, 0, payload=b"x")).error == 0
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


async def test_a_waiting_request_does_not_hold_up_others() -> None:
    class ColdAtZero(SlowDisk):
        def read_nowait(self, offset: int, length: int) -> Sequence[Piece] | None:
            return None if offset == 0 else self.memory.read_nowait(offset, length)

    disk = ColdAtZero()
    async with serving(disk) as server:
        await server.client.send(READ, 0, 4, cookie=1)
        assert (await server.client.ask(READ, 4096, 4, cookie=2)).cookie == 2
        disk.go.set()
        assert (await server.client.reply()).cookie == 1


async def test_a_small_payload_survives_the_reuse_of_the_receive_buffer() -> None:
    disk = SlowDisk()
    async with serving(disk) as server:
        await server.client.send(WRITE, 0, payload=b"a" * 100, cookie=1)
        await trio.testing.wait_all_tasks_blocked()
        await server.client.send(WRITE, 100, payload=b"b" * 100, cookie=2)
        await trio.testing.wait_all_tasks_blocked()
        disk.go.set()
        assert {(await server.client.reply()).cookie for _ in range(2)} == {1, 2}
    assert contents(disk.memory, 0, 200) == b"a" * 100 + b"b" * 100


async def test_a_large_payload_is_given_to_the_disk() -> None:
    given: list[bool] = []

    class Watching(MemoryDisk):
        def write_nowait(self, offset: int, data: memoryview, *, owned: bool) -> bool:
            given.append(owned)
            return super().write_nowait(offset, data, owned=owned)

    async with serving(Watching(SIZE)) as server:
        for length in (LARGE_PAYLOAD - 1, LARGE_PAYLOAD, 3 * LARGE_PAYLOAD):
            payload = bytes([length % 251]) * length
            assert (await server.client.ask(WRITE, 5, payload=payload)).error == 0
            assert (await server.client.ask(READ, 5, length)).bytes == payload
    assert given == [False, True, True]


@pytest.mark.parametrize("length", [100, 3 * LARGE_PAYLOAD])
async def test_a_payload_that_breaks_off_changes_nothing(length: int) -> None:
    disk = MemoryDisk(SIZE)
    async with serving(disk) as server:
        await server.client.stream.send_all(request(WRITE, 0, payload=b"x" * length)[:-1])
        await trio.testing.wait_all_tasks_blocked()
    assert disk.allocated_bytes == 0


async def test_disc_finishes_what_is_outstanding_and_closes() -> None:
    disk = SlowDisk()
    async with serving(disk) as server:
        await server.client.send(WRITE, 0, payload=b"x", cookie=5)
        await server.client.stream.send_all(request(DISC) + request(TRIM, 0, 1))
        await trio.testing.wait_all_tasks_blocked()
        assert not server.ended.is_set()
        disk.go.set()
        assert (await server.client.reply()).cookie == 5
        assert await server.client.at_end()
        assert [call[0] for call in disk.calls] == ["write"]


async def test_wrong_magic_ends_the_connection_after_what_came_before() -> None:
    async with serving(MemoryDisk(SIZE)) as server:
        await server.client.stream.send_all(request(WRITE, 0, payload=b"x", cookie=5) + b"?" * 28)
        assert (await server.client.reply()).cookie == 5
        assert await server.client.at_end()
        assert isinstance(server.failure, ProtocolError)


async def test_a_client_that_vanishes_is_no_failure_of_the_disk() -> None:
    disk = SlowDisk()
    async with serving(disk) as server:
        for cookie in range(3):
            await server.client.send(WRITE, cookie, payload=b"x", cookie=cookie)
        await trio.testing.wait_all_tasks_blocked()
        server.client.socket.close()
        disk.go.set()
        await server.ended.wait()
    assert contents(disk.memory, 0, 3) == b"xxx"


async def test_a_client_that_does_not_read_is_read_from_no_more() -> None:
    """Its answers are a bounded heap; when it reads at last it gets all of them."""
    disk = MemoryDisk(SIZE)
    disk.write_nowait(0, memoryview(bytearray(b"x" * (1 << 20))), owned=True)
    count = 200
    async with serving(disk) as server:
        await server.client.stream.send_all(b"".join(request(READ, 0, 1 << 20, cookie=i) for i in range(count)))
        await trio.testing.wait_all_tasks_blocked()
        done = server.shared.metrics.traffic.requests[READ]
        assert done < 20
        for cookie in range(count):
            assert (await server.client.reply()).cookie == cookie


@pytest.mark.parametrize(
    ("limits", "accepted"),
    [
        (Limits(requests_in_flight=3), 3),
        (Limits(bytes_in_flight=2500), 3),
        (Limits(server_bytes_in_flight=3500), 4),
    ],
)
async def test_limits_in_flight_hold_the_client_back(limits: Limits, accepted: int) -> None:
    disk = SlowDisk()
    limits = replace(limits, batch=replace(limits.batch, requests=1))
    async with serving(disk, limits=limits) as server:
        await server.client.stream.send_all(b"".join(request(READ, i, 1000, cookie=i) for i in range(10)))
        await trio.testing.wait_all_tasks_blocked()
        assert len(disk.calls) == accepted
        disk.go.set()
        assert sorted([(await server.client.reply()).cookie for _ in range(10)]) == [*range(10)]
        assert server.session.requests_in_flight.used == server.session.account.held == server.shared.memory.used == 0


@SPEEDS
async def test_an_answer_that_is_not_taken_counts_as_held(slow: bool) -> None:
    disk = disk_of(slow)
    memory = disk.memory if isinstance(disk, SlowDisk) else disk
    memory.write_nowait(0, memoryview(bytearray(b"x" * (8 << 20))), owned=True)
    async with serving(disk) as server:
        await server.client.send(READ, 0, 8 << 20)
        await trio.testing.wait_all_tasks_blocked()
        assert server.session.stalled
        assert server.shared.memory.used == server.session.account.held > 6 << 20
        assert (await server.client.reply()).bytes == b"x" * (8 << 20)
        await trio.testing.wait_all_tasks_blocked()
        assert not server.session.stalled
        assert server.shared.memory.used == server.session.account.held == 0


async def test_a_payload_on_its_way_counts_as_held_once_there_is_room() -> None:
    disk, payload = MemoryDisk(SIZE), bytes(range(256)) * (4 << 12)
    async with serving(disk, limits=Limits(server_bytes_in_flight=1 << 20)) as server:
        server.shared.memory.take(1 << 20)
        data = request(WRITE, 0, payload=payload)
        await server.client.stream.send_all(data[: 1 << 16])
        await trio.testing.wait_all_tasks_blocked()
        assert server.session.account.held == 0
        assert not server.session.stalled, "it is not the client that is waited for"
        server.shared.memory.give(1 << 20)
        await trio.testing.wait_all_tasks_blocked()
        assert server.session.account.held == len(payload)
        assert server.session.stalled
        await server.client.stream.send_all(data[1 << 16 :])
        assert (await server.client.reply()).error == 0
        assert contents(disk, 0, len(payload)) == payload
        await trio.testing.wait_all_tasks_blocked()
        assert server.shared.memory.used == 0


async def test_a_client_that_leaves_amid_a_payload_gives_it_back() -> None:
    async with serving(MemoryDisk(SIZE)) as server:
        await server.client.stream.send_all(request(WRITE, 0, payload=bytes(1 << 20))[: 1 << 16])
        await trio.testing.wait_all_tasks_blocked()
        assert server.shared.memory.used == 1 << 20
        await server.client.stream.aclose()
        await server.ended.wait()
        assert server.shared.memory.used == 0


async def test_while_memory_is_short_only_large_requests_wait() -> None:
    disk, common = MemoryDisk(SIZE), shared(Limits(server_bytes_in_flight=1 << 20))
    common.memory.take(1 << 20)
    async with serving(disk, common=common) as server:
        await server.client.send(WRITE, 0, payload=b"x", cookie=1)
        assert (await server.client.reply()).cookie == 1
        parts = [
            request(READ, 0, 1, cookie=2),
            request(READ, 0, SMALL_BYTES + 1, cookie=3),
            request(READ, 1, 1, cookie=4),
        ]
        await server.client.stream.send_all(b"".join(parts))
        assert (await server.client.reply()).cookie == 2
        await trio.testing.wait_all_tasks_blocked()
        assert common.metrics.traffic.requests[READ] == 1
        assert not server.session.stalled, "it is not the client that is waited for"
        common.memory.give(1 << 20)
        assert [(await server.client.reply()).cookie for _ in range(2)] == [3, 4]
    assert common.memory.used == 0
    assert not common.memory.dependents


async def test_while_memory_is_short_small_requests_of_a_client_follow_each_other() -> None:
    disk, common = SlowDisk(), shared(Limits(server_bytes_in_flight=1 << 20))
    common.memory.take(1 << 20)
    async with serving(disk, common=common) as server:
        await server.client.stream.send_all(b"".join(request(READ, i, 1000, cookie=i) for i in range(10)))
        await trio.testing.wait_all_tasks_blocked()
        assert server.session.account.held == 1000
        disk.go.set()
        assert [(await server.client.reply()).cookie for _ in range(10)] == [*range(10)]
        assert common.memory.used == 1 << 20


async def test_nothing_follows_a_disc_while_memory_is_short() -> None:
    disk, common = MemoryDisk(SIZE), shared(Limits(server_bytes_in_flight=1 << 20))
    common.memory.take(1 << 20)
    async with serving(disk, common=common) as server:
        late = request(WRITE, 0, payload=b"late", cookie=2)
        await server.client.stream.send_all(request(FLUSH, cookie=1) + request(DISC) + 2 * late)
        assert (await server.client.reply()).cookie == 1
        assert await server.client.at_end()
    assert disk.allocated_bytes == 0


async def test_clients_with_payloads_do_not_wait_for_each_other() -> None:
    """Each could hold the payload under way, and with it all memory, while a read in front of it waits for room."""
    disk, common = MemoryDisk(SIZE), shared(Limits(server_bytes_in_flight=1 << 20))
    write, read = request(WRITE, 0, payload=bytes(1 << 20), cookie=1), request(READ, 0, 1 << 20, cookie=2)

    async def talk(client: Client) -> None:
        for _ in range(5):
            await client.stream.send_all(write + read + write[: 1 << 15])
            assert [(await client.reply()).cookie for _ in range(2)] == [1, 2]
            await client.stream.send_all(write[1 << 15 :])
            assert (await client.reply()).cookie == 1

    async with serving(disk, common=common) as one, serving(disk, common=common) as other:
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(talk, one.client)
                nursery.start_soon(talk, other.client)
    assert common.memory.used == 0


async def test_an_answer_behind_another_that_is_not_taken_counts_as_held() -> None:
    class ColdAtZero(SlowDisk):
        def read_nowait(self, offset: int, length: int) -> Sequence[Piece] | None:
            return None if offset == 0 else self.memory.read_nowait(offset, length)

    disk = ColdAtZero()
    disk.memory.write_nowait(0, memoryview(bytearray(b"x" * SIZE)), owned=True)
    disk.go.set()
    async with serving(disk) as server:
        await server.client.send(READ, 0, 4 << 20, cookie=1)
        await trio.testing.wait_all_tasks_blocked()
        before = server.shared.memory.used
        await server.client.send(READ, 4096, 4 << 20, cookie=2)
        await trio.testing.wait_all_tasks_blocked()
        assert before + (4 << 20) <= server.shared.memory.used < before + (5 << 20)
        assert [len((await server.client.reply()).bytes) for _ in range(2)] == [4 << 20] * 2
        await trio.testing.wait_all_tasks_blocked()
        assert server.shared.memory.used == server.session.account.held == 0


@pytest.mark.parametrize("command", [CACHE, BLOCK_STATUS])
async def test_surveys_at_a_time_are_limited_for_each_and_for_all(command: int) -> None:
    disk, common = SlowDisk(), shared(Limits(surveys=3, client_surveys=2))
    contexts = ("base:allocation",)
    async with (
        serving(disk, common=common, contexts=contexts) as one,
        serving(disk, common=common, contexts=contexts) as other,
    ):
        for server, running in ((one, 2), (other, 3)):
            await server.client.stream.send_all(b"".join(request(command, 0, 512, cookie=i) for i in range(10)))
            await trio.testing.wait_all_tasks_blocked()
            assert len(disk.calls) == running
            assert (await server.client.ask(WRITE_ZEROES, 0, 0, cookie=99)).cookie == 99, "others go on"
        disk.go.set()
        for server in (one, other):
            assert {(await server.client.reply()).cookie for _ in range(10)} == {*range(10)}


@pytest.mark.parametrize("command", [WRITE, WRITE_ZEROES, TRIM])
async def test_an_empty_change_with_fua_flushes(command: int) -> None:
    disk = SlowDisk()
    disk.go.set()
    async with serving(disk) as server:
        assert (await server.client.ask(command, 0, 0, payload=b"" if command == WRITE else None)).error == 0
        assert not disk.calls
        assert (await server.client.ask(command, 0, 0, payload=b"" if command == WRITE else None, flags=FUA)).error == 0
        assert [call[0] for call in disk.calls] == ["flush"]


async def test_a_flush_with_a_range_is_a_flush() -> None:
    disk = SlowDisk()
    disk.go.set()
    async with serving(disk) as server:
        assert (await server.client.ask(FLUSH, 1 << 60, 512)).error == 0
        assert [call[0] for call in disk.calls] == ["flush"]


class Flushed(MemoryDisk):
    """Takes down who was said to be alone, and never has a flush for nothing."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.flushes: list[bool] = []

    def flush_nowait(self, mark: int) -> bool:
        return False

    async def flush(self, mark: int | None = None, *, alone: bool = False) -> None:
        self.flushes.append(alone)


async def test_one_request_after_the_other_makes_a_client_alone() -> None:
    disk = Flushed()
    async with serving(disk) as server:
        for _ in range(20):
            assert (await server.client.ask(FLUSH)).error == 0
        assert disk.flushes == [False] * 16 + [True] * 4
        assert (await server.client.ask(WRITE, 0, payload=b"x", flags=FUA)).error == 0
        assert disk.flushes[-1]
        await server.client.stream.send_all(request(READ, 0, 1, cookie=90) + request(FLUSH, cookie=91))
        assert {(await server.client.reply()).cookie for _ in range(2)} == {90, 91}
        assert not disk.flushes[-1], "with two requests at a time the second might have to wait"


async def test_a_client_beside_another_is_not_alone() -> None:
    disk, common = Flushed(), shared()
    async with serving(disk, common=common) as one, serving(MemoryDisk(SIZE), common=common) as other:
        for _ in range(20):
            assert (await one.client.ask(FLUSH)).error == 0
            assert (await other.client.ask(READ, 0, 1)).error == 0
        assert disk.flushes == [False] * 20


async def test_a_lone_flush_holds_up_nobody_else() -> None:
    class Stuck(Flushed):
        async def flush(self, mark: int | None = None, *, alone: bool = False) -> None:
            await super().flush(mark, alone=alone)
            if alone:
                await go.wait()

    go, disk, common = trio.Event(), Stuck(), shared()
    async with serving(disk, common=common) as one, serving(disk, common=common) as other:
        for _ in range(16):
            assert (await one.client.ask(FLUSH)).error == 0
        await one.client.send(FLUSH, cookie=50)
        await trio.testing.wait_all_tasks_blocked()
        assert disk.flushes[-1]
        await one.client.send(READ, 0, 1, cookie=51)
        with trio.fail_after(5):
            for _ in range(3):
                assert (await other.client.ask(READ, 0, 1)).error == 0
                assert (await other.client.ask(FLUSH)).error == 0
        assert not disk.flushes[-1], "there is someone else now"
        go.set()
        assert [(await one.client.reply()).cookie for _ in range(2)] == [50, 51]


async def test_a_lone_flush_that_fails_is_answered_with_the_error() -> None:
    class Failing(Flushed):
        async def flush(self, mark: int | None = None, *, alone: bool = False) -> None:
            await super().flush(mark, alone=alone)
            raise DamageError("flush", "the device failed")

    disk = Failing()
    async with serving(disk) as server:
        assert [(await server.client.ask(FLUSH)).error for _ in range(18)] == [NbdErrno.EIO] * 18
        assert disk.flushes[-1]


async def test_failures_do_not_flood_the_log(
    mock_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    disk = SlowDisk()
    disk.go.set()
    disk.error = NoSpaceError("/secret/path", "full", "make room")
    async with serving(disk) as server:
        for _ in range(50):
            assert "secret" not in (await server.client.ask(READ, 0, 1)).message
        mock_clock.jump(11)
        await server.client.ask(READ, 0, 1)
    assert [record.getMessage() for record in caplog.records] == [
        "a request failed: /secret/path: full (make room)",
        "a request failed: /secret/path: full (make room); 49 more like it since the last line",
    ]


async def test_the_log_tells_which_range_of_a_disk_is_damaged(caplog: pytest.LogCaptureFixture) -> None:
    disk = SlowDisk()
    disk.go.set()
    disk.error = DamageError("stored data", "fails its authentication", "run nbdvde check")
    async with serving(disk) as server:
        assert (await server.client.ask(READ, 4096, 8192)).error == NbdErrno.EIO
    where, why = f"disk {disk.name}: bytes 4096 to 12287 cannot be read", "stored data: fails its authentication"
    assert [record.getMessage() for record in caplog.records] == [
        f"a request failed: {where}: {why} (run nbdvde check)"
    ]


@pytest.mark.parametrize("error", [NoSpaceError("image", "full"), ZeroDivisionError("a bug")])
async def test_a_client_that_comes_again_does_not_flood_the_log_either(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    disk, common = SlowDisk(), shared()
    disk.go.set()
    disk.error = error
    for _ in range(3):
        async with serving(disk, common=common) as server:
            for _ in range(3):
                assert (await server.client.ask(READ, 0, 1)).error
    assert len(caplog.records) == 1


async def test_many_small_requests_in_one_go() -> None:
    disk = MemoryDisk(SIZE)
    async with serving(disk) as server:
        writes = b"".join(request(WRITE, i * 8, payload=i.to_bytes(8, "big"), cookie=i) for i in range(3000))
        await server.client.stream.send_all(writes)
        assert [(await server.client.reply()).cookie for _ in range(3000)] == [*range(3000)]
        data = (await server.client.ask(READ, 0, 24000)).bytes
        assert data == b"".join(i.to_bytes(8, "big") for i in range(3000))


class Flood(Transport):
    """A client that has always sent one more request, and takes every answer."""

    def __init__(self, count: int) -> None:
        self.left = count

    async def receive(self, targets: Sequence[memoryview], *, poll: bool = False) -> int:
        if not self.left:
            return 0
        self.left -= 1
        data = request(READ, 0, 4096)
        targets[0][: len(data)] = data
        return len(data)

    def send_nowait(self, buffers: Sequence[Buffer]) -> Sequence[Buffer]:
        return ()


async def test_a_busy_client_lets_others_have_their_turn() -> None:
    flood = Flood(10_000)
    negotiated = Negotiated(ExportInfo("disk", SIZE), structured=True)
    session = Session(flood, MemoryDisk(SIZE), negotiated, memoryview(bytearray(1 << 16)), shared())
    turns: list[int] = []

    async def other() -> None:
        while flood.left:
            turns.append(flood.left)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await session.run()
    assert max(before - after for before, after in itertools.pairwise([10_000, *turns])) <= 64


async def test_status_is_cut_at_a_bound_of_its_own() -> None:
    disk = SlowDisk()
    disk.go.set()
    async with serving(disk, contexts=("base:allocation",)) as server:
        await server.client.ask(BLOCK_STATUS, 0, SIZE)
        await server.client.ask(BLOCK_STATUS, 0, SIZE, flags=REQ_ONE)
    assert [call[3] for call in disk.calls] == [MAX_EXTENTS, 1]


async def test_stop_answers_what_was_sent_and_ends() -> None:
    disk = SlowDisk()
    async with serving(disk) as server:
        await server.client.send(READ, 0, 4, cookie=1)
        await trio.testing.wait_all_tasks_blocked()
        await server.client.send(READ, 0, 4, cookie=2)
        server.transport.stop()
        await trio.testing.wait_all_tasks_blocked()
        assert len(disk.calls) == 2
        disk.go.set()
        assert {(await server.client.reply()).cookie for _ in range(2)} == {1, 2}
        assert await server.client.at_end()


def test_budget_and_pool() -> None:
    budget = Budget(10)
    budget.take(12)
    assert budget.used == 12
    budget.give(12)
    assert budget.used == 0
    pool = BufferPool(1, 8192, 64)
    first, second = pool.take(), pool.take()
    assert (len(first), len(second)) == (8192, 64)
    pool.give(second)
    pool.give(first)
    assert pool.take() is first
    assert len(pool.take()) == 64


@pytest.mark.parametrize("data", [b"", b"\0\0\0\3", b"\0\0\0\3IHAVEOPT"])
async def test_a_client_may_leave_the_handshake(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        transport = Transport(ours)
        assert await negotiate(transport, Handshake(Visitor(Exports(), Peer(LOCAL)))) is None
        transport.close()


async def test_flushes_that_wait_together_are_flushed_together() -> None:
    class Marked(SlowDisk):
        def mark(self) -> int:
            return len([call for call in self.calls if call[0] == "write"])

        def flush_nowait(self, mark: int) -> bool:
            return self.durable >= mark

        async def flush(self, mark: int | None = None, *, alone: bool = False) -> None:
            assert mark is not None
            await self._wait("flush", mark)
            self.durable = max(self.durable, mark)

        durable = 0

    disk = Marked()
    async with serving(disk) as server:
        requests = [request(WRITE, 0, payload=b"x", cookie=1), *(request(FLUSH, cookie=10 + i) for i in range(40))]
        await server.client.stream.send_all(requests[0])
        await trio.testing.wait_all_tasks_blocked()
        await server.client.stream.send_all(b"".join(requests[1:]))
        await trio.testing.wait_all_tasks_blocked()
        await server.client.stream.send_all(request(WRITE, 0, payload=b"y", cookie=2))
        await trio.testing.wait_all_tasks_blocked()
        disk.go.set()
        assert {(await server.client.reply()).cookie for _ in range(42)} == {1, 2, *range(10, 50)}
        flushes = [call for call in disk.calls if call[0] == "flush"]
        assert len(flushes) <= 2
        assert set(flushes) == {("flush", 1)}, "what came later is not waited for"
        assert server.session.requests_in_flight.used == 0
