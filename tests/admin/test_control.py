"""The control socket of a served image, asked by the client that commands use."""

import os
import socket
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import trio
import trio.testing

import nbdvde
from nbdvde.admin import http, regioncalls, watching
from nbdvde.admin.calls import Feed, OfImage
from nbdvde.admin.client import ControlClient, connect, control_path
from nbdvde.admin.messages import AddExport, ErrorBody, KeyRequest, Reloaded, RemoveExport, SecretBody
from nbdvde.admin.regioncalls import REGIONS, AnonState, RegionInfo, RegionList, VaultState
from nbdvde.admin.service import Service
from nbdvde.admin.streamcalls import StreamInfo
from nbdvde.engine.access import fresh
from nbdvde.engine.image import Image
from nbdvde.engine.keys import Cost, KeyFile, MasterKey, Passphrase
from nbdvde.engine.managed.anon import AnonTable
from nbdvde.engine.managed.metricslog import MetricsLog
from nbdvde.engine.managed.stream import Stream
from nbdvde.engine.managed.vault import Vault
from nbdvde.engine.managed.worm import Worm
from nbdvde.engine.regions.form import Form
from nbdvde.engine.regions.samples import Sample
from nbdvde.engine.report import CheckReport
from nbdvde.errors import DamageError, ImageError, KeyFailure, NbdvdeError, NetworkError, RefusedError, UsageError
from nbdvde.exports import Exports
from nbdvde.hosting import ExportSpec, Host
from nbdvde.listeners import UnixAddress, open_listener
from nbdvde.server import Server
from tests.engine.regions.passports import KEY, PUBLIC, passport

MASTER = MasterKey(bytes(range(32)))
FIRST, SECOND = KeyFile(b"first key file, thirty-two bytes"), Passphrase("geheim ä".encode())
T = TypeVar("T")


@pytest.fixture
def image_path(tmp_path: Path) -> Path:
    path = tmp_path / "image.vde"
    nbdvde.create_image(path, 1 << 20, secret=MASTER)
    nbdvde.update_keys(path, lambda area: area.with_slot(MASTER, FIRST, fresh(), cost=Cost(64, 1, 1)))
    return path


class Told:
    """What the whole server was told."""

    admin = ("http://127.0.0.1:1/",)

    def __init__(self) -> None:
        self.stopped = self.reloaded = 0
        self.is_ready = True

    def stop(self) -> None:
        self.stopped += 1

    async def reload(self) -> Reloaded:
        self.reloaded += 1
        return Reloaded(["a"], ["b"])


class Upto(msgspec.Struct, frozen=True):
    """A number."""

    number: int


@dataclass
class Served:
    """A control socket, and whether it was told to stop."""

    client: ControlClient
    server: Server
    told: "Told"

    async def ask(self, call: Callable[..., T], *arguments: object) -> T:
        """Call the blocking client while the server runs."""
        return await trio.to_thread.run_sync(lambda: call(*arguments))


@asynccontextmanager
async def serving(folder: Path, image: Any) -> AsyncIterator[Served]:
    """The control interface of an image (or None) on a socket."""
    path = folder / "ctl"
    told = Told()
    exports = Exports(default="disk")
    server = Server(exports)
    listener = await open_listener(UnixAddress(path))

    @asynccontextmanager
    async def unattended(_path: Path) -> AsyncIterator[Callable[[Image], Awaitable[None]]]:
        yield nothing

    async with trio.open_nursery() as nursery:
        host = Host(server, exports, nursery, unattended, {})
        await host.add(ExportSpec(name="disk", memory_bytes=4096), lambda: None)
        made = Service(server, lambda: image, host, ["nbd:x"], told)
        await nursery.start(http.serve, listener.sockets[0], made.routes())
        try:
            yield Served(ControlClient(path), server, told)
        finally:
            await host.close()
            nursery.cancel_scope.cancel()
            listener.close()


async def nothing(_image: Image) -> None:
    pass


@asynccontextmanager
async def served(path: Path) -> AsyncIterator[tuple[Served, Image]]:
    async with nbdvde.open_image(path, key=MASTER) as image, serving(path.parent, image) as control:
        yield control, image


async def test_status(image_path: Path) -> None:
    async with served(image_path) as (control, _):
        status = await control.ask(control.client.status)
    assert (status.pid, status.image, status.exports, status.addresses) == (
        os.getpid(), str(image_path), ["disk"], ["nbd:x"],
    )  # fmt: skip
    assert (status.clients, status.failure, status.read_only) == ([], None, False)
    assert status.metrics["connections_total"] == 0


async def test_info_check_and_flush(image_path: Path) -> None:
    async with served(image_path) as (control, image):
        await image.disk().write(0, memoryview(os.urandom(8192)))
        await control.ask(control.client.flush)
        info = await control.ask(control.client.info)
        assert info.disks[0].logical_bytes == 8192
        assert info.statistics
        report = await control.ask(control.client.check, lambda done, total: None)
        scrubbed = await control.ask(control.client.check, lambda done, total: None, 1 << 30)
        with pytest.raises(UsageError, match="rate 0"):
            await control.ask(control.client.check, lambda done, total: None, 0)
    assert report.ok
    assert scrubbed.units_verified >= report.units_verified > 1


async def test_regions(image_path: Path) -> None:
    form = Form("TEST", 4, 16)
    async with served(image_path) as (control, image):
        assert (await control.ask(control.client.call, REGIONS, OfImage())).regions == []
        area = await image.regions.area(image.disk())
        await area.create(form, 8, {0: form.block(b"text", 1)}, 1)
        found = await control.ask(control.client.call, REGIONS, OfImage())
    assert found.regions == [RegionInfo(disk="disk", type="TEST", size=8 * 4096, metadata=4096)]


async def test_states_of_regions(image_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with nbdvde.open_image(image_path, key=MASTER) as image:
        disk, area = image.disk(), await image.regions.area(image.disk())
        await (await Stream.create(image.regions, disk, 32)).append(b"x")
        await (await Worm.create(image.regions, disk, 8, 0, 5)).append(b"x")
        for make in (Vault.create, AnonTable.create, MetricsLog.create):
            await make(area)
        for number, ends in enumerate(((0, 0), (0, 20), (50, 0))):
            record = replace(passport(number + 1, expires_ns=ends[1]), issued_ns=ends[0]).signed_with(KEY)
            await (await image.regions.get(Vault, disk)).add(record, PUBLIC, 100)
        table = await image.regions.get(AnonTable, disk)
        for number in range(3):
            await table.map(b"%016d" % (number // 2), 0, b"%d" % number, 7, b"%016d" % (number + 1) * 3)
        await table.erase(b"%016d" % 1, 8)
        log = await image.regions.get(MetricsLog, disk)
        await log.append([Sample(5000, 30, 1.0), Sample(5000, 10, 1.0)])
    async with served(image_path) as (control, image):
        monkeypatch.setattr("time.time_ns", lambda: 40)
        found = (await control.ask(control.client.call, REGIONS, OfImage())).regions
        monkeypatch.setattr(regioncalls, "_LOADED_MAX", 0)
        again = (await control.ask(control.client.call, REGIONS, OfImage())).regions
        assert [one for one in again if one.worm is None] == [one for one in found if one.worm is None], "are loaded"
    states = {one.type: one for one in found}
    assert [one.problem for one in found] == [""] * 5
    assert states["STRE"].stream == StreamInfo("disk", "overwrite", 32 * 4096, 16 * 4096, 0.5, 16 * 4096, 1, 0, 1)
    assert states["WORM"].worm is not None
    assert (states["WORM"].worm.mark, states["WORM"].worm.left_ns) == (4096, None)
    assert states["CMVT"].vault == VaultState(3, 1, 1, 1, 0)
    assert states["ANON"].anonymisation == AnonState(3, 2, 1)
    assert states["MTRK"].metrics is not None
    log_state = states["MTRK"].metrics
    assert (log_state.samples, log_state.first_ns, log_state.last_ns) == (2, 10, 30)


async def test_a_damaged_region_hides_no_other(image_path: Path) -> None:
    async with served(image_path) as (control, image):
        await Stream.create(image.regions, image.disk(), 4)
        area = await image.regions.area(image.disk())
        await Vault.create(area)
        await area.change(Vault.FORM, {0: b"x" * 4096})
        stream, vault = (await control.ask(control.client.call, REGIONS, OfImage())).regions
    assert stream.stream is not None
    assert vault.vault is None
    assert "a block fails its checksum" in vault.problem


async def test_images_are_told_apart_by_their_paths(image_path: Path) -> None:
    async with served(image_path) as (control, _image):
        with pytest.raises(UsageError, match="is not served here"):
            await control.ask(control.client.call, REGIONS, OfImage("other.vde"))
        for query in ("images=x", "&".join(f"x{number}=1" for number in range(17))):
            with pytest.raises(UsageError, match="request"):
                await control.ask(control.client._call, "GET", f"/v1/regions?{query}", RegionList)


async def _squares(_image: Image, asked: Upto) -> AsyncGenerator[Upto, None]:
    for number in range(asked.number):
        yield Upto(number**2)
    if asked.number == 3:
        raise RefusedError("three", "is enough")


async def test_a_feed_ends_or_fails(image_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squares = Feed("squares", Upto, Upto, _squares)
    monkeypatch.setattr("nbdvde.admin.service.CALLS", (squares,))
    async with served(image_path) as (control, _):
        found = await control.ask(lambda: list(control.client.feed(squares, Upto(4))))
        with pytest.raises(RefusedError, match="three: is enough"):
            await control.ask(lambda: list(control.client.feed(squares, Upto(3))))
    assert [line.number for line in found] == [0, 1, 4, 9]


async def test_connect(image_path: Path) -> None:
    async with served(image_path) as (control, _):
        assert await control.ask(connect, image_path.parent / "ctl") is not None


def test_frozen_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdvde.admin.client.ANSWER_S", 0.05)
    path = tmp_path / "ctl"
    with ExitStack() as opened:
        frozen = opened.enter_context(socket.socket(socket.AF_UNIX))
        frozen.bind(str(path))
        frozen.listen(8)
        with pytest.raises(NetworkError, match="does not answer"):
            connect(path)
        for _ in range(10):
            waiting = opened.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            waiting.connect_ex(str(path))
        with pytest.raises(NetworkError, match="does not answer"):
            connect(path)


async def test_socket_of_another_user(image_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(image_path) as (control, image):
        before = image.key_area
        request = KeyRequest(SecretBody.of(FIRST), SecretBody.of(SECOND))
        monkeypatch.setattr("nbdvde.admin.client._peer_uid", lambda sock: os.geteuid() + 1)
        for call in (lambda: control.client.change_keys("add", request), lambda: connect(image_path.parent / "ctl")):
            with pytest.raises(NetworkError, match=f"user {os.geteuid() + 1}"):
                await control.ask(call)
        assert image.key_area == before


async def test_path_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.vde")
    nbdvde.create_image(path, 1 << 20, secret=None)
    async with nbdvde.open_image(path) as image, serving(tmp_path, image) as control:
        assert (await control.ask(control.client.info)).path == str(path)
        assert (await control.ask(control.client.status)).image == str(path)


async def test_stop(image_path: Path) -> None:
    async with served(image_path) as (control, _):
        await control.ask(control.client.stop)
        assert control.told.stopped == 1


async def test_keys(image_path: Path) -> None:
    async with served(image_path) as (control, image):
        client = control.client
        assert [slot.slot for slot in (await control.ask(client.keys)).slots] == [0]
        request = KeyRequest(SecretBody.of(FIRST), SecretBody.of(SECOND), slot=3, label="ä")
        added = await control.ask(client.change_keys, "add", request)
        assert [(slot.slot, slot.kind, slot.label) for slot in added.slots] == [
            (0, "keyfile", ""),
            (3, "passphrase", "ä"),
        ]
        assert image.key_area.unlock(SECOND) == MASTER
        left = await control.ask(client.change_keys, "remove", KeyRequest(SecretBody.of(SECOND), slot=0))
        assert [slot.slot for slot in left.slots] == [3]
        changed = KeyRequest(SecretBody.of(SECOND), SecretBody.of(FIRST))
        await control.ask(client.change_keys, "change", changed)
        assert image.key_area.open(FIRST) == (MASTER, 3)
    assert nbdvde.read_key_area(image_path).unlock(FIRST) == MASTER


@pytest.mark.parametrize(
    ("action", "request_", "error"),
    [
        ("add", KeyRequest(SecretBody.of(SECOND), SecretBody.of(SECOND)), KeyFailure),
        ("remove", KeyRequest(SecretBody.of(FIRST)), RefusedError),
        ("remove", KeyRequest(SecretBody.of(FIRST), slot=99), UsageError),
        ("add", KeyRequest(SecretBody.of(FIRST)), UsageError),
        ("add", KeyRequest(SecretBody.of(FIRST), SecretBody.of(FIRST)), RefusedError),
        ("add", KeyRequest(SecretBody.of(FIRST), SecretBody.of(SECOND), slot=0), RefusedError),
    ],
)
async def test_errors_arrive_as_they_left(
    image_path: Path, action: Any, request_: KeyRequest, error: type[NbdvdeError], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    async with served(image_path) as (control, image):
        before = image.key_area
        with pytest.raises(error):
            await control.ask(control.client.change_keys, action, request_)
        assert image.key_area == before
    for secret in (FIRST, SECOND):
        assert msgspec.json.encode(secret.data).decode() not in caplog.text
        assert secret.data.decode() not in caplog.text


async def test_malformed_requests(image_path: Path) -> None:
    async with served(image_path) as (control, _):
        for body in (
            b"",
            b"{}",
            b'{"secret": 1}',
            b'{"secret":{"kind":"x","data":""}}',
            b"[",
            b'{"\xaf":1}',
            b'{"secret":null,"x":1}',
        ):
            with pytest.raises(UsageError, match="request"):
                await control.ask(control.client._call, "POST", "/v1/keys/remove", msgspec.Raw, body)


async def test_unencrypted_image_has_no_keys(tmp_path: Path) -> None:
    nbdvde.create_image(tmp_path / "plain.vde", 1 << 20, secret=None)
    async with nbdvde.open_image(tmp_path / "plain.vde") as image, serving(tmp_path, image) as control:
        with pytest.raises(RefusedError, match="not encrypted"):
            await control.ask(control.client.keys)


async def test_disk_in_memory(tmp_path: Path) -> None:
    async with serving(tmp_path, None) as control:
        assert (await control.ask(control.client.status)).image is None
        await control.ask(control.client.flush)
        for call in (control.client.info, control.client.keys):
            with pytest.raises(RefusedError, match="in memory"):
                await control.ask(call)


class SlowImage:
    """A check that goes on until somebody stops it."""

    def __init__(self) -> None:
        self.step, self.ended = threading.Event(), threading.Event()

    async def check(self, progress: Callable[[int, int], None], rate: int | None) -> CheckReport:
        assert rate in (None, 65537)
        return await trio.to_thread.run_sync(self._check, progress)

    def _check(self, progress: Callable[[int, int], None]) -> CheckReport:
        try:
            for done in range(1000):
                progress(done, 1000)
                self.step.wait(0.01)
            raise AssertionError("nobody stopped it")
        finally:
            self.ended.set()


@pytest.mark.parametrize("rate", [None, 65537])
async def test_check_tells_of_progress_and_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: int | None
) -> None:
    monkeypatch.setattr(watching, "PROGRESS_S", 0)
    image, seen = SlowImage(), []

    def enough(done: int, total: int) -> None:
        seen.append((done, total))
        raise KeyboardInterrupt

    async with serving(tmp_path, image) as control:
        with pytest.raises(KeyboardInterrupt):
            await control.ask(control.client.check, enough, rate)
        await trio.to_thread.run_sync(image.ended.wait, 30)
        assert image.ended.is_set()
    assert seen[0][1] == 1000


async def test_exports(image_path: Path, tmp_path: Path) -> None:
    async with serving(tmp_path, None) as control:
        client = control.client
        (only,) = (await control.ask(client.exports)).exports
        assert (only.name, only.image, only.size, only.clients) == ("disk", None, 4096, 0)
        more = AddExport("more", image=str(image_path), secret=SecretBody.of(FIRST), description="d", connections=2)
        added = (await control.ask(client.add_export, more)).exports[1]
        assert (added.name, added.image, added.size, added.read_only) == ("more", str(image_path), 1 << 20, False)
        with pytest.raises(RefusedError, match="exists already"):
            await control.ask(client.add_export, more)
        left = await control.ask(client.remove_export, RemoveExport("more"))
        assert left.exports == [only]
        with pytest.raises(RefusedError, match="does not exist"):
            await control.ask(client.remove_export, RemoveExport("more"))
    async with nbdvde.open_image(image_path, key=MASTER):
        """It is closed, so that others can open it."""


@pytest.mark.parametrize(
    ("request_", "kind", "words"),
    [
        (AddExport("x"), UsageError, "either an image or memory"),
        (AddExport("x", image="y", memory=512), UsageError, "either an image or memory"),
        (AddExport("x", memory=513), UsageError, "multiple of 512"),
        (AddExport("", memory=512), UsageError, "empty"),
        (AddExport("x" * 4097, memory=512), UsageError, "longer than"),
        (AddExport("x", memory=512, addresses=["1.2.3"]), UsageError, "1.2.3"),
        (AddExport("x", image="/nothing/here"), ImageError, "/nothing/here"),
    ],
)
async def test_exports_that_cannot_be(tmp_path: Path, request_: AddExport, kind: type[NbdvdeError], words: str) -> None:
    async with serving(tmp_path, None) as control:
        with pytest.raises(kind, match=words):
            await control.ask(control.client.add_export, request_)
        assert [export.name for export in (await control.ask(control.client.exports)).exports] == ["disk"]


async def test_a_wrong_key_leaves_an_image_closed(tmp_path: Path, image_path: Path) -> None:
    async with serving(tmp_path, None) as control:
        with pytest.raises(KeyFailure):
            await control.ask(control.client.add_export, AddExport("x", image=str(image_path)))
        more = AddExport("x", image=str(image_path), secret=SecretBody.of(FIRST))
        assert len((await control.ask(control.client.add_export, more)).exports) == 2


async def test_reload(tmp_path: Path) -> None:
    async with serving(tmp_path, None) as control:
        assert await control.ask(control.client.reload) == Reloaded(["a"], ["b"])
        assert control.told.reloaded == 1


async def test_damage_found_by_a_check_of_a_served_image(tmp_path: Path) -> None:
    class Damaged:
        async def check(self, progress: object, rate: int | None) -> CheckReport:
            raise DamageError("a", "b", "c")

    async with serving(tmp_path, Damaged()) as control:
        with pytest.raises(DamageError, match="a: b"):
            await control.ask(control.client.check, lambda done, total: None)


def test_every_error_keeps_its_class() -> None:
    for kind in (UsageError, KeyFailure, DamageError, RefusedError, NetworkError):
        again = ErrorBody.of(kind("what", "why", "hint")).exception()
        assert (type(again), str(again)) == (kind, "what: why (hint)")


def test_secrets_in_requests_do_not_show() -> None:
    assert "geheim" not in repr(KeyRequest(SecretBody.of(SECOND), SecretBody.of(FIRST)))


def test_nobody_listens(tmp_path: Path) -> None:
    assert connect(tmp_path / "none.ctl") is None
    assert connect(tmp_path / ("x" * 200)) is None
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead.ctl"))
    assert connect(tmp_path / "dead.ctl") is None
    assert control_path(tmp_path / "a.vde") == tmp_path / "a.vde.ctl"


@contextmanager
def answering(path: Path, answer: bytes):
    """A server that answers once, with these bytes, and goes away."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with listener.accept()[0] as client:
                client.recv(65536)
                client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield ControlClient(path)
        thread.join(30)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense",
        b"HTTP/1.1 200 \r\nContent-Length: 99\r\n\r\n{}",
        b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 \r\nContent-Length: 3\r\n\r\n{}\n",
        b'HTTP/1.1 200 \r\nContent-Length: 11\r\n\r\n{"error":1}',
    ],
)
def test_strange_answers(tmp_path: Path, answer: bytes) -> None:
    for call in (ControlClient.status, lambda client: client.check(lambda done, total: None)):
        path = tmp_path / f"{call.__name__}.ctl"
        with answering(path, answer) as client, pytest.raises(NetworkError) as caught:
            call(client)
        assert "\n" not in str(caught.value)
