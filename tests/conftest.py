"""What all tests share: libnbd on the path, places for servers and clients, and hypothesis without chance."""

import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from hypothesis import settings

from nbdvde.listeners import UnixAddress
from tests.serving import Connect

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
        with suppress(FileExistsError):  # also of another process of this run
            link.symlink_to(source)
    sys.path.append(str(folder))


_add_libnbd(_DEBIAN_MODULES)

# A run in the background ignores these, and so would the programs that the tests start.
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)

# Programs that tests start begin in two thirds of the time when they need not be compiled each time (1.1 s, 0.8 s).
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# The machine may be slow, and a test that fails must fail again; campaigns that search at random are in tools/.
settings.register_profile("nbdvde", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("nbdvde")


@pytest.fixture
def address(tmp_path: Path) -> UnixAddress:
    return UnixAddress(tmp_path / "nbd.sock")


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    made = Connect()
    yield made
    for client in made.clients:
        client.socket.close()
