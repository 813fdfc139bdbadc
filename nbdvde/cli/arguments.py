"""Arguments and options that several commands have, and what they come to."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nbdvde.cli.images import ImageByPath

# Our own errors tell what cannot be read and why, with the exit code that belongs to it: hence `readable=False`.
ImageArgument = Annotated[
    Path, typer.Argument(metavar="IMAGE", readable=False, help="Path of the image.", show_default=False)
]
FileArgument = Annotated[
    Path, typer.Argument(metavar="FILE", readable=False, help="The file, or block device.", show_default=False)
]
DiskName = Annotated[
    str | None, typer.Option("--disk", metavar="NAME", help="The disk, or DISK@SNAPSHOT. [default: the first disk]")
]
Format = Annotated[
    str, typer.Option("--format", metavar="FORMAT", help="raw, or qcow2, vmdk, vdi, ... through qemu-img.")
]
KeyFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", readable=False, help="Key file, mode 0600; without it a passphrase is asked for."),
]
NewKeyFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", readable=False, help="The new key file; without it a passphrase is asked for, twice."),
]
Control = Annotated[
    Path | None,
    typer.Option(metavar="PATH", readable=False, help="Control socket of the running server. [default: IMAGE.ctl]"),
]
PngFile = Annotated[
    Path | None, typer.Option("--png", metavar="FILE", readable=False, help="Write a picture to this PNG file instead.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SLOT_HELP = "Number of the key slot. [default: the one that --key-file or the passphrase opens]"
Slot = Annotated[int | None, typer.Option(metavar="N", help=SLOT_HELP)]


def image_at(path: Path, key_file: Path | None, control: Path | None) -> "ImageByPath":
    """The image that a command names, served or at rest."""
    from nbdvde.cli.images import ImageByPath

    return ImageByPath(path, key_file=key_file, control=control)
