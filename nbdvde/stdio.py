"""Standard input and output as the connection of one client: `ssh` and inetd start servers so, and libnbd does."""

import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import trio

from nbdvde.errors import NetworkError

_PIECE = 1 << 18
_FINISH_S = 1.0
"""How long the client may take for the rest of its answers once the connection is over."""
_IN, _OUT = 0, 1


@asynccontextmanager
async def standard_streams() -> AsyncIterator[socket.socket]:
    """A socket whose other side is the client, and which the caller closes. Raises NetworkError.

    Two pipes are copied to and from a pair of sockets, since TLS and buffers are made for a socket.
    """
    if sys.__stdin__ is None or sys.__stdout__ is None:  # and something else may have their numbers now
        raise NetworkError("cannot serve on stdio", "it is closed", "let a client start this command")
    if os.isatty(_IN) or os.isatty(_OUT):
        raise NetworkError("cannot serve on stdio", "that is a terminal", "let a client start this command")
    theirs = _same_socket()
    if theirs is not None:
        yield theirs
        return
    ours, theirs = socket.socketpair()
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
    async with trio.open_nursery() as nursery:
        taking = trio.CancelScope()
        nursery.start_soon(_take, stream, taking)
        nursery.start_soon(_give, stream, taking)
        yield theirs
        nursery.cancel_scope.deadline = trio.current_time() + _FINISH_S


def _same_socket() -> socket.socket | None:
    """The socket that both are."""
    first, second = os.fstat(_IN), os.fstat(_OUT)
    if (first.st_dev, first.st_ino) != (second.st_dev, second.st_ino):
        return None
    try:
        sock = socket.socket(fileno=os.dup(_IN))
    except OSError:
        return None
    os.set_inheritable(sock.fileno(), False)
    _let_go()
    return sock


def _let_go() -> None:
    """Nothing else is to be read or written there, and the client must see the end when the connection ends."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, _IN)
    os.dup2(nowhere, _OUT)
    os.close(nowhere)


async def _take(stream: trio.SocketStream, scope: trio.CancelScope) -> None:
    """What the client sends."""
    async with trio.lowlevel.FdStream(os.dup(_IN)) as source:
        with scope, suppress(trio.BrokenResourceError, trio.ClosedResourceError):  # `_give` may end at the same time
            while data := await source.receive_some(_PIECE):
                await stream.send_all(data)
            await stream.send_eof()


async def _give(stream: trio.SocketStream, taking: trio.CancelScope) -> None:
    """What the client gets; at its end nothing more is taken."""
    async with stream, trio.lowlevel.FdStream(os.dup(_OUT)) as sink:
        with suppress(trio.BrokenResourceError):
            while data := await stream.receive_some(_PIECE):
                await sink.send_all(data)
    taking.cancel()
