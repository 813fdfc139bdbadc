"""Nodes of a cluster as processes of this machine, on loopback addresses."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from nbdvde.admin.calls import Nothing
from nbdvde.admin.client import connect, control_path
from nbdvde.admin.clustercalls import STATUS, ClusterStatus
from nbdvde.errors import NetworkError
from tests.certificates import make_authority
from tests.interop.harness import NBDVDE, Process, run

WAIT_S = 60
"""More than this is a hang."""


class Member:
    """One node: its image, its configuration, and its process if it runs."""

    def __init__(self, folder: Path, number: int, port: int) -> None:
        folder.mkdir()
        self.folder, self.number, self.address = folder, number, f"127.0.0.1:{port}"
        self.image, self.key_file = folder / "disk.vde", folder / "key"
        self.key_file.write_bytes(os.urandom(32))
        self.key_file.chmod(0o600)
        self.process: Process | None = None

    @property
    def uri(self) -> str:
        """Of its disk."""
        assert self.process
        return self.process.uri

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

    def pause(self) -> None:
        """SIGSTOP."""
        assert self.process
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        assert self.process
        os.kill(self.process.pid, signal.SIGCONT)

    def status(self) -> ClusterStatus:
        """As it sees the cluster. Raises NetworkError."""
        served = connect(control_path(self.image))
        if served is None:
            raise NetworkError(str(self.image), "is not served")
        return served.call(STATUS, Nothing())


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
        create: Sequence[str] = (),
        content: Path | None = None,
    ) -> None:
        """`create` are further options of `nbdvde create`, `content` is what the first image holds before."""
        self.members = [
            Member(folder / f"node{number}", number, port) for number, port in enumerate(_free_ports(nodes), 1)
        ]
        authority = make_authority(folder / "authority")
        for member in self.members:
            certificate, key = authority.node(f"node-{member.number}")
            table = {
                "listen": member.address, "cert": str(certificate), "key": str(key), "ca": str(authority.ca),
                "election": election_s, "log_size": log_size,
            }  # fmt: skip
            lines = [f"{name} = {json.dumps(value)}" for name, value in table.items()]
            (member.folder / "node.toml").write_text("\n".join(["[cluster]", *lines]) + "\n")
            run(NBDVDE, "create", member.image, str(size), "--key-file", member.key_file, *create)
        first, *others = self.members
        if content:
            run(NBDVDE, "import", first.image, content, "--key-file", first.key_file)
            run(NBDVDE, "snapshot", "create", first.image, "disk@before", "--key-file", first.key_file)
            run(NBDVDE, "stream", "create", first.image, "--capacity", "1M", "--key-file", first.key_file)
            run(NBDVDE, "stream", "append", first.image, "--key-file", first.key_file, input=b"before")
        where = ("--address", first.address, "--name", "node-1")
        run(NBDVDE, "cluster", "init", first.image, *where, "--key-file", first.key_file)
        first.start()
        for member in others:
            self.add(member)

    def add(self, member: Member) -> None:
        """Have a node join that is served nowhere yet; it is a voter in the end."""
        leader = self.leader()
        ticket = member.folder / "ticket"
        where = ("--address", member.address, "--name", f"node-{member.number}")
        run(NBDVDE, "cluster", "invite", leader.image, *where, "--ticket", ticket)
        run(NBDVDE, "cluster", "join", member.image, "--ticket", ticket, "--key-file", member.key_file)
        member.start()
        self.wait(lambda status: any(n.node == member.number and n.role != "learner" for n in status.nodes))

    @property
    def running(self) -> list[Member]:
        """Those whose processes run."""
        return [member for member in self.members if member.process]

    def leader(self) -> Member:
        """The node that leads, when one does."""
        found = self.wait(lambda status: status.role == "leader")
        return self.members[found.node - 1]

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


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports
