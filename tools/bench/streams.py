"""Appends to a stream: how fast they become durable, alone and by many at the same time."""

import os
import time
from functools import partial

import trio

import nbdvde
from nbdvde import MasterKey
from nbdvde.disk import BLOCK
from nbdvde.engine.managed.stream import Stream
from tools.bench.report import Section, Table, mib_per_s, number
from tools.bench.servers import Work

_KEY = MasterKey(bytes(32))
_CASES = ((1, 1), (64, 1), (1024, 1), (64, 16), (1, 256), (8, 256), (2, 1024))
"""(tasks, entries that each appends at a time)."""
_MIB = 256
_MIB_ONE_BY_ONE = 32


def measure(work: Work, *, rounds: int) -> Section:
    """Encrypted image, entries of 4096 bytes that do not compress."""
    table, figures = Table(["tasks", "entries at a time", "appends", ""]), {}
    for tasks, count in _CASES:
        mib = _MIB if count > 1 else _MIB_ONE_BY_ONE // (1 if tasks > 1 else 8)
        rates = sorted(trio.run(partial(_rate, work, tasks, count, mib << 20)) for _ in range(rounds))
        rate = rates[len(rates) // 2]
        table.add(str(tasks), str(count), f"{number(rate / BLOCK)}/s", mib_per_s(rate))
        figures[f"{tasks} tasks, {count} entries"] = rate
    text = (
        f"Entries of 4096 bytes that do not compress, appended to a stream of {_MIB} MiB in an encrypted image, in the "
        f"process that has it open. Each task waits until its entries are durable; medians of {rounds} runs."
    )
    return Section("streams", text, [table], ["python -m tools.bench streams"], figures)


async def _rate(work: Work, tasks: int, count: int, total: int) -> float:
    """Bytes a second."""
    path = work.directory / "stream.vde"
    nbdvde.create_image(path, 1 << 30, secret=_KEY)
    try:
        chance = os.urandom(64 * BLOCK)
        entries = [chance[at : at + BLOCK] for at in range(0, count * 61, 61)]
        async with nbdvde.open_image(path, key=_KEY) as image:
            stream = await Stream.create(image.regions, image.disk(), (_MIB << 20) // BLOCK)
            each = total // BLOCK // tasks // count

            async def append() -> None:
                for _ in range(each):
                    await stream.append_many(entries)

            begun = time.perf_counter()
            async with trio.open_nursery() as nursery:
                for _ in range(tasks):
                    nursery.start_soon(append)
            return each * tasks * count * BLOCK / (time.perf_counter() - begun)
    finally:
        path.unlink()
