"""Nodes of a cluster as processes of this machine, on loopback addresses."""

import json
import os
import random
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import trio

from nbdvde import KeyFile, create_image, open_image
from nbdvde.admin.calls import Nothing
from nbdvde.admin.client import ControlClient, connect, control_path
from nbdvde.admin.clustercalls import INVITE, LEAVE, STATUS, ClusterStatus, Invitation, NodeRequest, place_of
from nbdvde.engine.image import Image
from nbdvde.engine.managed.stream import Stream
from nbdvde.errors import NbdvdeError, NetworkError
from nbdvde.replication import membership
from nbdvde.replication.ticket import Ticket
from tests.certificates import make_authority
from tests.interop.harness import Process

WAIT_S = 60
"""More than this is a hang."""
_PORTS = range(20_000, 32_768)
"""Below those of which Linux takes one for a connection (ip(7), ip_local_port_range)."""


class Member:
    """One node: its image, its configuration, and its process if it runs."""

    def __init__(self, folder: Path, number: int, port: int, called: str | None = None) -> None:
        """It listens at `port` for others, who call it at the address `called`, which is the same by default."""
        (folder / "store").mkdir(parents=True)
        self.folder, self.number, self.listen = folder, number, f"127.0.0.1:{port}"
        self.called, self.name = called or self.listen, f"node-{number}"
        self.image, self.key_file = folder / "store" / "disk.vde", folder / "key"
        self.key_file.write_bytes(os.urandom(32))
        self.key_file.chmod(0o600)
        self.process: Process | None = None
        self.paused = False

    @property
    def uri(self) -> str:
        """Of its disk."""
        assert self.process
        return self.process.uri

    @property
    def key(self) -> KeyFile:
        """Of its image."""
        return KeyFile(self.key_file.read_bytes())

    def create(self, size: int, capacity: int = 0) -> None:
        """A new image."""
        create_image(self.image, size, secret=self.key, capacity=capacity)

    def change(self, work: Callable[[Image], Awaitable[object]]) -> None:
        """Do something to the image, which nobody serves."""

        async def opened() -> None:
            async with open_image(self.image, key=self.key) as image:
                await work(image)

        trio.run(opened)

    def start(self, listen: str | None = None) -> None:
        """Serve, at a Unix socket unless elsewhere; returns when clients are let in."""
        what: Sequence[str | Path] = [self.image, "--key-file", self.key_file, "--config", self.folder / "node.toml"]
        self.process = Process(self.folder, what, listen)

    def stop(self) -> None:
        """SIGTERM; it must end with 0 and have met no bug."""
        assert self.process
        self.process.stop()
        self.process = None

    def kill(self) -> None:
        """SIGKILL."""
        if self.process:
            self.process.kill()
            self.process = None
        self.paused = False

    def pause(self) -> None:
        """SIGSTOP."""
        assert self.process
        os.kill(self.process.pid, signal.SIGSTOP)
        self.paused = True

    def resume(self) -> None:
        """SIGCONT."""
        assert self.process
        os.kill(self.process.pid, signal.SIGCONT)
        self.paused = False

    @property
    def control(self) -> ControlClient:
        """Of its server. Raises NetworkError."""
        served = connect(control_path(self.image))
        if served is None:
            raise NetworkError(str(self.image), "is not served")
        return served

    def status(self) -> ClusterStatus:
        """As it sees the cluster. Raises NetworkError."""
        return self.control.call(STATUS, Nothing())


class Cluster:
    """Nodes 1 to N, of which the first made the cluster and invited the others."""

    def __init__(
        self,
        folder: Path,
        size: int,
        nodes: int = 3,
        *,
        election_s: float = 1.0,
        log_size: str = "64M",
        capacity: int = 0,
        content: bytes = b"",
        members: Sequence[Member] = (),
        **options: object,
    ) -> None:
        """`content` is what the first image holds before, with a snapshot and a stream; `members` are made already.

        `options` are further ones of `[cluster]`.
        """
        self._size, self._capacity = size, capacity
        self.members = list(members) or [
            Member(folder / f"node{number}", number, port) for number, port in enumerate(free_ports(nodes), 1)
        ]
        authority = make_authority(folder / "authority")
        for member in self.members:
            certificate, key = authority.node(member.name)
            table = {
                "listen": member.listen, "cert": str(certificate), "key": str(key), "ca": str(authority.ca),
                "election": election_s, "log_size": log_size, **options,
            }  # fmt: skip
            lines = [f"{name} = {json.dumps(value)}" for name, value in table.items()]
            (member.folder / "node.toml").write_text("\n".join(["[cluster]", *lines]) + "\n")
        first, *others = self.members
        first.create(size, capacity)
        first.change(lambda image: _found(image, first, content))
        first.start()
        self.add(*others)

    def add(self, *members: Member) -> None:
        """Have nodes join that are served nowhere; they are voters in the end."""
        for member in members:
            ticket = self._ticket(member)
            member.number = ticket.identity.node
            member.create(self._size, self._capacity)
            member.change(partial(membership.join, ticket=ticket))
        with ThreadPoolExecutor() as pool:
            list(pool.map(Member.start, members))
        numbers = {member.number for member in members}
        self.wait(lambda status: numbers <= {node.node for node in status.nodes if node.role != "learner"})

    @property
    def running(self) -> list[Member]:
        """Those whose processes run."""
        return [member for member in self.members if member.process and not member.paused]

    def leader(self) -> Member:
        """The node that leads, when one does."""
        found = self.wait(lambda status: status.role == "leader")
        return next(member for member in self.members if member.number == found.node)

    def _ticket(self, member: Member) -> Ticket:
        """Invite a node, instead of who was called at its address before. A leader may be lost meanwhile, or be new."""
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                leader = self.leader()
                for node in leader.status().nodes:
                    if node.address == member.called:
                        leader.control.call(LEAVE, NodeRequest(node.node))
                return leader.control.call(INVITE, Invitation(member.called, member.name))
            except NbdvdeError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    def wait(self, wanted: Callable[[ClusterStatus], bool]) -> ClusterStatus:
        """Wait until a node's view of the cluster is as wanted; that view."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            for member in self.running:
                with suppress(NetworkError):
                    if wanted(status := member.status()):
                        return status
            time.sleep(0.05)
        raise AssertionError([member.status() for member in self.running])

    def close(self) -> None:
        """End everything."""
        for member in self.members:
            member.kill()


async def _found(image: Image, member: Member, content: bytes) -> None:
    if content:
        await image.disk().write(0, memoryview(content))
        await image.volumes.snapshot("disk", "before")
        stream = await Stream.create(image.regions, image.disk(), 256)
        await stream.append_many([b"before"])
    await membership.found(image, place_of(member.called, member.name))


def has_applied(node: int, index: int, status: ClusterStatus) -> bool:
    """Whether a node has everything up to an entry."""
    return status.node == node and status.applied >= index


def free_ports(count: int) -> list[int]:
    """Of this machine, for now; none that the system gives to whoever connects or does not care."""
    sockets = list[socket.socket]()
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with suppress(OSError):
            sockets.append(socket.create_server(("127.0.0.1", port)))
        if len(sockets) == count:
            break
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports
