"""Commands and their options. What they do is imported when they run: start-up time matters."""

import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nbdvde.cli import output, reports
from nbdvde.cli.anon import anon_app
from nbdvde.cli.arguments import (
    Control,
    DiskName,
    FileArgument,
    Format,
    ImageArgument,
    Json,
    KeyFile,
    image_at,
)
from nbdvde.cli.cluster import cluster_app
from nbdvde.cli.ctl import ctl_app
from nbdvde.cli.dictionaries import dict_app
from nbdvde.cli.keys import key_app
from nbdvde.cli.maps import map_
from nbdvde.cli.metrics import metrics_app
from nbdvde.cli.servecommand import serve
from nbdvde.cli.streams import stream_app
from nbdvde.cli.vault import vault_app
from nbdvde.cli.volumes import clone, disk_app, resize, snapshot_app
from nbdvde.cli.worm import worm_app
from nbdvde.errors import ExitCode, RefusedError, UsageError
from nbdvde.version import VERSION

if TYPE_CHECKING:
    from nbdvde.cli.images import Copied
    from nbdvde.engine.report import CheckReport

app = typer.Typer(
    name="nbdvde",
    help="Serve compressed, encrypted and authenticated disk images over NBD.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(disk_app, name="disk")
app.add_typer(snapshot_app, name="snapshot")
app.add_typer(key_app, name="key")
app.add_typer(dict_app, name="dict")
app.add_typer(vault_app, name="vault")
app.add_typer(stream_app, name="stream")
app.add_typer(metrics_app, name="metrics")
app.add_typer(anon_app, name="anon")
app.add_typer(worm_app, name="worm")
app.add_typer(cluster_app, name="cluster")
app.add_typer(ctl_app, name="ctl")


class Encryption(StrEnum):
    """How a new image is protected."""

    AES_256_GCM = "aes-256-gcm"
    NONE = "none"


class Switch(StrEnum):
    """Whether something is done."""

    ON = "on"
    OFF = "off"


def _version(wanted: bool) -> None:
    if wanted:
        output.line(f"nbdvde {VERSION}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Serve compressed, encrypted and authenticated disk images over NBD."""


@app.command()
def create(
    image: ImageArgument,
    size: Annotated[str, typer.Argument(metavar="SIZE", help="Size of its disk, like 10G.", show_default=False)],
    key_file: KeyFile = None,
    disk: Annotated[str, typer.Option(metavar="NAME", help="Name of its disk.")] = "disk",
    encryption: Annotated[Encryption, typer.Option(help="`none` makes an image anybody can read.")] = (
        Encryption.AES_256_GCM
    ),
    compression: Annotated[
        str, typer.Option(metavar="LEVEL", help="fastest, optimal, smallest, none, or a zstd level 1 to 22.")
    ] = "fastest",
    extent_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Most that is sealed as one unit, 4K to 1M.")
    ] = "64K",
    capacity: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Most bytes that the file may have, 64M or more.")
    ] = None,
    dedup: Annotated[Switch, typer.Option(help="Store blocks that are stored already as references.")] = Switch.ON,
    dedup_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory for finding duplicates. [default: 256M]")
    ] = None,
    json: Json = False,
) -> None:
    """Make an image with one empty disk. With --json, tell what `info` tells of it without a key."""
    from nbdvde import config, create_image, keysource, read_info
    from nbdvde.engine.volumes import check_name

    check_name(disk)
    length, extent_bytes = config.parse_disk_size(size), config.parse_extent_size(extent_size)
    level, limit = config.parse_compression(compression), config.parse_capacity(capacity) if capacity else 0
    if encryption is Encryption.NONE and key_file:
        raise UsageError("--key-file", "an image without encryption takes no key", "drop one of the two")
    if not image.name:
        raise UsageError("image", "has no name", "choose one, like disk.vde")
    if image.exists():
        raise RefusedError(str(image), "exists already", "choose another name, or remove it first")
    secret = None
    if encryption is not Encryption.NONE:
        secret = keysource.secret(key_file, "New passphrase: ", confirm=True)
    create_image(
        image, length, secret=secret, compression=level, extent_bytes=extent_bytes, disk_name=disk, capacity=limit,
        dedup=dedup is Switch.ON, dedup_memory=config.parse_dedup_memory(dedup_memory) if dedup_memory else 0,
    )  # fmt: skip
    if json:
        output.json(read_info(image))


app.command()(serve)


@app.command()
def info(image: ImageArgument, key_file: KeyFile = None, control: Control = None, json: Json = False) -> None:
    """Tell what an image is and holds; the key file adds how full an encrypted one is."""
    found = image_at(image, key_file, control).info()
    output.json(found) if json else reports.info(found)


@app.command()
def df(image: ImageArgument, key_file: KeyFile = None, control: Control = None, json: Json = False) -> None:
    """Tell where the bytes of an image went: data, sharing, compression, garbage, overhead."""
    found = image_at(image, key_file, control).df()
    output.json(found) if json else reports.space(found)


@app.command()
def check(
    image: ImageArgument,
    repair: Annotated[
        bool, typer.Option("--repair", help="Make again what follows from something else; gives up no data.")
    ] = False,
    salvage: Annotated[
        Path | None,
        typer.Option(metavar="NEW", readable=False, help="Copy what can be read into a new image, with the same keys."),
    ] = None,
    key_file: KeyFile = None,
    control: Control = None,
    json: Json = False,
) -> int:
    """Verify everything in an image; exit code 6 tells of damage, of that which is left after a repair."""
    target = image_at(image, key_file, control)
    if salvage and repair:
        raise UsageError("--salvage", "does not go with --repair", "save the data first")
    if salvage:
        return _told(image, target.salvage(salvage), json=json, new=salvage)
    return _told(image, target.repair() if repair else target.check(), json=json)


@app.command()
def scrub(
    image: ImageArgument,
    rate: Annotated[str, typer.Option(metavar="SIZE", help="Bytes that are read in a second at most.")] = "64M",
    key_file: KeyFile = None,
    control: Control = None,
    json: Json = False,
) -> int:
    """Verify everything in an image without being in the way of its clients; exit code 6 tells of damage."""
    from nbdvde import config

    return _told(image, image_at(image, key_file, control).check(config.parse_rate(rate)), json=json)


@app.command()
def optimize(
    image: ImageArgument,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PASS", help="repack, duplicates, train or recompress; repeatable."),
    ] = None,
    level: Annotated[
        int | None, typer.Option(metavar="N", help="zstd level, 1 to 22. [default: 12, or the image's if higher]")
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Bytes a second at most. [default: 64M while served, else no limit]"),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory for comparing blocks. [default: 256M]")
    ] = None,
    key_file: KeyFile = None,
    control: Control = None,
    json: Json = False,
) -> None:
    """Make an image smaller, at rest or beside its clients; may be interrupted at any moment."""
    from nbdvde import config
    from nbdvde.engine.optimize import options_of

    limit, bytes_ = config.parse_rate(rate) if rate else None, config.parse_size(memory) if memory else None
    report = image_at(image, key_file, control).optimize(options_of(only or None, level, limit, bytes_))
    output.json(report) if json else reports.optimized(report)


def _told(image: Path, report: "CheckReport", *, json: bool, new: Path | None = None) -> int:
    output.json(report) if json else reports.report(image, report, new)
    return ExitCode.DONE if report.ok else ExitCode.DAMAGE


@app.command("import")
def import_(
    image: ImageArgument,
    file: FileArgument,
    disk: DiskName = None,
    format_: Format = "raw",
    key_file: KeyFile = None,
    control: Control = None,
    json: Json = False,
) -> None:
    """Make a disk hold what a file or block device holds, and zeroes behind that. What was on it is lost."""
    from nbdvde.cli.copy import import_file

    begun_s = time.monotonic()
    with output.unless_interrupted("what was on the disk may be overwritten in part: import again"):
        copied = import_file(image_at(image, key_file, control), file, disk, format_)
    if json:
        _print_copied(image, file, format_, copied, begun_s)


@app.command()
def export(
    image: ImageArgument,
    file: FileArgument,
    disk: DiskName = None,
    format_: Format = "raw",
    force: Annotated[bool, typer.Option("--force", help="Even to a file that exists, or to a block device.")] = False,
    key_file: KeyFile = None,
    control: Control = None,
    json: Json = False,
) -> None:
    """Write a disk to a new file, which is there once it is whole; its holes stay holes."""
    from nbdvde.cli.copy import export_file

    begun_s = time.monotonic()
    copied = export_file(image_at(image, key_file, control), file, disk, format_, overwrite=force)
    if json:
        _print_copied(image, file, format_, copied, begun_s)


def _print_copied(image: Path, file: Path, file_format: str, copied: "Copied", begun_s: float) -> None:
    from nbdvde.admin.messages import CopyReport

    seconds = round(time.monotonic() - begun_s, 3)
    output.json(CopyReport(str(image), copied.disk, str(file), file_format, copied.bytes, seconds))


app.command()(clone)
app.command()(resize)
app.command("map")(map_)
