"""A small root file system for the kernel of tools/debian-kernel: busybox, programs of the host, modules."""

import functools
import lzma
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.interop.harness import ROOT, run, unavailable

PROGRAMS = ("nbd-client", "mke2fs", "e2fsck", "resize2fs")
"""Of the host, with the libraries they need; busybox has the rest."""
MODULES = ("virtio_pci", "virtio_net", "virtio_blk", "nbd", "ext4", "crc32c_generic")
"""Those that this kernel has built in are left out."""
INIT = r"""#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/sbin:/bin HOME=/
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
stty -echo -onlcr
while read -r module; do insmod "$module"; done < /modules
ip link set lo up
if ip link set eth0 up 2> /dev/null; then ip address add 10.0.2.15/24 dev eth0; fi
{then}
printf '\036ready\036'
while IFS= read -r line; do eval "$line"; printf '\036%d\036' $?; done
"""
"""Executes what it reads from the console, line by line, and says how each ended."""

LIST_MODULES = """
import runpy, sys
runpy.run_path(sys.argv[1])
print(*{module.__file__ for module in sys.modules.values() if getattr(module, "__file__", None)}, sep="\\n")
"""


@functools.cache
def debian_kernel() -> Path | None:
    """The folder, None when it cannot be had."""
    done = subprocess.run([ROOT / "tools" / "debian-kernel"], stdout=subprocess.PIPE, text=True, check=False)
    return Path(done.stdout.strip()) if done.returncode == 0 else None


def need_kernel() -> Path:
    """Skip the test without the folder; with CI=true it fails."""
    folder = debian_kernel()
    if folder is None:
        unavailable("tools/debian-kernel failed")
    assert folder is not None
    return folder


def kernel_image() -> Path:
    """What QEMU boots."""
    (image,) = need_kernel().glob("boot/vmlinuz-*")
    return image


def make_root(folder: Path, *, then: str = "") -> Path:
    """A folder that is a root file system; its /init runs `then` before it takes commands."""
    for name in ("bin", "sbin", "dev", "proc", "sys", "mnt", "tmp", "etc"):
        (folder / name).mkdir(parents=True)
    (busybox,) = need_kernel().glob("**/bin/busybox")
    shutil.copy(busybox, folder / "bin/busybox")
    for program in PROGRAMS:
        _copy_program(program, folder)
    (folder / "modules").write_text("".join(f"{path}\n" for path in _copy_modules(folder)))
    init = folder / "init"
    init.write_text(INIT.format(then=then))
    init.chmod(0o755)
    return folder


def add_python(root: Path, script: Path) -> None:
    """The Python of these tests and a script as /bin/NAME, with the modules of the standard library that it imports."""
    python = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
    modules = {Path(path) for path in run(python, "-I", "-S", "-c", LIST_MODULES, script).split()}
    for path in {python, *modules}:
        _copy(path, root)
        if path == python or path.suffix == ".so":
            for library in _libraries(path):
                _copy(library, root)
    code, starter = root / "etc" / script.name, root / "bin" / script.name
    shutil.copy(script, code)
    starter.write_text(f'#!/bin/sh\nexec {python} -I -S /etc/{script.name} "$@"\n')
    starter.chmod(0o755)


def make_initramfs(root: Path) -> Path:
    """The folder as an archive that the kernel unpacks at boot: cpio, format `newc`."""
    archive = root.with_suffix(".cpio")
    names = sorted(root.rglob("*"))
    with archive.open("wb") as out:
        for number, path in enumerate(names, 1):
            data = b"" if path.is_dir() else path.read_bytes()
            out.write(_entry(str(path.relative_to(root)), number, path.stat().st_mode, data))
        out.write(_entry("TRAILER!!!", 0, 0, b""))
    return archive


def _entry(name: str, inode: int, mode: int, data: bytes) -> bytes:
    """Kernel documentation, driver-api/early-userspace/buffer-format."""
    encoded = name.encode() + b"\0"
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def _copy_program(name: str, folder: Path) -> None:
    program = Path(shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin") or name)
    shutil.copy(program, folder / "sbin" / name)
    for library in _libraries(program):
        _copy(library, folder)


def _libraries(program: Path) -> list[Path]:
    return [Path(library) for library in re.findall(r"(/\S+) \(0x", run("ldd", program))]


def _copy(path: Path, folder: Path) -> None:
    """To the same place below the folder."""
    target = folder / path.relative_to("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, target)


def _copy_modules(folder: Path) -> list[str]:
    """The modules and those they depend on, in an order in which they can be loaded."""
    (available,) = need_kernel().glob("**/lib/modules/*")
    files = {path.name.split(".ko")[0].replace("-", "_"): path for path in available.rglob("*.ko*")}
    loaded: dict[str, None] = {}
    for name in _with_dependencies([name for name in MODULES if name in files], files):
        (folder / name).with_suffix(".ko").write_bytes(_module(files[name]))
        loaded[f"/{name}.ko"] = None
    return list(loaded)


def _with_dependencies(names: Sequence[str], files: dict[str, Path]) -> Iterator[str]:
    for name in names:
        found = re.search(rb"\0depends=([^\0]+)\0", _module(files[name]))
        if found:
            yield from _with_dependencies(found[1].decode().replace("-", "_").split(","), files)
        yield name


def _module(path: Path) -> bytes:
    """Uncompressed."""
    return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
