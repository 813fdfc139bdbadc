"""A client of a cluster that goes on when its node ends, and tells all that it saw. Nothing but libnbd.

Several requests are under way at a time. When the connection breaks, nobody knows what became of writes; from when the
client is connected again they must have been done, or never be.
"""

import os
import random
import signal
import sys
import time
from contextlib import suppress
from enum import Enum

import nbd

from tests.interop.records import BLOCK, BLOCKS, RUN_BLOCKS, SIZE, Record, content_of, offset_of, pack, version_in

_DEPTH = 4
_PATIENCE_S = 120
_CONNECT_S = 2.5
_ANSWER_S = (0.3, 1.0, 2.5)
"""One of them, after which it goes to another node: this one may be cut off, and say late what it was told."""
_PAUSE_S = 0.02
"""Between requests: it is not how much they do that counts."""
_ALLOWED = ("ENOSPC", "ESHUTDOWN")
"""What a request may be refused with: there is no room, or the server ends."""


class Kind(Enum):
    """Of a request."""

    READ, WRITE, TRIM, ZERO, ALLOCATE, TRIM_ALL = range(6)


_SHARES = {
    Kind.READ: 40, Kind.WRITE: 46, Kind.TRIM: 5, Kind.ZERO: 4, Kind.ALLOCATE: 4, Kind.TRIM_ALL: 1,
}  # fmt: skip
"""Of a hundred requests."""


class Request:
    """One request: for a few blocks that lie side by side, or, if it trims all, for the whole disk."""

    def __init__(self, kind: Kind, first: int, count: int, version: int) -> None:
        """`version` is 0 unless it writes."""
        self.kind, self.blocks, self.version = kind, range(first, first + count), version
        self.buffer = nbd.Buffer.from_bytearray(bytearray(b"".join(content_of(version, at) for at in self.blocks)))
        self.begin_ns = time.monotonic_ns()

    @property
    def changes(self) -> bool:
        """Whether it is no read."""
        return self.kind != Kind.READ

    def send(self, handle: nbd.NBD) -> int:
        """Begin it. Raises nbd.Error."""
        offset, length = offset_of(self.blocks.start), len(self.blocks) * BLOCK
        match self.kind:
            case Kind.READ:
                return int(handle.aio_pread(self.buffer, offset))
            case Kind.WRITE:
                return int(handle.aio_pwrite(self.buffer, offset))
            case Kind.TRIM:
                return int(handle.aio_trim(length, offset))
            case Kind.ZERO:
                return int(handle.aio_zero(length, offset))
            case Kind.ALLOCATE:
                return int(handle.aio_zero(length, offset, flags=nbd.CMD_FLAG_NO_HOLE))
            case Kind.TRIM_ALL:
                return int(handle.aio_trim(SIZE, 0))

    def versions(self) -> list[int]:
        """What its blocks hold now. Ends the process when one holds what nobody wrote there at once."""
        return [self.version] * len(self.blocks) if self.changes else versions_in(self.buffer, self.blocks)


class Client:
    """Uses the node that answers, of several."""

    def __init__(self, result: str, number: int, seed: str, uris: list[str]) -> None:
        """`number` is in all versions that it writes."""
        self._chance = random.Random(seed)
        self._uris, self._at = uris, self._chance.randrange(len(uris))
        self._version = number << 48
        self._file = os.open(result, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._lost: list[Request] = []
        """Changes whose connection broke."""
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
            self._lost += [request for request in pending.values() if request.changes]

    def _drawn(self) -> Request:
        chance = self._chance
        (kind,) = chance.choices([*_SHARES], [*_SHARES.values()])
        if kind == Kind.TRIM_ALL:
            return Request(kind, 0, BLOCKS, 0)
        count = chance.choice((1, 1, 1, 2, 4))
        run, at = chance.randrange(BLOCKS // RUN_BLOCKS), chance.randrange(RUN_BLOCKS - count + 1)
        if kind == Kind.WRITE:
            self._version += 1
        return Request(kind, run * RUN_BLOCKS + at, count, self._version if kind == Kind.WRITE else 0)

    def _send(self, handle: nbd.NBD, request: Request) -> int:
        try:
            return request.send(handle)
        except nbd.Error:
            if request.changes:  # a part may have left
                self._lost.append(request)
            raise

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
        if request.changes or acknowledged:
            records = [
                Record(request.changes, acknowledged, block, version, request.begin_ns, end_ns)
                for block, version in zip(request.blocks, request.versions(), strict=True)
            ]
            os.write(self._file, b"".join(map(pack, records)))

    def _read_everything(self) -> bool:
        try:
            handle = self._connected()
            for first in range(0, BLOCKS, RUN_BLOCKS):
                request = Request(Kind.READ, first, RUN_BLOCKS, 0)
                data = handle.pread(RUN_BLOCKS * BLOCK, offset_of(first))
                request.buffer = nbd.Buffer.from_bytearray(bytearray(data))
                self._tell(request, time.monotonic_ns(), acknowledged=True)
        except nbd.Error:
            return False
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


def versions_in(buffer: nbd.Buffer, blocks: range) -> list[int]:
    """What a read found. Ends the process when a block is not one that was written at once, and here."""
    data = bytes(buffer.to_bytearray())
    try:
        return [version_in(data[at * BLOCK : (at + 1) * BLOCK], block) for at, block in enumerate(blocks)]
    except ValueError as error:
        sys.exit(str(error))


def main(result: str, number: str, seed: str, *uris: str) -> None:
    """Use a disk until SIGTERM, and tell what became of it in the file `result`."""
    client = Client(result, int(number), seed, list(uris))

    def end(*_: object) -> None:
        client.ended = True

    signal.signal(signal.SIGTERM, end)
    client.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
