"""What thousands of snapshots cost: taking them, reading and writing beside them, counting what is in use, memory."""

import random
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import trio

import nbdvde
from tools.bench import fio
from tools.bench.fio import Job
from tools.bench.report import Section, Table, milliseconds, number
from tools.bench.servers import Server, Work, show

_BLOCK = 4096
_DISK, _LARGE_DISK = 64 << 30, 1 << 40
_STORED = 512 << 20
"""Bytes at the start of the disk that are written before, and that the jobs go over."""
_CHANGES = 2000
"""Random writes before each snapshot of the large disk, each in a leaf of its own."""
_LARGE_SNAPSHOTS = 20
_RATIO, _TAKE_S, _MARK_S, _PEAK_BYTES = 0.95, 0.005, 2.0, 300 << 20
_JOBS = {"4K randread QD32": Job("randread", "4k", 32), "4K randwrite QD32": Job("randwrite", "4k", 32)}


@dataclass(frozen=True, slots=True)
class _Cost:
    """Of taking snapshots: seconds for each, and to count what is in use once there are all."""

    taken_s: list[float]
    mark_s: float


def measure(work: Work, *, snapshots: int, rounds: int, seconds: float) -> Section:
    """Take `snapshots` of a disk of 64 GiB, and compare it with one that has none."""
    none, many = _server("none"), _server("many")
    rates: dict[str, dict[str, list[float]]] = {job: {"none": [], "many": []} for job in _JOBS}
    for server in (none, many):
        work.create(server, _DISK)
        with work.serving(server, _DISK):
            fio.fill(work.directory, server.uri, _STORED)
    cost = trio.run(_take, work.directory / many.disk, _key(work), snapshots)
    with ExitStack() as stack:
        running = {server.name: stack.enter_context(work.serving(server, _DISK)) for server in (none, many)}
        for number_of_round in range(rounds):
            for job, found in rates.items():
                for server in (none, many):
                    line = fio.command(server.uri, _JOBS[job], size=_STORED, seconds=seconds, seed=number_of_round)
                    found[server.name].append(fio.run(work.directory, line).iops)
        peak = running["many"].peak_memory()
    large = _large(work)
    return _section(snapshots, rates, cost, large, peak)


def _server(name: str) -> Server:
    disk = f"{name}.vde"
    return Server(
        name, disk,
        lambda size: (("nbdvde", "create", disk, f"{size}", "--key-file=disk.key"),),
        lambda _: ("nbdvde", "serve", disk, "--key-file=disk.key", f"--listen=unix:{name}.sock"),
    )  # fmt: skip


def _key(work: Work) -> nbdvde.KeyFile:
    return nbdvde.KeyFile((work.directory / "disk.key").read_bytes())


async def _take(path: Path, key: nbdvde.KeyFile, count: int) -> _Cost:
    """Take snapshots of a disk, each after a write."""
    rng, taken = random.Random(1), []
    async with nbdvde.open_image(path, key=key) as image:
        for place in range(count):
            await image.disk().write(rng.randrange(_STORED // _BLOCK) * _BLOCK, memoryview(rng.randbytes(_BLOCK)))
            begun = time.perf_counter()
            await image.volumes.snapshot("disk", f"s{place}")
            taken.append(time.perf_counter() - begun)
        await image.checkpoint()
        begun = time.perf_counter()
        await image.space()
        return _Cost(taken, time.perf_counter() - begun)


def _large(work: Work) -> list[float]:
    """Seconds for each snapshot of a disk of 1 TiB, after writes all over it were flushed."""
    server = _server("large")
    work.create(server, _LARGE_DISK)
    return trio.run(_take_large, work.directory / server.disk, _key(work))


async def _take_large(path: Path, key: nbdvde.KeyFile) -> list[float]:
    rng, taken = random.Random(1), []
    async with nbdvde.open_image(path, key=key) as image:
        for place in range(_LARGE_SNAPSHOTS):
            for _ in range(_CHANGES):
                await image.disk().write(rng.randrange(_LARGE_DISK // _BLOCK) * _BLOCK, memoryview(bytes(4095) + b"x"))
            await image.flush()
            begun = time.perf_counter()
            await image.volumes.snapshot("disk", f"s{place}")
            taken.append(time.perf_counter() - begun)
    return taken


def _section(
    snapshots: int, rates: dict[str, dict[str, list[float]]], cost: _Cost, large: list[float], peak: int
) -> Section:
    table = Table(["", "no snapshots", number(snapshots), "ratio", "required", ""])
    figures: dict[str, float] = {"peak_bytes": peak, "mark_s": cost.mark_s}
    for job, found in rates.items():
        none, many = statistics.median(found["none"]), statistics.median(found["many"])
        figures[job] = many / none
        table.add(job, number(none), number(many), f"{many / none:.2f}", f"{_RATIO}", _verdict(many / none >= _RATIO))
    costs = Table(["", "found", "allowed", ""])
    figures |= {"large_s": statistics.median(large), "taken_s": statistics.median(cost.taken_s)}
    taken, worst = statistics.median(cost.taken_s), max(cost.taken_s)
    costs.add("a snapshot of 64 GiB, median", milliseconds(taken), milliseconds(_TAKE_S), _verdict(taken <= _TAKE_S))
    costs.add("the slowest", milliseconds(worst), "", "")
    at_large = figures["large_s"]
    costs.add("of 1 TiB, median", milliseconds(at_large), milliseconds(_TAKE_S), _verdict(at_large <= _TAKE_S))
    costs.add("the slowest", milliseconds(max(large)), "", "")
    costs.add("counting what is in use", f"{cost.mark_s:.2f} s", f"{_MARK_S:g} s", _verdict(cost.mark_s <= _MARK_S))
    costs.add(
        "peak memory of the server", f"{peak >> 20} MiB", f"{_PEAK_BYTES >> 20} MiB", _verdict(peak <= _PEAK_BYTES)
    )
    text = (
        f"A disk of 64 GiB with {_STORED >> 20} MiB in it and {number(snapshots)} snapshots, one after each of so many "
        f"random 4K writes, beside one without. Snapshots of a disk of 1 TiB: each after {_CHANGES} random writes and "
        f"a flush. Counting is a checkpoint and the mark behind `nbdvde df`."
    )
    lines = [show(_server(name).serve(_DISK)) for name in ("none", "many")]
    jobs = [show(fio.command("URI", job, size=_STORED, seconds=None)) for job in _JOBS.values()]
    return Section("snapshots", text, [table, costs], [*lines, *jobs], figures)


def _verdict(reached: bool) -> str:
    return "reached" if reached else "**not reached**"
