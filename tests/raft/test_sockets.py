"""Nodes over TCP and TLS on this machine: they find each other, and nobody else gets in."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import pytest
import trio

from nbdvde.errors import UsageError
from nbdvde.listeners import Listener, TcpAddress, open_listener
from nbdvde.raft.messages import NodeId
from nbdvde.raft.node import Node, Options
from nbdvde.raft.sockets import Place, TlsNetwork
from nbdvde.raft.transport import Identity
from nbdvde.tls import TlsFiles, node_contexts
from tests.certificates import Authority, make_authority
from tests.raft.world import SETTINGS, Cluster, until

FAST = Options(tick_s=0.05)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("pki"))


def files_of(authority: Authority, name: str, trusted: Path | None = None) -> TlsFiles:
    return TlsFiles(*authority.node(name), trusted or authority.ca)


class Sockets(Cluster):
    """A cluster whose nodes have sockets."""

    def __init__(self, authority: Authority) -> None:
        super().__init__(options=FAST)
        self.listeners: dict[NodeId, Listener] = {}
        self.files = {number: files_of(authority, f"node-{number}") for number in self.logs}
        self.names = {number: f"Node-{number}" for number in self.logs}

    async def listen(self) -> None:
        for number in self.logs:
            self.listeners[number] = await open_listener(TcpAddress("127.0.0.1", 0))

    def network_of(self, number: NodeId) -> TlsNetwork:
        places = {
            other: Place(address, self.names[other])
            for other, listener in self.listeners.items()
            for address in listener.bound
            if isinstance(address, TcpAddress)
        }
        return TlsNetwork(self.files[number], self.listeners[number], places)

    def connected(self) -> bool:
        return all(peer.connected for node in self.nodes.values() for peer in node.mesh.peers.values())

    async def begin(self, networks: Sequence[tuple[NodeId, TlsNetwork]]) -> None:
        for number, network in networks:
            node = self.nodes[number] = Node(
                Identity(number, "test"), self.logs[number], network, SETTINGS, Random(number).randint, options=FAST
            )
            node.open("default", self.machine("default", number))
            await self.nursery.start(node.run)


@asynccontextmanager
async def sockets(authority: Authority, cluster: Sockets | None = None) -> AsyncIterator[Sockets]:
    cluster = cluster or Sockets(authority)
    await cluster.listen()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            cluster.nursery = nursery
            await cluster.begin([(number, cluster.network_of(number)) for number in cluster.logs])
            yield cluster
            nursery.cancel_scope.cancel()


async def test_three_nodes_write_and_read(authority: Authority) -> None:
    async with sockets(authority) as cluster:
        leader = await cluster.leader()
        results: list[object] = []

        async def propose() -> None:
            results.append(await leader.groups["default"].propose(b"1".rjust(100_000)))

        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(propose)
        assert sorted(results) == list(range(1, 101))  # type: ignore[type-var]
        for node in cluster.others(leader):
            await node.groups["default"].read_barrier()
            assert cluster.states["default"][node.number].value == 100


async def test_a_node_that_is_gone_is_replaced_and_comes_back(authority: Authority) -> None:
    async with sockets(authority) as cluster:
        leader = await cluster.leader()
        await leader.groups["default"].propose(b"1")
        number, address = leader.number, cluster.listeners[leader.number].bound[0]
        places = cluster.network_of(number)
        cluster.crash(number)
        following = await cluster.leader()
        assert await following.groups["default"].propose(b"1") == 2
        assert isinstance(address, TcpAddress)
        cluster.listeners[number] = await open_listener(address)
        network = TlsNetwork(cluster.files[number], cluster.listeners[number], places.places)
        await cluster.begin([(number, network)])
        assert (await cluster.agree()).value == 2


async def test_a_connection_that_is_cut_is_made_again(authority: Authority) -> None:
    async with sockets(authority) as cluster:
        await until(cluster.connected)
        links = [(peer, peer._link) for node in cluster.nodes.values() for peer in node.mesh.peers.values()]
        for peer, _ in links:
            peer.abort()
        await until(lambda: all(peer._link not in (None, link) for peer, link in links))


async def test_who_shows_no_good_certificate_stays_outside(authority: Authority, tmp_path: Path) -> None:
    cluster = Sockets(authority)
    other = make_authority(tmp_path)
    cluster.files[3] = files_of(other, "node-3", authority.ca)
    async with sockets(authority, cluster):
        one = cluster.nodes[1].mesh
        await until(lambda: one.peers[2].connected and "TLS" in one.peers[3].problem)
        assert not cluster.nodes[2].mesh.peers[3].connected
        assert not cluster.nodes[3].mesh.peers[1].connected


@pytest.mark.parametrize("name", ["node-2", "alice"])
async def test_a_certificate_of_another_node_is_not_enough(authority: Authority, name: str) -> None:
    cluster = Sockets(authority)
    cluster.files[3] = files_of(authority, name)
    async with sockets(authority, cluster):
        one = cluster.nodes[1].mesh
        problem = "node 3: shows a certificate without the name 'node-3'"
        await until(lambda: one.peers[2].connected and one.peers[3].problem == problem)
        assert not cluster.nodes[2].mesh.peers[3].connected


async def test_who_is_refused_is_told_why(authority: Authority) -> None:
    cluster = Sockets(authority)
    cluster.files[1] = files_of(authority, "node-2")
    async with sockets(authority, cluster):
        why = "node 3: refuses the connection: node 1: shows a certificate without the name 'node-1'"
        await until(lambda: cluster.nodes[1].mesh.peers[3].problem == why)


@pytest.mark.parametrize("kind", ["server", "client"])
async def test_a_certificate_for_one_side_only_is_not_enough(authority: Authority, kind: str) -> None:
    cluster = Sockets(authority)
    number = 3 if kind == "client" else 1
    authority.issue(kind, f"node-{number}")
    cluster.files[number] = TlsFiles(*(authority.server if kind == "server" else authority.client), authority.ca)
    async with sockets(authority, cluster):
        await until(
            lambda: cluster.nodes[number].mesh.peers[2].connected or cluster.nodes[2].mesh.peers[4 - number].connected
        )
        await until(lambda: bool(cluster.nodes[1].mesh.peers[3].problem))
        assert not cluster.nodes[number].mesh.peers[4 - number].connected


async def test_strangers_without_tls_cost_nothing(authority: Authority) -> None:
    async with sockets(authority) as cluster:
        address = cluster.network_of(1).places[1].address
        strangers = [await trio.open_tcp_stream(address.host, address.port) for _ in range(100)]
        for stranger in strangers[:50]:
            await stranger.send_all(b"GET / HTTP/1.0\r\n\r\n")
        leader = await cluster.leader()
        assert await leader.groups["default"].propose(b"1") == 1
        for stranger in strangers:
            await stranger.aclose()


async def test_an_authority_is_needed(authority: Authority) -> None:
    with pytest.raises(UsageError):
        node_contexts(TlsFiles(*authority.node("x")))
