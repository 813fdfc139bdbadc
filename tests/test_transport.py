"""Receiving: what is there at once, after a moment's attempts, and after a wait."""

import socket

import trio
import trio.testing

from nbdvde.transport import Transport


class CountingSocket:
    """A socket that answers after some attempts; until then it has nothing."""

    family = socket.AF_UNIX

    def __init__(self, empty: int) -> None:
        self.empty, self.attempts = empty, 0

    def setblocking(self, flag: bool) -> None:
        assert not flag

    def setsockopt(self, *_: int) -> None:
        pass

    def recv_into(self, target: memoryview) -> int:
        self.attempts += 1
        if self.attempts <= self.empty:
            raise BlockingIOError
        target[:1] = b"x"
        return 1


async def test_a_client_with_credit_is_looked_at_before_waiting() -> None:
    sock = CountingSocket(empty=3)
    transport = Transport(sock)  # type: ignore[arg-type]
    transport._credit = 1
    with trio.fail_after(1):
        assert await transport.receive([memoryview(bytearray(8))], poll=True) == 1
    assert sock.attempts == 4
    assert transport._credit == 2


async def test_a_client_that_does_not_answer_at_once_loses_its_credit() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        transport = Transport(ours)
        transport._credit = 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: transport.receive([memoryview(bytearray(8))], poll=True))
            await trio.testing.wait_all_tasks_blocked()
            assert transport._credit < 0
            theirs.send(b"x")
        transport.close()


async def test_each_wait_earns_credit() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        transport = Transport(ours)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transport.receive, [memoryview(bytearray(8))])
            await trio.testing.wait_all_tasks_blocked()
            theirs.send(b"x")
        assert transport._credit == 1
        transport.close()
