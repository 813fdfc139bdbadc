"""Programs of a later Debian release, unpacked by tools/later-debian: clients and servers newer than the host's.

They run with the loader, the libraries and the Python that they were built for.
"""

import functools
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.interop.harness import ROOT, run, unavailable


@functools.cache
def later_debian() -> Path | None:
    """The folder, None when it cannot be had."""
    done = subprocess.run([ROOT / "tools" / "later-debian"], stdout=subprocess.PIPE, text=True, check=False)
    return Path(done.stdout.strip()) if done.returncode == 0 else None


def need_later() -> Path:
    """Skip the test without the folder; with CI=true it fails."""
    folder = later_debian()
    if folder is None:
        unavailable("tools/later-debian failed")
    assert folder is not None
    return folder


def later(program: str, *arguments: str | Path) -> list[str | Path]:
    """The command that runs one of the programs."""
    folder = need_later()
    (loader,) = folder.glob("usr/lib/*/ld-linux-*.so.*")
    found = next(path for path in (folder / "usr/bin" / program, folder / "usr/sbin" / program) if path.exists())
    libraries = f"{loader.parent}:{loader.parent}/nbdkit"
    return [loader, "--library-path", libraries, found, *arguments]


def nbdkit_plugin(name: str) -> Path:
    """What `nbdkit` of that release calls by its name alone."""
    (path,) = need_later().glob(f"usr/lib/*/nbdkit/plugins/nbdkit-{name}-plugin.so")
    return path


def later_libnbd(module: str, function: str, *arguments: str) -> None:
    """Call a function of a module of this package, with that release's Python and libnbd."""
    folder = need_later()
    (python,) = folder.glob("usr/bin/python3.[0-9][0-9]")
    modules: Sequence[Path] = (folder / "usr/lib/python3/dist-packages", ROOT)
    variables = {"PYTHONHOME": str(folder / "usr"), "PYTHONPATH": ":".join(map(str, modules))}
    command = later(python.name, "-B", "-m", f"{__package__}.{module}", function, *arguments)
    run(*command, variables=variables)
