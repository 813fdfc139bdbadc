"""What forms of replies and TLS cost."""

import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from tests.certificates import make_authority
from tools.bench import fio, wire
from tools.bench.fio import Job
from tools.bench.report import Section, Table, mib_per_s, number
from tools.bench.servers import SERVERS, Server, Work, show
from tools.bench.speed import MEMORY, NBDKIT, Case, serve_lines

_BLOCK, _DEPTH = 4096, 32
_KEPT = 0.9
"""Of the rate with simple replies."""
_RUNS = (*((MEMORY, headers) for headers in wire.HEADERS), (NBDKIT, "simple"), (NBDKIT, "structured"))
TLS_SERVERS = {
    server.name: server
    for server in (
        Server(
            "nbdvde-tls", "", lambda _: (),
            lambda size: (
                "nbdvde", "serve", f"--memory={size}", "--listen=unix:nbdvde-tls.sock",
                "--tls-cert=pki/server-cert.pem", "--tls-key=pki/server-key.pem",
            ),
            query="&tls-verify-peer=false", scheme="nbds+unix",
        ),
        Server(
            "nbdkit-tls", "", lambda _: (),
            lambda size: (
                "nbdkit", "-f", "-U", "nbdkit-tls.sock", "--tls=require", "--tls-certificates=$PWD/pki", "memory",
                f"{size}",
            ),
            query="&tls-verify-peer=false", scheme="nbds+unix",
        ),
    )
}  # fmt: skip
_TLS_CASES = (
    Case("4K randread QD32", Job("randread", "4k", 32)),
    Case("4K randwrite QD32", Job("randwrite", "4k", 32)),
    Case("1M read QD8", Job("read", "1M", 8), in_bytes=True),
    Case("1M write QD8", Job("write", "1M", 8), in_bytes=True),
)


def replies(work: Work, *, size: int, rounds: int, seconds: float) -> Section:
    """4 KiB reads with each form of replies, asked by a client that is never the limit."""
    rates: dict[tuple[str, str], list[float]] = {run: [] for run in _RUNS}
    with ExitStack() as stack:
        for name in (MEMORY, NBDKIT):
            stack.enter_context(work.serving(SERVERS[name], size))
            fio.fill(work.directory, SERVERS[name].uri, size)
        for _ in range(rounds):
            for name, headers in _RUNS:
                path = work.directory / SERVERS[name].socket
                rate = wire.read_rate(path, headers, block=_BLOCK, depth=_DEPTH, size=size, seconds=seconds)
                rates[name, headers].append(rate)
    medians = {run: statistics.median(values) for run, values in rates.items()}
    table = Table(["server", "replies", "4K reads/s"])
    for (name, headers), rate in medians.items():
        table.add(name, headers, number(rate))
    ratios = Table(["ours", "beside", "ratio", "required", ""])
    simple = medians[MEMORY, "simple"]
    for headers in ("structured", "extended"):
        ratio = medians[MEMORY, headers] / simple
        ratios.add(f"{headers} replies", "simple replies", f"{ratio:.2f}", f"{_KEPT}", _verdict(ratio, _KEPT))
    for headers in ("simple", "structured"):
        ratio = medians[MEMORY, headers] / medians[NBDKIT, headers]
        ratios.add(f"{headers} replies", "nbdkit's", f"{ratio:.2f}", "2.0", _verdict(ratio, 2.0))
    text = (
        f"4 KiB random reads, {_DEPTH} in flight, of a client that makes its requests before and only counts the bytes "
        f"of the answers. Medians of {rounds} rounds of {seconds:g} s, disks of {size >> 20} MiB in memory."
    )
    figures = {f"{name} {headers}": rate for (name, headers), rate in medians.items()}
    return Section("replies", text, [ratios, table], serve_lines((MEMORY, NBDKIT), size), {"medians": figures})


def tls(work: Work, *, size: int, rounds: int, seconds: float) -> Section:
    """The same jobs over TLS."""
    make_authority(work.directory / "pki")
    medians: dict[str, Mapping[str, float]] = {}
    with ExitStack() as stack:
        for server in TLS_SERVERS.values():
            stack.enter_context(work.serving(server, size))
            fio.fill(work.directory, server.uri, size)
        for case in _TLS_CASES:
            medians[case.name] = _in_turn(work, case, size=size, rounds=rounds, seconds=seconds)
    table = Table(["case", *TLS_SERVERS, "ratio", "required", ""])
    for case in _TLS_CASES:
        ours, theirs = medians[case.name].values()
        show_rate: Callable[[float], str] = mib_per_s if case.in_bytes else number
        table.add(
            case.name, show_rate(ours), show_rate(theirs), f"{ours / theirs:.2f}", "1.0", _verdict(ours / theirs, 1.0)
        )
    text = f"Disks in memory over TLS 1.3 on Unix sockets. Medians of {rounds} rounds of {seconds:g} s."
    lines = [show(server.serve(size)) for server in TLS_SERVERS.values()]
    jobs = [show(fio.command("URI", case.job, size=size, seconds=seconds)) for case in _TLS_CASES]
    return Section("tls", text, [table], [*lines, *jobs], {"medians": medians})


def _in_turn(work: Work, case: Case, *, size: int, rounds: int, seconds: float) -> Mapping[str, float]:
    rates: dict[str, list[float]] = {name: [] for name in TLS_SERVERS}
    for turn in range(rounds):
        for name, server in TLS_SERVERS.items():
            line = fio.command(server.uri, case.job, size=size, seconds=seconds, seed=turn + 1)
            result = fio.run(work.directory, line)
            rates[name].append(result.bytes_per_s if case.in_bytes else result.iops)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(case.name, medians, flush=True)
    return medians


def _verdict(ratio: float, required: float) -> str:
    return "reached" if ratio >= required else "**not reached**"
