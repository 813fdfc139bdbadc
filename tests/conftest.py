"""What all tests share: libnbd's Python module on the path, and hypothesis without chance or deadlines."""

import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from hypothesis import settings

_DEBIAN_MODULES = Path("/usr/lib/python3/dist-packages")


def _add_libnbd(modules: Path) -> None:
    """Put the two files of Debian's python3-libnbd on the path, in a folder of their own.

    The rest of Debian's modules must stay away: old versions of ours are among them. Nothing happens when the
    package is not there or was built for another Python; tests/interop/test_libnbd.py has a way around that.
    """
    binary = next((path for suffix in EXTENSION_SUFFIXES if (path := modules / f"libnbdmod{suffix}").exists()), None)
    if binary is None or not (modules / "nbd.py").exists():
        return
    folder = Path(sys.prefix) / "libnbd"
    folder.mkdir(exist_ok=True)
    for source in (modules / "nbd.py", binary):
        link = folder / source.name
        if not link.exists():
            link.symlink_to(source)
    sys.path.append(str(folder))


_add_libnbd(_DEBIAN_MODULES)

# The machine may be slow, and a test that fails must fail again; campaigns that search at random are in tools/.
settings.register_profile("nbdvde", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("nbdvde")
