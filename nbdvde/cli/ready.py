"""How `serve` says that it is ready: URIs, the log, the service manager and the pid file."""

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from nbdvde.cli import output
from nbdvde.errors import UsageError, reason
from nbdvde.listeners import ANY_CID, Address, Listener, TcpAddress, UnixAddress, VsockAddress

_log = logging.getLogger(__name__)


def announce(names: Sequence[str], default: str, listeners: Sequence[Listener], *, tls: bool, printed: bool) -> None:
    """Tell where the exports are served, the default one first."""
    for name in sorted(names, key=lambda name: name != default):
        for uri in [
            uri for listener in listeners for uri in uris_of(listener, "" if name == default else name, tls=tls)
        ]:
            _log.info("serving %s on %s", name, uri, extra={"fields": {"export": name, "uri": uri}})
            if printed:
                _print_uri(uri)


def _print_uri(uri: str) -> None:
    """Clients may come all the same when nobody reads it."""
    try:
        output.line(uri)
    except OSError as error:
        _log.warning("cannot print the URI on standard output: %s", reason(error))


def uris_of(listener: Listener, export: str = "", *, tls: bool = False) -> list[str]:
    """Where clients of a listener find an export: one URI, more when the kernel chose several ports."""
    address = listener.address
    known = isinstance(address, UnixAddress) or (isinstance(address, TcpAddress) and address.port)
    return [_uri(place, export, "nbds" if tls else "nbd") for place in ([address] if known else listener.bound)]


def _uri(place: Address, export: str, scheme: str) -> str:
    """See https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md; libnbd adds vsock."""
    path = quote(export, safe="")
    if isinstance(place, UnixAddress):
        return f"{scheme}+unix:///{path}?socket={quote(os.fsencode(place.path.absolute()))}"
    if isinstance(place, VsockAddress):
        return f"{scheme}+vsock://{'' if place.cid == ANY_CID else place.cid}:{place.port}/{path}"
    return f"{scheme}://{place}/{path}"


def tell_systemd(state: str) -> None:
    """Tell the service manager, if there is one that wants to know (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)


@contextmanager
def pid_file(name: str | None) -> Iterator[None]:
    """Have the process id in a file meanwhile. Raises UsageError."""
    if name is None:
        yield
        return
    path, text = Path(name), f"{os.getpid()}\n"
    try:
        _refuse_other_content(path)
        path.write_text(text)
    except OSError as error:
        raise UsageError(f"pid file {path}", reason(error), "check --pid-file") from None
    try:
        yield
    finally:
        with suppress(OSError):
            if path.read_bytes() == text.encode():
                path.unlink()


def _refuse_other_content(path: Path) -> None:
    """A pid file may be left over; anything else must not be lost."""
    if not path.exists():
        return
    if path.is_file():
        with path.open("rb") as file:
            content = file.read(32).strip()
        if not content or content.isdigit():
            return
    raise UsageError(f"pid file {path}", "exists and holds something else", "choose another name")
