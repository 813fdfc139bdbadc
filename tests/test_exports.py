"""Exports by name, and who may use them."""

import pytest

from nbdvde.errors import UsageError
from nbdvde.exports import LOCAL, VSOCK, Access, Export, Exports, Peer, Visitor
from nbdvde.memory import MemoryDisk
from nbdvde.protocol.messages import ExportInfo
from nbdvde.tls import folded

HERE = Peer(LOCAL)


def names(visitor: Visitor) -> list[str]:
    return [export.name for export in visitor.listing()]


def test_names() -> None:
    one, two = MemoryDisk(512, "one"), MemoryDisk(1024, "two", read_only=True)
    exports = Exports([Export("a", one, description="first"), Export("b", two)], default="b")
    visitor = Visitor(exports, HERE)
    assert visitor.find("") == ExportInfo("b", 1024, read_only=True, contexts=two.contexts)
    assert visitor.find("a") == ExportInfo("a", 512, description="first", contexts=one.contexts)
    assert visitor.find("c") is None
    assert names(visitor) == ["a", "b"]
    assert Visitor(Exports([Export("a", one)]), HERE).find("") is None


def test_the_default_export_is_never_another_one() -> None:
    export = Export("a", MemoryDisk(512))
    exports = Exports([export, Export("b", MemoryDisk(512))], default="a")
    exports.remove(export)
    assert exports.get("") is None
    exports.add(Export("a", MemoryDisk(1024)))
    assert Visitor(exports, HERE).find("") == Visitor(exports, HERE).find("a") != None  # noqa: E711


def test_a_disk_may_be_read_only_for_some() -> None:
    disk = MemoryDisk(512)
    visitor = Visitor(Exports([Export("rw", disk), Export("ro", disk, read_only=True)]), HERE)
    assert [export.read_only for export in visitor.listing()] == [False, True]


@pytest.mark.parametrize(
    ("addresses", "peer", "allowed"),
    [
        (None, "192.0.2.1", True),
        (["192.0.2.0/24"], "192.0.2.255", True),
        (["192.0.2.0/24"], "192.0.20.1", False),
        (["192.0.2.1"], "192.0.2.1", True),
        (["192.0.2.1"], "192.0.2.10", False),  # CVE-2013-6410: nbd-server compared as text
        (["192.0.2.1"], "192.0.2.11", False),
        (["192.0.2.1"], "::ffff:192.0.2.1", True),
        (["2001:db8::/32"], "2001:0db8:0:0::1", True),
        (["2001:db8::/32"], "2001:db9::1", False),
        (["fe80::/10"], "fe80::1%eth0", True),
        (["0.0.0.0/0"], "::1", False),
        ([], "192.0.2.1", False),
        (["unix"], "192.0.2.1", False),
    ],
)
def test_addresses(addresses: list[str] | None, peer: str, allowed: bool) -> None:
    assert Access.parse(addresses).allows(Peer.at(peer)) is allowed


@pytest.mark.parametrize("place", [LOCAL, VSOCK])
def test_places_without_addresses(place: str) -> None:
    assert Access.parse().allows(Peer(place))
    assert Access.parse([place, "::1"]).allows(Peer(place))
    assert not Access.parse(["0.0.0.0/0", "::/0"]).allows(Peer(place))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "192.0.2.1/24",
        "192.0.2",
        "localhost",
        "192.0.2.0/33",
        "::1::",
        "UNIX",
        " ::1",
        "fe80::1%eth0",
        "fe80::%eth0/64",
        "::ffff:192.0.2.1",
        "::ffff:10.0.0.0/104",
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError, match="address"):
        Access.parse([text])


def test_certificates() -> None:
    access = Access.parse(certificates=["Host.Example.org", "other"])
    assert not access.allows(HERE)
    assert not access.allows(Peer(LOCAL, frozenset({"example.org"})))
    assert access.allows(Peer(LOCAL, frozenset({"host.example.org", "x"})))
    assert not Access.parse(certificates=["\u212aim"]).allows(Peer(LOCAL, frozenset({folded("Kim")}))), "a Kelvin sign"
    both = Access.parse(["::1"], ["a"])
    assert not both.allows(Peer(LOCAL, frozenset({"a"})))
    assert both.allows(Peer(Peer.at("::1").place, frozenset({"a"})))


def test_what_a_client_may_not_use_does_not_exist_for_it() -> None:
    exports = Exports([Export("a", MemoryDisk(512), access=Access.parse(["::1"]))], default="a")
    visitor = Visitor(exports, Peer.at("::2"))
    assert visitor.find("a") is visitor.find("") is None
    assert names(visitor) == []
    assert names(Visitor(exports, Peer.at("::1"))) == ["a"]


def test_connections() -> None:
    export = Export("a", MemoryDisk(512), access=Access.parse(connections=2))
    exports = Exports([export])
    visitors = [Visitor(exports, HERE) for _ in range(3)]
    assert [visitor.enter("a") is None for visitor in visitors] == [True, True, False]
    assert export.clients == 2
    visitors[0].leave()
    visitors[0].leave()
    visitors[2].leave()
    assert export.clients == 1
    assert visitors[2].enter("a") is None
