"""File systems of the Linux kernel on a served disk: FUSE file (nbdfuse), loop device, mount."""

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.interop.conftest import Serve
from tests.interop.harness import Served, need, run, unavailable

SIZE = 512 << 20
"""xfs takes no less than 300 MiB."""
WAIT_S = 30.0
LEFT_OUT = shutil.ignore_patterns(
    "site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__", "*.so", "config-*"
)


@dataclass(frozen=True, slots=True)
class FileSystem:
    """Commands that take the disk as a file."""

    make: tuple[str, ...]
    check: tuple[str, ...]


FILE_SYSTEMS = {
    "ext4": FileSystem(("mkfs.ext4", "-q", "-F"), ("e2fsck", "-f", "-n")),
    "xfs": FileSystem(("mkfs.xfs", "-q", "-f"), ("xfs_repair", "-n")),
    "btrfs": FileSystem(("mkfs.btrfs", "-q", "-f"), ("btrfs", "check", "--readonly")),
}


def need_mounts(*programs: str) -> None:
    """Skip the test where file systems cannot be mounted; with CI=true it fails."""
    need("nbdfuse", "fusermount3", "mount", *programs)
    if os.geteuid() or not Path("/dev/fuse").exists() or not Path("/dev/loop-control").exists():
        unavailable("mounting needs root, /dev/fuse and loop devices")


@contextmanager
def fuse_file(disk: Served) -> Iterator[Path]:
    """The disk as a file."""
    folder = disk.folder / "fuse"
    folder.mkdir(exist_ok=True)
    file = folder / "disk"
    program = subprocess.Popen(["nbdfuse", str(file), disk.uri])
    try:
        wait_until(lambda: file.exists() or program.poll() is not None)
        assert program.poll() is None
        yield file
    finally:
        # Without its server nbdfuse may have aborted, and leaves its mount.
        subprocess.run(["fusermount3", "-u", *([] if disk.server.running else ["-z"]), folder], check=True)
        code = program.wait(WAIT_S)
        assert code == 0 or not disk.server.running


@contextmanager
def mounted(disk: Served) -> Iterator[Path]:
    """The file system on the disk, mounted."""
    folder = disk.folder / "mnt"
    folder.mkdir(exist_ok=True)
    with fuse_file(disk) as file:
        run("mount", "-o", "loop", file, folder)
        try:
            yield folder
        finally:
            run("umount", folder)
            wait_until(lambda: not run("losetup", "--associated", file))


def wait_until(condition: Callable[[], object]) -> None:
    """Poll what happens in other programs and in the kernel, which tell nobody."""
    until = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def contents(root: Path) -> dict[str, tuple[int, str]]:
    """Mode, and hash or target, of everything below a folder."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            what = str(path.readlink())
        else:
            what = hashlib.blake2b(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        found[str(path.relative_to(root))] = path.lstat().st_mode, what
    return found


def fill(root: Path) -> dict[str, tuple[int, str]]:
    """Copy Python's own modules, delete and overwrite some; returns what must be found."""
    tree = root / "tree"
    shutil.copytree(Path(os.__file__).parent, tree, symlinks=True, ignore=LEFT_OUT)
    shutil.copytree(tree, root / "second", symlinks=True)
    shutil.rmtree(tree / "email")
    for number, path in enumerate(sorted((root / "second").glob("*.py"))):
        if number % 3 == 0:
            path.write_bytes(path.read_bytes()[::-1])
    (root / "link").symlink_to("tree/os.py")
    with (root / "sparse").open("wb") as file:
        file.seek(100 << 20)
        file.write(b"end")
    return contents(root)


@pytest.mark.mount
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", FILE_SYSTEMS)
def test_a_file_system_survives_restarts(serve: Serve, kind: str) -> None:
    file_system = FILE_SYSTEMS[kind]
    need_mounts(file_system.make[0], file_system.check[0])
    disk = serve(SIZE)
    with fuse_file(disk) as file:
        run(*file_system.make, file)
    with mounted(disk) as root:
        expected = fill(root)
        assert len(expected) > 1000
    disk.restart()
    with mounted(disk) as root:
        assert contents(root) == expected
        shutil.rmtree(root / "second")
        with (root / "sparse").open("rb") as sparse:
            assert sparse.read(4096) == bytes(4096)
    disk.restart()
    with fuse_file(disk) as file:
        run(*file_system.check, file)


@pytest.mark.mount
@pytest.mark.timeout(600)
def test_synced_files_survive_kill_9(serve: Serve) -> None:
    """The server dies under a mounted ext4; its journal brings back every file that was synced."""
    need_mounts("mkfs.ext4", "e2fsck")
    disk = serve(SIZE)
    with fuse_file(disk) as file:
        run("mkfs.ext4", "-q", "-F", file)
    with mounted(disk) as root:
        written = {}
        for number in range(50):
            path = root / f"{number}"
            data = os.urandom(1000 * number + 1)
            with path.open("wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            written[path.name] = data
        disk.server.kill()
    disk.start()
    with mounted(disk) as root:
        for name, data in written.items():
            assert (root / name).read_bytes() == data
    with fuse_file(disk) as file:
        run("e2fsck", "-f", "-n", file)
