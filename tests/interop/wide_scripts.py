"""Sessions with extended headers, as in scripts.py."""

from functools import partial

from nbdvde.protocol.constants import Chunk, Command, Option
from tests.interop.peers import NAME, SIZE
from tests.interop.scripts import ALLOCATION, BLOCK, FUA, UNKNOWN_COMMAND, Script, usable, verdict
from tests.protocol.client import Client, option, request, status_filter

DEPTH = "qemu:allocation-depth"
HUGE = 1 << 40


async def ask(
    command: int, offset: int = 0, length: int = 0, *, client: Client, contexts: tuple[str, ...] = (), **options: object
) -> str:
    """One request."""
    await client.go(NAME, wide=True, contexts=contexts)
    return await usable(client, verdict(await client.ask(command, offset, length, **options)))


async def write_unannounced(client: Client) -> str:
    """A payload without PAYLOAD_LEN."""
    await client.go(NAME, wide=True)
    await client.send(Command.WRITE, 0, BLOCK)
    await client.stream.send_all(b"x" * BLOCK)
    answer = verdict(await client.reply())
    read = await client.ask(Command.READ, 0, BLOCK, cookie=2)
    return f"{answer}, {'written' if read.bytes == b'x' * BLOCK else 'not written'}"


async def status_kinds(client: Client) -> str:
    """Chunks of two contexts."""
    await client.go(NAME, wide=True, contexts=(ALLOCATION, DEPTH))
    reply = await client.ask(Command.BLOCK_STATUS, 0, SIZE)
    return " ".join(Chunk(kind).name for kind in reply.chunks)


async def compact_request(client: Client) -> str:
    await client.go(NAME, wide=True)
    await client.stream.send_all(request(Command.READ, 0, BLOCK).ljust(32, b"\0"))
    return "closes" if await client.at_end() else "answers"


async def export_name(client: Client) -> str:
    await client.greet()
    await client.option(Option.EXTENDED_HEADERS)
    await client.stream.send_all(option(Option.EXPORT_NAME, NAME.encode()))
    return "closes" if await client.at_end() else "answers"


_status = partial(ask, Command.BLOCK_STATUS, contexts=(ALLOCATION, DEPTH))

WIDE: dict[str, Script] = {
    "EXPORT_NAME after EXTENDED_HEADERS": export_name,
    "a compact request": compact_request,
    "WRITE": partial(ask, Command.WRITE, payload=bytes(BLOCK), flags=FUA),
    "WRITE without PAYLOAD_LEN": write_unannounced,
    "READ with a payload": partial(ask, Command.READ, payload=bytes(BLOCK)),
    "an unknown command with a payload": partial(ask, UNKNOWN_COMMAND, payload=bytes(BLOCK)),
    "READ of 1 TiB": partial(ask, Command.READ, 0, HUGE),
    "TRIM of 1 TiB": partial(ask, Command.TRIM, 0, HUGE),
    "WRITE_ZEROES of 1 TiB": partial(ask, Command.WRITE_ZEROES, 0, HUGE),
    "WRITE_ZEROES of all": partial(ask, Command.WRITE_ZEROES, 0, SIZE),
    "a range that overflows 64 bits": partial(ask, Command.TRIM, (1 << 64) - 1, (1 << 64) - 1),
    "BLOCK_STATUS of two contexts": status_kinds,
    "BLOCK_STATUS filtered": partial(_status, payload=status_filter(SIZE, 1)),
    "BLOCK_STATUS filtered to nothing": partial(_status, payload=status_filter(SIZE)),
    "BLOCK_STATUS filtered to an unknown context": partial(_status, payload=status_filter(SIZE, 2)),
    "BLOCK_STATUS filtered to a context twice": partial(_status, payload=status_filter(SIZE, 1, 1)),
    "BLOCK_STATUS filtered, past the end": partial(_status, payload=status_filter(SIZE + 512, 1)),
    "BLOCK_STATUS with a short payload": partial(_status, payload=b"short"),
}
"""All of them are in the table, with QEMU's server, the other one that has extended headers."""
