"""Writes that a disk begins and ends later, without a task for each of them."""

import trio
import trio.testing

from nbdvde.disk import Done
from nbdvde.errors import DetachedError, NbdErrno, NoSpaceError
from nbdvde.memory import MemoryDisk
from nbdvde.protocol.connection import LARGE_PAYLOAD
from nbdvde.protocol.constants import Command
from tests.protocol.client import request
from tests.test_session import SIZE, contents, serving, shared

WRITE, READ, DISC = int(Command.WRITE), int(Command.READ), int(Command.DISC)


class LateDisk(MemoryDisk):
    """Keeps what it was asked to begin until `end`."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.begun: list[tuple[int, memoryview, Done]] = []

    def write_nowait(self, offset: int, data: memoryview, *, owned: bool) -> bool:
        return False

    def begin_write(self, offset: int, data: memoryview, done: Done) -> bool:
        self.begun.append((offset, data, done))
        return True

    def end(self, failure: Exception | None = None) -> None:
        offset, data, done = self.begun.pop(0)
        if failure is None:
            super().write_nowait(offset, data, owned=True)
        done(failure)


async def test_writes_that_end_together_are_answered_in_one_call() -> None:
    disk = LateDisk()
    async with serving(disk) as server:
        await server.client.stream.send_all(
            b"".join(request(WRITE, 4096 * n, cookie=n, payload=b"%d" % n * 512) for n in range(8))
        )
        await server.client.stream.send_all(request(READ, 0, 4, cookie=99))
        assert (await server.client.reply()).cookie == 99, "nobody is held up"
        calls = list[int]()
        send = server.transport.send_nowait
        server.transport.send_nowait = lambda buffers: calls.append(len(buffers)) or send(buffers)  # type: ignore[method-assign, func-returns-value]
        for number in range(8):
            disk.end(NoSpaceError("image", "is full") if number == 3 else None)
        replies = [await server.client.reply() for _ in range(8)]
        assert [(reply.cookie, reply.error) for reply in replies] == [
            (number, NbdErrno.ENOSPC if number == 3 else 0) for number in range(8)
        ]
        assert len(calls) == 1
        assert contents(disk, 4096, 512) == b"1" * 512, "the receive buffer was used again meanwhile"
        await trio.testing.wait_all_tasks_blocked()
        assert server.session.requests_in_flight.used == server.session.account.held == server.shared.memory.used == 0


async def test_a_session_ends_when_they_have_ended() -> None:
    disk = LateDisk()
    async with serving(disk) as server:
        for number in range(2):
            await server.client.send(WRITE, 0, cookie=number, payload=b"x" * LARGE_PAYLOAD)
        await server.client.send(DISC)
        await trio.testing.wait_all_tasks_blocked()
        assert server.shared.memory.used == 2 * LARGE_PAYLOAD
        disk.end()
        await trio.testing.wait_all_tasks_blocked()
        assert not server.ended.is_set()
        assert server.shared.memory.used == LARGE_PAYLOAD
        disk.end()
        assert [(await server.client.reply()).cookie for _ in range(2)] == [0, 1]
        await server.ended.wait()


async def test_one_that_ends_at_once_is_answered() -> None:
    class Prompt(LateDisk):
        def begin_write(self, offset: int, data: memoryview, done: Done) -> bool:
            done(None)
            return True

    async with serving(Prompt()) as server:
        for _ in range(3):
            assert (await server.client.ask(WRITE, 0, payload=b"x")).error == 0


async def test_a_client_is_left_without_an_answer_when_nobody_knows_one() -> None:
    disk = LateDisk()
    async with serving(disk) as server:
        await server.client.send(WRITE, 0, payload=b"x")
        await trio.testing.wait_all_tasks_blocked()
        disk.end(DetachedError("cluster", "lost its leader"))
        await server.ended.wait()
        assert server.session.lost


async def test_what_a_session_held_that_is_cancelled_is_given_back() -> None:
    disk, common = LateDisk(), shared()
    async with serving(disk, common=common) as server:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                server.session._start((WRITE, 0, 7, 0, 4, memoryview(bytearray(b"data")), None), nursery)
                await trio.testing.wait_all_tasks_blocked()
                assert common.memory.used == 4
                scope.cancel()
        assert common.memory.used == server.session.requests_in_flight.used == 0
        disk.end()  # nobody is there to be told
        assert common.memory.used == 0
