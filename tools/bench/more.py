"""What else is measured: cold reads, endurance, a slow disk, bytes written, and opening a large image."""

import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tools.bench import fio
from tools.bench.fio import Job, Result
from tools.bench.report import Section, Table, mib_per_s, milliseconds, number
from tools.bench.servers import SERVERS, Command, Running, Server, Work, show
from tools.bench.speed import IMAGE, LUKS, serve_lines

_SLOW_SYNC = Path(__file__).with_name("slow_sync.py")
_INJECTED_S = 0.010
_ALLOWED_GROWTH_S = 0.002
_RAMP_S = 1
_WRITES_PER_S = 400
_READER = Job("randread", "4k", 1, extra=(f"--ramp_time={_RAMP_S}",))
_WRITER = Job("randwrite", "4k", 8, fsync=8, extra=(f"--rate_iops={_WRITES_PER_S}",))
_ALLOWED_WRITES = 1.1
_CLEAN_S, _CRASHED_S, _PEAK_BYTES = 1.0, 10.0, 300 << 20
_FILL = Job("randwrite", "1M", 8, extra=("--end_fsync=1",))
_LOAD_S, _LOADS = 10.0, ("randread", "randrw")


def cold(work: Work, *, size: int, servers: Sequence[str]) -> Section:
    """Read everything once after a restart, with nothing of the disk in the host's memory."""
    jobs = {"4K randread QD32": Job("randread", "4k", 32), "1M read QD8": Job("read", "1M", 8)}
    table, figures = Table(["server", *jobs]), {}
    for name in servers:
        server = SERVERS[name]
        work.create(server, size)
        with work.serving(server, size):
            fio.fill(work.directory, server.uri, size)
        rates = {case: _cold_run(work, server, job, size).bytes_per_s for case, job in jobs.items()}
        table.add(name, *map(mib_per_s, rates.values()))
        figures[name] = rates
    commands = [show(fio.command("URI", job, size=size, seconds=None)) for job in jobs.values()]
    text = f"Each block of a disk of {size >> 20} MiB read once; server restarted and page cache dropped before."
    return Section("cold", text, [table], [*serve_lines(servers, size), *commands], {"bytes_per_s": figures})


def _cold_run(work: Work, server: Server, job: Job, size: int) -> Result:
    work.drop_caches(server)
    with work.serving(server, size):
        return fio.run(work.directory, fio.command(server.uri, job, size=size, seconds=None))


def sustained(work: Work, *, size: int, seconds: float, servers: Sequence[str]) -> Section:
    """Random writes for a minute: the rate holds, and no request waits for long."""
    job = Job("randwrite", "4k", 32)
    table = Table(["server", "writes/s", "slowest half second, writes/s", "p99", "p99.9", "slowest"])
    results = {}
    for name in servers:
        server = SERVERS[name]
        work.create(server, size)
        with work.serving(server, size):
            fio.fill(work.directory, server.uri, size)
            os.sync()
            result = fio.run(work.directory, fio.command(server.uri, job, size=size, seconds=seconds))
        results[name] = result
        times = map(milliseconds, (result.p99_s, result.p999_s, result.slowest_s))
        table.add(name, number(result.iops), number(result.slowest_half_second_iops), *times)
    text = f"4K random writes at queue depth 32 for {seconds:g} s on a filled disk of {size >> 20} MiB."
    if {IMAGE, LUKS} <= results.keys():
        ratio = results[IMAGE].iops / results[LUKS].iops
        text += f" {IMAGE} / {LUKS}: {ratio:.2f}, required 1.0: {_verdict(ratio >= 1)}."
    commands = [*serve_lines(servers, size), show(fio.command("URI", job, size=size, seconds=seconds))]
    figures = {name: {"iops": result.iops, "p99_s": result.p99_s} for name, result in results.items()}
    return Section("sustained", text, [table], commands, figures)


def slow_sync(work: Work, *, size: int, rounds: int, seconds: float) -> Section:
    """A disk that takes long to sync must not delay the reads of another client.

    The writer is held to a rate that slow syncs allow, so that it takes the same share of the processors in both runs.
    """
    server = SERVERS[IMAGE]
    work.create(server, size)
    with work.serving(server, size):
        fio.fill(work.directory, server.uri, size)
    delays = {"normal": 0.0, f"{_INJECTED_S * 1e3:g} ms longer": _INJECTED_S}
    pairs: dict[str, list[tuple[Result, Result]]] = {syncs: [] for syncs in delays}
    for turn in range(rounds):
        for syncs in list(delays)[:: 1 if turn % 2 else -1]:
            pairs[syncs].append(_read_beside_writes(work, size, seconds, delays[syncs], seed=turn))
    table = Table(["syncs", "reads/s", "p99 of reads", "p99.9", "of the rounds", "writes/s beside", "a flush"])
    medians = {syncs: _add_medians(table, syncs, results) for syncs, results in pairs.items()}
    usual, slow = medians.values()
    growth = slow - usual
    text = (
        f"4K random reads at queue depth 1 on a disk of {size >> 20} MiB, beside a client that makes {_WRITES_PER_S} "
        f"4K random writes a second and flushes every 8. Medians of {rounds} rounds of {seconds:g} s, taken in turn. "
        f"Growth of the p99 with the injected delay: {milliseconds(growth)}, at most "
        f"{milliseconds(_ALLOWED_GROWTH_S)} allowed: {_verdict(growth <= _ALLOWED_GROWTH_S)}."
    )
    servers = [show(("python", "tools/bench/slow_sync.py", f"{s:g}", *server.serve(size)[1:])) for s in delays.values()]
    jobs = [show(fio.command("URI", job, size=size, seconds=seconds)) for job in (_READER, _WRITER)]
    return Section("slow-sync", text, [table], [show(server.create(size)[0]), *servers, *jobs], {"p99_s": medians})


def _read_beside_writes(work: Work, size: int, seconds: float, delay_s: float, seed: int) -> tuple[Result, Result]:
    """What a reader and, beside it, a writer got."""
    server = SERVERS[IMAGE]
    with work.serving(server, size, launcher=(sys.executable, str(_SLOW_SYNC), str(delay_s))):
        write = fio.command(server.uri, _WRITER, size=size, seconds=seconds + _RAMP_S + 1, seed=2 * seed + 1)
        writer = fio.Client(work.directory, write)
        try:
            read = fio.command(server.uri, _READER, size=size, seconds=seconds, seed=2 * seed + 2)
            return fio.run(work.directory, read), writer.result()
        finally:
            writer.kill()


def _add_medians(table: Table, syncs: str, results: Sequence[tuple[Result, Result]]) -> float:
    """A row of the table; answers the median of the reader's p99 in seconds."""
    readers, writers = zip(*results, strict=True)
    p99: float = statistics.median(reader.p99_s for reader in readers)
    table.add(
        syncs,
        number(statistics.median(reader.iops for reader in readers)),
        milliseconds(p99),
        milliseconds(statistics.median(reader.p999_s for reader in readers)),
        ", ".join(f"{reader.p99_s * 1e3:.2f}" for reader in readers),
        number(statistics.median(writer.iops for writer in writers)),
        milliseconds(statistics.median(writer.median_flush_s for writer in writers)),
    )
    return p99


def amplification(work: Work, *, size: int) -> Section:
    """Bytes that the host is asked to write for each byte that a guest writes.

    For ours alone: for a file that is overwritten in place the kernel charges whole folios, up to 1 MiB a write.
    """
    server = SERVERS[IMAGE]
    job = Job("randwrite", "4k", 32, fsync=32, extra=("--buffer_compress_percentage=0", "--end_fsync=1"))
    work.create(server, size)
    with work.serving(server, size):
        fio.fill(work.directory, server.uri, size)
    with work.serving(server, size) as running:
        result = fio.run(work.directory, _incompressible(server.uri, job, size))
        written = running.stop()
    ratio = written / result.total_bytes
    table = Table(["guest wrote", "host wrote", "ratio", "allowed", ""])
    cells = _mib(result.total_bytes), _mib(written), f"{ratio:.2f}", f"{_ALLOWED_WRITES}"
    table.add(*cells, _verdict(ratio <= _ALLOWED_WRITES))
    text = (
        f"4K random incompressible writes over a filled disk of {size >> 20} MiB, flushed every 32, each block once. "
        "What the kernel charged the server process (`ru_oublock`) from its start to the end of its clean stop."
    )
    commands = [*serve_lines([IMAGE], size), show(_incompressible("URI", job, size))]
    return Section("amplification", text, [table], commands, {"ratio": ratio})


def _incompressible(uri: str, job: Job, size: int) -> Command:
    line = fio.command(uri, job, size=size, seconds=None)
    return tuple(option for option in line if option != "--buffer_compress_percentage=60")


def opening(work: Work, *, size: int, stored: int) -> Section:
    """Time to open and peak memory of a large thin disk: after a clean stop, and after `kill -9` while writing."""
    server = SERVERS[IMAGE]
    work.create(server, size)
    with work.serving(server, size):
        fio.run(work.directory, _scattered(server.uri, _FILL, size, stored))
    columns = ["peak memory then", "after reads", "after reads and writes"]
    table, figures = Table(["stopped by", "open", "allowed", "", *columns, "allowed", ""]), {}
    for how, limit in (("SIGTERM", _CLEAN_S), ("kill -9", _CRASHED_S)):
        if how == "kill -9":
            _crash_while_writing(work, server, size)
        work.drop_caches(server)
        with work.serving(server, size) as running:
            opened, peaks = running.start_s, _peaks(work, running, server, size, stored)
        verdicts = _verdict(opened <= limit), _verdict(peaks[-1] <= _PEAK_BYTES)
        memory = *map(_mib, peaks), _mib(_PEAK_BYTES), verdicts[1]
        table.add(how, f"{opened:.2f} s", f"{limit:g} s", verdicts[0], *memory)
        figures[how] = {"open_s": opened, "peak_bytes": peaks}
    text = (
        f"A disk of {size >> 30} GiB with {stored >> 30} GiB in pieces of 1 MiB all over it. From starting the program "
        f"to its greeting, page cache dropped; peak resident memory then, after {_LOAD_S:g} s of 4K reads in those "
        f"pieces in random order, and after {_LOAD_S:g} s of reads and writes."
    )
    clients = [_scattered("URI", _FILL, size, stored), *(_in_pieces("URI", rw, size, stored) for rw in _LOADS)]
    return Section("opening", text, [table], [*serve_lines([IMAGE], size), *map(show, clients)], figures)


def _scattered(uri: str, job: Job, size: int, stored: int, offset: int = 0) -> Command:
    """A job in `stored` bytes in pieces of 1 MiB all over the disk: the same ones in the same order each time."""
    places = (f"--offset={offset}", "--blockalign=1M", "--norandommap", f"--number_ios={stored >> 20}")
    return (*fio.command(uri, job, size=size - (1 << 20), seconds=None), *places)


def _in_pieces(uri: str, rw: str, size: int, stored: int, offset: int = 0) -> Command:
    return _scattered(uri, Job(rw, "4k", 32), size, stored, offset)


def _crash_while_writing(work: Work, server: Server, size: int) -> None:
    with work.serving(server, size) as running:
        writer = fio.command(server.uri, Job("randwrite", "64k", 8, fsync=64), size=size, seconds=600)
        client = fio.Client(work.directory, writer)
        running.wait_written(384 << 20)
        running.kill()
        client.kill()


def _peaks(work: Work, running: Running, server: Server, size: int, stored: int) -> list[int]:
    """Peak memory in bytes now, and after each of the loads."""
    peaks = [running.peak_memory()]
    for rw in _LOADS:
        end = time.monotonic() + _LOAD_S
        for offset in range(0, 1 << 20, 64 << 10):
            if time.monotonic() < end:
                fio.run(work.directory, _in_pieces(server.uri, rw, size, stored, offset))
        peaks.append(running.peak_memory())
    return peaks


def _mib(value: int) -> str:
    return f"{number(value / 2**20)} MiB"


def _verdict(reached: bool) -> str:
    return "reached" if reached else "**not reached**"
