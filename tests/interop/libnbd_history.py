"""A client of a cluster that goes on when its node ends, and tells all that it saw. Nothing but libnbd.

Several requests are under way at a time. When the connection breaks, nobody knows what became of writes; from when the
client is connected again they must have been done, or never be.
"""

import os
import random
import signal
import struct
import sys
import time
from contextlib import suppress

import nbd

from tests.interop.records import Record, pack

BLOCK, BLOCKS = 4096, 64
_DEPTH = 4
_PATIENCE_S = 120
_CONNECT_S = 2.5
_ANSWER_S = (0.3, 1.0, 2.5)
"""One of them, after which it goes to another node: this one may be cut off, and say late what it was told."""
_PAUSE_S = 0.02
"""Between requests: it is not how much they do that counts."""
_HEAD = struct.Struct("<QQ")
_ALLOWED = ("ENOSPC", "ESHUTDOWN")
"""What a request may be refused with: there is no room, or the server ends."""


class Request:
    """One request, for a few blocks."""

    def __init__(self, first: int, count: int, version: int) -> None:
        """`version` is 0 for a read."""
        self.first, self.count, self.version = first, count, version
        data = b"".join(_HEAD.pack(version, block) * (BLOCK // _HEAD.size) for block in self.blocks)
        self.buffer = nbd.Buffer.from_bytearray(bytearray(data))
        self.begin_ns = time.monotonic_ns()

    @property
    def blocks(self) -> range:
        """Which it is about."""
        return range(self.first, self.first + self.count)


class Client:
    """Uses the node that answers, of several."""

    def __init__(self, result: str, number: int, seed: str, uris: list[str]) -> None:
        """`number` is in all versions that it writes."""
        self._chance = random.Random(seed)
        self._uris, self._at = uris, self._chance.randrange(len(uris))
        self._version = number << 48
        self._file = os.open(result, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._lost: list[Request] = []
        """Writes whose connection broke."""
        self.ended = False

    def run(self) -> None:
        """Until it is told to end; then everything is read once more, from another node."""
        while not self.ended:
            with suppress(nbd.Error, TimeoutError):
                self._use(self._connected())
            time.sleep(self._chance.uniform(0, 0.3))
        while not self._read_everything():
            pass

    def _connected(self) -> nbd.NBD:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            self._at += 1
            try:
                handle = _connected(self._uris[self._at % len(self._uris)])
            except (nbd.Error, TimeoutError) as error:
                if time.monotonic() > deadline:
                    sys.exit(f"no node was to be reached for {_PATIENCE_S} s: {error}")
                time.sleep(self._chance.uniform(0, 0.1))
            else:
                self._know_by(time.monotonic_ns())
                return handle

    def _know_by(self, end_ns: int) -> None:
        """What was lost has been done by now, or never will be."""
        for request in self._lost:
            self._tell(request, end_ns, acknowledged=False)
        self._lost = []

    def _use(self, handle: nbd.NBD) -> None:
        """Write and read until the connection breaks, or all is told at the end. Raises nbd.Error, TimeoutError."""
        pending: dict[int, Request] = {}
        answered, patience_s = time.monotonic(), self._chance.choice(_ANSWER_S)
        try:
            while pending or not self.ended:
                while len(pending) < _DEPTH and not self.ended:
                    request = self._drawn()
                    pending[self._send(handle, request)] = request
                handle.poll(100)
                for cookie in [cookie for cookie in pending if self._is_done(handle, cookie, pending)]:
                    answered = time.monotonic()
                    del pending[cookie]
                _expect_before(answered + patience_s)
                time.sleep(_PAUSE_S)
        finally:
            self._lost += [request for request in pending.values() if request.version]

    def _drawn(self) -> Request:
        chance = self._chance
        count = chance.choice((1, 1, 1, 2, 4))
        version = 0
        if chance.random() < 0.6:
            version = self._version = self._version + 1
        return Request(chance.randrange(BLOCKS - count + 1), count, version)

    def _send(self, handle: nbd.NBD, request: Request) -> int:
        if request.version:
            try:
                return int(handle.aio_pwrite(request.buffer, request.first * BLOCK))
            except nbd.Error:
                self._lost.append(request)  # a part may have left
                raise
        return int(handle.aio_pread(request.buffer, request.first * BLOCK))

    def _is_done(self, handle: nbd.NBD, cookie: int, pending: dict[int, Request]) -> bool:
        try:
            if not handle.aio_command_completed(cookie):
                return False
        except nbd.Error as error:
            if handle.aio_is_dead() or handle.aio_is_closed():
                raise
            if error.errno not in _ALLOWED:
                sys.exit(f"an error was answered: {error}")
            self._tell(pending[cookie], time.monotonic_ns(), acknowledged=False)
            return True
        self._tell(pending[cookie], time.monotonic_ns(), acknowledged=True)
        return True

    def _tell(self, request: Request, end_ns: int, *, acknowledged: bool) -> None:
        if request.version or acknowledged:
            versions = [request.version] * request.count if request.version else _versions(request)
            wrote = bool(request.version)
            records = [
                Record(wrote, acknowledged, block, version, request.begin_ns, end_ns)
                for block, version in zip(request.blocks, versions, strict=True)
            ]
            os.write(self._file, b"".join(map(pack, records)))

    def _read_everything(self) -> bool:
        try:
            handle = self._connected()
            request = Request(0, BLOCKS, 0)
            request.buffer = nbd.Buffer.from_bytearray(bytearray(handle.pread(BLOCKS * BLOCK, 0)))
        except nbd.Error:
            return False
        self._tell(request, time.monotonic_ns(), acknowledged=True)
        return True


def _connected(uri: str) -> nbd.NBD:
    """Raises nbd.Error, TimeoutError."""
    handle, deadline = nbd.NBD(), time.monotonic() + _CONNECT_S
    handle.aio_connect_uri(uri)
    while not handle.aio_is_ready():
        handle.poll(500)
        _expect_before(deadline)
        if handle.aio_is_dead() or handle.aio_is_closed():
            raise TimeoutError("the connection ended")
    return handle


def _expect_before(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError("no answer")


def _versions(request: Request) -> list[int]:
    """What a read found. Ends the process when a block is not one that was written at once, and here."""
    data = request.buffer.to_bytearray()
    found = []
    for at, block in enumerate(request.blocks):
        piece = bytes(data[at * BLOCK : (at + 1) * BLOCK])
        version, place = _HEAD.unpack_from(piece)
        if piece != piece[: _HEAD.size] * (BLOCK // _HEAD.size) or (version and place != block):
            sys.exit(f"block {block} is torn, or holds what belongs to block {place}: {piece[:64].hex()}")
        found.append(version)
    return found


def main(result: str, number: str, seed: str, *uris: str) -> None:
    """Use a disk until SIGTERM, and tell what became of it in the file `result`."""
    client = Client(result, int(number), seed, list(uris))

    def end(*_: object) -> None:
        client.ended = True

    signal.signal(signal.SIGTERM, end)
    client.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
