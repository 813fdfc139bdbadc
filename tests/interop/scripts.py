"""Sessions that are held with any server, right ones and wrong ones; each tells in a few words what came of it."""

import struct
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeAlias

import trio

from nbdvde.errors import NbdErrno
from nbdvde.protocol import wire
from nbdvde.protocol.constants import (
    OPTION_MAGIC,
    SIMPLE_REPLY_MAGIC,
    Chunk,
    Command,
    CommandFlag,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
)
from tests.interop.peers import NAME, SIZE
from tests.protocol.client import Client, Reply, info_data, meta_data, option, request, string

PATIENCE_S = 4
"""Every answer but those that never come is here in milliseconds."""
Script: TypeAlias = Callable[..., Awaitable[str]]
"""Is called with `client`, which has just connected."""
ALLOCATION = "base:allocation"
UNKNOWN_OPTION, UNKNOWN_COMMAND, RESIZE = 77, 99, 8
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (int(flag) for flag in CommandFlag)
BLOCK = 4096
_GONE = (EOFError, trio.BrokenResourceError, ConnectionError)


async def outcome(script: Script, client: Client) -> str:
    """What a session comes to."""
    try:
        with trio.fail_after(PATIENCE_S):
            return await script(client=client)
    except _GONE:
        return "closes"
    except trio.TooSlowError:
        return "no answer"
    except AssertionError as error:
        return str(error) or "breaks the protocol"


# Handshake


def told(replies: Sequence[tuple[int, bytes]]) -> str:
    """Replies to an option: the last one, and what came before if it is a success."""
    reply = replies[-1][0]
    if reply != OptionReply.ACK:
        known = {int(known): known.name for known in OptionReply}
        return known.get(reply, hex(reply))
    kinds = [OptionReply(kind).name for kind, _ in replies[:-1]]
    return ", ".join([f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)] + ["ACK"])


async def haggle(*options: tuple[int, bytes], client: Client) -> str:
    """Send options one after the other; the answer to the last, and whether more may be asked."""
    await client.greet()
    answer = ""
    for number, data in options:
        answer = told(await client.option(number, data))
    try:
        await client.option(UNKNOWN_OPTION)
    except _GONE:
        answer += ", then closes"
    return answer


async def flags(value: int, client: Client) -> str:
    await client.exactly(18)
    await client.stream.send_all(struct.pack(">I", value))
    return told(await client.option(UNKNOWN_OPTION))


async def raw(data: bytes, client: Client) -> str:
    """Bytes in the place of an option."""
    await client.greet()
    await client.stream.send_all(data)
    await client.exactly(1)
    return "answers"


async def abort(client: Client) -> str:
    await client.greet()
    answer = told(await client.option(Option.ABORT))
    return f"{answer}, closes" if await client.at_end() else answer


async def list_with_data(client: Client) -> str:
    """There must be exactly one answer."""
    await client.greet()
    await client.stream.send_all(option(Option.LIST, b"data") + option(UNKNOWN_OPTION))
    answers: list[str] = []
    while True:
        _, number, reply, length = wire.OPTION_REPLY.unpack(await client.exactly(wire.OPTION_REPLY.size))
        await client.exactly(length)
        if number == UNKNOWN_OPTION:
            return " and ".join(answers)
        answers.append(told([(reply, b"")]))


async def export_name(client_flags: int, name: str, client: Client) -> str:
    await client.exactly(18)
    await client.stream.send_all(struct.pack(">I", client_flags) + option(Option.EXPORT_NAME, name.encode()))
    data = await client.exactly(wire.EXPORT_NAME_REPLY.size)
    await client.stream.send_all(request(Command.FLUSH, cookie=0x6744669800000000))
    zeroes = 0
    while (await client.exactly(1)) == b"\0":
        zeroes += 1
    return f"{wire.EXPORT_NAME_REPLY.unpack(data)[0]} bytes, {zeroes} zeroes"


async def byte_by_byte(client: Client) -> str:
    await client.greet()
    for byte in option(Option.GO, info_data(NAME)):
        await client.stream.send_all(bytes([byte]))
    assert struct.unpack(">QIII", await client.exactly(20))[2] == OptionReply.INFO
    return "answers"


async def go_and_more(client: Client) -> str:
    """A request in the same piece as GO must not be lost."""
    await client.greet()
    await client.stream.send_all(option(Option.GO, info_data(NAME)) + request(Command.READ, 0, 16, cookie=5))
    while True:
        _, _, reply, length = wire.OPTION_REPLY.unpack(await client.exactly(wire.OPTION_REPLY.size))
        await client.exactly(length)
        if reply == OptionReply.ACK:
            break
    magic, error, cookie = wire.SIMPLE_REPLY.unpack(await client.exactly(wire.SIMPLE_REPLY.size))
    assert (magic, error, cookie, await client.exactly(16)) == (SIMPLE_REPLY_MAGIC, 0, 5, bytes(16))
    return "answers"


async def size_by_info(client: Client) -> str:
    await client.greet()
    replies = await client.option(Option.INFO, info_data(NAME))
    sizes = [wire.INFO_EXPORT.unpack(data)[1] for _, data in replies[:-1] if data[:2] == bytes(2)]
    return f"{sizes[0]} bytes" if sizes else told(replies)


# Transmission


def verdict(reply: Reply) -> str:
    """Success, or the name of the error."""
    return NbdErrno(reply.error).name if reply.error else "success"


async def usable(client: Client, answer: str) -> str:
    """Whether the connection goes on."""
    try:
        reply = await client.ask(Command.READ, 0, 16, cookie=99)
        return answer if not reply.error else f"{answer}, then {verdict(reply)}"
    except _GONE:
        return f"{answer}, then closes"


async def ask(
    command: int, offset: int = 0, length: int = 0, *, client: Client, contexts: tuple[str, ...] = (),
    structured: bool = True, **options: object,
) -> str:  # fmt: skip
    """One request."""
    await client.go(NAME, structured=structured, contexts=contexts)
    return await usable(client, verdict(await client.ask(command, offset, length, **options)))


async def statuses(flags: int, length: int, client: Client) -> str:
    """Extents of an empty disk with one block written."""
    await client.go(NAME, contexts=(ALLOCATION,))
    await client.ask(Command.WRITE, 1 << 20, payload=b"x" * (1 << 16))
    reply = await client.ask(Command.BLOCK_STATUS, 0, length, flags=flags)
    if reply.error:
        return verdict(reply)
    (extents,) = reply.contexts.values()
    return " ".join(f"{size >> 10}K:{flags}" for size, flags in extents)


async def status_after(command: int, flags: int, client: Client) -> str:
    """How a block is reported after it was written and then zeroed or trimmed."""
    await client.go(NAME, contexts=(ALLOCATION,))
    await client.ask(Command.WRITE, 0, payload=b"x" * (1 << 20))
    done = await client.ask(command, 0, 1 << 20, flags=flags)
    if done.error:
        return verdict(done)
    read = await client.ask(Command.READ, 0, 1 << 20)
    reply = await client.ask(Command.BLOCK_STATUS, 0, 1 << 20, flags=REQ_ONE)
    status = " and ".join(str(number) for extents in reply.contexts.values() for _, number in extents) or "unknown"
    return f"{'data' if any(read.bytes) else 'zeroes'}, status {status}"


async def chunks(flags: int, client: Client) -> str:
    """Kinds of chunks of a read of data with holes around."""
    await client.go(NAME)
    await client.ask(Command.WRITE, 1 << 20, payload=b"x" * (1 << 20))
    reply = await client.ask(Command.READ, 0, 3 << 20, flags=flags)
    return verdict(reply) if reply.error else " ".join(Chunk(kind).name for kind in reply.chunks)


async def bad_magic(client: Client) -> str:
    await client.go(NAME)
    await client.stream.send_all(bytes(64))
    return "closes" if await client.at_end() else "answers"


async def stale_contexts(bad: bytes, client: Client) -> str:
    """A selection of contexts that is followed by one that fails."""
    await client.greet()
    await client.option(Option.STRUCTURED_REPLY)
    client.structured = True
    await client.option(Option.SET_META_CONTEXT, meta_data(NAME, ALLOCATION))
    answer = told(await client.option(Option.SET_META_CONTEXT, bad))
    await client.option(Option.GO, info_data(NAME))
    reply = await client.ask(Command.BLOCK_STATUS, 0, BLOCK)
    return f"{answer}, then BLOCK_STATUS: {verdict(reply)}"


# What they offer


async def transmission_flags(client: Client) -> str:
    await client.greet()
    await client.option(Option.STRUCTURED_REPLY)
    replies = await client.option(Option.GO, info_data(NAME))
    (found,) = (wire.INFO_EXPORT.unpack(data)[2] for _, data in replies[:-1] if data[:2] == bytes(2))
    shown = TransmissionFlag(found & sum(TransmissionFlag)) & ~TransmissionFlag.HAS_FLAGS
    return " ".join(flag.name.removeprefix("SEND_") for flag in shown if flag.name)


async def infos(client: Client) -> str:
    await client.greet()
    wanted = tuple(int(info) for info in Info)
    replies = await client.option(Option.GO, info_data(NAME, wanted))
    found = [Info(struct.unpack(">H", data[:2])[0]).name for _, data in replies[:-1]]
    return " ".join(sorted(found))


async def block_sizes(client: Client) -> str:
    await client.greet()
    replies = await client.option(Option.GO, info_data(NAME, (int(Info.BLOCK_SIZE),)))
    sizes = [data for _, data in replies[:-1] if data[:2] == struct.pack(">H", Info.BLOCK_SIZE)]
    return " ".join(map(str, wire.INFO_BLOCK_SIZE.unpack(sizes[0])[1:])) if sizes else "not told"


async def context_names(*queries: str, client: Client) -> str:
    await client.greet()
    await client.option(Option.STRUCTURED_REPLY)
    replies = await client.option(Option.LIST_META_CONTEXT, meta_data(NAME, *queries))
    names = [data[4:].decode() for _, data in replies[:-1]]
    return " ".join(names) if replies[-1][0] == OptionReply.ACK and names else told(replies)


OFFERED: dict[str, Script] = {
    "STRUCTURED_REPLY": partial(haggle, (Option.STRUCTURED_REPLY, b"")),
    "EXTENDED_HEADERS": partial(haggle, (Option.EXTENDED_HEADERS, b"")),
    "transmission flags": transmission_flags,
    "infos of GO": infos,
    "block sizes: minimum, preferred, maximum": block_sizes,
    "metadata contexts": context_names,
    "zeroed and trimmed: WRITE_ZEROES": partial(status_after, Command.WRITE_ZEROES, 0),
    "WRITE_ZEROES with NO_HOLE": partial(status_after, Command.WRITE_ZEROES, NO_HOLE),
    "WRITE_ZEROES with FAST_ZERO": partial(status_after, Command.WRITE_ZEROES, FAST_ZERO),
    "TRIM": partial(status_after, Command.TRIM, 0),
    "READ of 1 MiB of data between holes": partial(chunks, 0),
}
"""Sessions that show what a server can do."""

_LONG, _HUGE = "n" * 300, "n" * 4097
_STRUCTURED = (int(Option.STRUCTURED_REPLY), b"")
_EXTENDED = (int(Option.EXTENDED_HEADERS), b"")
_OVERRUN = string(NAME) + struct.pack(">II", 1, 1000) + b"base:"

HANDSHAKES: dict[str, Script] = {
    "client flags with an unknown bit": partial(flags, 1 << 31 | 3),
    "option with a wrong magic": partial(raw, bytes(16)),
    "option of 4 GiB": partial(raw, struct.pack(">QII", OPTION_MAGIC, UNKNOWN_OPTION, 0xFFFFFFFF)),
    "unknown option with 10 bytes": partial(haggle, (UNKNOWN_OPTION, bytes(10))),
    "unknown option with 100,000 bytes": partial(haggle, (UNKNOWN_OPTION, bytes(100_000))),
    "40 unknown options": partial(haggle, *[(UNKNOWN_OPTION, b"")] * 40),
    "PEEK_EXPORT": partial(haggle, (4, b"")),
    "ABORT": abort,
    "LIST": partial(haggle, (Option.LIST, b"")),
    "LIST with data": list_with_data,
    "STARTTLS without TLS": partial(haggle, (Option.STARTTLS, b"")),
    "INFO": partial(haggle, (Option.INFO, info_data(NAME))),
    "INFO tells the size": size_by_info,
    "INFO of an unknown export": partial(haggle, (Option.INFO, info_data("unknown"))),
    "INFO of a name of 300 bytes": partial(haggle, (Option.INFO, info_data(_LONG))),
    "INFO of a name of 4097 bytes": partial(haggle, (Option.INFO, info_data(_HUGE))),
    "INFO of a name with NUL": partial(haggle, (Option.INFO, info_data("di\0sk"))),
    "INFO of a name that is not UTF-8": partial(haggle, (Option.INFO, info_data(b"\xff\xfe"))),
    "INFO with a name longer than its data": partial(haggle, (Option.INFO, struct.pack(">I", 1000) + bytes(6))),
    "INFO with a name of 4 GiB": partial(haggle, (Option.INFO, struct.pack(">I", 0xFFFFFFFF) + bytes(6))),
    "INFO with bytes left over": partial(haggle, (Option.INFO, info_data(NAME) + b"x")),
    "INFO without data": partial(haggle, (Option.INFO, b"")),
    "GO in single bytes": byte_by_byte,
    "GO and a request in one piece": go_and_more,
    "EXPORT_NAME": partial(export_name, 3, NAME),
    "EXPORT_NAME without NO_ZEROES": partial(export_name, 1, NAME),
    "EXPORT_NAME without fixed newstyle": partial(export_name, 0, NAME),
    "EXPORT_NAME of an unknown export": partial(export_name, 3, "unknown"),
    "STRUCTURED_REPLY with data": partial(haggle, (Option.STRUCTURED_REPLY, b"x")),
    "STRUCTURED_REPLY twice": partial(haggle, _STRUCTURED, _STRUCTURED),
    "STRUCTURED_REPLY after EXTENDED_HEADERS": partial(haggle, _EXTENDED, _STRUCTURED),
    "LIST_META_CONTEXT of base:": partial(context_names, "base:"),
    "LIST_META_CONTEXT of an unknown namespace": partial(context_names, "x-unknown:"),
    "LIST_META_CONTEXT before STRUCTURED_REPLY": partial(haggle, (Option.LIST_META_CONTEXT, meta_data(NAME))),
    "LIST_META_CONTEXT of an unknown export": partial(
        haggle, _STRUCTURED, (Option.LIST_META_CONTEXT, meta_data("unknown"))
    ),
    "LIST_META_CONTEXT with a query longer than its data": partial(
        haggle, _STRUCTURED, (Option.LIST_META_CONTEXT, _OVERRUN)
    ),
    "SET_META_CONTEXT before STRUCTURED_REPLY": partial(
        haggle, (Option.SET_META_CONTEXT, meta_data(NAME, ALLOCATION))
    ),
    "SET_META_CONTEXT of base:": partial(haggle, _STRUCTURED, (Option.SET_META_CONTEXT, meta_data(NAME, "base:"))),
    "SET_META_CONTEXT that fails after one that did not": partial(stale_contexts, _OVERRUN),
    "SET_META_CONTEXT of nothing after one of something": partial(stale_contexts, meta_data(NAME)),
}  # fmt: skip
"""Sessions that end before transmission, or soon after."""

REQUESTS: dict[str, Script] = {
    "READ of no length": partial(ask, Command.READ, 0, 0),
    "READ past the end": partial(ask, Command.READ, SIZE - 512, 1024),
    "READ past the end, without structure": partial(ask, Command.READ, SIZE - 512, 1024, structured=False),
    "READ of a range that overflows": partial(ask, Command.READ, (1 << 64) - 512, 1024),
    "READ of 65 MiB": partial(ask, Command.READ, 0, 65 << 20),
    "READ with FUA": partial(ask, Command.READ, 0, BLOCK, flags=FUA),
    "READ with an unknown flag": partial(ask, Command.READ, 0, BLOCK, flags=1 << 12),
    "READ with DF": partial(chunks, DF),
    "READ with DF, without structure": partial(ask, Command.READ, 0, BLOCK, flags=DF, structured=False),
    "WRITE past the end": partial(ask, Command.WRITE, SIZE - 512, payload=bytes(1024)),
    "WRITE of no length": partial(ask, Command.WRITE, payload=b""),
    "WRITE of 33 MiB": partial(ask, Command.WRITE, payload=bytes(33 << 20)),
    "WRITE of 65 MiB": partial(ask, Command.WRITE, payload=bytes(65 << 20)),
    "WRITE with a flag of another command": partial(ask, Command.WRITE, payload=bytes(BLOCK), flags=NO_HOLE),
    "FLUSH with a range": partial(ask, Command.FLUSH, 512, 512),
    "FLUSH with FUA": partial(ask, Command.FLUSH, flags=FUA),
    "TRIM past the end": partial(ask, Command.TRIM, SIZE - 512, 1024),
    "TRIM of no length": partial(ask, Command.TRIM, 0, 0),
    "TRIM of all": partial(ask, Command.TRIM, 0, SIZE),
    "CACHE": partial(ask, Command.CACHE, 0, 1 << 20),
    "CACHE with an unknown flag": partial(ask, Command.CACHE, 0, 1 << 20, flags=1 << 12),
    "WRITE_ZEROES past the end": partial(ask, Command.WRITE_ZEROES, SIZE - 512, 1024),
    "WRITE_ZEROES of all": partial(ask, Command.WRITE_ZEROES, 0, SIZE),
    "WRITE_ZEROES of 3 bytes at 5": partial(ask, Command.WRITE_ZEROES, 5, 3),
    "BLOCK_STATUS without a context": partial(ask, Command.BLOCK_STATUS, 0, BLOCK),
    "BLOCK_STATUS of no length": partial(ask, Command.BLOCK_STATUS, 0, 0, contexts=(ALLOCATION,)),
    "BLOCK_STATUS past the end": partial(ask, Command.BLOCK_STATUS, SIZE - 512, 1024, contexts=(ALLOCATION,)),
    "BLOCK_STATUS": partial(statuses, 0, 4 << 20),
    "BLOCK_STATUS with REQ_ONE": partial(statuses, REQ_ONE, 4 << 20),
    "RESIZE": partial(ask, RESIZE, 1 << 20, 0),
    "an unknown command": partial(ask, UNKNOWN_COMMAND, 0, 512),
    "a request with a wrong magic": bad_magic,
}
"""Sessions with requests, right ones and wrong ones."""

READ_ONLY: dict[str, Script] = {
    "WRITE to a read-only export": partial(ask, Command.WRITE, payload=bytes(BLOCK)),
    "TRIM of a read-only export": partial(ask, Command.TRIM, 0, BLOCK),
    "WRITE_ZEROES to a read-only export": partial(ask, Command.WRITE_ZEROES, 0, BLOCK),
    "FLUSH of a read-only export": partial(ask, Command.FLUSH),
}
"""The same with an export that cannot be written."""
