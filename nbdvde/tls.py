"""TLS: the certificates a server shows and asks for, and a TLS connection that looks like a socket."""

import socket
import ssl
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
    return context


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
        path.open("rb").close()
    except OSError as error:
        raise KeyFailure(str(path), reason(error), "check the files for TLS") from None


def _no_password() -> str:
    raise KeyFailure("the key for TLS", "is protected by a password", "use a key file that only the server can read")


async def secured(transport: Transport, context: ssl.SSLContext) -> tuple[Transport, frozenset[str]]:
    """The transport with TLS over it, and the names in the client's certificate, in lower case.

    `transport` itself is of no use any more. Raises trio.BrokenResourceError.
    """
    wrapped = context.wrap_socket(transport.detach(), server_side=True, do_handshake_on_connect=False)
    try:
        while not await _shaken(wrapped):
            pass
    except (OSError, ValueError) as error:
        wrapped.close()
        raise trio.BrokenResourceError(f"TLS: {getattr(error, 'reason', None) or error}") from None
    except BaseException:
        wrapped.close()
        raise
    return Transport(TlsSocket(wrapped)), _names(wrapped)


def _names(wrapped: ssl.SSLSocket) -> frozenset[str]:
    """The common name and the alternative names (RFC 5280, 4.1.2.6 and 4.2.1.6) of the client's certificate."""
    certificate: dict[str, Any] = wrapped.getpeercert() or {}
    names = [value for _, value in certificate.get("subjectAltName", ())]
    names += [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
    return frozenset(name.lower() for name in names if isinstance(name, str))


async def _shaken(wrapped: ssl.SSLSocket) -> bool:
    try:
        wrapped.do_handshake()
    except ssl.SSLWantReadError:
        await trio.lowlevel.wait_readable(wrapped)
    except ssl.SSLWantWriteError:
        await trio.lowlevel.wait_writable(wrapped)
    else:
        return True
    return False


class TlsSocket:
    """What a `Transport` uses of a non-blocking socket, over TLS.

    A call that would have to wait raises BlockingIOError, as a socket's does.
    """

    def __init__(self, wrapped: ssl.SSLSocket) -> None:
        self._wrapped = wrapped
        self.family = wrapped.family

    def fileno(self) -> int:
        """The descriptor to wait for."""
        return self._wrapped.fileno()

    def setblocking(self, flag: bool) -> None:
        """See `socket.socket`."""
        self._wrapped.setblocking(flag)

    def setsockopt(self, level: int, option: int, value: int) -> None:
        """See `socket.socket`."""
        self._wrapped.setsockopt(level, option, value)

    def recv_into(self, target: memoryview) -> int:
        """As many records as there are, as far as they fit."""
        done = 0
        while done < len(target):
            try:
                count = self._wrapped.recv_into(target[done:])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                if done:
                    break
                raise BlockingIOError from None
            if not count:
                break
            done += count
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
        try:
            return self._wrapped.send(_gathered(buffers))
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def shutdown(self, how: int) -> None:
        """Say in TLS that nothing more comes, then in TCP."""
        if how == socket.SHUT_WR:
            with suppress(OSError, ValueError):
                self._wrapped.unwrap()
        self._wrapped.shutdown(how)

    def close(self) -> None:
        """See `socket.socket`."""
        self._wrapped.close()


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
