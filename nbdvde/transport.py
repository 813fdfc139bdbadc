"""Bytes in and out of one non-blocking stream socket, and the buffers they are received in.

Every call tries first and waits only when the kernel says so: a round through the event loop costs as much as ten
requests. Errors of the connection are `trio.BrokenResourceError`.
"""

import mmap
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

import trio

from nbdvde.disk import Buffer

SEND_BUFFER = 1 << 20
"""Bytes of replies the kernel is asked to hold for one client, so that a large read goes out in few pieces."""
_IOV_MAX = 1024
_SCRAP = memoryview(bytearray(1 << 16))
"""Where bytes go that nobody will look at; clearing one for each of 10,000 clients took 1.3 s of a stop."""
_POLLS = 60
"""Attempts to receive before the event loop is left to wait: about 70 µs. One 4 KiB read at a time is answered 32,000
times a second so, 17,000 times if each has to wake us (2 cores, Unix socket). With 25, a client that is woken itself by
each answer to a flush was missed: 7 % fewer writes with a flush each."""
_PROBES = 3
_CREDIT_MAX = 32
_CREDIT_OF_A_MISS = 8
"""A hit earns one, a wait one as well: a client that thinks longer costs one attempt in nine requests."""


def keep_alive(sock: socket.socket, silence_s: int) -> None:
    """Let TCP ask, after a silence and three times in half of that again, whether the other side is still there."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, silence_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, silence_s // 2 // _PROBES))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)


class StreamSocket(Protocol):
    """What is used of a socket. Calls never wait: they raise BlockingIOError instead."""

    @property
    def family(self) -> int: ...
    def fileno(self) -> int: ...
    def setblocking(self, flag: bool, /) -> None: ...
    def setsockopt(self, level: int, option: int, value: int, /) -> None: ...
    def recv_into(self, target: memoryview, /) -> int: ...
    def recvmsg_into(self, targets: Sequence[memoryview], /) -> tuple[Any, ...]: ...
    def sendmsg(self, buffers: Sequence[Buffer], /) -> int: ...
    def shutdown(self, how: int, /) -> None: ...
    def close(self) -> None: ...


class Transport:
    """A connected stream socket, which it owns. One task receives and one sends at a time."""

    def __init__(self, sock: StreamSocket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._stopped = False
        self._credit = 0
        self.receiving = self.sending = False
        """Whether we wait for the client to send, or to take what we send."""
        self.sent = 0
        """Bytes."""

    async def receive(self, targets: Sequence[memoryview], *, poll: bool = False) -> int:
        """Receive into the targets, one after the other; how many bytes, 0 at the end and, after `stop`, when idle.

        With `poll` a client that is known to ask again at once is looked at for a moment before waiting.
        """
        sock = self._sock
        if poll and self._credit > 0 and (count := self._poll(targets)):
            return count
        while True:
            try:
                if len(targets) == 1:
                    return sock.recv_into(targets[0])
                return int(sock.recvmsg_into(targets)[0])
            except BlockingIOError:
                if self._stopped:
                    return 0
            except OSError as error:
                raise trio.BrokenResourceError(str(error)) from error
            await self.readable()
            self._credit += 1

    async def readable(self) -> None:
        """Wait until there may be more to receive: after less came than there was room for, trying is of no use."""
        self.receiving = True
        with suppress(trio.ClosedResourceError):  # `stop` wakes us so
            await trio.lowlevel.wait_readable(self._sock)
        self.receiving = False

    def _poll(self, targets: Sequence[memoryview]) -> int:
        """Try for a moment. A client that answers in that time is asked so again, one that does not seldom is."""
        target, receive = targets[0], self._sock.recv_into
        for _ in range(_POLLS):
            try:
                count = receive(target)
            except BlockingIOError:
                continue
            except OSError:
                break
            self._credit = min(self._credit + 1, _CREDIT_MAX)
            return count
        self._credit -= _CREDIT_OF_A_MISS
        return 0

    def send_nowait(self, buffers: Sequence[Buffer]) -> Sequence[Buffer]:
        """Send the buffers, one after the other, as far as the kernel takes them at once; what is left."""
        sock = self._sock
        while buffers:
            try:
                sent = sock.sendmsg(buffers if len(buffers) <= _IOV_MAX else buffers[:_IOV_MAX])
            except BlockingIOError:
                break
            except OSError as error:
                raise trio.BrokenResourceError(str(error)) from error
            buffers = _rest(buffers, sent)
            self.sent += sent
        return buffers

    async def send(self, buffers: Sequence[Buffer]) -> None:
        """Send all buffers, one after the other."""
        while buffers := self.send_nowait(buffers):
            self.sending = True
            with suppress(trio.ClosedResourceError):  # `stop` wakes us so, but replies are still sent
                await trio.lowlevel.wait_writable(self._sock)
            self.sending = False

    def stop(self) -> None:
        """Receive what is there already, and then the end."""
        self._stopped = True
        trio.lowlevel.notify_closing(self._sock)

    async def finish(self, patience_s: float) -> None:
        """Say that nothing more comes, and after `stop` wait a while until the client has said so too.

        Closing a socket that holds unread bytes makes TCP throw away replies that are still on their way.
        """
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            return
        if self._stopped:
            with trio.move_on_after(patience_s):
                await self._drain()

    async def _drain(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            try:
                if not self._sock.recv_into(_SCRAP):
                    return
            except OSError:
                return

    def detach(self) -> socket.socket:
        """Give the socket away, which must be a plain one; the transport is of no use any more."""
        assert isinstance(self._sock, socket.socket), "there is nothing over it"
        return self._sock

    def abort(self) -> None:
        """Break the connection off: whoever waits for it meets the end or an error."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket."""
        trio.lowlevel.notify_closing(self._sock)
        self._sock.close()


def _rest(buffers: Sequence[Buffer], sent: int) -> Sequence[Buffer]:
    """What is left of the buffers after `sent` bytes."""
    if sent == sum(map(len, buffers)):
        return ()
    index = 0
    while sent >= len(buffers[index]):
        sent -= len(buffers[index])
        index += 1
    return [memoryview(buffers[index])[sent:], *buffers[index + 1 :]]


class BufferPool:
    """Receive buffers: large ones while there are any, small ones beyond, never a wait.

    Large buffers are mapped, so that they cost memory only as far as they were used.
    """

    def __init__(self, count: int, large_bytes: int, small_bytes: int) -> None:
        self._left, self._large_bytes, self._small_bytes = count, large_bytes, small_bytes
        self._free: list[memoryview] = []

    def take(self) -> memoryview:
        """A buffer; what is in it is left over from others."""
        if self._free:
            return self._free.pop()
        if not self._left:
            return memoryview(bytearray(self._small_bytes))
        self._left -= 1
        return memoryview(mmap.mmap(-1, self._large_bytes))

    def give(self, buffer: memoryview) -> None:
        """Return a buffer that nothing uses any more."""
        if len(buffer) == self._large_bytes:
            self._free.append(buffer)
