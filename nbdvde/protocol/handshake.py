"""The server's side of fixed newstyle negotiation, as a state machine (spec, "Handshake", "Option types").

    FLAGS --client flags--> OPTIONS --GO, EXPORT_NAME--> TRANSMISSION
                            OPTIONS --STARTTLS---------> TLS --secured--> OPTIONS
                            OPTIONS --ABORT------------> ABORTED
                            OPTIONS --any other--------> OPTIONS

Limits are those of `HandshakeLimits`: longer option data are skipped as they arrive and refused, and what is above the
others ends the connection. Time is the caller's limit.

Duties of the caller:
1. Send `greeting()`. Then, while `phase` is FLAGS or OPTIONS: `feed` what arrives, and call `step` until it returns
   None, sending each answer before the next step, so that a client that pipelines options is answered at the pace it
   reads.
2. On `ProtocolError` close the connection.
3. In TLS let TLS begin, and call `secured`; what was agreed before is forgotten.
4. In TRANSMISSION go on with `negotiated`, `unread` being the first bytes of it. In ABORTED close.
"""

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from nbdvde.disk import Buffer
from nbdvde.protocol import wire
from nbdvde.protocol.constants import (
    MAX_STRING,
    OPTION_MAGIC,
    ClientFlag,
    Option,
    OptionReply,
    TransmissionFlag,
)
from nbdvde.protocol.messages import ExportInfo, Negotiated, ProtocolError
from nbdvde.protocol.wire import OptionData, OptionRefused, option_reply

_CLIENT_FLAGS = int(ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES)
_ZEROES = bytes(124)


class Phase(enum.Enum):
    """Where a handshake is."""

    FLAGS = enum.auto()
    OPTIONS = enum.auto()
    TLS = enum.auto()
    TRANSMISSION = enum.auto()
    ABORTED = enum.auto()


class Tls(enum.Enum):
    """What a connection may and must do."""

    OFF = enum.auto()
    REQUIRED = enum.auto()
    """Nothing but STARTTLS and ABORT is answered before (spec, "FORCEDTLS mode")."""
    DONE = enum.auto()


@dataclass(frozen=True, slots=True)
class HandshakeLimits:
    """What a client may send before transmission."""

    option_bytes: int = 1 << 16
    """Data of one option that are kept. The longest legal name needs 4 KiB, a list of queries seldom more."""
    handshake_bytes: int = 1 << 25
    """All options together; what qemu takes as the data of one (NBD_MAX_BUFFER_SIZE)."""
    options: int = 256
    """nbdkit takes 32, and more when there are many exports to ask for."""


class Directory(Protocol):
    """The exports as one client may see them. The empty name is the default export."""

    def find(self, name: str, /) -> ExportInfo | None:
        """The export of a name."""

    def listing(self) -> Iterable[ExportInfo]:
        """All exports, under their canonical names."""

    def enter(self, name: str, /) -> str | None:
        """Begin to use what `find` gave, or say why that cannot be now."""


def transmission_flags(
    read_only: bool, *, structured: bool = False, filtered: bool = False, sequential: bool = False
) -> TransmissionFlag:
    """What every export of this server can do (spec, "Transmission flags").

    `filtered`: a BLOCK_STATUS may say which of the selected contexts it asks for. `sequential`: writes have to come in
    order, which several connections cannot keep; nor are zeroes faster than other data then.
    """
    flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_FUA
    flags |= TransmissionFlag.SEND_CACHE
    if not sequential:
        flags |= TransmissionFlag.CAN_MULTI_CONN
    if read_only:
        flags |= TransmissionFlag.READ_ONLY
    else:
        flags |= TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES
        flags |= TransmissionFlag(0) if sequential else TransmissionFlag.SEND_FAST_ZERO
    if filtered:
        flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
    return flags | TransmissionFlag.SEND_DF if structured else flags


class Handshake:
    """One connection's negotiation. See the module for the caller's duties."""

    def __init__(self, exports: Directory, tls: Tls = Tls.OFF, limits: HandshakeLimits | None = None) -> None:
        self.phase = Phase.FLAGS
        self.negotiated: Negotiated | None = None
        self._exports, self._tls, self._limits = exports, tls, limits or HandshakeLimits()
        self._buffer = bytearray()
        self._no_zeroes = False
        self._forget()
        self._options = self._option_bytes = 0
        self._skip = 0
        self._after_skip: bytes | None = None
        self._shut_down = False

    def _forget(self) -> None:
        self._structured = self._extended = False
        self._contexts: tuple[str, ...] = ()
        self._contexts_for: str | None = None

    def secured(self) -> None:
        """TLS is on: nothing that came before it counts (CVE-2021-3716)."""
        assert self.phase is Phase.TLS, "the client asked for it"
        self._forget()
        self._tls, self.phase = Tls.DONE, Phase.OPTIONS

    @property
    def begun(self) -> bool:
        """Whether the client has sent anything."""
        return self.phase is not Phase.FLAGS or bool(self._buffer)

    def shut_down(self) -> None:
        """From now on every option but ABORT is refused with ERR_SHUTDOWN."""
        self._shut_down = True

    @property
    def unread(self) -> bytes:
        """Bytes that arrived behind the last message of the handshake."""
        return bytes(self._buffer)

    def feed(self, data: Buffer) -> None:
        """Take bytes from the client."""
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        self._buffer += memoryview(data)[skipped:]

    def step(self) -> bytes | None:
        """Handle one message; what to send because of it, or None when more bytes are needed.

        Raises `ProtocolError`.
        """
        if self._skip:
            return None
        if self._after_skip is not None:
            reply, self._after_skip = self._after_skip, None
            return reply
        if self.phase is Phase.FLAGS:
            return self._client_flags()
        return self._option() if self.phase is Phase.OPTIONS else None

    def _client_flags(self) -> bytes | None:
        if len(self._buffer) < wire.CLIENT_FLAGS.size:
            return None
        flags: int = wire.CLIENT_FLAGS.unpack(self._take(wire.CLIENT_FLAGS.size))[0]
        if flags & ~_CLIENT_FLAGS:
            raise ProtocolError("client flags", f"unknown bits in {flags:#x}")
        self._no_zeroes = bool(flags & ClientFlag.NO_ZEROES)
        self.phase = Phase.OPTIONS
        return b""

    def _option(self) -> bytes | None:
        header = wire.OPTION
        if len(self._buffer) < header.size:
            return None
        magic, option, length = header.unpack_from(self._buffer)
        if magic != OPTION_MAGIC:
            raise ProtocolError("option", f"magic {magic:#x}")
        if length > self._limits.option_bytes:
            return self._oversized(option, length)
        if len(self._buffer) < header.size + length:
            return None
        self._count_option(length)
        self._take(header.size)
        return self._answer(option, self._take(length))

    def _take(self, count: int) -> bytes:
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data

    def _count_option(self, length: int) -> None:
        limits = self._limits
        self._options += 1
        self._option_bytes += wire.OPTION.size + length
        if self._options > limits.options:
            raise ProtocolError("option", f"more than {limits.options} in one connection")
        if self._option_bytes > limits.handshake_bytes:
            raise ProtocolError("option", f"{length} bytes of data, {self._option_bytes} in all")

    def _oversized(self, option: int, length: int) -> bytes:
        """Skip the data as they arrive, then refuse."""
        if option == Option.EXPORT_NAME:
            raise ProtocolError("option", f"a name of {length} bytes")
        self._count_option(length)
        self._take(wire.OPTION.size)
        if option == Option.SET_META_CONTEXT:
            self._select(None, ())
        skipped = min(length, len(self._buffer))
        del self._buffer[:skipped]
        self._skip = length - skipped
        if option == Option.ABORT:
            self.phase = Phase.ABORTED
            return option_reply(option, OptionReply.ACK)
        reply = OptionReply.ERR_TOO_BIG if option in _HANDLERS else OptionReply.ERR_UNSUP
        self._after_skip = option_reply(option, reply, b"too much data")
        return b""

    def _answer(self, option: int, data: bytes) -> bytes:
        if self._shut_down and option != Option.ABORT:
            if option == Option.EXPORT_NAME:
                raise ProtocolError("export", "the server is stopping")
            return option_reply(option, OptionReply.ERR_SHUTDOWN, b"the server is stopping")
        if self._tls is Tls.REQUIRED and option not in (Option.STARTTLS, Option.ABORT):
            return self._demand_tls(option)
        handler = _HANDLERS.get(option)
        if handler is None:
            return option_reply(option, OptionReply.ERR_UNSUP, b"unknown option")
        try:
            return handler(self, option, data)
        except OptionRefused as refused:
            return option_reply(option, refused.reply, wire.encode_string(refused.message))

    def _demand_tls(self, option: int) -> bytes:
        if option == Option.EXPORT_NAME:
            raise ProtocolError("export", "EXPORT_NAME without TLS")
        return option_reply(option, OptionReply.ERR_TLS_REQD, b"this server is for TLS only")

    def _starttls(self, option: int, data: bytes) -> bytes:
        OptionData(data).finish()
        if self._tls is Tls.OFF:
            raise OptionRefused(OptionReply.ERR_POLICY, "this server has no TLS")
        if self._tls is Tls.DONE:
            raise OptionRefused(OptionReply.ERR_INVALID, "TLS is on already")
        if self._buffer:
            raise ProtocolError("STARTTLS", "more was sent than TLS may follow")
        self.phase = Phase.TLS
        return option_reply(option, OptionReply.ACK)

    def _export_name(self, _option: int, data: bytes) -> bytes:
        """There is no error reply to this option: what cannot be served ends the connection."""
        if self._extended:
            raise ProtocolError("export", "EXPORT_NAME after EXTENDED_HEADERS")
        try:
            name = wire.decode_string(data)
            export = self._export(name)
            self._go(name, export)
        except OptionRefused as refused:
            raise ProtocolError("export", refused.message) from None
        reply = wire.EXPORT_NAME_REPLY.pack(export.size, self._flags(name, export))
        return reply if self._no_zeroes else reply + _ZEROES

    def _abort(self, option: int, _data: bytes) -> bytes:
        self.phase = Phase.ABORTED
        return option_reply(option, OptionReply.ACK)

    def _list(self, option: int, data: bytes) -> bytes:
        OptionData(data).finish()
        replies = [
            option_reply(option, OptionReply.SERVER, wire.server_entry(export)) for export in self._exports.listing()
        ]
        return b"".join(replies) + option_reply(option, OptionReply.ACK)

    def _info(self, option: int, data: bytes) -> bytes:
        """INFO and GO differ only in what follows a success."""
        cursor = OptionData(data)
        name = cursor.string()
        wanted = [cursor.u16() for _ in range(cursor.u16())]
        cursor.finish()
        export = self._export(name)
        flags = self._flags(name, export)
        replies = [option_reply(option, OptionReply.INFO, info) for info in wire.infos(export, flags, wanted)]
        if option == Option.GO:
            self._go(name, export)
        return b"".join(replies) + option_reply(option, OptionReply.ACK)

    def _structured_reply(self, option: int, data: bytes) -> bytes:
        OptionData(data).finish()
        if self._extended:
            raise OptionRefused(OptionReply.ERR_EXT_HEADER_REQD, "extended headers are in use")
        self._structured = True
        return option_reply(option, OptionReply.ACK)

    def _extended_headers(self, option: int, data: bytes) -> bytes:
        OptionData(data).finish()
        self._extended = True
        return option_reply(option, OptionReply.ACK)

    def _list_meta_context(self, option: int, data: bytes) -> bytes:
        export, queries = self._meta_queries(data)
        wild = tuple(query for query in queries if query.endswith(":"))
        found = [name for name in export.contexts if not queries or name in queries or name.startswith(wild)]
        return _meta_contexts(option, [(0, name) for name in found])

    def _set_meta_context(self, option: int, data: bytes) -> bytes:
        """The selection is replaced even when the option fails."""
        self._select(None, ())
        export, queries = self._meta_queries(data)
        self._select(OptionData(data).string(), tuple(name for name in export.contexts if name in queries))
        return _meta_contexts(option, enumerate(self._contexts))

    def _meta_queries(self, data: bytes) -> tuple[ExportInfo, set[str]]:
        cursor = OptionData(data)
        name = cursor.string()
        queries = {cursor.string() for _ in range(cursor.u32())}
        cursor.finish()
        if not (self._structured or self._extended):
            raise OptionRefused(OptionReply.ERR_INVALID, "negotiate structured replies first")
        return self._export(name), queries

    def _select(self, name: str | None, contexts: tuple[str, ...]) -> None:
        self._contexts_for, self._contexts = name, contexts

    def _export(self, name: str) -> ExportInfo:
        export = self._exports.find(name)
        if export is None:
            raise OptionRefused(OptionReply.ERR_UNKNOWN, f"no export named '{name}'"[:MAX_STRING])
        return export

    def _contexts_of(self, name: str) -> tuple[str, ...]:
        """The selection, if it was made with this name."""
        return self._contexts if name == self._contexts_for else ()

    def _flags(self, name: str, export: ExportInfo) -> TransmissionFlag:
        structured = self._structured or self._extended
        filtered = self._extended and bool(self._contexts_of(name))
        return transmission_flags(
            export.read_only, structured=structured, filtered=filtered, sequential=export.sequential
        )

    def _go(self, name: str, export: ExportInfo) -> None:
        """A selection of contexts holds only for the export name it was made with (spec, "Metadata querying")."""
        obstacle = self._exports.enter(name)
        if obstacle is not None:
            raise OptionRefused(OptionReply.ERR_POLICY, obstacle)
        self.negotiated = Negotiated(export, self._structured, self._contexts_of(name), self._extended)
        self.phase = Phase.TRANSMISSION


def _meta_contexts(option: int, contexts: Iterable[tuple[int, str]]) -> bytes:
    replies = [option_reply(option, OptionReply.META_CONTEXT, wire.meta_context(*context)) for context in contexts]
    return b"".join(replies) + option_reply(option, OptionReply.ACK)


_HANDLERS: dict[int, Callable[[Handshake, int, bytes], bytes]] = {
    Option.EXPORT_NAME: Handshake._export_name,
    Option.ABORT: Handshake._abort,
    Option.LIST: Handshake._list,
    Option.STARTTLS: Handshake._starttls,
    Option.INFO: Handshake._info,
    Option.GO: Handshake._info,
    Option.STRUCTURED_REPLY: Handshake._structured_reply,
    Option.EXTENDED_HEADERS: Handshake._extended_headers,
    Option.LIST_META_CONTEXT: Handshake._list_meta_context,
    Option.SET_META_CONTEXT: Handshake._set_meta_context,
}
