"""Where clients connect: addresses, and the sockets that listen on them."""

import contextlib
import errno
import os
import re
import socket
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from nbdvde.errors import NetworkError, UsageError, reason

DEFAULT_PORT = 10809
BACKLOG = 128
ANY_CID = (1 << 32) - 1
"""Every context id of this machine."""
_FIRST_PASSED = 3
_VSOCK = re.compile(r"vsock:(?P<cid>any|\d{1,10}):(?P<port>\d{1,10})")
_FORMS = "use unix:PATH, HOST:PORT, [IPV6]:PORT, vsock:CID:PORT, systemd or stdio"
_TCP = re.compile(r"(?:\[(?P<ipv6>[^\]]+)\]|(?P<host>[^:\[\]]*)):(?P<port>\d{1,5})")


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A Unix socket in the file system."""

    path: Path

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host, all of whose addresses are meant, and a port (0: any that is free)."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class VsockAddress:
    """A port between a virtual machine and its host (vsock(7))."""

    cid: int
    port: int

    def __str__(self) -> str:
        return f"vsock:{'any' if self.cid == ANY_CID else self.cid}:{self.port}"


@dataclass(frozen=True, slots=True)
class PassedAddress:
    """Sockets that systemd has opened for us (sd_listen_fds(3))."""

    def __str__(self) -> str:
        return "systemd"


@dataclass(frozen=True, slots=True)
class StdioAddress:
    """One client, on standard input and output."""

    def __str__(self) -> str:
        return "stdio"


SocketAddress = UnixAddress | TcpAddress | VsockAddress | PassedAddress
Address = SocketAddress | StdioAddress


_WORDS: dict[str, type[PassedAddress | StdioAddress]] = {"systemd": PassedAddress, "stdio": StdioAddress}


def parse_listen(text: str) -> Address:
    """An address as `--listen` takes it. Raises `UsageError`."""
    if text in _WORDS:
        return _WORDS[text]()
    if match := _VSOCK.fullmatch(text):
        cid, port = ANY_CID if match["cid"] == "any" else int(match["cid"]), int(match["port"])
        if max(cid, port) > ANY_CID:
            raise UsageError(f"listen address '{text}'", "a number is above 4294967295", "use vsock:any:10809")
        return VsockAddress(cid, port)
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path or "\0" in path:
            raise UsageError(f"listen address '{text}'", "no path", "use unix:PATH")
        return UnixAddress(Path(path))
    match = _TCP.fullmatch(text)
    host = match and (match["ipv6"] or match["host"])
    if not match or not host or int(match["port"]) > 65535 or host == "vsock":
        raise UsageError(f"listen address '{text}'", "not understood", _FORMS)
    return TcpAddress(host, int(match["port"]))


class Listener:
    """Sockets bound and listening for one address; clients queue until a server accepts them."""

    def __init__(
        self, address: Address, sockets: Sequence[socket.socket], connected: Sequence[socket.socket] = ()
    ) -> None:
        """`connected` are clients that are there already; they are given on to the server."""
        self.address = address
        self.sockets, self.connected = tuple(sockets), tuple(connected)
        self._inode = _inode(address.path) if isinstance(address, UnixAddress) else None

    @property
    def bound(self) -> list[SocketAddress]:
        """Where the sockets are, with the port the kernel chose."""
        return [_place_of(sock) for sock in self.sockets]

    def close(self) -> None:
        """Close the sockets, and remove a Unix socket if it is still ours."""
        for sock in self.sockets:
            trio.lowlevel.notify_closing(sock)
            sock.close()
        if isinstance(self.address, UnixAddress) and self._inode == _inode(self.address.path):
            self.address.path.unlink(missing_ok=True)


async def open_listener(address: SocketAddress) -> Listener:
    """Bind and listen. A Unix socket nobody listens on is replaced. Raises `NetworkError`."""
    if isinstance(address, PassedAddress):
        return Listener(address, _passed())
    if isinstance(address, UnixAddress):
        return Listener(address, [_listen_unix(address)])
    if isinstance(address, VsockAddress):
        return Listener(address, [_listen_vsock(address)])
    try:
        found = await trio.socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise NetworkError(f"cannot listen on {address}", reason(error), "check the host name") from error
    except ValueError:  # names that cannot be asked for
        raise NetworkError(f"cannot listen on {address}", "that is no name of a host", "use localhost") from None
    return Listener(address, _listen_tcp(address, [(family, where) for family, _, _, _, where in found]))


def _listen_tcp(address: TcpAddress, places: Sequence[tuple[int, object]]) -> list[socket.socket]:
    """A socket for every address of the host this machine has; `localhost` may be two."""
    with contextlib.ExitStack() as opened:
        sockets: list[socket.socket] = []
        missing: OSError | None = None
        for family, where in dict.fromkeys(places):
            try:
                sockets.append(opened.enter_context(_bound(family, where)))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise _cannot_listen(address, error) from error
                missing = error
        if missing is not None and not sockets:
            raise _cannot_listen(address, missing)
        opened.pop_all()
        return sockets


def _listen_unix(address: UnixAddress) -> socket.socket:
    try:
        _remove_stale(address)
        return _bound(socket.AF_UNIX, str(address.path))
    except OSError as error:
        raise _cannot_listen(address, error) from error


def _listen_vsock(address: VsockAddress) -> socket.socket:
    try:
        return _bound(socket.AF_VSOCK, (address.cid, address.port))
    except (OSError, AttributeError) as error:
        raise NetworkError(
            f"cannot listen on {address}",
            reason(error) if isinstance(error, OSError) else "this system has no vsock",
            "virtual machines need a vsock device, hosts the module vhost_vsock",
        ) from error


def _passed() -> list[socket.socket]:
    """What systemd says is ours: descriptors from 3 on. They are ours once, and not our children's."""
    count, owner = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if owner != str(os.getpid()) or not count.isdecimal() or not int(count):
        raise NetworkError("cannot listen on systemd", "it passed no sockets", "start the .socket unit")
    sockets = []
    for descriptor in range(_FIRST_PASSED, _FIRST_PASSED + int(count)):
        try:
            sock = socket.socket(fileno=descriptor)
            listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise NetworkError("cannot listen on systemd", reason(error), f"descriptor {descriptor}") from error
        if not listening or sock.type != socket.SOCK_STREAM:
            raise NetworkError("cannot listen on systemd", "a socket does not listen", "use Accept=no, ListenStream=")
        sock.setblocking(False)
        sock.set_inheritable(False)
        sockets.append(sock)
    return sockets


def _place_of(sock: socket.socket) -> SocketAddress:
    """Where a socket is bound."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return UnixAddress(Path(os.fsdecode(name)))
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        return TcpAddress(*name[:2])
    return VsockAddress(*name)


def _remove_stale(address: UnixAddress) -> None:
    """Remove what an ended server left behind; nothing else."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(address.path.lstat().st_mode):
            raise NetworkError(f"cannot listen on {address}", "it exists and is not a socket", "choose another path")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)  # a frozen server's queue may be full
            try:
                probe.connect(str(address.path))
            except ConnectionRefusedError:
                address.path.unlink()
            else:
                raise _cannot_listen(address, OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)))


def _bound(family: int, where: object) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        if family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(where)  # type: ignore[arg-type]  # its form depends on the family
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _cannot_listen(address: Address, error: OSError) -> NetworkError:
    hints = {
        None: "choose a shorter path",  # Python's own check
        errno.EAGAIN: "stop the other server or choose another address",
        errno.EADDRNOTAVAIL: "choose localhost or another address of this machine",
        errno.EADDRINUSE: "stop the other server or choose another address",
        errno.EACCES: "choose a port above 1023 or a directory you may write to",
        errno.ENOENT: "create the directory first",
    }
    return NetworkError(f"cannot listen on {address}", reason(error), hints.get(error.errno, ""))


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
