"""Eight connections to one export, held to the rule on caches (spec, "NBD_FLAG_CAN_MULTI_CONN").

What one connection wrote is seen by all from the reply on; a reply to FLUSH or to a write with FUA on one makes
durable all that was completed on any before it was sent.
"""

import json
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import nbd

CONNECTIONS = 8
BLOCKS = 192
BLOCK = 4096
STEPS = 1500


@dataclass
class Model:
    """Generations of blocks: a block holds its generation, over and over; 0 is what it held at first."""

    completed: list[int] = field(default_factory=lambda: [0] * BLOCKS)
    durable: list[int] = field(default_factory=lambda: [0] * BLOCKS)
    issued: list[list[int]] = field(default_factory=lambda: [[0] for _ in range(BLOCKS)])

    def after_a_crash(self) -> list[list[int]]:
        """What each block may hold."""
        return [
            [generation for generation in issued if generation >= durable]
            for issued, durable in zip(self.issued, self.durable, strict=True)
        ]


@dataclass(frozen=True)
class Command:
    """A request on its way."""

    handle: nbd.NBD
    cookie: int
    block: int | None
    """None for a flush."""
    generation: int
    covers: tuple[int, ...]
    """Generations that are durable once it is done; empty when it promises nothing."""


class Eight:
    """The connections and what is known of the disk."""

    def __init__(self, uri: str, seed: str) -> None:
        self._chance = Random(seed)
        self._handles = [nbd.NBD() for _ in range(CONNECTIONS)]
        for handle in self._handles:
            handle.connect_uri(uri)
            assert handle.can_multi_conn()
        self._under_way: list[Command] = []
        self._last = 0
        self.model = Model()
        self.flushes = self.reads = 0

    def step(self) -> None:
        """Something on one of the connections."""
        handle = self._chance.choice(self._handles)
        busy = {command.block for command in self._under_way}
        block = self._chance.choice([block for block in range(BLOCKS) if block not in busy])
        action = self._chance.random()
        if action < 0.02:
            self._under_way.append(Command(handle, handle.aio_flush(), None, 0, tuple(self.model.completed)))
        elif action < 0.3:
            self.reads += 1
            assert handle.pread(BLOCK, block * BLOCK) == content(self.model.completed[block])
        else:
            self._write(handle, block, fua=action > 0.98)
        self._reap()

    def _write(self, handle: nbd.NBD, block: int, *, fua: bool) -> None:
        self._last += 1
        self.model.issued[block].append(self._last)
        covers = list(self.model.completed) if fua else []
        if fua:
            covers[block] = self._last
        data = nbd.Buffer.from_bytearray(bytearray(content(self._last)))
        cookie = handle.aio_pwrite(data, block * BLOCK, flags=nbd.CMD_FLAG_FUA if fua else 0)
        self._under_way.append(Command(handle, cookie, block, self._last, tuple(covers)))

    def _reap(self) -> None:
        for handle in self._handles:
            while handle.poll(0):
                pass
        for command in list(self._under_way):
            if command.handle.aio_command_completed(command.cookie):
                self._under_way.remove(command)
                self._done(command)

    def _done(self, command: Command) -> None:
        if command.block is not None:
            self.model.completed[command.block] = command.generation
        if command.covers:
            self.flushes += 1
            self.model.durable = [max(pair) for pair in zip(self.model.durable, command.covers, strict=True)]


def content(generation: int) -> bytes:
    """Of a block."""
    return generation.to_bytes(8, "big") * (BLOCK // 8)


def write_and_kill(uri: str, pid: str, seed: str, record: str) -> None:
    """Write and flush at random, kill the server in the middle, and record what each block may hold."""
    eight = Eight(uri, seed)
    for _ in range(STEPS):
        eight.step()
    os.kill(int(pid), signal.SIGKILL)
    assert eight.flushes > 20
    assert eight.reads > 100
    assert sum(generation > 0 for generation in eight.model.durable) > BLOCKS // 2
    Path(record).write_text(json.dumps(eight.model.after_a_crash()))


def find(uri: str, record: str) -> None:
    """Every block holds what it may."""
    handle = nbd.NBD()
    handle.connect_uri(uri)
    for block, allowed in enumerate(json.loads(Path(record).read_text())):
        found = handle.pread(BLOCK, block * BLOCK)
        generation = int.from_bytes(found[:8], "big")
        assert found == content(generation), f"block {block} is mixed"
        assert generation in allowed, f"block {block} holds {generation}, not one of {allowed}"
    handle.shutdown()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
