"""QEMU's block layer on a served disk: jobs onto it, exports of it, and restarts below it."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import trio

from nbdvde.listeners import UnixAddress
from nbdvde.protocol.constants import Command
from tests.interop.conftest import Serve
from tests.interop.harness import ROOT, Served, libnbd, need, run, run_json
from tests.interop.qemu import storage_daemon
from tests.interop.test_tools import equal
from tests.protocol.client import Client
from tests.serving import Connect

PAGE = ROOT / "docs/how-to/use-from-qemu-and-libvirt.md"
MIB = 1 << 20
SIZE = 64 * MIB
BLOCK = 4096
RIDE_OVER_S = 60
WRITERS = 4
THROUGH_QEMU = (
    "old_handshake_works",
    "simple_replies_work",
    "any_offset_and_length_work",
    "largest_request_works",
    "holes_are_sent_as_holes",
    "allocation_is_told",
    "zeroing_fast_works",
    "fua_and_flush_work",
    "cache_works",
    "many_requests_at_a_time_work",
)
"""Checks of libnbd that depend on no property of ours that QEMU hides."""


@pytest.fixture(params=[False, True], ids=["host", "later"])
def newer(request: pytest.FixtureRequest) -> bool:
    """Which of two QEMUs; the newer one has extended headers."""
    return bool(request.param)


def nbd_uri(socket: Path, name: str) -> str:
    return f"nbd+unix:///{name}?socket={socket}"


def test_mirror_onto_our_export(serve: Serve, tmp_path: Path, newer: bool) -> None:
    """A disk in use is copied to ours while it goes on being written, and then given up for ours."""
    need("qemu-img", "qemu-io")
    disk, source = serve(SIZE), tmp_path / "source.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", source, "64M")
    run("qemu-io", "-c", "write -q -P 1 0 8M", "-c", "write -q -P 2 40M 3M", source)
    with storage_daemon(tmp_path, newer=newer) as daemon:
        file = {"driver": "file", "filename": str(source)}
        daemon.do("blockdev-add", driver="qcow2", node_name="source", file=file, discard="unmap")
        daemon.attach("ours", disk.server.socket, discard="unmap")
        front = nbd_uri(daemon.export("source"), "source")
        daemon.do("blockdev-mirror", job_id="job", device="source", target="ours", sync="full")
        daemon.wait("BLOCK_JOB_READY")
        changes = ["write -q -P 3 1M 2M", "write -q -P 4 20M 1M", "write -q -z 4M 1M", "flush"]
        run("qemu-io", "-f", "raw", *(part for change in changes for part in ("-c", change)), front)
        daemon.do("block-job-complete", device="job")
        assert not daemon.wait("BLOCK_JOB_COMPLETED").get("error")
        run("qemu-io", "-f", "raw", "-c", "write -q -P 5 60M 1M", front)
    disk.restart()
    checks = [
        "read -P 1 0 1M", "read -P 3 1M 2M", "read -P 1 3M 1M", "read -P 0 4M 1M", "read -P 1 5M 3M",
        "read -P 4 20M 1M", "read -P 0 39M 1M", "read -P 2 40M 3M", "read -P 5 60M 1M", "read -P 0 61M 3M",
    ]  # fmt: skip
    output = run("qemu-io", "-f", "raw", *(part for check in checks for part in ("-c", check)), disk.uri)
    assert "verification failed" not in output
    assert output.count("ops; ") == len(checks)


def test_backup_of_our_export(serve: Serve, tmp_path: Path, newer: bool) -> None:
    """The copy is of the moment the job began; holes are left out."""
    need("qemu-img", "qemu-io")
    disk, copy = serve(SIZE), tmp_path / "copy.qcow2"
    run("qemu-io", "-f", "raw", "-c", "write -q -P 1 0 8M", disk.uri)
    run("qemu-img", "create", "-q", "-f", "qcow2", copy, "64M")
    with storage_daemon(tmp_path, newer=newer) as daemon:
        daemon.attach("ours", disk.server.socket)
        file = {"driver": "file", "filename": str(copy)}
        daemon.do("blockdev-add", driver="qcow2", node_name="copy", file=file)
        front = nbd_uri(daemon.export("ours"), "ours")
        daemon.do("blockdev-backup", job_id="job", device="ours", target="copy", sync="full", speed=1)
        run("qemu-io", "-f", "raw", "-c", "write -q -P 2 0 4M", front)
        daemon.do("block-job-set-speed", device="job", speed=0)
        assert not daemon.wait("BLOCK_JOB_COMPLETED").get("error")
    assert "failed" not in run("qemu-io", "-c", "read -P 1 0 8M", "-c", "read -P 0 8M 56M", copy)
    assert "failed" not in run("qemu-io", "-f", "raw", "-c", "read -P 2 0 4M", "-c", "read -P 1 4M 4M", disk.uri)
    ranges = run_json("qemu-img", "map", "--output=json", copy)
    assert sum(part["length"] for part in ranges if part["data"]) == 8 * MIB


def test_commands_of_the_page(serve: Serve, tmp_path: Path, newer: bool) -> None:
    """What docs/how-to/use-from-qemu-and-libvirt.md has QEMU execute."""
    need("qemu-img", "qemu-io")
    blocks = re.findall(r"^```json\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    attach, mirror, let_go, backup = (json.loads(line) for block in blocks for line in block.splitlines())
    disk = serve(SIZE)
    attach["arguments"]["server"]["path"] = str(disk.server.socket)
    with storage_daemon(tmp_path, newer=newer) as daemon:
        for name in ("source", "copy"):
            file = tmp_path / f"{name}.qcow2"
            run("qemu-img", "create", "-q", "-f", "qcow2", file, "64M")
            daemon.do("blockdev-add", driver="qcow2", node_name=name, file={"driver": "file", "filename": str(file)})
        run("qemu-io", "-f", "raw", "-c", "write -q -P 7 16M 3M", nbd_uri(daemon.export("source"), "source"))
        daemon.execute(attach)
        daemon.execute(mirror)
        daemon.wait("BLOCK_JOB_READY")
        daemon.execute(let_go)
        assert not daemon.wait("BLOCK_JOB_COMPLETED").get("error")
        daemon.execute(backup)
        assert not daemon.wait("BLOCK_JOB_COMPLETED").get("error")
    for place in (disk.uri, tmp_path / "source.qcow2", tmp_path / "copy.qcow2"):
        assert "failed" not in run("qemu-io", "-c", "read -P 7 16M 3M", "-c", "read -P 0 19M 45M", place)


def test_in_front_of_us(served: Served, tmp_path: Path, newer: bool) -> None:
    """What libnbd finds behind QEMU's export of our export; all of it has reached us."""
    need("nbdcopy")
    through, direct = tmp_path / "through", tmp_path / "direct"
    with storage_daemon(tmp_path, newer=newer) as daemon:
        daemon.attach("ours", served.server.socket, discard="unmap")
        front = nbd_uri(daemon.export("ours"), "ours")
        for check in THROUGH_QEMU:
            libnbd("clear", front)
            libnbd(check, front)
        run("nbdcopy", front, through)
    run("nbdcopy", served.uri, direct)
    assert equal(through, direct)
    assert any(direct.read_bytes())


async def test_restarts_below_reconnect_delay(serve: Serve, connect: Connect, tmp_path: Path, newer: bool) -> None:
    """Clients that write through QEMU see no error while our server is stopped and started again."""
    disk = await trio.to_thread.run_sync(serve, SIZE)
    written = [Written(number * SIZE // WRITERS) for number in range(WRITERS)]
    with storage_daemon(tmp_path, newer=newer) as daemon:
        attach = partial(daemon.attach, "ours", disk.server.socket, reconnect_delay=RIDE_OVER_S)
        await trio.to_thread.run_sync(attach)
        front = UnixAddress(await trio.to_thread.run_sync(daemon.export, "ours"))
        clients = [connect(front) for _ in written]
        async with trio.open_nursery() as nursery:
            for part, client in zip(written, clients, strict=True):
                await client.go("ours")
                nursery.start_soon(part.go_on, client)
            for _ in range(3):
                for part in written:
                    await part.more(50)
                await trio.to_thread.run_sync(disk.restart)
            for part in written:
                await part.more(50)
                part.enough = True
        for part, client in zip(written, clients, strict=True):
            await part.verify(client)
    await trio.to_thread.run_sync(disk.restart)
    direct = connect(UnixAddress(disk.server.socket))
    await direct.go("disk")
    for part in written:
        await part.verify(direct)


class Written:
    """Blocks from an offset on, written one after the other, round and round."""

    def __init__(self, first: int) -> None:
        self._first = first
        self.count = 0
        self.enough = False
        self._progress = trio.Condition()

    async def go_on(self, client: Client) -> None:
        """Write until there is enough; every request must succeed."""
        while not self.enough:
            offset = self._offset(self.count)
            reply = await client.ask(Command.WRITE, offset, payload=self._data(self.count))
            assert not reply.error, f"write {self.count}: {reply}"
            async with self._progress:
                self.count += 1
                self._progress.notify_all()
            if self.count % 50 == 0:
                assert not (await client.ask(Command.FLUSH)).error

    async def more(self, count: int) -> None:
        """Wait for so many more writes."""
        until = self.count + count
        async with self._progress:
            while self.count < until:
                await self._progress.wait()

    async def verify(self, client: Client) -> None:
        """Every block must hold what it was last given."""
        last = {self._offset(number): number for number in range(self.count)}
        for offset, number in last.items():
            assert (await client.ask(Command.READ, offset, BLOCK)).bytes == self._data(number), number

    def _offset(self, number: int) -> int:
        return self._first + number * 7919 % 1000 * 3 * BLOCK

    def _data(self, number: int) -> bytes:
        return number.to_bytes(8, "big") * (BLOCK // 8)
