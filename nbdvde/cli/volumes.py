"""The commands about disks and snapshots in an image."""

from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from nbdvde.cli import output, reports
from nbdvde.cli.arguments import Control, ImageArgument, Json, KeyFile, image_at

if TYPE_CHECKING:
    from nbdvde.admin.volumechange import Action
    from nbdvde.cli.images import ImageByPath

disk_app = typer.Typer(help="Make, list, resize and delete the disks of an image.", rich_markup_mode=None)
snapshot_app = typer.Typer(help="Take, list, delete and go back to snapshots.", rich_markup_mode=None)

NewDisk = Annotated[str, typer.Argument(metavar="NAME", help="Name of the new disk.", show_default=False)]
Disk = Annotated[str, typer.Argument(metavar="DISK", help="Name of the disk.", show_default=False)]
Snapshot = Annotated[
    str, typer.Argument(metavar="DISK@NAME", help="The disk, and the snapshot's own name.", show_default=False)
]
Size = Annotated[str, typer.Argument(metavar="SIZE", help="Its size, like 10G.", show_default=False)]
DedupWith = Annotated[
    str | None,
    typer.Option(
        "--dedup-with",
        metavar="DISK",
        help="Store what it has in common with this disk once. Each can find out what the other holds. "
        "[default: no disk]",
    ),
]
First = Annotated[str | None, typer.Option("--disk", metavar="NAME", help="The disk. [default: the first one]")]
Discard = Annotated[bool, typer.Option("--discard", help="Cut off data that lies beyond the new size.")]
Force = Annotated[bool, typer.Option("--force", help="Even while clients use it: disconnect them.")]


@disk_app.command("create")
def disk_create(
    image: ImageArgument, name: NewDisk, size: Size, dedup_with: DedupWith = None, key_file: KeyFile = None,
    control: Control = None, json: Json = False,
) -> None:  # fmt: skip
    """Make a further disk, empty."""
    from nbdvde.config import parse_disk_size

    options = {"size": parse_disk_size(size), "dedup_with": dedup_with}
    _change(image_at(image, key_file, control), "disks/create", name, json=json, **options)


@disk_app.command("list")
def disk_list(image: ImageArgument, key_file: KeyFile = None, control: Control = None, json: Json = False) -> None:
    """List the disks of an image."""
    found = image_at(image, key_file, control).whole_info()
    output.json({"disks": found.disks}) if json else reports.disks(found)


@disk_app.command("resize")
def disk_resize(
    image: ImageArgument, disk: Disk, size: Size, discard: Discard = False, force: Force = False,
    key_file: KeyFile = None, control: Control = None, json: Json = False,
) -> None:  # fmt: skip
    """Make a disk longer or shorter. Clients that connect afterwards see the new size."""
    _resize(image_at(image, key_file, control), disk, size, discard=discard, force=force, json=json)


@disk_app.command("delete")
def disk_delete(
    image: ImageArgument, disk: Disk, force: Force = False, key_file: KeyFile = None, control: Control = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Delete a disk, which may have no snapshots any more."""
    _change(image_at(image, key_file, control), "disks/delete", disk, json=json, force=force)


@snapshot_app.command("create")
def snapshot_create(
    image: ImageArgument, snapshot: Snapshot, key_file: KeyFile = None, control: Control = None, json: Json = False
) -> None:
    """Keep what a disk holds now, to read it, clone it or go back to it."""
    _change(image_at(image, key_file, control), "snapshots/create", snapshot, json=json)


@snapshot_app.command("list")
def snapshot_list(
    image: ImageArgument,
    disk: Annotated[
        str | None, typer.Argument(metavar="DISK", help="Of one disk alone. [default: all]", show_default=False)
    ] = None,
    key_file: KeyFile = None, control: Control = None, json: Json = False,
) -> None:  # fmt: skip
    """List the snapshots, oldest first."""
    from nbdvde.errors import UsageError

    disks = image_at(image, key_file, control).whole_info().disks
    if disk is not None and disk not in (found.name for found in disks):
        raise UsageError(f"disk {disk}", "does not exist in this image", "see nbdvde disk list")
    found = [(of.name, snapshot) for of in disks if disk in (None, of.name) for snapshot in of.snapshots]
    if json:
        output.json({"snapshots": [{"disk": name, **msgspec.structs.asdict(snapshot)} for name, snapshot in found]})
    else:
        reports.snapshots((f"{name}@{snapshot.name}", snapshot) for name, snapshot in found)


@snapshot_app.command("delete")
def snapshot_delete(
    image: ImageArgument, snapshot: Snapshot, force: Force = False, key_file: KeyFile = None, control: Control = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Delete a snapshot. The disk, and other snapshots, keep all they hold."""
    _change(image_at(image, key_file, control), "snapshots/delete", snapshot, json=json, force=force)


@snapshot_app.command("rollback")
def snapshot_rollback(
    image: ImageArgument, snapshot: Snapshot, force: Force = False, key_file: KeyFile = None, control: Control = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Make a disk what it was when the snapshot was taken. What it holds now is lost."""
    _change(image_at(image, key_file, control), "snapshots/rollback", snapshot, json=json, force=force)


@snapshot_app.command("diff")
def snapshot_diff(
    image: ImageArgument, snapshot: Snapshot,
    until: Annotated[
        str | None,
        typer.Argument(metavar="UNTIL", help="Another snapshot of the disk. [default: the disk]", show_default=False),
    ] = None,
    key_file: KeyFile = None, control: Control = None, json: Json = False,
) -> None:  # fmt: skip
    """List what is different on a disk since a snapshot was taken: offset and length in bytes.

    What the snapshot has beyond the end of the disk is said to be cut off.
    """
    from nbdvde.admin.messages import DiffRequest

    cut: list[tuple[int, int]] = []
    found = image_at(image, key_file, control).diff(DiffRequest(snapshot, until), cut.append)
    if json:
        changes, beyond = ([{"offset": at, "length": length} for at, length in part] for part in (found, cut))
        output.json({"changes": changes, "cut": beyond[0]} if beyond else {"changes": changes})
    else:
        reports.ranges(found)
        reports.ranges(cut, " cut off")


def clone(
    image: ImageArgument,
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A snapshot, DISK@NAME, or a disk.", show_default=False)
    ],
    name: NewDisk, key_file: KeyFile = None, control: Control = None, json: Json = False,
) -> None:  # fmt: skip
    """Make a disk that begins as a snapshot or another disk is now, at once. Both share what neither changes."""
    _change(image_at(image, key_file, control), "disks/clone", name, json=json, source=source)


def resize(
    image: ImageArgument, size: Size, disk: First = None, discard: Discard = False, force: Force = False,
    key_file: KeyFile = None, control: Control = None, json: Json = False,
) -> None:  # fmt: skip
    """As `disk resize`, of the first disk unless another is named."""
    target = image_at(image, key_file, control)
    _resize(target, disk or target.info().disks[0].name, size, discard=discard, force=force, json=json)


def _resize(image: "ImageByPath", disk: str, size: str, *, discard: bool, force: bool, json: bool) -> None:
    from nbdvde.config import parse_disk_size

    _change(image, "disks/resize", disk, json=json, size=parse_disk_size(size), discard=discard, force=force)


def _change(image: "ImageByPath", action: "Action", name: str, *, json: bool, **options: Any) -> None:
    from nbdvde.admin.messages import VolumeRequest

    done = image.change_volume(action, VolumeRequest(name, **options))
    if json:
        output.json(done)
