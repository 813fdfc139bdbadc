"""Encoding and decoding of single messages. All integers are big-endian (spec, "Conventions")."""

import struct
from collections.abc import Iterable

from nbdvde.disk import Buffer
from nbdvde.protocol.constants import (
    MAX_PAYLOAD,
    MAX_STRING,
    MIN_BLOCK,
    NBD_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    PREFERRED_BLOCK,
    HandshakeFlag,
    Info,
    OptionReply,
)
from nbdvde.protocol.messages import ExportInfo

GREETING = struct.Struct(">QQH")
"""NBD_MAGIC, OPTION_MAGIC, handshake flags."""
CLIENT_FLAGS = struct.Struct(">I")
OPTION = struct.Struct(">QII")
"""OPTION_MAGIC, option, length of the data that follows."""
OPTION_REPLY = struct.Struct(">QIII")
"""OPTION_REPLY_MAGIC, option, reply type, length of the data that follows."""
EXPORT_NAME_REPLY = struct.Struct(">QH")
"""Size of the export, transmission flags; 124 zero bytes follow unless NO_ZEROES was negotiated."""
REQUEST = struct.Struct(">IHHQQI")
"""REQUEST_MAGIC, flags, command, cookie, offset, length; a payload of `length` bytes follows a WRITE."""
EXTENDED_REQUEST = struct.Struct(">IHHQQQ")
"""EXTENDED_REQUEST_MAGIC and the rest as in `REQUEST`; a payload of `length` bytes follows if PAYLOAD_LEN is set."""
STATUS_FILTER = struct.Struct(">Q")
"""Length of the range of a BLOCK_STATUS with payload; the ids of the contexts follow."""
SIMPLE_REPLY = struct.Struct(">IIQ")
"""SIMPLE_REPLY_MAGIC, error, cookie; data follow a successful READ."""
CHUNK = struct.Struct(">IHHQI")
"""STRUCTURED_REPLY_MAGIC, flags, chunk type, cookie, length of the payload that follows."""
DATA_CHUNK = struct.Struct(">IHHQIQ")
"""`CHUNK` and the offset of the data that follow."""
HOLE_CHUNK = struct.Struct(">IHHQIQI")
"""`CHUNK`, offset and length of the hole."""
ERROR_CHUNK = struct.Struct(">IHHQIIH")
"""`CHUNK`, error, length of the message that follows."""
STATUS_CHUNK = struct.Struct(">IHHQII")
"""`CHUNK` and context id; pairs of `EXTENT` follow."""
EXTENT = struct.Struct(">II")
"""Length and status flags."""
EXTENDED_CHUNK = struct.Struct(">IHHQQQ")
"""EXTENDED_REPLY_MAGIC, flags, chunk type, cookie, offset of the request, length of the payload that follows."""
EXTENDED_DATA_CHUNK = struct.Struct(">IHHQQQQ")
"""`EXTENDED_CHUNK` and the offset of the data that follow."""
EXTENDED_HOLE_CHUNK = struct.Struct(">IHHQQQQI")
"""`EXTENDED_CHUNK`, offset and length of the hole."""
EXTENDED_ERROR_CHUNK = struct.Struct(">IHHQQQIH")
"""`EXTENDED_CHUNK`, error, length of the message that follows."""
EXTENDED_STATUS_CHUNK = struct.Struct(">IHHQQQII")
"""`EXTENDED_CHUNK`, context id and number of extents; as many pairs of `LONG_EXTENT` follow."""
LONG_EXTENT = struct.Struct(">QQ")
"""Length and status flags."""
INFO_EXPORT = struct.Struct(">HQH")
INFO_BLOCK_SIZE = struct.Struct(">HIII")
_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")


class OptionRefused(Exception):
    """An option is answered with an error reply, and haggling goes on."""

    def __init__(self, reply: OptionReply, message: str) -> None:
        super().__init__(reply, message)
        self.reply, self.message = reply, message


class OptionData:
    """A cursor over the data of one option. Whatever does not fit raises `OptionRefused` with ERR_INVALID."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        end = self._position + count
        if end > len(self._data):
            raise OptionRefused(OptionReply.ERR_INVALID, "a length reaches past the end of the option")
        data = self._data[self._position : end]
        self._position = end
        return data

    def u16(self) -> int:
        """The next unsigned 16-bit integer."""
        value: int = _U16.unpack(self.take(2))[0]
        return value

    def u32(self) -> int:
        """The next unsigned 32-bit integer."""
        value: int = _U32.unpack(self.take(4))[0]
        return value

    def string(self) -> str:
        """The next string, which begins with its length in 32 bits."""
        return decode_string(self.take(self.u32()))

    def finish(self) -> None:
        """Nothing may be left."""
        if self._position != len(self._data):
            raise OptionRefused(OptionReply.ERR_INVALID, "bytes are left over at the end of the option")


def decode_string(data: bytes) -> str:
    """A string of the protocol: UTF-8, no NUL, at most 4096 bytes (spec, "Conventions"). Raises `OptionRefused`."""
    if len(data) > MAX_STRING:
        raise OptionRefused(OptionReply.ERR_INVALID, f"a string is longer than {MAX_STRING} bytes")
    if b"\0" in data:
        raise OptionRefused(OptionReply.ERR_INVALID, "a string contains NUL")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise OptionRefused(OptionReply.ERR_INVALID, "a string is not UTF-8") from None


def encode_string(text: str) -> bytes:
    """Any text as a string of the protocol: what is not allowed is replaced, what is too long is cut."""
    data = text.encode(errors="replace").replace(b"\0", b"?")
    return data if len(data) <= MAX_STRING else data[:MAX_STRING].decode(errors="ignore").encode()


def greeting() -> bytes:
    """The server's first message (spec, "Newstyle negotiation")."""
    return GREETING.pack(NBD_MAGIC, OPTION_MAGIC, HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)


def option_reply(option: int, reply: OptionReply, data: bytes = b"") -> bytes:
    """One reply to an option (spec, "Fixed newstyle negotiation")."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, reply, len(data)) + data


def server_entry(export: ExportInfo) -> bytes:
    """Data of a reply of type SERVER."""
    name = encode_string(export.name)
    return _U32.pack(len(name)) + name + encode_string(export.description)


def ids(data: Buffer) -> tuple[int, ...]:
    """The 32-bit numbers that `data` is made of."""
    return struct.unpack(f">{len(data) // 4}I", data)


def meta_context(context_id: int, name: str) -> bytes:
    """Data of a reply of type META_CONTEXT."""
    return _U32.pack(context_id) + encode_string(name)


def infos(export: ExportInfo, flags: int, wanted: Iterable[int]) -> list[bytes]:
    """Data of the replies of type INFO: EXPORT always, the others as wanted, each once."""
    known = {
        Info.NAME: _U16.pack(Info.NAME) + encode_string(export.name),
        Info.DESCRIPTION: _U16.pack(Info.DESCRIPTION) + encode_string(export.description),
        Info.BLOCK_SIZE: INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, MIN_BLOCK, PREFERRED_BLOCK, MAX_PAYLOAD),
    }
    asked = set(wanted)
    if not export.description:
        asked.discard(Info.DESCRIPTION)
    return [INFO_EXPORT.pack(Info.EXPORT, export.size, flags), *(known[info] for info in known if info in asked)]
