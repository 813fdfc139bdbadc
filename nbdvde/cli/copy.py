"""`import` and `export`: raw files by ourselves, every other format through QEMU's `qemu-img`."""

import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory

import trio

from nbdvde.cli.images import Copied, ImageByPath
from nbdvde.disk import Disk
from nbdvde.errors import ImageError, NbdvdeError, NoSpaceError, RefusedError, UsageError
from nbdvde.exports import Export, Exports
from nbdvde.listeners import UnixAddress, open_listener
from nbdvde.server import Server
from nbdvde.transfer import opened, target

RAW = "raw"


def import_file(image: ImageByPath, file: Path, disk: str | None, file_format: str) -> Copied:
    """Make a disk hold what a file of some format holds, and zeroes behind that. Raises NbdvdeError."""
    _check_name(file)
    if file_format == RAW:
        return image.copy_in(file, disk)
    _check(file_format)

    async def run(target: Disk) -> int:
        with opened(file, os.O_RDONLY):
            return await _convert_in(file, file_format, target)

    return image.use(disk, run)


async def _convert_in(file: Path, file_format: str, disk: Disk) -> int:
    described = await _qemu_img("info", "--output=json", "-f", file_format, _name(file))
    size = int(json.loads(described)["virtual-size"])
    if size > disk.size:
        raise RefusedError(str(file), f"has {size} bytes, disk {disk.name} {disk.size}", "make a larger disk")
    await disk.zero(0, disk.size)
    async with _serving(disk) as uri:
        await _qemu_img(
            "convert", *_progress(), "-n", "--target-is-zero", "-f", file_format, "-O", RAW, _name(file), uri
        )
    await disk.flush()
    return size


def export_file(image: ImageByPath, file: Path, disk: str | None, file_format: str, *, overwrite: bool) -> Copied:
    """Write a disk to a file of some format. Raises NbdvdeError."""
    _check_name(file)
    if file_format == RAW:
        return image.copy_out(file, disk, overwrite=overwrite)
    _check(file_format)

    async def run(source: Disk) -> int:
        async with target(file, overwrite=overwrite) as (_, part), _serving(source) as uri:
            await _qemu_img("convert", *_progress(), "-f", RAW, "-O", file_format, uri, _name(part))
        return source.size

    return image.use(disk, run, read_only=True)


def _check_name(file: Path) -> None:
    if str(file) == "-":
        raise UsageError("file -", "would be a file of that name", "name a file; nbdcopy copies from and to a pipe")


def _check(file_format: str) -> None:
    if not file_format.isalnum():
        raise UsageError(f"format {file_format!r}", "is none", "use raw, qcow2, vmdk, vdi, vpc, vhdx, …")
    if which("qemu-img") is None:
        raise UsageError(f"format {file_format}", "needs qemu-img, which is not installed", "install qemu-utils")


def _name(file: Path) -> str:
    """The file as QEMU takes it for one, whatever is in its name."""
    return f"file:{file.absolute()}"


@asynccontextmanager
async def _serving(disk: Disk) -> AsyncIterator[str]:
    """The disk on a socket that nobody else can reach. What fails of it comes before what its client says of that."""
    failures: list[NbdvdeError] = []
    with TemporaryDirectory(prefix="nbdvde-") as folder:
        listener = await open_listener(UnixAddress(Path(folder) / "nbd.sock"))
        server = Server(Exports([Export("disk", disk)], default="disk"), failed=failures.append)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run, [listener])
            try:
                yield f"nbd+unix:///?socket={folder}/nbd.sock"
            except NbdvdeError as error:
                failures.append(error)
            server.stop()
    if failures:
        raise failures[0]


def _progress() -> Sequence[str]:
    return ("-p",) if sys.stderr.isatty() else ()


async def _qemu_img(*arguments: str) -> str:
    """What it says. Raises ImageError with what it has to complain about, or NoSpaceError."""
    shown = {"stdout": sys.stderr} if "-p" in arguments else {"capture_stdout": True}
    english = {**os.environ, "LC_ALL": "C"}
    done = await trio.run_process(["qemu-img", *arguments], capture_stderr=True, check=False, env=english, **shown)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["it failed"]
        if any("No space left" in line or "quota exceeded" in line for line in lines):
            raise NoSpaceError("qemu-img", "no space left on the host", "free some")
        raise ImageError("qemu-img", lines[-1].removeprefix("qemu-img: "), "see its manual for the formats it knows")
    return (done.stdout or b"").decode()
