"""What else is measured: cold reads, endurance, a slow disk, bytes written, and opening a large image."""

import os
import sys
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
_ALLOWED_WRITES = 1.1
_CLEAN_S, _CRASHED_S, _PEAK_BYTES = 1.0, 10.0, 300 << 20


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


def slow_sync(work: Work, *, size: int, seconds: float) -> Section:
    """A disk that takes long to sync must not delay the reads of another client."""
    server = SERVERS[IMAGE]
    work.create(server, size)
    with work.serving(server, size):
        fio.fill(work.directory, server.uri, size)
    reader, writer = Job("randread", "4k", 1), Job("randwrite", "4k", 8, fsync=8)
    launcher = (sys.executable, str(_SLOW_SYNC), str(_INJECTED_S))
    results: dict[str, Result] = {
        "nobody": _read_beside(work, size, seconds, reader, None),
        "a client that flushes every 8 writes": _read_beside(work, size, seconds, reader, writer),
        "the same, every sync 10 ms longer": _read_beside(work, size, seconds, reader, writer, launcher),
    }
    table = Table(["beside", "reads/s", "p99", "p99.9"])
    for beside, result in results.items():
        table.add(beside, number(result.iops), milliseconds(result.p99_s), milliseconds(result.p999_s))
    _, usual, slow = results.values()
    growth = slow.p99_s - usual.p99_s
    text = (
        f"4K random reads at queue depth 1, on a disk of {size >> 20} MiB. Growth of the p99 with the injected delay: "
        f"{milliseconds(growth)}, at most {milliseconds(_ALLOWED_GROWTH_S)} allowed: "
        f"{_verdict(growth <= _ALLOWED_GROWTH_S)}."
    )
    slow_command = show(("python", "tools/bench/slow_sync.py", str(_INJECTED_S), *server.serve(size)[1:]))
    jobs = [show(fio.command("URI", job, size=size, seconds=seconds)) for job in (reader, writer)]
    figures = {beside: {"iops": result.iops, "p99_s": result.p99_s} for beside, result in results.items()}
    return Section("slow-sync", text, [table], [*serve_lines([IMAGE], size), slow_command, *jobs], figures)


def _read_beside(
    work: Work, size: int, seconds: float, reader: Job, writer: Job | None, launcher: Command = ()
) -> Result:
    server = SERVERS[IMAGE]
    with work.serving(server, size, launcher=launcher):
        line = fio.command(server.uri, reader, size=size, seconds=seconds, seed=1)
        if writer is None:
            return fio.run(work.directory, line)
        other = fio.command(server.uri, writer, size=size, seconds=seconds + 1, seed=2)
        beside = fio.Client(work.directory, other)
        try:
            return fio.run(work.directory, line)
        finally:
            beside.result()


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
    scatter = Job("randwrite", "1M", 8, extra=(f"--io_size={stored}", "--end_fsync=1", "--norandommap"))
    fill = fio.command(server.uri, scatter, size=size, seconds=None)
    with work.serving(server, size):
        fio.run(work.directory, fill)
    table = Table(["stopped by", "open", "allowed", "", "peak memory then", "after mixed load", "allowed", ""])
    figures = {}
    for how, limit in (("SIGTERM", _CLEAN_S), ("kill -9", _CRASHED_S)):
        if how == "kill -9":
            _crash_while_writing(work, server, size)
        work.drop_caches(server)
        with work.serving(server, size) as running:
            opened, peak = running.start_s, running.peak_memory()
            loaded = _peak_under_load(work, running, server, size)
        verdicts = _verdict(opened <= limit), _verdict(loaded <= _PEAK_BYTES)
        table.add(
            how,
            f"{opened:.2f} s",
            f"{limit:g} s",
            verdicts[0],
            _mib(peak),
            _mib(loaded),
            _mib(_PEAK_BYTES),
            verdicts[1],
        )
        figures[how] = {"open_s": opened, "peak_bytes": peak, "loaded_bytes": loaded}
    text = (
        f"A disk of {size >> 30} GiB with {stored >> 30} GiB in pieces of 1 MiB all over it. From starting the program "
        "to its greeting, page cache dropped; peak resident memory then, and after 10 s of random 4K reads and writes."
    )
    return Section("opening", text, [table], [*serve_lines([IMAGE], size), show(fill)], figures)


def _crash_while_writing(work: Work, server: Server, size: int) -> None:
    with work.serving(server, size) as running:
        writer = fio.command(server.uri, Job("randwrite", "64k", 8, fsync=64), size=size, seconds=600)
        client = fio.Client(work.directory, writer)
        running.wait_written(384 << 20)
        running.kill()
        client.kill()


def _peak_under_load(work: Work, running: Running, server: Server, size: int) -> int:
    fio.run(
        work.directory,
        fio.command(server.uri, Job("randrw", "4k", 32, extra=("--norandommap",)), size=size, seconds=10),
    )
    return running.peak_memory()


def _mib(value: int) -> str:
    return f"{number(value / 2**20)} MiB"


def _verdict(reached: bool) -> str:
    return "reached" if reached else "**not reached**"
