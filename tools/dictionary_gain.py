"""What dictionaries save of real data, by kind and by size of extents: prints the table of docs/benchmarks.md.

    python tools/dictionary_gain.py [--mib N]

The data is what there is on the machine: programs, logs, mail (the patches of this repository, as mbox), database pages
(SQLite, made from the file lists of the package manager), sources and changelogs. Half of it teaches, the other half is
measured.
"""

import argparse
import gzip
import random
import sqlite3
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import zstandard

from nbdvde.engine.dictionaries import Dictionaries, identified
from nbdvde.engine.extent import WITH_DICTIONARY, Compressor
from nbdvde.engine.training import SIZE

ROOT = Path(__file__).resolve().parents[1]
SIZES = (4 << 10, 16 << 10, 64 << 10)
LEVEL = 1
_FEWEST = 24


def _contents(paths: Iterable[Path]) -> Iterator[bytes]:
    for path in paths:
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            yield gzip.decompress(data) if path.suffix == ".gz" else data


def programs() -> Iterator[bytes]:
    """ELF files."""
    return (data for data in _contents(sorted(Path("/usr/bin").iterdir())) if data.startswith(b"\x7fELF"))


def logs() -> Iterator[bytes]:
    """Logs of the machine."""
    return _contents(path for path in sorted(Path("/var/log").rglob("*")) if path.suffix in (".log", ".gz"))


def mail() -> Iterator[bytes]:
    """The history of this repository, as mails."""
    command = ["git", "-C", str(ROOT), "format-patch", "--root", "--stdout", "HEAD"]
    yield subprocess.run(command, capture_output=True, check=True).stdout


def pages() -> Iterator[bytes]:
    """A database of which files belong to which package."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "files.db"
        database = sqlite3.connect(path)
        database.execute("create table files (package text, path text)")
        for listed in sorted(Path("/var/lib/dpkg/info").glob("*.list")):
            rows = ((listed.stem, line) for line in listed.read_text().splitlines())
            database.executemany("insert into files values (?, ?)", rows)
        database.execute("create index by_path on files (path)")
        database.commit()
        database.close()
        yield path.read_bytes()


def sources() -> Iterator[bytes]:
    """Python."""
    return _contents(sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py")))


def changelogs() -> Iterator[bytes]:
    """Of the packages installed."""
    return _contents(sorted(Path("/usr/share/doc").glob("*/changelog*.gz")))


KINDS: dict[str, Callable[[], Iterator[bytes]]] = {
    "programs (ELF)": programs, "logs": logs, "mail (mbox)": mail, "database pages (SQLite)": pages,
    "sources (Python)": sources, "changelogs": changelogs,
}  # fmt: skip


def extents(kind: Callable[[], Iterator[bytes]], size: int, limit: int) -> list[bytes]:
    """Parts of files of this size, in random order, without those that are all zeroes."""
    parts = (data[at : at + size] for data in kind() for at in range(0, len(data) - size + 1, size))
    found = list(islice((part for part in parts if part.strip(b"\0")), limit // size))
    random.Random(1).shuffle(found)
    return found


def trained(samples: list[bytes]) -> Dictionaries:
    """A dictionary from blocks of 4 KiB, as number 1."""
    content = identified(zstandard.train_dictionary(SIZE, [*samples[:4096]], k=200, d=8).as_bytes())
    dictionaries = Dictionaries()
    dictionaries.take(dictionaries.table, {1: content})
    return dictionaries


def saved(parts: list[bytes], compressors: Sequence[Compressor]) -> str:
    """Ratio without and with a dictionary, what is saved, and what the higher level saves without one."""
    if len(parts) < _FEWEST:
        return "too little data"
    ways = (compressors[0].compress, compressors[1].compress, lambda part: compressors[0].compress_with(1, part))
    plain, higher, better = (sum(min(len(compress(part)), len(part)) for part in parts) for compress in ways)
    raw = sum(map(len, parts))
    return f"{raw / plain:.2f} → {raw / better:.2f}: {1 - better / plain:.0%} ({1 - higher / plain:.0%})"


def microseconds(parts: list[bytes], compress: Callable[[bytes], bytes]) -> float:
    """Of one block, in the best of several rounds."""
    rounds = []
    for _ in range(7):
        begun = time.perf_counter()
        for part in parts:
            compress(part)
        rounds.append((time.perf_counter() - begun) / len(parts) * 1e6)
    return min(rounds)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=32, help="most of each kind")
    limit = parser.parse_args().mib << 20
    print("| data | samples | 4 KiB | 16 KiB | 64 KiB | µs for 4 KiB |")
    print("|---|---|---|---|---|---|")
    for name, kind in KINDS.items():
        blocks = extents(kind, SIZES[0], limit)
        dictionaries = trained(blocks[::2])
        with_it = Compressor(LEVEL, dictionaries)
        pair = with_it, Compressor(WITH_DICTIONARY)
        cells = [saved((blocks if size == SIZES[0] else extents(kind, size, limit))[1::2], pair) for size in SIZES]
        some = blocks[1:400:2]
        times = microseconds(some, with_it.compress), microseconds(some, partial(with_it.compress_with, 1))
        print(f"| {name} | {len(blocks) // 2} | {' | '.join(cells)} | {times[0]:.0f} → {times[1]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
