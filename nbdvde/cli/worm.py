"""The commands about WORM regions."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nbdvde.cli import output, regionreports
from nbdvde.cli.arguments import Control, DiskName, FileArgument, ImageArgument, Json, KeyFile, Overwrite, image_at
from nbdvde.cli.streams import FileOrInput

if TYPE_CHECKING:
    from nbdvde.admin.calls import Call
    from nbdvde.admin.wormcalls import WormInfo, WormRecord, WormRequest

worm_app = typer.Typer(
    help="Append what nobody can change, or remove before its retention ends.", rich_markup_mode=None
)
_PART = 1 << 20
_RETENTION = "How long nothing of it can be removed, like 30d or 7y (s, m, h, d, w, y); 0 is for ever."


@worm_app.command("create")
def create(
    image: ImageArgument, capacity: Annotated[str, typer.Option(metavar="SIZE", help="Most bytes that it takes.")],
    retention: Annotated[str, typer.Option(metavar="TIME", help=_RETENTION)],
    disk: DiskName = None, key_file: KeyFile = None, control: Control = None, json: Json = False,
) -> None:  # fmt: skip
    """Make the WORM region of a disk. Until its retention ends, the disk cannot be deleted, shrunk or rolled back."""
    from nbdvde.admin import wormcalls
    from nbdvde.cli.times import parse_retention
    from nbdvde.config import parse_size

    request = wormcalls.CreateWorm(parse_size(capacity), parse_retention(retention), disk)
    made = image_at(image, key_file, control).call(wormcalls.CREATE, request)
    if json:
        output.json(made)


@worm_app.command("append")
def append(
    image: ImageArgument, file: FileOrInput = Path("-"), disk: DiskName = None, key_file: KeyFile = None,
    control: Control = None, json: Json = False,
) -> None:  # fmt: skip
    """Append a file, or what comes on standard input, 1 MiB to a record, each durable before the next."""
    from nbdvde.admin import wormcalls
    from nbdvde.cli.files import opened
    from nbdvde.replication.regionexport import AppendData

    def show(record: "WormRecord") -> None:
        if json:
            output.json(record)

    with opened(file) as read:
        requests = (AppendData(part, disk) for part in _parts(read))
        image_at(image, key_file, control).calls(wormcalls.APPEND, requests, show)


@worm_app.command("list")
def list_(
    image: ImageArgument, disk: DiskName = None, key_file: KeyFile = None, control: Control = None, json: Json = False
) -> None:
    """List what was appended, when by the retention clock, and its SHA-256."""
    from nbdvde.admin import wormcalls

    found: list[WormRecord] = []
    show = output.json if json else found.append
    image_at(image, key_file, control).feed(wormcalls.LIST, wormcalls.WormRequest(disk), show)
    if not json:
        regionreports.worm_records(found)


@worm_app.command("export")
def export(
    image: ImageArgument, file: FileArgument, overwrite: Overwrite = False, disk: DiskName = None,
    key_file: KeyFile = None, control: Control = None,
) -> None:  # fmt: skip
    """Write everything that was appended to a new file, byte for byte; - is standard output."""
    from nbdvde.admin import wormcalls
    from nbdvde.cli.files import written

    target = image_at(image, key_file, control)
    request = wormcalls.WormRequest(disk)
    if str(file) == "-":
        target.feed(wormcalls.EXPORT, request, lambda part: output.raw(part.data))
        return
    with written(file, image, overwrite=overwrite) as out:
        target.feed(wormcalls.EXPORT, request, lambda part: out.writelines((part.data,)))


@worm_app.command("verify")
def verify(
    image: ImageArgument, disk: DiskName = None, key_file: KeyFile = None, control: Control = None, json: Json = False
) -> None:
    """Verify the chain of records, the clock, and all data."""
    from nbdvde.admin import wormcalls

    found = _ask(image, wormcalls.VERIFY, disk, key_file, control)
    if json:
        output.json(found)
    else:
        output.line(f"{image}: sound, {output.counted(found.records, 'append')} of {output.size(found.mark)} verified")


@worm_app.command("retention")
def retention(
    image: ImageArgument,
    extend: Annotated[
        str | None, typer.Option("--extend", metavar="TIME", help="Retain it so long, from its creation on.")
    ] = None,
    disk: DiskName = None, key_file: KeyFile = None, control: Control = None, json: Json = False,
) -> None:  # fmt: skip
    """Tell how long a WORM region is retained, or extend that."""
    from nbdvde.admin import wormcalls
    from nbdvde.cli.times import parse_retention

    if extend is None:
        found = _ask(image, wormcalls.RETENTION, disk, key_file, control)
    else:
        request = wormcalls.ExtendRetention(parse_retention(extend), disk)
        found = image_at(image, key_file, control).call(wormcalls.EXTEND, request)
    output.json(found) if json else regionreports.worm(found)


@worm_app.command("delete")
def delete(
    image: ImageArgument, disk: DiskName = None, key_file: KeyFile = None, control: Control = None, json: Json = False
) -> None:
    """Give up a WORM region whose retention has ended."""
    from nbdvde.admin import wormcalls

    done = _ask(image, wormcalls.DELETE, disk, key_file, control)
    if json:
        output.json(done)


def _parts(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """What is read, in parts that are as long as can be."""
    part = b""
    while data := read(_PART - len(part)):
        part += data
        if len(part) == _PART:
            yield part
            part = b""
    if part:
        yield part


def _ask(
    image: Path, call: "Call[WormRequest, WormInfo]", disk: str | None, key_file: Path | None, control: Path | None
) -> "WormInfo":
    from nbdvde.admin.wormcalls import WormRequest

    return image_at(image, key_file, control).call(call, WormRequest(disk))
