"""The command `map`."""

import os
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from nbdvde.cli import output
from nbdvde.cli.arguments import Control, DiskName, ImageArgument, Json, KeyFile, Overwrite, PngFile
from nbdvde.errors import UsageError

if TYPE_CHECKING:
    from nbdvde.cli.mapcells import Order

_SIDE, _SIDE_OF_PICTURE, _SIDE_MAX = 32, 128, 512


class Course(StrEnum):
    """In which order the parts of a disk are drawn."""

    HILBERT = "hilbert"
    LINEAR = "linear"


def map_(
    image: ImageArgument, disk: DiskName = None,
    since: Annotated[
        str | None, typer.Option(metavar="SNAPSHOT", help="Show what has changed since this snapshot of the disk.")
    ] = None,
    png: PngFile = None, overwrite: Overwrite = False,
    order: Annotated[
        Course | None,
        typer.Option(help="In rows, or along a curve that keeps neighbours near. [default: linear, hilbert in a PNG]"),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(metavar="N", help="Draw N * N cells, N a power of 2 from 2 to 512. [default: 32, in a PNG 128]"),
    ] = None,
    key_file: KeyFile = None, control: Control = None, json: Json = False,
) -> None:  # fmt: skip
    """Draw what a disk is made of: holes, zeroes, compressed, incompressible and shared data, what has changed."""
    from nbdvde.admin.mapcalls import DRAW, MapRequest
    from nbdvde.cli.images import ImageByPath

    side = (_SIDE_OF_PICTURE if png else _SIDE) if size is None else size
    if not 2 <= side <= _SIDE_MAX or side & (side - 1):
        raise UsageError(f"--size {side}", f"is not a power of 2 from 2 to {_SIDE_MAX}")
    course: Order = order.value if order else "hilbert" if png else "linear"
    found = ImageByPath(image, key_file=key_file, control=control).call(DRAW, MapRequest(disk, since, side * side))
    if png:
        from nbdvde.cli.mappicture import picture
        from nbdvde.cli.pngfile import save

        save(picture(found, image.name, course, side), png, image, overwrite=overwrite)
    if json:
        output.json(found)
    elif not png:
        from nbdvde.cli.maptext import drawn

        for line in drawn(found, output.clean(image.name), course, side, colours=_colours()):
            output.coloured(line)


def _colours() -> int:
    """How many colours the terminal has; none for a file, and for who wants none (https://no-color.org)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb" or not sys.stdout.isatty():
        return 0
    return 1 << 24 if os.environ.get("COLORTERM") in ("truecolor", "24bit") else 256
