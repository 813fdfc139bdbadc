"""The commands about streams."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nbdvde.cli import output, regionreports
from nbdvde.cli.arguments import Control, DiskName, ImageArgument, Json, KeyFile, image_at
from nbdvde.disk import BLOCK
from nbdvde.errors import UsageError

if TYPE_CHECKING:
    from nbdvde.admin.calls import Call
    from nbdvde.admin.streamcalls import Entry, ReadEntries, StreamInfo, StreamRequest
    from nbdvde.cli.images import ImageByPath

stream_app = typer.Typer(
    help="Append entries to the stream of a disk, and read them by their positions.", rich_markup_mode=None
)
_AT_A_TIME = 256
"""Entries in a request."""
FileOrInput = Annotated[
    Path, typer.Argument(metavar="[FILE]", readable=False, help="The file; - is standard input.", show_default=False)
]
Count = Annotated[int | None, typer.Option("--count", metavar="N", help="Entries at most.")]
Raw = Annotated[bool, typer.Option("--raw", help="Print the bytes of the entries as they are, with nothing between.")]


@stream_app.command("create")
def create(
    image: ImageArgument,
    capacity: Annotated[str, typer.Option(metavar="SIZE", help="Most that it holds; 4K are an entry.")] = "64M",
    policy: Annotated[
        str, typer.Option(metavar="POLICY", help="What is done when it is full: overwrite, reject or wait.")
    ] = "overwrite",
    increment: Annotated[str, typer.Option(metavar="SIZE", help="What is allocated at a time.")] = "64K",
    disk: DiskName = None, key_file: KeyFile = None, control: Control = None, json: Json = False,
) -> None:  # fmt: skip
    """Make the stream of a disk."""
    from nbdvde.admin import streamcalls
    from nbdvde.config import parse_size

    request = streamcalls.CreateStream(parse_size(capacity), disk, policy, parse_size(increment))
    made = image_at(image, key_file, control).call(streamcalls.CREATE, request)
    if json:
        output.json(made)


@stream_app.command("append")
def append(
    image: ImageArgument, file: FileOrInput = Path("-"),
    lines: Annotated[
        bool, typer.Option("--lines", help="Each line is an entry, its end included, instead of 4096 bytes.")
    ] = False,
    disk: DiskName = None, key_file: KeyFile = None, control: Control = None, json: Json = False,
) -> None:  # fmt: skip
    """Append a file, or what comes on standard input."""
    from nbdvde.admin import streamcalls
    from nbdvde.cli.files import opened

    positions: list[int] = []
    target = image_at(image, key_file, control)
    wait = target.is_served  # nobody makes room in an image that this process has
    with opened(file) as read:
        requests = (streamcalls.AppendEntries(entries, disk, wait) for entries in _batches(read, lines=lines))
        target.calls(streamcalls.APPEND, requests, lambda done: positions.extend(done.positions))
    if json:
        output.json(streamcalls.Positions(positions))


@stream_app.command("read")
def read(
    image: ImageArgument,
    start: Annotated[
        int | None, typer.Option("--from", metavar="POSITION", help="First entry. [default: the oldest one]")
    ] = None,
    count: Count = None, raw: Raw = False, disk: DiskName = None, key_file: KeyFile = None, control: Control = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Print entries."""
    from nbdvde.admin.streamcalls import ReadEntries

    _print(image_at(image, key_file, control), ReadEntries(disk, start, count=count), raw=raw, json=json)


@stream_app.command("tail")
def tail(
    image: ImageArgument,
    count: Annotated[int, typer.Option("-n", "--count", metavar="N", help="How many.")] = 10,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with those that are appended.")] = False,
    raw: Raw = False, disk: DiskName = None, key_file: KeyFile = None, control: Control = None, json: Json = False,
) -> None:  # fmt: skip
    """Print the newest entries."""
    from nbdvde.admin.streamcalls import ReadEntries

    target = image_at(image, key_file, control)
    if follow:
        target.server()  # nobody appends to an image that this process has
    _print(target, ReadEntries(disk, last=count, follow=follow), raw=raw, json=json)


@stream_app.command("advance")
def advance(
    image: ImageArgument,
    position: Annotated[int, typer.Argument(metavar="POSITION", help="Of the oldest entry that is still needed.")],
    disk: DiskName = None, key_file: KeyFile = None, control: Control = None, json: Json = False,
) -> None:  # fmt: skip
    """Give up the entries before a position, and the space that they take."""
    from nbdvde.admin import streamcalls

    done = image_at(image, key_file, control).call(streamcalls.ADVANCE, streamcalls.AdvanceTail(position, disk))
    if json:
        output.json(done)


@stream_app.command("status")
def status(
    image: ImageArgument, disk: DiskName = None, key_file: KeyFile = None, control: Control = None, json: Json = False
) -> None:
    """Tell how full a stream is, and which positions it has."""
    from nbdvde.admin import streamcalls

    found = _ask(image, streamcalls.STATUS, disk, key_file, control)
    output.json(found) if json else regionreports.stream(found)


@stream_app.command("reset")
def reset(
    image: ImageArgument, disk: DiskName = None, key_file: KeyFile = None, control: Control = None, json: Json = False
) -> None:
    """Give up all entries; positions go on, and what is allocated stays so."""
    from nbdvde.admin import streamcalls

    done = _ask(image, streamcalls.RESET, disk, key_file, control)
    if json:
        output.json(done)


@stream_app.command("delete")
def delete(
    image: ImageArgument, disk: DiskName = None, key_file: KeyFile = None, control: Control = None, json: Json = False
) -> None:
    """Give up the stream of a disk."""
    from nbdvde.admin import streamcalls

    done = _ask(image, streamcalls.DELETE, disk, key_file, control)
    if json:
        output.json(done)


def _ask(
    image: Path, call: "Call[StreamRequest, StreamInfo]", disk: str | None, key_file: Path | None, control: Path | None
) -> "StreamInfo":
    from nbdvde.admin.streamcalls import StreamRequest

    return image_at(image, key_file, control).call(call, StreamRequest(disk))


def _print(image: "ImageByPath", request: "ReadEntries", *, raw: bool, json: bool) -> None:
    from nbdvde.admin.streamcalls import READ_ENTRIES

    def show(entry: "Entry") -> None:
        if json:
            output.json(entry)
        elif raw:
            output.raw(entry.data)
        else:
            output.line(entry.data.removesuffix(b"\n").decode(errors="replace"))

    image.feed(READ_ENTRIES, request, show)


def _batches(read: Callable[[int], bytes], *, lines: bool) -> Iterator[list[bytes]]:
    """Entries, as many at a time as come together. Raises UsageError at a line that is too long."""
    cut = _lines if lines else _pieces
    rest, number = b"", 1
    while data := read(_AT_A_TIME * BLOCK - len(rest)):
        *entries, rest = cut(rest + data)
        for entry in (*entries, rest):
            if len(entry) > BLOCK:
                raise UsageError(f"line {number}", f"is longer than {BLOCK} bytes", "append it without --lines")
            number += 1
        number -= 1
        yield from (entries[at : at + _AT_A_TIME] for at in range(0, len(entries), _AT_A_TIME))
    if rest:
        yield [rest]


def _lines(data: bytes) -> list[bytes]:
    """Whole lines, and behind them what is left."""
    *lines, rest = data.split(b"\n")
    return [*(line + b"\n" for line in lines), rest]


def _pieces(data: bytes) -> list[bytes]:
    """Whole blocks, and behind them what is left."""
    return [data[at : at + BLOCK] for at in range(0, len(data) // BLOCK * BLOCK + 1, BLOCK)]
