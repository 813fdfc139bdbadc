"""The exports of a server: what clients may ask for by name, and who may."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Protocol, Self, TypeAlias
from weakref import WeakSet

import trio

from nbdvde.disk import Disk
from nbdvde.errors import UsageError
from nbdvde.metrics import Traffic
from nbdvde.protocol.messages import ExportInfo
from nbdvde.tls import folded

Network: TypeAlias = IPv4Network | IPv6Network
LOCAL, VSOCK = "unix", "vsock"
"""Where clients are that have no address: at a Unix socket or on standard input, or in a virtual machine."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of a connection."""

    place: IPv4Address | IPv6Address | str
    """Its address, or what it has instead of one."""
    names: frozenset[str] = frozenset()
    """What its certificate says it is called, in lower case."""

    @classmethod
    def at(cls, address: str) -> Self:
        """The client at an IP address; one of IPv4 may be written in IPv6."""
        place = ip_address(address.partition("%")[0])
        return cls(getattr(place, "ipv4_mapped", None) or place)


@dataclass(frozen=True, slots=True)
class Access:
    """Who may use an export."""

    networks: frozenset[Network] | None = None
    """Addresses that may; None: all."""
    places: frozenset[str] = frozenset()
    """What may as well of `LOCAL` and `VSOCK`, when `networks` are given."""
    certificates: frozenset[str] | None = None
    """Names of which a client's certificate must have one, in lower case; None: none is asked for."""
    connections: int | None = None
    """Clients at a time."""

    @classmethod
    def parse(
        cls,
        addresses: Iterable[str] | None = None,
        certificates: Iterable[str] | None = None,
        connections: int | None = None,
    ) -> Self:
        """Rules from text; addresses are like `10.0.0.0/8`, `::1`, `unix` or `vsock`. Raises UsageError."""
        given = None if addresses is None else frozenset(addresses)
        places = frozenset((given or frozenset()) & {LOCAL, VSOCK})
        networks = None if given is None else frozenset(map(_network, given - places))
        names = None if certificates is None else frozenset(map(folded, certificates))
        return cls(networks, places, names, connections)

    def allows(self, peer: Peer) -> bool:
        """Whether a client may know of the export."""
        if self.certificates is not None and not self.certificates & peer.names:
            return False
        if self.networks is None:
            return True
        if isinstance(peer.place, str):
            return peer.place in self.places
        return any(peer.place in network for network in self.networks)


def _network(text: str) -> Network:
    hint = "use addresses like 192.0.2.7, 10.0.0.0/8 or fd00::/8, or unix or vsock"
    if "%" in text:
        raise UsageError(f"address '{text}'", "has a zone, which is not looked at", hint)
    try:
        network = ip_network(text)
    except ValueError as error:
        raise UsageError(f"address '{text}'", str(error).removeprefix(f"'{text}' "), hint) from None
    if isinstance(network, IPv6Network) and network.network_address.ipv4_mapped:
        raise UsageError(f"address '{text}'", "is IPv4 within IPv6", hint)  # `Peer.at` takes IPv4 out of it
    return network


class Kin(Protocol):
    """What there is of an image behind one of its exports: snapshots, regions, other disks. It may change any time."""

    def find(self, export: "Export", name: str) -> "Export | None":
        """An export of that name, if it belongs to this one."""

    def listing(self, export: "Export") -> Iterable[ExportInfo]:
        """What to tell of those that `find` would find: of many not all."""


@dataclass(eq=False)
class Export:
    """A disk under a name."""

    name: str
    disk: Disk
    read_only: bool = False
    """Refuse changes even if the disk takes them."""
    description: str = ""
    access: Access = field(default_factory=Access)
    kin: Kin | None = None
    base: "Export | None" = None
    """The one whose kin it is."""
    clients: int = 0
    """That use it now."""
    traffic: Traffic = field(default_factory=Traffic)
    """Of clients that have left."""
    _left: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)

    @property
    def info(self) -> ExportInfo:
        """What the handshake tells of it."""
        read_only = self.read_only or self.disk.read_only
        disk = self.disk
        return ExportInfo(self.name, disk.size, read_only, self.description, disk.contexts, disk.sequential)

    def leave(self) -> None:
        """A client ends its use."""
        self.clients -= 1
        self._left.unpark_all()

    async def unused(self) -> None:
        """Wait until no client uses it."""
        while self.clients:
            await self._left.park()


class Exports:
    """The exports by name, and their kin. The empty name is always the same one's, or nobody's."""

    def __init__(self, exports: Iterable[Export] = (), default: str | None = None) -> None:
        """`default` is the name of the default export, which may be added later."""
        self._exports = {export.name: export for export in exports}
        self._default = default
        self._kin: WeakSet[Export] = WeakSet()
        """Those that somebody uses."""
        self._held: set[Disk] = set()

    def __iter__(self) -> Iterator[Export]:
        return iter(list(self._exports.values()))

    def add(self, export: Export) -> None:
        """Let clients use it; its name must be a new one."""
        assert export.name not in self._exports, "the caller looked"
        self._exports[export.name] = export

    def remove(self, export: Export) -> None:
        """Let no further client use it, nor its kin."""
        del self._exports[export.name]

    def get(self, name: str) -> Export | None:
        """The export of a name."""
        if not name and self._default is not None:
            name = self._default
        return self._exports.get(name) or self._kin_of(name)

    def _kin_of(self, name: str) -> Export | None:
        for export in self._exports.values():
            if export.kin is not None and (found := export.kin.find(export, name)) is not None:
                known = next((kin for kin in self._kin if kin.name == name and kin.disk is found.disk), found)
                self._kin.add(known)
                known.access, known.read_only = found.access, found.read_only
                return known
        return None

    def listing(self, peer: Peer) -> Iterator[ExportInfo]:
        """What a client may know of."""
        for export in self:
            if export.access.allows(peer):
                yield export.info
        for export in self:
            if export.kin is not None and export.access.allows(peer):
                yield from (info for info in export.kin.listing(export) if info.name not in self._exports)

    def used(self) -> list[Export]:
        """The exports that clients use, those that were removed left out."""
        return [export for export in (*self, *self._kin) if export.clients]

    @contextmanager
    def holding(self, disk: Disk) -> Iterator[None]:
        """Let no further client use a disk meanwhile."""
        self._held.add(disk)
        try:
            yield
        finally:
            self._held.discard(disk)

    def is_held(self, disk: Disk) -> bool:
        """See `holding`."""
        return disk in self._held


class Visitor:
    """The exports as one client may see them (`protocol.handshake.Directory`)."""

    def __init__(self, exports: Exports, peer: Peer) -> None:
        self._exports, self.peer = exports, peer
        self.export: Export | None = None
        """What it uses."""

    def find(self, name: str) -> ExportInfo | None:
        """See `Directory`. What a client may not use does not exist for it."""
        export = self._export(name)
        return None if export is None else export.info

    def listing(self) -> Iterator[ExportInfo]:
        """See `Directory`."""
        return self._exports.listing(self.peer)

    def enter(self, name: str) -> str | None:
        """See `Directory`; `leave` ends the use."""
        export = self._export(name)
        assert export is not None, "it was found in the same moment"
        if export.access.connections is not None and export.clients >= export.access.connections:
            return "it is in use by as many clients as may be"
        if self._exports.is_held(export.disk.owner):
            return "its disk is being changed, try again"
        export.clients += 1
        self.export = export
        return None

    def leave(self) -> None:
        """End the use, if there is one."""
        if self.export is not None:
            self.export.leave()
            self.export = None

    def _export(self, name: str) -> Export | None:
        export = self._exports.get(name)
        return export if export is not None and export.access.allows(self.peer) else None
