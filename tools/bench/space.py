"""What two versions of a disk take: bytes, time in, time out, and random reads where they can be read in place."""

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.bench import fio
from tools.bench.fio import Job
from tools.bench.report import Section, Table, number
from tools.bench.servers import Command, Server, Work, show
from tools.dedup_share import change, file_system, generate

_CLUSTER = 64 << 10
_FIRST, _SECOND = "first.raw", "second.raw"
_READ = Job("randread", "4k", 1)
_READ_S = 5.0
Commands = tuple[Command, ...]


@dataclass(frozen=True, slots=True)
class Store:
    """A way of keeping both versions."""

    name: str
    writable: bool
    """Whether what is kept can be overwritten in place."""
    files: tuple[str, ...]
    """What it takes: files or folders."""
    put: Commands
    get: Commands
    """The second version out again, as `out.raw` or below `out`."""
    serve: Command = ()
    """Has the second version at the Unix socket `space.sock`."""


def _qemu_nbd(disk: str) -> Command:
    return ("qemu-nbd", "--persistent", "--socket=$PWD/space.sock", "--format=qcow2", disk)


def _convert(source: str, target: str, *options: str) -> Command:
    return ("qemu-img", "convert", "-O", "qcow2", *options, source, target)


def _out(source: str) -> Commands:
    return (("qemu-img", "convert", "-O", "raw", source, "out.raw"),)


def _nbdvde(name: str, size: int, *options: str) -> Store:
    disk, key = f"{name}.vde", "--key-file=disk.key"
    return Store(
        name, True, (disk,),
        (
            ("nbdvde", "create", disk, str(size), key, *options),
            ("nbdvde", "import", disk, _FIRST, key),
            ("nbdvde", "snapshot", "create", disk, "disk@first", key),
            ("nbdvde", "import", disk, _SECOND, key),
        ),
        (("nbdvde", "export", disk, "out.raw", key),),
        ("nbdvde", "serve", disk, key, "--listen=unix:space.sock"),
    )  # fmt: skip


def stores(size: int) -> list[Store]:
    """All that are compared, for disks of `size` bytes."""
    restic = ("restic", "--repo=restic", "--quiet", "--no-cache")
    return [
        Store(
            "qcow2", True, ("a.qcow2", "b.qcow2"), (_convert(_FIRST, "a.qcow2"), _convert(_SECOND, "b.qcow2")),
            _out("b.qcow2"), _qemu_nbd("b.qcow2"),
        ),
        Store(
            "qcow2 -c", False, ("ac.qcow2", "bc.qcow2"),
            (_convert(_FIRST, "ac.qcow2", "-c"), _convert(_SECOND, "bc.qcow2", "-c")), _out("bc.qcow2"),
            _qemu_nbd("bc.qcow2"),
        ),
        Store(
            "qcow2 with backing file", True, ("base.qcow2", "over.qcow2"),
            (
                _convert(_FIRST, "base.qcow2"),
                ("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "over.qcow2"),
                ("write-differences", "over.qcow2"),
            ),
            _out("over.qcow2"), _qemu_nbd("over.qcow2"),
        ),
        Store(
            "borg", False, ("borg",),
            (
                ("borg", "init", "--encryption=repokey-blake2", "borg"),
                *(("borg", "create", "--compression=zstd,3", f"borg::{f[0]}", f) for f in (_FIRST, _SECOND)),
            ),
            (("mkdir", "out-borg"), ("sh", "-c", "cd out-borg && borg extract ../borg::s")),
        ),
        Store(
            "casync", False, ("casync",),
            (
                ("mkdir", "casync"),
                *(("casync", "make", "--store=casync", f"casync/{f}.caibx", f) for f in (_FIRST, _SECOND)),
            ),
            (("casync", "extract", "--store=casync", f"casync/{_SECOND}.caibx", "out.raw"),),
        ),
        Store(
            "restic", False, ("restic",),
            ((*restic, "init"), (*restic, "backup", _FIRST), (*restic, "backup", _SECOND)),
            ((*restic, "restore", "latest", "--target", "out-restic"),),
        ),
        _nbdvde("nbdvde", size),
        _nbdvde("nbdvde-optimal", size, "--compression=optimal"),
    ]  # fmt: skip


def measure(work: Work, *, mib: int) -> Section:
    """Two generated ext4 file systems, the second a later version of the first, in each store."""
    size = _make(work.directory, mib)
    os.environ |= {"BORG_PASSPHRASE": "bench", "RESTIC_PASSWORD": "bench", "BORG_BASE_DIR": str(work.directory)}
    table = Table(["store", "MiB", "of nbdvde", "in, s", "out, s", "4K random reads/s", "overwritable"])
    found: dict[str, dict[str, float]] = {}
    all_stores = stores(size)
    for store in all_stores:
        found[store.name] = {
            "in_s": _timed(work, store.put),
            "bytes": sum(map(_bytes, (work.directory / name for name in store.files))),
            "out_s": _timed(work, store.get),
            "reads_per_s": _random_reads(work, store, size) if store.serve else 0.0,
        }
        for leftover in work.directory.glob("out.raw"):
            leftover.unlink()
    ours = found["nbdvde"]["bytes"]
    for store in all_stores:
        row = found[store.name]
        reads = number(row["reads_per_s"]) if store.serve else "only by taking it out"
        table.add(
            store.name, number(row["bytes"] / (1 << 20)), f"{row['bytes'] / ours:.2f}", f"{row['in_s']:.1f}",
            f"{row['out_s']:.1f}", reads, "yes" if store.writable else "no",
        )  # fmt: skip
    text = (
        f"Two ext4 file systems of {size >> 20} MiB: {mib} MiB of generated files, then 5 % removed, 5 % edited "
        "by an insertion, 10 % added. nbdvde keeps the first as a snapshot; all but qcow2 and casync encrypt."
    )
    commands = [show(command) for store in all_stores for command in (*store.put, *store.get, *_served(store))]
    return Section("space", text, [table], commands, found)


def _served(store: Store) -> Commands:
    return (store.serve, fio.command("URI", _READ, size=0, seconds=_READ_S)) if store.serve else ()


def _make(folder: Path, mib: int) -> int:
    """Make both raw disks, of equal length; answers it in bytes."""
    tree = folder / "tree"
    tree.mkdir()
    generate(tree, mib)
    file_system(tree, folder / _FIRST)
    change(tree)
    file_system(tree, folder / _SECOND)
    size = max((folder / name).stat().st_size for name in (_FIRST, _SECOND))
    for name in (_FIRST, _SECOND):
        os.truncate(folder / name, size)
    return size


def _timed(work: Work, commands: Sequence[Command]) -> float:
    begun = time.perf_counter()
    for command in commands:
        if command[0] == "write-differences":
            _write_differences(work.directory, command[1])
        else:
            work.run(command)
    os.sync()
    return time.perf_counter() - begun


def _write_differences(folder: Path, overlay: str) -> None:
    """Write to an overlay of the first version the clusters in which the second differs."""
    mount = folder / "mount"
    mount.mkdir()
    server = ["nbdfuse", str(mount), "[", "qemu-nbd", "--format=qcow2", str(folder / overlay), "]"]
    process = subprocess.Popen(server)
    disk = mount / "nbd"
    while not disk.exists():
        assert process.poll() is None, "nbdfuse ended"
        time.sleep(0.05)
    try:
        with (folder / _FIRST).open("rb") as old, (folder / _SECOND).open("rb") as new, disk.open("r+b", 0) as target:
            while data := new.read(_CLUSTER):
                if data != old.read(_CLUSTER):
                    target.seek(new.tell() - len(data))
                    target.write(data)
            os.fsync(target.fileno())
    finally:
        subprocess.run(["fusermount3", "-u", str(mount)], check=True)
        process.wait()


def _bytes(path: Path) -> int:
    """What a file, or all in a folder, takes on the host."""
    found = [path, *path.rglob("*")] if path.is_dir() else [path]
    return sum(one.stat().st_blocks * 512 for one in found)


def _random_reads(work: Work, store: Store, size: int) -> float:
    server = Server("space", "", lambda _: (), lambda _: store.serve)
    command = fio.command(server.uri, _READ, size=size, seconds=_READ_S)
    with work.serving(server, size):
        return fio.run(work.directory, command).iops
