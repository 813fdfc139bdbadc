"""Snapshots, clones and new sizes as libnbd's and QEMU's programs see them, while the image is served."""

import json
import os
import subprocess
from pathlib import Path

from tests.interop.conftest import SIZE, Serve
from tests.interop.harness import NBDVDE, Served, need, run, run_json
from tests.interop.qemu import storage_daemon

MIB, BLOCK = 1 << 20, 4096


def nbdvde(disk: Served, *words: str) -> str:
    """A command about the image: `snapshot create`, its image, and the rest."""
    group = 2 if words[0] in ("disk", "snapshot") else 1
    assert disk.image
    return run(NBDVDE, *words[:group], disk.image, *words[group:])


def uri(disk: Served, name: str) -> str:
    return f"nbd+unix:///{name}?socket={disk.server.socket}"


def qemu_io(disk: Served, *commands: str, name: str = "disk") -> None:
    mode = ["-r"] if "@" in name else []
    run("qemu-io", "-f", "raw", *mode, *(word for command in commands for word in ("-c", command)), uri(disk, name))


def test_names(serve: Serve) -> None:
    need("nbdinfo")
    disk = serve(SIZE)
    nbdvde(disk, "snapshot", "create", "disk@a")
    nbdvde(disk, "clone", "disk@a", "two")
    listed = run_json("nbdinfo", "--list", "--json", disk.uri)["exports"]
    assert [entry["export-name"] for entry in listed] == ["disk", "two", "disk@a"]
    snapshot = listed[2]
    assert snapshot["is_read_only"]
    assert snapshot["description"].startswith("snapshot of ")
    nbdvde(disk, "snapshot", "delete", "disk@a")
    assert subprocess.run(["nbdinfo", uri(disk, "disk@a")], capture_output=True, check=False).returncode


def test_a_snapshot_in_the_middle_of_writing(serve: Serve, tmp_path: Path) -> None:
    """It holds what was written up to one moment, what was flushed before included, and never changes."""
    need("qemu-io", "nbdcopy")
    disk, count = serve(SIZE), 3000
    script = "".join(f"write -q -P {n % 255 + 1} {n * BLOCK} 4k\n" + "flush\n" * (n % 16 == 0) for n in range(count))
    taken = []
    with subprocess.Popen(
        ["qemu-io", "-f", "raw", uri(disk, "disk")], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as writer:
        assert writer.stdin
        half = script.splitlines(keepends=True)
        for part in range(4):
            writer.stdin.writelines(line.encode() for line in half[part * len(half) // 4 : (part + 1) * len(half) // 4])
            writer.stdin.flush()
            nbdvde(disk, "snapshot", "create", f"disk@{part}")
            taken.append(contents(disk, f"disk@{part}", tmp_path))
        writer.stdin.close()
        assert writer.wait(60) == 0
    expected = b"".join(bytes([n % 255 + 1]) * BLOCK for n in range(count))
    lengths = [len(data.rstrip(b"\0")) for data in taken]
    assert lengths == sorted(lengths)
    for part, (data, length) in enumerate(zip(taken, lengths, strict=True)):
        assert length % BLOCK == 0
        assert data == expected[:length].ljust(SIZE, b"\0")
        assert contents(disk, f"disk@{part}", tmp_path) == data
    assert contents(disk, "disk", tmp_path) == expected.ljust(SIZE, b"\0")


def test_what_was_flushed_is_in_a_snapshot(serve: Serve, tmp_path: Path) -> None:
    need("qemu-io", "qemu-img")
    disk = serve(SIZE)
    qemu_io(disk, "write -q -P 1 0 1M", "write -q -P 2 40M 64k", "flush")
    nbdvde(disk, "snapshot", "create", "disk@a")
    qemu_io(disk, "write -q -P 3 512k 1M", "discard 40M 64k", "flush")
    qemu_io(disk, "read -P 1 0 1M", "read -P 0 1M 39M", "read -P 2 40M 64k", name="disk@a")
    qemu_io(disk, "read -P 1 0 512k", "read -P 3 512k 1M", "read -P 0 40M 64k")
    copy = tmp_path / "copy.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri(disk, "disk@a"), copy)
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", copy, uri(disk, "disk@a"))
    assert copy.stat().st_size < 3 * MIB, "holes stay holes"
    refused = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write 0 4k", uri(disk, "disk@a")], capture_output=True, check=False
    )
    assert refused.returncode


def test_an_incremental_backup(serve: Serve, tmp_path: Path) -> None:
    """QEMU's `x-dirty-bitmap` shows what changed between two snapshots as `data: false`; no more has to be copied."""
    need("qemu-io", "qemu-img", "nbdcopy")
    disk = serve(SIZE)
    qemu_io(disk, "write -q -P 1 0 8M")
    nbdvde(disk, "snapshot", "create", "disk@a")
    backup = bytearray(contents(disk, "disk@a", tmp_path))
    qemu_io(disk, "write -q -P 2 1M 64k", "write -q -P 3 40M 1M", "discard 6M 1M")
    nbdvde(disk, "snapshot", "create", "disk@b")
    qemu_io(disk, "write -q -P 4 0 8M")
    options = f"driver=nbd,export=disk@b,server.type=unix,server.path={disk.server.socket}"
    bitmap = "x-dirty-bitmap=qemu:dirty-bitmap:a"
    ranges = run_json("qemu-img", "map", "--output=json", "--image-opts", f"{options},{bitmap}")
    changed = [(part["start"], part["length"]) for part in ranges if not part["data"]]
    assert changed == [(MIB, 64 << 10), (6 * MIB, MIB), (40 * MIB, MIB)]
    now = contents(disk, "disk@b", tmp_path)
    for offset, length in changed:
        backup[offset : offset + length] = now[offset : offset + length]
    assert bytes(backup) == now
    told = json.loads(nbdvde(disk, "snapshot", "diff", "disk@a", "disk@b", "--json"))["changes"]
    assert [(part["offset"], part["length"]) for part in told] == changed


def test_a_file_system_goes_back(serve: Serve, tmp_path: Path) -> None:
    """ext4, changed after a snapshot, is the old one after a rollback and in a clone, and sound."""
    need("mkfs.ext4", "e2fsck", "debugfs", "nbdcopy")
    disk, raw, back = serve(SIZE), tmp_path / "raw", tmp_path / "back"
    with raw.open("wb") as file:
        file.truncate(SIZE)
    run("mkfs.ext4", "-q", "-d", Path(os.__file__).parent / "email", raw)
    run("nbdcopy", "--flush", raw, disk.uri)
    nbdvde(disk, "snapshot", "create", "disk@good")
    nbdvde(disk, "clone", "disk@good", "two")
    qemu_io(disk, "write -q -P 9 0 8M", "flush")
    nbdvde(disk, "snapshot", "rollback", "disk@good")
    for name in ("disk", "two"):
        run("nbdcopy", uri(disk, name), back)
        assert back.read_bytes() == raw.read_bytes()
        run("e2fsck", "-fn", back)
        back.unlink()


def test_a_new_size(serve: Serve) -> None:
    """Who connects later sees it; who was there goes on with the old one."""
    need("nbdinfo", "qemu-io")
    disk = serve(SIZE)
    with subprocess.Popen(
        ["qemu-io", "-f", "raw", disk.uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as old:
        assert old.stdin
        assert old.stdout
        old.stdin.write("length\n")
        old.stdin.flush()
        assert "64 MiB" in old.stdout.readline()
        nbdvde(disk, "resize", "128M")
        assert run("nbdinfo", "--size", disk.uri) == f"{128 * MIB}\n"
        qemu_io(disk, "write -q -P 5 127M 1M", "flush")
        assert old.communicate("write -q -P 4 63M 1M\nlength\nflush\n", timeout=60)[0].count("64 MiB") == 1
    qemu_io(disk, "read -P 4 63M 1M", "read -P 0 64M 63M", "read -P 5 127M 1M")
    refused = subprocess.run([NBDVDE, "resize", str(disk.image), "64M"], capture_output=True, check=False)
    assert refused.returncode == 9
    assert b"--discard" in refused.stderr
    nbdvde(disk, "resize", "64M", "--discard")
    assert run("nbdinfo", "--size", disk.uri) == f"{SIZE}\n"


def test_qemu_takes_over_a_new_size(serve: Serve, tmp_path: Path) -> None:
    """docs/how-to/resize.md: disconnect it, let it come back with any request, and tell it the size by QMP."""
    need("nbdinfo", "qemu-io")
    disk = serve(SIZE)
    with storage_daemon(tmp_path, newer=False) as daemon:
        daemon.attach("ours", disk.server.socket, reconnect_delay=60)
        through = f"nbd+unix:///ours?socket={daemon.export('ours')}"
        nbdvde(disk, "resize", "128M", "--force")
        run("qemu-io", "-f", "raw", "-c", "read -q 0 4k", through)
        daemon.do("block-export-del", id="ours", mode="hard")
        daemon.wait("BLOCK_EXPORT_DELETED")
        daemon.do("block_resize", node_name="ours", size=128 * MIB)
        daemon.do("block-export-add", type="nbd", id="ours", node_name="ours", name="ours", writable=True)
        assert run("nbdinfo", "--size", through) == f"{128 * MIB}\n"
        run("qemu-io", "-f", "raw", "-c", "write -q -P 7 127M 1M", "-c", "flush", through)
    qemu_io(disk, "read -P 7 127M 1M")


def contents(disk: Served, name: str, folder: Path) -> bytes:
    copy = folder / "contents"
    run("nbdcopy", uri(disk, name), copy)
    data = copy.read_bytes()
    copy.unlink()
    return data
