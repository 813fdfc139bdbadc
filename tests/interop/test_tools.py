"""libnbd's commands, QEMU's tools and fio on a served disk."""

import os
import random
import re
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from tests.interop.conftest import SIZE
from tests.interop.harness import Process, Served, need, run, run_json, serve_image

MIB = 1 << 20
COUNT_OF_LINES = re.compile(r"ops; ")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A sparse file as large as the disk, with an ext4 file system full of Python's own modules."""
    need("mkfs.ext4")
    path = tmp_path / "tree.raw"
    with path.open("wb") as file:
        file.truncate(SIZE)
    run("mkfs.ext4", "-q", "-d", Path(os.__file__).parent / "email", path)
    return path


def equal(one: Path, other: Path) -> bool:
    """Do both files hold the same? They are too long for a comparison that pytest explains."""
    return one.read_bytes() == other.read_bytes()


def allocated(path: Path) -> int:
    """Bytes that a file takes on the host."""
    return path.stat().st_blocks * 512


def test_nbdinfo(served: Served) -> None:
    need("nbdinfo")
    info = run_json("nbdinfo", "--json", served.uri)
    (export,) = info["exports"]
    assert info["protocol"] == "newstyle-fixed"
    assert info["structured"]
    assert (export["export-name"], export["export-size"]) == ("disk", SIZE)
    contexts = ["base:allocation", "qemu:allocation-depth", *(["x-nbdvde:extent"] if served.image else [])]
    assert export["contexts"] == contexts
    assert [entry["export-name"] for entry in run_json("nbdinfo", "--list", "--json", served.uri)["exports"]] == [
        "disk"
    ]
    assert run("nbdinfo", "--size", served.uri) == f"{SIZE}\n"
    run("nbdinfo", "--can", "multi-conn", served.uri)


def test_nbdinfo_over_tcp(tmp_path: Path) -> None:
    need("nbdinfo")
    server = Process(tmp_path, ["--memory", "1M"], listen="127.0.0.1:0")
    assert server.uri.startswith("nbd://127.0.0.1:")
    assert run("nbdinfo", "--size", server.uri) == f"{MIB}\n"
    server.stop()


@pytest.mark.parametrize("address", ["unix", "tcp"])
def test_nbd_client_lists(tmp_path: Path, address: str) -> None:
    """The reference implementation's client."""
    need("nbd-client")
    server = Process(tmp_path, ["--memory", "1M"], listen="127.0.0.1:0" if address == "tcp" else None)
    where = ["-unix", server.socket] if address == "unix" else ["127.0.0.1", server.uri.rstrip("/").rpartition(":")[2]]
    assert run("nbd-client", "-l", *where).split() == ["Negotiation:", "..", "disk"]
    server.stop()


def test_nbdinfo_maps_how_blocks_are_stored(tmp_path: Path) -> None:
    need("nbdinfo", "qemu-io")
    with closing(serve_image(tmp_path, SIZE)) as disk:
        noise = tmp_path / "noise"
        noise.write_bytes(random.Random(2).randbytes(MIB))
        run("qemu-io", "-f", "raw", "-c", "write -q -P 1 0 1M", "-c", f"write -q -s {noise} 1M 1M", disk.uri)
        disk.restart()
        entries = run_json("nbdinfo", "--map=x-nbdvde:extent", "--json", disk.uri)
    kinds = [(entry["offset"], entry["length"], entry["type"]) for entry in entries]
    assert kinds == [(0, MIB, 1), (MIB, MIB, 0), (2 * MIB, SIZE - 2 * MIB, 2)]


def test_nbdsh(served: Served) -> None:
    need("nbdsh")
    script = [
        "h.pwrite(b'shell' * 100, 1000)", "h.flush()", "print(h.pread(10, 1000).decode(), h.get_size(), h.can_fua())"
    ]  # fmt: skip
    commands = [part for line in script for part in ("-c", line)]
    path = {"PATH": f"/usr/bin:{os.environ['PATH']}"}  # the Python that libnbd was built for
    assert run("nbdsh", "-u", served.uri, *commands, variables=path) == f"shellshell {SIZE} True\n"


@pytest.mark.parametrize("shared", ["false", "true"])
def test_nbdkit_in_front_of_us(served: Served, raw: Path, tmp_path: Path, shared: str) -> None:
    """Its plugin `nbd` has one connection for each of its clients, or one for all."""
    need("nbdkit", "nbdcopy", "nbdinfo")
    through, direct = tmp_path / "through", tmp_path / "direct"
    work = f'nbdcopy --connections=4 {raw} "$uri" && nbdcopy --connections=4 "$uri" {through} && nbdinfo --map "$uri"'
    mapped = run("nbdkit", "-U", "-", "nbd", f"uri={served.uri}", f"shared={shared}", "--run", work)
    assert mapped == run("nbdinfo", "--map", served.uri)
    assert "hole,zero" in mapped
    run("nbdcopy", served.uri, direct)
    assert equal(raw, through)
    assert equal(raw, direct)


def test_nbdcopy_in_and_out(served: Served, raw: Path, tmp_path: Path) -> None:
    need("nbdcopy", "e2fsck", "nbdinfo")
    run("nbdcopy", "--destination-is-zero", raw, served.uri)
    if served.image:
        served.restart()
    back = tmp_path / "back.raw"
    run("nbdcopy", "--flush", served.uri, back)
    assert equal(raw, back)
    assert allocated(back) < allocated(raw) + 4 * MIB, "holes became data"
    run("e2fsck", "-fn", back)
    holes = sum(entry["length"] for entry in run_json("nbdinfo", "--map", "--json", served.uri) if entry["type"] & 1)
    assert holes > SIZE // 2


def test_nbdcopy_between_servers(served: Served, raw: Path, tmp_path: Path) -> None:
    """Many requests at a time over several connections, in and out."""
    need("nbdcopy")
    (tmp_path / "other").mkdir()
    other = Process(tmp_path / "other", ["--memory", str(SIZE)])
    run("nbdcopy", "--connections=4", "--requests=64", raw, served.uri)
    run("nbdcopy", "--connections=4", "--requests=64", served.uri, other.uri)
    run("nbdcopy", other.uri, tmp_path / "back.raw")
    other.stop()
    assert equal(raw, tmp_path / "back.raw")


def test_nbdcopy_overwrites_with_zeroes(served: Served, tmp_path: Path) -> None:
    need("nbdcopy", "nbdinfo")
    noise, empty = tmp_path / "noise.raw", tmp_path / "empty.raw"
    noise.write_bytes(random.Random(1).randbytes(SIZE))
    with empty.open("wb") as file:
        file.truncate(SIZE)
    run("nbdcopy", noise, served.uri)
    run("nbdcopy", "--allocated", empty, served.uri)
    run("nbdcopy", served.uri, tmp_path / "back.raw")
    assert equal(empty, tmp_path / "back.raw")


def test_qemu_img(served: Served, raw: Path, tmp_path: Path) -> None:
    need("qemu-img")
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", raw, served.uri)
    if served.image:
        served.restart()
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", raw, served.uri)
    copy = tmp_path / "copy.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", served.uri, copy)
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, copy)
    info = run_json("qemu-img", "info", "--output=json", "-f", "raw", served.uri)
    assert info["virtual-size"] == SIZE
    ranges = run_json("qemu-img", "map", "--output=json", "-f", "raw", served.uri)
    assert sum(part["length"] for part in ranges) == SIZE
    assert sum(part["length"] for part in ranges if part["zero"]) > SIZE // 2


def qemu_io(uri: str, *commands: str) -> None:
    """Run commands of qemu-io; each must succeed, and patterns must be found."""
    arguments = [part for command in commands for part in ("-c", command)]
    output = run("qemu-io", "-f", "raw", *arguments, uri)
    assert "verification failed" not in output, output
    assert "failed" not in output, output
    assert len(COUNT_OF_LINES.findall(output)) == sum(
        not command.startswith(("flush", "aio_flush")) for command in commands
    )


def test_qemu_io_patterns(served: Served) -> None:
    need("qemu-io")
    qemu_io(
        served.uri,
        "write -P 0x11 0 1M",
        "write -P 0x22 4k 4k",
        "write -P 0x33 12289 5001",
        "write -f -P 0x44 1M 64k",
        "read -P 0x11 0 4k",
        "read -P 0x22 4k 4k",
        "read -P 0x33 12289 5001",
        "read -P 0x11 17290 100000",
        "write -z 64k 64k",
        "write -z -u 256k 64k",
        "discard 512k 256k",
        "read -P 0 64k 64k",
        "read -P 0 256k 64k",
        "read -P 0 512k 256k",
        "flush",
        "read -P 0x44 1M 64k",
        "read -P 0 2M 1M",
    )
    if served.image:
        served.restart()
        qemu_io(
            served.uri, "read -P 0x22 4k 4k", "read -P 0x33 12289 5001", "read -P 0 512k 256k", "read -P 0x44 1M 64k"
        )


def test_qemu_io_many_at_a_time(served: Served) -> None:
    need("qemu-io")
    writes = [f"aio_write -P {number} {number * 12}k 12k" for number in range(1, 65)]
    reads = [f"aio_read -P {number} {number * 12}k 12k" for number in range(1, 65)]
    qemu_io(served.uri, *writes, "aio_flush", *reads, "aio_flush")


@pytest.mark.parametrize(
    "job",
    [
        ["--rw=randwrite", "--bs=4k", "--iodepth=32", "--fsync=32"],
        ["--rw=randwrite", "--bsrange=512-64k", "--bs_unaligned", "--iodepth=16", "--io_size=48M"],
        ["--rw=write", "--bs=1M", "--iodepth=8", "--fsync=4"],
        ["--rw=randwrite", "--bs=16k", "--iodepth=8", "--numjobs=4", "--offset_increment=25%", "--size=25%"],
        [
            "--rw=randwrite",
            "--bs=4k",
            "--iodepth=16",
            "--numjobs=16",
            "--offset_increment=4M",
            "--size=4M",
            "--fsync=64",
        ],
        ["--rw=randrw", "--bs=8k", "--iodepth=16", "--verify_backlog=256"],
    ],
    ids=["4k", "any", "1M", "four clients", "sixteen clients", "mixed"],
)
def test_fio_verifies_its_checksums(served: Served, job: list[str], tmp_path: Path) -> None:
    need("fio")
    common = [
        "fio", "--name=job", "--ioengine=nbd", f"--uri={served.uri}", f"--size={SIZE}", "--verify=crc32c", *job,
        "--verify_fatal=1", "--buffer_compress_percentage=60", "--refill_buffers", "--randseed=7",
    ]  # fmt: skip
    done = subprocess.run([*common, "--do_verify=1"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "err= 0" in done.stdout
