"""The same jobs against every server, interleaved: medians, and their ratios beside the ones required."""

import os
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from tools.bench import fio
from tools.bench.fio import Job
from tools.bench.report import Section, Table, mib_per_s, number
from tools.bench.servers import SERVERS, Work, show

MEMORY, IMAGE, LUKS, RAW, NBDKIT = "nbdvde-memory", "nbdvde", "qemu-luks", "qemu-raw", "nbdkit-memory"


@dataclass(frozen=True, slots=True)
class Case:
    """A job, and how many times as fast as others we must do it: (ours, theirs) -> ratio."""

    name: str
    job: Job
    required: dict[tuple[str, str], float] = field(default_factory=dict)
    in_bytes: bool = False
    """Report MiB/s rather than requests per second."""


CASES = (
    Case(
        "4K randread QD32", Job("randread", "4k", 32),
        {(MEMORY, NBDKIT): 2.0, (IMAGE, LUKS): 1.5, (IMAGE, RAW): 1.0},
    ),
    Case("4K randread QD1", Job("randread", "4k", 1), {(MEMORY, NBDKIT): 1.1, (IMAGE, LUKS): 1.0}),
    Case(
        "4K randwrite QD32", Job("randwrite", "4k", 32),
        {(MEMORY, NBDKIT): 2.0, (IMAGE, LUKS): 1.5, (IMAGE, RAW): 1.0},
    ),
    Case("4K randwrite QD32, fsync every 32", Job("randwrite", "4k", 32, fsync=32), {(IMAGE, LUKS): 1.2}),
    Case("4K randwrite QD1, fsync every write", Job("randwrite", "4k", 1, fsync=1), {(IMAGE, LUKS): 0.8}),
    Case("64K write QD8, fsync every 64", Job("write", "64k", 8, fsync=64), {(IMAGE, LUKS): 1.2}, in_bytes=True),
    Case("1M read QD8", Job("read", "1M", 8), {(MEMORY, NBDKIT): 1.0, (IMAGE, LUKS): 2.0}, in_bytes=True),
    Case(
        "1M write QD8, fsync every 64", Job("write", "1M", 8, fsync=64),
        {(MEMORY, NBDKIT): 1.0, (IMAGE, LUKS): 1.3}, in_bytes=True,
    ),
)  # fmt: skip


_SEEDS = 1000
"""Of a case: with the seed of another run fio writes the same data again, which deduplication would find."""


def measure(
    work: Work, *, size: int, rounds: int, seconds: float, servers: Sequence[str], cases: Sequence[str]
) -> Section:
    """Serve all disks, fill them, and run each case `rounds` times on each, one server after the other."""
    chosen = [case for case in CASES if not cases or any(part in case.name for part in cases)]
    medians: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        for name in servers:
            server = SERVERS[name]
            work.create(server, size)
            stack.enter_context(work.serving(server, size))
            fio.fill(work.directory, server.uri, size)
        for number, case in enumerate(chosen, 1):
            medians[case.name] = _medians(
                work, case, size=size, rounds=rounds, seconds=seconds, servers=servers, seed=number * _SEEDS
            )
    return _report(chosen, servers, medians, size=size, rounds=rounds, seconds=seconds)


def _medians(
    work: Work, case: Case, *, size: int, rounds: int, seconds: float, servers: Sequence[str], seed: int
) -> dict[str, float]:
    rates: dict[str, list[float]] = {name: [] for name in servers}
    for turn in range(rounds):
        first = turn % len(servers)
        for name in [*servers[first:], *servers[:first]]:
            os.sync()
            line = fio.command(SERVERS[name].uri, case.job, size=size, seconds=seconds, seed=seed + turn)
            result = fio.run(work.directory, line)
            rates[name].append(result.bytes_per_s if case.in_bytes else result.iops)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(case.name, *(f"{name}={_rate(case, rate)}" for name, rate in medians.items()), sep="  ", flush=True)
    return medians


def _report(
    cases: Sequence[Case],
    servers: Sequence[str],
    medians: dict[str, dict[str, float]],
    *,
    size: int,
    rounds: int,
    seconds: float,
) -> Section:
    ratios = Table(["case", "ours", "theirs", "ratio", "required", ""])
    rates = Table(["case", *servers])
    for case in cases:
        got = medians[case.name]
        rates.add(case.name, *(_rate(case, got[name]) for name in servers))
        for (ours, theirs), required in case.required.items():
            if ours in got and theirs in got:
                ratio = got[ours] / got[theirs]
                reached = "reached" if ratio >= required else "**not reached**"
                ratios.add(case.name, ours, theirs, f"{ratio:.2f}", f"{required:.1f}", reached)
    text = (
        f"Medians of {rounds} rounds of {seconds:g} s, disks of {size >> 20} MiB filled before, servers taken in turn. "
        "Requests per second; MiB/s where it says so."
    )
    commands = [show(fio.command("URI", case.job, size=size, seconds=seconds)) for case in cases]
    return Section("speed", text, [ratios, rates], [*serve_lines(servers, size), *commands], {"medians": medians})


def serve_lines(servers: Sequence[str], size: int) -> list[str]:
    """The command lines that make and serve the disks."""
    return [show(line) for name in servers for line in (*SERVERS[name].create(size), SERVERS[name].serve(size))]


def _rate(case: Case, rate: float) -> str:
    return mib_per_s(rate) if case.in_bytes else number(rate)
