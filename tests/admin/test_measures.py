"""What a server tells of itself while it serves."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

import nbdvde
from nbdvde.admin.measures import Gauges, Latency, Measures
from nbdvde.admin.messages import AddExport
from nbdvde.listeners import UnixAddress, open_listener
from nbdvde.metrics import Histogram
from nbdvde.protocol.constants import Command
from tests.admin.test_control import Served, serving
from tests.serving import Connect

READ, WRITE, FLUSH = int(Command.READ), int(Command.WRITE), int(Command.FLUSH)


@asynccontextmanager
async def working(folder: Path) -> AsyncIterator[tuple[Served, Connect, UnixAddress]]:
    """A server with an export in memory and one in an image, with clients."""
    connect, address = Connect(), UnixAddress(folder / "nbd")
    nbdvde.create_image(folder / "image.vde", 1 << 20, secret=None)
    listener = await open_listener(address)
    async with serving(folder, None) as control, trio.open_nursery() as nursery:
        await control.ask(control.client.add_export, AddExport("image", image=str(folder / "image.vde")))
        await nursery.start(control.server.run, [listener])
        yield control, connect, address
        for client in connect.clients:
            await client.stream.aclose()
        control.server.stop()


async def ask(control: Served) -> Measures:
    return await control.ask(control.client.metrics)


async def test_what_clients_did(tmp_path: Path) -> None:
    async with working(tmp_path) as (control, connect, address):
        client = connect(address)
        await client.go("image")
        await client.ask(WRITE, 0, payload=b"x" * 8192)
        await client.ask(FLUSH)
        assert (await client.ask(READ, 0, 4096)).error == 0
        assert (await client.ask(READ, 1 << 30, 4096)).error != 0
        during = await ask(control)
        await client.stream.aclose()
        while control.server.connections:
            await trio.lowlevel.checkpoint()
        after = await ask(control)
    (told,) = during.clients
    assert (told.export, told.requests, told.bytes > 8192) == ("image", 3, True)
    for found in (during, after):
        memory, image = found.exports
        assert (memory.traffic.requests, image.clients) == ({}, len(found.clients))
        assert image.traffic.requests == found.traffic.requests == {"read": 1, "write": 1, "flush": 1}
        assert (image.traffic.bytes["write"], image.traffic.errors) == (8192, 1)
        assert image.traffic.latency.keys() == {"read", "write", "flush"}
        assert 0 < image.traffic.latency["flush"].p50_s <= image.traffic.latency["flush"].max_s < 10
    assert (during.connections.open, after.connections.open, after.connections.total) == (1, 0, 1)


async def test_what_an_image_tells(tmp_path: Path) -> None:
    async with working(tmp_path) as (control, connect, address):
        client = connect(address)
        await client.go("image")
        await client.ask(WRITE, 0, payload=bytes(range(256)) * 32)
        await client.ask(FLUSH)
        (image,) = (await ask(control)).images
        info = await control.ask(control.client.status)
    space = image.space
    assert (image.path, image.failure, image.damaged_segments) == (str(tmp_path / "image.vde"), None, 0)
    assert [(disk.name, disk.size, disk.snapshots) for disk in image.disks] == [("disk", 1 << 20, 0)]
    assert space.live_bytes > 0
    assert space.garbage_bytes == space.reserved_bytes == 0
    assert space.overhead_bytes > 0
    assert image.syncs.count > 0
    assert image.statistics["bytes_in"] == 8192
    assert info.image is None


async def test_gauges_are_not_read_all_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("nbdvde.admin.measures.time.monotonic", lambda: clock[0])
    nbdvde.create_image(tmp_path / "image.vde", 1 << 20, secret=None)
    async with nbdvde.open_image(tmp_path / "image.vde") as image:
        gauges, real, asked = Gauges(), image.gauges, []

        def slow() -> object:
            clock[0] += 0.05
            asked.append(clock[0])
            return real()

        monkeypatch.setattr(image, "gauges", slow)
        for second in (0, 1, 4, 6, 7, 12):
            clock[0] = 100.0 + second
            assert gauges.of([image])[0].path == image.path
        assert asked == [100.05, 106.05, 112.05]
        assert gauges.of([]) == []


async def test_a_file_that_was_removed(tmp_path: Path) -> None:
    nbdvde.create_image(tmp_path / "image.vde", 1 << 20, secret=None)
    async with nbdvde.open_image(tmp_path / "image.vde") as image:
        assert Gauges().of([image])[0].file_bytes > 0
        (tmp_path / "image.vde").unlink()
        assert Gauges().of([image])[0].file_bytes == 0


def test_latency_of_a_histogram() -> None:
    histogram = Histogram()
    for milliseconds in range(1, 101):
        histogram.add(milliseconds * 1_000_000)
    histogram.add(200 * 10**9)
    found = Latency.of(histogram)
    assert (found.count, found.max_s) == (101, 200.0)
    assert 0.9 <= found.p95_s / 0.095 <= 1.15
    assert found.buckets[0] == (0.001, 1)
    assert found.buckets[-1] == (None, 1)
    assert sum(count for _, count in found.buckets) == 101
