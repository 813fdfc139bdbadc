"""A client of a cluster that goes on when its node ends, and checks what it reads. Nothing but libnbd.

Each block has a number that goes up with every write to it. What was acknowledged must be read from any node, until a
newer number is; one whose acknowledgement was lost may be read or not, and is written again before the next one.
"""

import json
import random
import signal
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import cycle
from pathlib import Path

import nbd

BLOCK = 4096
BLOCKS = 512
_CONNECT_S = 60


class Client:
    """Uses the node that answers, of several."""

    def __init__(self, uris: list[str]) -> None:
        self._uris: Iterator[str] = cycle(uris)
        self.writes = self.reads = self.connections = 0
        self.longest_s = 0.0
        """Between two acknowledgements."""
        self._handle = self._connect()
        found = self._handle.pread(BLOCKS * BLOCK, 0)
        self.sent = [struct.unpack_from("<QQ", found, block * BLOCK)[1] for block in range(BLOCKS)]
        self.acknowledged = self.sent[:]
        self._last = time.monotonic()

    def _connect(self) -> nbd.NBD:
        deadline = time.monotonic() + _CONNECT_S
        while True:
            handle = nbd.NBD()
            try:
                handle.connect_uri(next(self._uris))
            except nbd.Error:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            else:
                self.connections += 1
                return handle

    def write(self, block: int) -> None:
        """Write the next number, again and again until it is acknowledged."""
        number = self.sent[block] = self.sent[block] + 1
        data = struct.pack("<QQ", block, number) * (BLOCK // 16)
        while True:
            try:
                self._handle.pwrite(data, block * BLOCK)
            except nbd.Error as error:
                self._reconnect(error)
                self.read(block)
            else:
                break
        self.acknowledged[block] = number
        self.writes += 1
        now = time.monotonic()
        self.longest_s = max(self.longest_s, now - self._last)
        self._last = now

    def read(self, block: int) -> None:
        """A block must hold what was acknowledged last, or what was sent after it."""
        while True:
            try:
                data = self._handle.pread(BLOCK, block * BLOCK)
            except nbd.Error as error:
                self._reconnect(error)
            else:
                break
        self.reads += 1
        check(block, data, self.acknowledged[block], self.sent[block])

    def _reconnect(self, error: nbd.Error) -> None:
        """A connection may end; an error as an answer would be taken for the truth about the disk."""
        assert self._handle.aio_is_dead() or self._handle.aio_is_closed(), f"an error was answered: {error}"
        self._handle = self._connect()


def check(block: int, data: bytes, acknowledged: int, sent: int) -> None:
    """Whether a block holds one of the numbers that it may."""
    where, number = struct.unpack_from("<QQ", data)
    assert data == data[:16] * (BLOCK // 16), f"block {block} is torn"
    assert acknowledged <= number <= sent, f"block {block} holds {number}, not {acknowledged} to {sent}"
    assert where == block or not number, f"block {block} holds what belongs to block {where}"


def use(result: str, seed: str, *uris: str) -> None:
    """Write and read until SIGTERM; then tell in the file `result` what the disk must hold."""
    ended = False

    def end(*_: object) -> None:
        nonlocal ended
        ended = True

    signal.signal(signal.SIGTERM, end)
    client, state = Client(list(uris)), int(seed)
    while not ended:
        state = state * 6364136223846793005 + 1442695040888963407 & (1 << 64) - 1
        block = state >> 33
        client.write(block % BLOCKS)
        if block & 1 << 20:
            client.read((block >> 10) % BLOCKS)
    shown = {name: getattr(client, name) for name in ("acknowledged", "sent", "writes", "reads", "connections")}
    Path(result).write_text(json.dumps({**shown, "longest_s": client.longest_s}))


def verify(result: str, *uris: str) -> None:
    """Every node shows what the disk must hold."""
    told = json.loads(Path(result).read_text())
    for uri in uris:
        handle = nbd.NBD()
        handle.connect_uri(uri)
        for block in range(BLOCKS):
            check(block, handle.pread(BLOCK, block * BLOCK), told["acknowledged"][block], told["sent"][block])
        with suppress(nbd.Error):
            handle.shutdown()


def take_over(first: str, second: str) -> None:
    """Connections to one node use the disk together, until somebody does through another node."""
    one, two = connected(first), connected(first)
    one.pwrite(b"1" * BLOCK, 0)
    two.pwrite(b"2" * BLOCK, BLOCK)
    assert one.can_multi_conn()
    assert one.pread(BLOCK, BLOCK) == b"2" * BLOCK
    other = connected(second)
    assert other.pread(2 * BLOCK, 0) == b"1" * BLOCK + b"2" * BLOCK
    for fenced in (one, two):
        try:
            fenced.pwrite(b"x" * BLOCK, 0)
        except nbd.Error:
            assert fenced.aio_is_dead() or fenced.aio_is_closed()
        else:
            raise AssertionError("a client that was fenced wrote")
    assert other.pread(BLOCK, 0) == b"1" * BLOCK
    other.pwrite(b"3" * BLOCK, 0)
    assert connected(first).pread(BLOCK, 0) == b"3" * BLOCK


def fill(*uris: str) -> None:
    """Write until it is refused, read everything, trim, and write again."""
    length, client, offset = 1 << 20, connected(uris[0]), 0
    while True:
        try:
            client.pwrite(random.Random(offset).randbytes(length), offset)
        except nbd.Error as error:
            expect_full(error)
            break
        offset += length
    assert 24 << 20 < offset < 64 << 20, offset
    other = connected(uris[1])
    for at in range(0, offset, length):
        assert other.pread(length, at) == random.Random(at).randbytes(length), at
    other.trim(offset // 2 // length * length, 0)
    deadline = time.monotonic() + _CONNECT_S
    while True:
        try:
            other.pwrite(b"again" * 1000, 0)
        except nbd.Error as error:
            expect_full(error)
            time.sleep(0.2)
        else:
            break
        assert time.monotonic() < deadline


def expect_full(error: nbd.Error) -> None:
    """Nothing else may be wrong."""
    assert error.errno == "ENOSPC", error


def connected(uri: str) -> nbd.NBD:
    """A client of a node."""
    handle = nbd.NBD()
    handle.connect_uri(uri)
    return handle


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
