"""TLS from STARTTLS to close_notify, and what must not pass without it."""

import os
import random
import socket
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from nbdvde.errors import KeyFailure, UsageError
from nbdvde.exports import Access, Export, Exports
from nbdvde.limits import Limits
from nbdvde.listeners import UnixAddress, open_listener
from nbdvde.memory import MemoryDisk
from nbdvde.protocol.constants import Command, Option, OptionReply
from nbdvde.server import Server
from nbdvde.tls import TlsFiles, TlsSocket, server_context, shared_key_context
from tests.certificates import Authority, make_authority
from tests.protocol.client import Client, info_data, meta_data, option
from tests.serving import Connect, running

READ, WRITE, FLUSH, DISC = int(Command.READ), int(Command.WRITE), int(Command.FLUSH), int(Command.DISC)
STARTTLS = [(OptionReply.ACK, b"")]
SIZE = 64 << 20


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("pki"))


def server_of(authority: Authority, *, clients: bool = False, limits: Limits | None = None) -> Server:
    context = server_context(TlsFiles(*authority.server, authority.ca if clients else None))
    exports = Exports([Export("disk", MemoryDisk(SIZE))], default="disk")
    return Server(exports, limits=limits or Limits(linger_s=0), tls=context)


def client_context(authority: Authority, *, certificate: Authority | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.ca)
    if certificate is not None:
        context.load_cert_chain(*certificate.client)
    return context


async def secure(client: Client, context: ssl.SSLContext) -> None:
    await client.greet()
    assert await client.option(Option.STARTTLS) == STARTTLS
    client.stream = trio.SSLStream(client.stream, context, server_hostname="localhost")


async def enter(client: Client) -> None:
    """Agree on structured replies and go, inside TLS."""
    assert await client.option(Option.STRUCTURED_REPLY) == STARTTLS
    client.structured = True
    assert (await client.option(Option.GO, info_data("disk")))[-1] == (OptionReply.ACK, b"")


async def test_a_session(address: UnixAddress, connect: Connect, authority: Authority) -> None:
    server = server_of(authority)
    async with running(server, await open_listener(address)):
        client = connect(address)
        await secure(client, client_context(authority))
        await enter(client)
        data = random.Random(1).randbytes(5 << 20)
        assert (await client.ask(WRITE, 4095, payload=data)).error == 0
        assert (await client.ask(READ, 4095, len(data))).bytes == data
        for number in range(40):
            await client.send(READ, number << 12, 1 << 16, cookie=100 + number)
        replies = [await client.reply() for _ in range(40)]
        padded = bytes(4095) + data
        for reply in replies:
            start = (reply.cookie - 100) << 12
            assert reply.bytes == padded[start : start + (1 << 16)]
        assert (await client.ask(FLUSH)).error == 0
        await client.send(DISC)
        assert await client.at_end(), "the end is told within TLS, or the client raises"


async def test_nothing_is_answered_before(
    address: UnixAddress,
    connect: Connect,
    authority: Authority,
) -> None:
    server = server_of(authority)
    async with running(server, await open_listener(address)):
        client = connect(address)
        await client.greet()
        for number, data in (
            (Option.LIST, b""),
            (Option.STRUCTURED_REPLY, b""),
            (Option.EXTENDED_HEADERS, b""),
            (Option.INFO, info_data("disk")),
            (Option.GO, info_data("disk")),
            (Option.SET_META_CONTEXT, meta_data("disk", "base:allocation")),
            (99, b"what"),
        ):
            assert [reply for reply, _ in await client.option(number, data)] == [OptionReply.ERR_TLS_REQD]
        assert await client.option(Option.ABORT) == STARTTLS
        assert await client.at_end()
        client = connect(address)
        await client.greet()
        await client.stream.send_all(option(Option.EXPORT_NAME, b"disk"))
        assert await client.at_end()


async def test_bytes_behind_starttls_end_the_connection_cve_2021_3716(
    address: UnixAddress,
    connect: Connect,
    authority: Authority,
) -> None:
    """Or who is in between could slip options into the protected session."""
    server = server_of(authority)
    async with running(server, await open_listener(address)):
        client = connect(address)
        await client.greet()
        await client.stream.send_all(option(Option.STARTTLS) + option(Option.STRUCTURED_REPLY))
        assert await client.at_end()
        assert server.metrics.protocol_errors == 1


async def test_tls_is_begun_once_and_without_data(
    address: UnixAddress,
    connect: Connect,
    authority: Authority,
) -> None:
    server = server_of(authority)
    async with running(server, await open_listener(address)):
        client = connect(address)
        await client.greet()
        assert [reply for reply, _ in await client.option(Option.STARTTLS, b"x")] == [OptionReply.ERR_INVALID]
        assert await client.option(Option.STARTTLS) == STARTTLS
        client.stream = trio.SSLStream(client.stream, client_context(authority), server_hostname="localhost")
        assert [reply for reply, _ in await client.option(Option.STARTTLS)] == [OptionReply.ERR_INVALID]
        await enter(client)


async def test_a_server_without_tls_says_so(address: UnixAddress, connect: Connect) -> None:
    server = Server(Exports([Export("disk", MemoryDisk(512))], default="disk"))
    async with running(server, await open_listener(address)):
        client = connect(address)
        await client.greet()
        assert [reply for reply, _ in await client.option(Option.STARTTLS)] == [OptionReply.ERR_POLICY]
        assert (await client.option(Option.GO, info_data("disk")))[-1] == (OptionReply.ACK, b"")


@pytest.mark.parametrize("who", ["nobody", "stranger", "alice"])
async def test_client_certificates(
    who: str,
    address: UnixAddress,
    connect: Connect,
    authority: Authority,
    tmp_path: Path,
) -> None:
    shown = {"nobody": None, "stranger": make_authority(tmp_path / "other"), "alice": authority}[who]
    server = server_of(authority, clients=True)
    async with running(server, await open_listener(address)):
        client = connect(address)
        await secure(client, client_context(authority, certificate=shown))
        if who == "alice":
            await enter(client)
            assert (await client.ask(READ, 0, 5)).bytes == bytes(5)
        else:
            with pytest.raises(trio.BrokenResourceError):
                await client.option(Option.LIST)
            await trio.testing.wait_all_tasks_blocked()
            assert server.connections == []


async def test_old_versions_are_refused(
    address: UnixAddress,
    connect: Connect,
    authority: Authority,
) -> None:
    context = client_context(authority)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    server = server_of(authority)
    async with running(server, await open_listener(address)):
        client = connect(address)
        await secure(client, context)
        with pytest.raises(trio.BrokenResourceError):
            await client.option(Option.LIST)


async def test_noise_instead_of_tls_ends_that_client_only(
    address: UnixAddress,
    connect: Connect,
    authority: Authority,
) -> None:
    server = server_of(authority)
    async with running(server, await open_listener(address)):
        good, bad = connect(address), connect(address)
        await secure(good, client_context(authority))
        await enter(good)
        await bad.greet()
        assert await bad.option(Option.STARTTLS) == STARTTLS
        await bad.stream.send_all(random.Random(2).randbytes(4096))
        with pytest.raises((EOFError, trio.BrokenResourceError)):
            await bad.exactly(1 << 20)
        assert (await good.ask(READ, 0, 4096)).bytes == bytes(4096)


async def test_who_never_begins_tls_is_dropped(
    address: UnixAddress,
    connect: Connect,
    authority: Authority,
    mock_clock: trio.testing.MockClock,
) -> None:
    server = server_of(authority, limits=Limits(linger_s=0, handshake_s=10))
    async with running(server, await open_listener(address)):
        client = connect(address)
        await client.greet()
        assert await client.option(Option.STARTTLS) == STARTTLS
        await trio.testing.wait_all_tasks_blocked()
        assert len(server.connections) == 1
        mock_clock.jump(11)
        assert await client.at_end()


async def test_stop_answers_within_tls(
    address: UnixAddress,
    connect: Connect,
    authority: Authority,
) -> None:
    server = server_of(authority)
    async with running(server, await open_listener(address)) as ended:
        client = connect(address)
        await secure(client, client_context(authority))
        await enter(client)
        await client.send(READ, 0, 1 << 20)
        server.stop()
        assert (await client.reply()).bytes == bytes(1 << 20)
        assert await client.at_end()
        await ended.wait()


class Chatter:
    """TLS in which there are never data, but an answer to everything (as to requests for new keys)."""

    def __init__(self, answers: int) -> None:
        self._answers = answers

    def wrap_bio(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, **_: object) -> "Chatter":
        self._incoming, self._outgoing = incoming, outgoing
        return self

    def pending(self) -> int:
        return 0

    def read(self, *_: object) -> int:
        self._outgoing.write(bytes(len(self._incoming.read()) * self._answers))
        raise ssl.SSLWantReadError


@pytest.mark.parametrize(("answers", "sent"), [(0, 5 << 14), (1, 2 << 14)])
def test_tls_that_is_busy_with_itself_is_ended(answers: int, sent: int) -> None:
    """New keys without end would cost our time, and memory as well while the client takes no answers."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        tls = TlsSocket(ours, Chatter(answers))  # type: ignore[arg-type]
        target = memoryview(bytearray(1 << 20))
        theirs.sendall(bytes(1 << 14))
        with pytest.raises(BlockingIOError):
            tls.recv_into(target)
        theirs.sendall(bytes(sent - (1 << 14)))
        with pytest.raises(OSError, match="without end"):
            tls.recv_into(target)


def test_short_records_do_not_hold_up_others(authority: Authority) -> None:
    """A byte a record costs thousands of times what a full one does: a call takes what arrived at once, no more."""
    with joined(authority) as (tls, client, sealed, wire):
        for _ in range(4096):
            sealed.write(b"x")
        wire.sendall(client.read())
        target, counts = memoryview(bytearray(1 << 20)), list[int]()
        while sum(counts) < 4096:
            counts.append(tls.recv_into(target))
        assert max(counts) < 1024


def test_data_behind_the_end_are_taken(authority: Authority) -> None:
    """Once we have said that nothing more comes, what a client still sends is read, or TCP would reset it."""
    with joined(authority) as (tls, client, sealed, wire):
        sealed.write(bytes(1000))
        wire.sendall(client.read())
        tls.shutdown(socket.SHUT_WR)
        taken, target = 0, memoryview(bytearray(1 << 16))
        while taken < 1000:
            taken += tls.recv_into(target)
        sealed.write(b"more")
        wire.sendall(client.read())
        assert tls.recv_into(target) == 4
        wire.shutdown(socket.SHUT_WR)
        assert tls.recv_into(target) == 0


@contextmanager
def joined(authority: Authority) -> Iterator[tuple[TlsSocket, ssl.MemoryBIO, ssl.SSLObject, socket.socket]]:
    """A connection after its handshake: our side; what the client encrypted, its TLS, and its socket."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        tls = TlsSocket(ours, server_context(TlsFiles(*authority.server)))
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = client_context(authority).wrap_bio(incoming, outgoing, server_hostname="localhost")
        while True:
            try:
                client.do_handshake()
            except ssl.SSLWantReadError:
                theirs.sendall(outgoing.read())
                assert not tls.shake_hands()
                incoming.write(theirs.recv(1 << 16))
            else:
                theirs.sendall(outgoing.read())
                assert tls.shake_hands()
                break
        yield tls, outgoing, client, theirs


def test_files_that_do_not_serve(authority: Authority, tmp_path: Path) -> None:
    other = make_authority(tmp_path / "other")
    certificate, key = authority.server
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for files, error, text in (
        (TlsFiles(tmp_path / "none", key), KeyFailure, "no such file"),
        (TlsFiles(certificate, tmp_path / "none"), KeyFailure, "no such file"),
        (TlsFiles(certificate, other.server[1]), KeyFailure, "does not go with the key"),
        (TlsFiles(key, key), KeyFailure, "does not go with the key"),
        (TlsFiles(certificate, key, key), UsageError, "holds no certificate"),
        (TlsFiles(certificate, key, tmp_path), KeyFailure, "is not a regular file"),
        (TlsFiles(pipe, key), KeyFailure, "is not a regular file"),
    ):
        with pytest.raises(error, match=text):
            server_context(files)


@pytest.mark.parametrize(
    ("certificates", "admitted"), [(("alice",), True), (("Alice", "bob"), True), (("bob",), False), ((), False)]
)
async def test_exports_for_some_certificates(
    address: UnixAddress, connect: Connect, authority: Authority, certificates: tuple[str, ...], admitted: bool
) -> None:
    context = server_context(TlsFiles(*authority.server, authority.ca))
    disk = MemoryDisk(512)
    exports = Exports([Export("disk", disk, access=Access.parse(certificates=certificates)), Export("all", disk)])
    async with running(Server(exports, tls=context, limits=Limits(linger_s=0)), await open_listener(address)):
        client = connect(address)
        await secure(client, client_context(authority, certificate=authority))
        listed = [reply for reply, _ in await client.option(Option.LIST)]
        assert listed == [OptionReply.SERVER] * (1 + admitted) + [OptionReply.ACK]
        reply = (await client.option(Option.GO, info_data("disk")))[-1][0]
        assert reply == (OptionReply.ACK if admitted else OptionReply.ERR_UNKNOWN)


async def test_new_certificates_hold_for_new_clients(
    address: UnixAddress, connect: Connect, authority: Authority, tmp_path: Path
) -> None:
    server, renewed = server_of(authority), make_authority(tmp_path)
    async with running(server, await open_listener(address)):
        old = connect(address)
        await secure(old, client_context(authority))
        await enter(old)
        server.change(Limits(linger_s=0), server_context(TlsFiles(*renewed.server)))
        new = connect(address)
        await secure(new, client_context(renewed))
        await enter(new)
        assert (await old.ask(READ, 0, 4)).bytes == (await new.ask(READ, 0, 4)).bytes == bytes(4)


KEYS = {"alice": bytes(range(32)), "bob": bytes(16)}


def shared_key_client(name: str, key: bytes, version: ssl.TLSVersion) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = version
    context.set_ciphers("PSK")
    context.set_psk_client_callback(lambda _hint: (name, key))  # type: ignore[attr-defined]
    return context


@pytest.mark.skipif(sys.version_info < (3, 13), reason="Python's ssl has no shared keys before 3.13")
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_shared_keys(
    address: UnixAddress, connect: Connect, authority: Authority, version: ssl.TLSVersion
) -> None:
    exports = Exports([Export("disk", MemoryDisk(512))])
    server = Server(exports, tls=shared_key_context(KEYS), limits=Limits(linger_s=0))
    async with running(server, await open_listener(address)):
        for name, key in KEYS.items():
            client = connect(address)
            await secure(client, shared_key_client(name, key, version))
            await enter(client)
            assert (await client.ask(READ, 0, 4)).bytes == bytes(4)
        strangers = [shared_key_client(*who, version) for who in (("alice", bytes(32)), ("carol", bytes(32)))]
        for context in [*strangers, client_context(authority, certificate=authority)]:
            stranger = connect(address)
            await secure(stranger, context)
            with pytest.raises((trio.BrokenResourceError, EOFError)):
                await stranger.option(Option.LIST)


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="this Python has shared keys")
def test_shared_keys_need_a_newer_python() -> None:
    with pytest.raises(UsageError, match=r"3\.13"):
        shared_key_context(KEYS)
