"""Command line of the benchmarks."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from nbdvde.config import parse_size
from tools.bench import failover, groups, history, more, network, replication, space, speed, streams
from tools.bench.report import Section, update_document, write_json
from tools.bench.servers import SERVERS, Work

_ALL = tuple(SERVERS)
_ON_DISK = tuple(server.name for server in SERVERS.values() if server.disk)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__)
    parser.add_argument("what", nargs="*", default="speed", choices=[*_SECTIONS, "all"], help="default: speed")
    parser.add_argument("--rounds", type=int, default=3, help="of each job on each server (speed, slow-sync)")
    parser.add_argument("--seconds", type=float, help="of each run (5; sustained: 60)")
    parser.add_argument("--size", type=parse_size, default=512 << 20, help="of a disk: four times our cache and buffer")
    parser.add_argument("--servers", type=lambda text: text.split(","), help=f"some of {','.join(_ALL)}")
    parser.add_argument("--cases", type=lambda text: text.split(","), default=[], help="parts of names (speed)")
    parser.add_argument("--large-size", type=parse_size, default=1 << 40, help="of the disk that is opened")
    parser.add_argument("--large-stored", type=parse_size, default=16 << 30, help="bytes in it")
    parser.add_argument("--snapshots", type=int, default=10_000, help="of a disk (snapshots)")
    parser.add_argument("--kills", type=int, default=100, help="of a leader (failover)")
    parser.add_argument("--mib", type=int, default=512, help="of files (space)")
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="directory for the disks")
    parser.add_argument("--json", type=Path, default=Path("build/bench.json"), help="figures of all sections")
    parser.add_argument("--update-docs", action="store_true", help="put the tables into docs/benchmarks.md")
    return parser.parse_args(argv)


def _chosen(options: argparse.Namespace, possible: Sequence[str]) -> list[str]:
    return [name for name in possible if not options.servers or name in options.servers]


_SECTIONS: dict[str, Callable[[Work, argparse.Namespace], Section]] = {
    "speed": lambda work, options: speed.measure(
        work, size=options.size, rounds=options.rounds, seconds=options.seconds or 5.0,
        servers=_chosen(options, _ALL), cases=options.cases,
    ),
    "replies": lambda work, options: network.replies(
        work, size=options.size, rounds=options.rounds, seconds=options.seconds or 5.0,
    ),
    "tls": lambda work, options: network.tls(
        work, size=options.size, rounds=options.rounds, seconds=options.seconds or 5.0,
    ),
    "cold": lambda work, options: more.cold(work, size=options.size, servers=_chosen(options, _ON_DISK)),
    "sustained": lambda work, options: more.sustained(
        work, size=options.size, seconds=options.seconds or 60.0,
        servers=_chosen(options, (speed.IMAGE, speed.LUKS, speed.RAW)),
    ),
    "slow-sync": lambda work, options: more.slow_sync(
        work, size=options.size, rounds=options.rounds, seconds=options.seconds or 5.0,
    ),
    "amplification": lambda work, options: more.amplification(work, size=options.size),
    "snapshots": lambda work, options: history.measure(
        work, snapshots=options.snapshots, rounds=options.rounds, seconds=options.seconds or 5.0,
    ),
    "streams": lambda work, options: streams.measure(work, rounds=options.rounds),
    "replication": lambda work, options: replication.measure(
        work, rounds=options.rounds, seconds=options.seconds or 5.0,
    ),
    "failover": lambda work, options: failover.measure(work, kills=options.kills),
    "groups": lambda work, options: groups.measure(work, seconds=options.seconds or 5.0),
    "space": lambda work, options: space.measure(work, mib=options.mib),
    "opening": lambda work, options: more.opening(work, size=options.large_size, stored=options.large_stored),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run what was asked for, print it, and keep it."""
    options = _arguments(argv)
    unknown = set(options.servers or ()) - set(_ALL)
    if unknown:
        sys.exit(f"unknown servers: {', '.join(sorted(unknown))}")
    asked = [options.what] if isinstance(options.what, str) else dict.fromkeys(options.what)
    options.work.mkdir(parents=True, exist_ok=True)
    for name in _SECTIONS if "all" in asked else asked:
        with TemporaryDirectory(dir=options.work) as directory:
            section = _SECTIONS[name](Work(Path(directory)), options)
        print(f"\n{section.markdown()}\n", flush=True)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, section)
        if options.update_docs:
            update_document(section)


if __name__ == "__main__":
    main()
