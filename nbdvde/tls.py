"""TLS: the certificates a server or node shows and asks for, and a TLS connection that looks like a socket."""

import socket
import ssl
import stat
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from nbdvde.disk import Buffer
from nbdvde.errors import KeyFailure, UsageError, reason
from nbdvde.transport import Transport

_GATHER_BYTES = 1 << 17
"""Bytes that are joined for one call: records of 16 KiB each, which is what a client decrypts at a time."""


_RECORD = (1 << 14) + 256
"""The longest record (RFC 8446, 5.2), with its head."""
_SCRATCH = memoryview(bytearray((1 << 17) + _RECORD))
"""Where encrypted bytes arrive, of all connections: they are taken from there at once."""
_BARREN = 4 * _RECORD
"""Bytes that may come without any data in them. New keys cost us 50 µs for 27 bytes of a client [measured]."""
_PSK_CIPHERS = "kECDHEPSK+CHACHA20:kDHEPSK+AESGCM:kDHEPSK+CHACHA20"
"""Of TLS 1.2, with forward secrecy; TLS 1.3 has its own."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Files in PEM."""

    certificate: Path
    """The server's, followed by those between it and its authority."""
    key: Path
    client_authority: Path | None = None
    """Whose certificates clients must show; without it they need none."""


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """TLS with these certificates. Raises UsageError, KeyFailure."""
    context = _context()
    _load(context, files)
    return context


def node_contexts(files: TlsFiles) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """TLS between nodes that show each other certificates of one authority: for who is called, and for who calls.

    Whose certificate it is has to be looked at afterwards, by either side. Raises UsageError, KeyFailure.
    """
    if files.client_authority is None:
        raise UsageError("TLS between nodes", "needs an authority", "name the file with its certificate")
    called, caller = _context(), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    caller.check_hostname = False  # a node has a name of its own, wherever it runs
    for context in (called, caller):
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        _load(context, files)
    return called, caller


def _load(context: ssl.SSLContext, files: TlsFiles) -> None:
    """Raises UsageError, KeyFailure."""
    for path in (files.certificate, files.key, files.client_authority):
        if path is not None:
            _readable(path)
    try:
        context.load_cert_chain(files.certificate, files.key, password=_no_password)
    except ssl.SSLError:
        raise KeyFailure(
            f"certificate {files.certificate}", f"does not go with the key {files.key}", "both must be PEM files"
        ) from None
    if files.client_authority is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(files.client_authority)
        except ssl.SSLError:
            raise UsageError(f"{files.client_authority}", "holds no certificate", "use a PEM file") from None


def shared_key_context(keys: Mapping[str, bytes]) -> ssl.SSLContext:
    """TLS with keys that clients share, by the clients' names (RFC 4279, RFC 8446). Raises UsageError.

    Not together with certificates: OpenSSL takes these keys with SHA-256 only, and prefers another hash as soon as a
    certificate lets it, so that TLS 1.3 would go on without the key.
    """
    if sys.version_info < (3, 13):
        raise UsageError("shared keys for TLS", "need Python 3.13 or newer", "use certificates")
    context = _context()
    context.set_ciphers(_PSK_CIPHERS)
    context.set_psk_server_callback(lambda identity: keys.get(identity or "", b""))
    return context


def _context() -> ssl.SSLContext:
    """TLS 1.2 or newer (spec, "TLS versions")."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.num_tickets = 0
    return context


def _readable(path: Path) -> None:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a FIFO would be waited for
            raise KeyFailure(str(path), "is not a regular file", "check the files for TLS")
        path.open("rb").close()
    except OSError as error:
        raise KeyFailure(str(path), reason(error), "check the files for TLS") from None


def _no_password() -> str:
    raise KeyFailure("the key for TLS", "is protected by a password", "use a key file that only the server can read")


def folded(name: str) -> str:
    """A name in lower case, if it is ASCII: elsewhere that makes different names the same (U+212A is a `k` then)."""
    return name.lower() if name.isascii() else name


async def secured(
    transport: Transport, context: ssl.SSLContext, *, server_side: bool = True
) -> tuple[Transport, frozenset[str]]:
    """The transport with TLS over it, and the names in the other side's certificate, in lower case.

    `transport` itself is of no use any more. Raises trio.BrokenResourceError.
    """
    tls = TlsSocket(transport.detach(), context, server_side=server_side)
    try:
        while not tls.shake_hands():
            await trio.lowlevel.wait_readable(tls)
    except (OSError, ValueError) as error:
        tls.close()
        raise trio.BrokenResourceError(f"TLS: {getattr(error, 'reason', None) or error}") from None
    except BaseException:
        tls.close()
        raise
    return Transport(tls), tls.names


class TlsSocket:
    """What a `Transport` uses of a non-blocking socket, over TLS.

    A call that would have to wait raises BlockingIOError, as a socket's does. OpenSSL is kept away from the socket: it
    would ask for each record's head and body, where one call takes in all that has arrived, and wakes the client once.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool = True) -> None:
        self._sock, self.family = sock, sock.family
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._unsent = memoryview(b"")
        """Encrypted bytes that the kernel has not taken yet,"""
        self._taken = 0
        """and how many bytes of the caller's are in them."""
        self._came, self._held = 1, 0
        """Bytes that arrived last, and those of data that were in them so far."""
        self._barren = 0
        """Bytes that arrived since there were data."""

    def shake_hands(self) -> bool:
        """Go on with the handshake as far as what has arrived allows; whether it is over.

        It has a few KiB, which the kernel takes at once. Raises OSError, ValueError.
        """
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                if not self._arrived(_RECORD):
                    return False
            except ssl.SSLError:
                with suppress(OSError):
                    self._flush()
                raise
            else:
                self._flush()
                self._barren = 0
                return True

    @property
    def names(self) -> frozenset[str]:
        """The common name and the alternative names of the other side's certificate (RFC 5280, 4.1.2.6 and 4.2.1.6)."""
        certificate: dict[str, Any] = self._tls.getpeercert() or {}
        names = [value for _, value in certificate.get("subjectAltName", ())]
        names += [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
        return frozenset(folded(name) for name in names if isinstance(name, str))

    def fileno(self) -> int:
        """The descriptor to wait for."""
        return self._sock.fileno()

    def setblocking(self, flag: bool) -> None:
        """See `socket.socket`."""
        self._sock.setblocking(flag)

    def setsockopt(self, level: int, option: int, value: int) -> None:
        """See `socket.socket`."""
        self._sock.setsockopt(level, option, value)

    def recv_into(self, target: memoryview) -> int:
        """As many records as there are, as far as they fit; of short ones no more than arrived at once."""
        done, room = 0, len(target)
        while done < room:
            try:
                count = self._tls.read(room - done, target[done:]) if self._holds_any else None
            except ssl.SSLWantReadError:
                count = None
            except ssl.SSLEOFError:
                break
            if count is None:
                sparse = 2 * self._held < self._came
                if done and sparse:
                    break
                self._refuse_chatter()
                if self._arrived(_RECORD if sparse else room - done + _RECORD):
                    continue
                if done:
                    break
                raise BlockingIOError
            if not count:
                break
            done += count  # type: ignore[operator]
            self._held += count  # type: ignore[operator]
            self._barren = 0
        return done

    def recvmsg_into(self, targets: Sequence[memoryview]) -> tuple[int]:
        """As `recv_into`, one target after the other."""
        done = 0
        for target in targets:
            try:
                count = self.recv_into(target)
            except BlockingIOError:
                if done:
                    break
                raise
            done += count
            if count < len(target):
                break
        return (done,)

    def sendmsg(self, buffers: Sequence[Buffer]) -> int:
        """Send some of the bytes; after BlockingIOError the next call must begin with the same ones."""
        if not self._taken:
            self._taken = self._tls.write(_gathered(buffers))
        self._flush()
        taken, self._taken = self._taken, 0
        return taken

    def shutdown(self, how: int) -> None:
        """Say in TLS that nothing more comes, then in TCP."""
        if how == socket.SHUT_WR:
            with suppress(OSError, ValueError):
                self._tls.unwrap()
            with suppress(OSError):
                self._flush()
        self._sock.shutdown(how)

    def close(self) -> None:
        """See `socket.socket`."""
        self._sock.close()

    @property
    def _holds_any(self) -> bool:
        """Whether TLS has anything to read; asking it in vain costs an exception."""
        incoming = self._incoming
        return bool(incoming.pending or self._tls.pending() or incoming.eof)

    def _arrived(self, most: int) -> bool:
        """Take in what has arrived, or its end; whether there was anything."""
        try:
            count = self._sock.recv_into(_SCRATCH[:most])
        except BlockingIOError:
            return False
        if count:
            self._came, self._held = count, 0
            self._barren += count
            self._incoming.write(_SCRATCH[:count])
        else:
            self._incoming.write_eof()
        return True

    def _refuse_chatter(self) -> None:
        """End it when a client has TLS busy with itself, and with answers that wait to be sent. Raises OSError."""
        if self._barren > _BARREN or self._outgoing.pending > _RECORD:
            raise OSError("messages of TLS itself without end")

    def _flush(self) -> None:
        """Send what is encrypted. Raises BlockingIOError unless the kernel takes all of it."""
        if self._outgoing.pending:
            fresh = self._outgoing.read()
            self._unsent = memoryview(bytes(self._unsent) + fresh if self._unsent else fresh)
        while self._unsent:
            self._unsent = self._unsent[self._sock.send(self._unsent) :]


def _gathered(buffers: Sequence[Buffer]) -> Buffer:
    """The first bytes of the buffers, in one piece."""
    if len(buffers[0]) >= _GATHER_BYTES:
        return memoryview(buffers[0])[:_GATHER_BYTES]
    parts: list[Buffer] = []
    room = _GATHER_BYTES
    for buffer in buffers:
        parts.append(buffer if len(buffer) <= room else memoryview(buffer)[:room])
        room -= len(parts[-1])
        if not room:
            break
    return b"".join(parts)
