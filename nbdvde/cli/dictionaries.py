"""The commands about compression dictionaries."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from nbdvde.cli import output, reports
from nbdvde.cli.arguments import Control, DiskName, ImageArgument, Json, KeyFile, image_at

if TYPE_CHECKING:
    from nbdvde.admin.dictionarychange import Action
    from nbdvde.cli.images import ImageByPath

dict_app = typer.Typer(help="Train, list, replace and remove compression dictionaries.", rich_markup_mode=None)

Id = Annotated[int, typer.Argument(metavar="ID", help="Number of the dictionary, 0 to 255.", show_default=False)]
Size = Annotated[str, typer.Option(metavar="SIZE", help="Size of a dictionary, 1K to 256K.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only tell what would be gained.")]


@dict_app.command("train")
def train(
    image: ImageArgument, disk: DiskName = None, size: Size = "64K",
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class", metavar="NAME",
            help="text, log, json, mail, database, code or binary; repeatable. [default: all]",
        ),
    ] = None,
    dry_run: DryRun = False, key_file: KeyFile = None, control: Control = None, json: Json = False,
) -> None:  # fmt: skip
    """Train a dictionary for each class of data on a disk, and keep those that save 5 % of small writes or more."""
    _change(
        image_at(image, key_file, control), "train", json=json, disk=disk, size=_bytes(size), classes=classes or [],
        dry_run=dry_run,
    )  # fmt: skip


@dict_app.command("list")
def list_(image: ImageArgument, key_file: KeyFile = None, control: Control = None, json: Json = False) -> None:
    """List the dictionaries of an image."""
    found = image_at(image, key_file, control).dictionaries()
    output.json(found) if json else reports.dictionaries(found.dictionaries)


@dict_app.command("replace")
def replace(
    image: ImageArgument, id_: Id, disk: DiskName = None, size: Size = "64K", dry_run: DryRun = False,
    key_file: KeyFile = None, control: Control = None, json: Json = False,
) -> None:  # fmt: skip
    """Train a dictionary anew from the data that it does best with. The old one stays as long as data needs it."""
    target = image_at(image, key_file, control)
    _change(target, "replace", json=json, id=id_, disk=disk, size=_bytes(size), dry_run=dry_run)


@dict_app.command("remove")
def remove(
    image: ImageArgument, id_: Id, key_file: KeyFile = None, control: Control = None, json: Json = False
) -> None:
    """Remove a dictionary that no data needs."""
    _change(image_at(image, key_file, control), "remove", json=json, id=id_)


def _bytes(size: str) -> int:
    from nbdvde.config import parse_size

    return parse_size(size)


def _change(image: "ImageByPath", action: "Action", *, json: bool, **options: Any) -> None:
    from nbdvde.admin.messages import DictionaryRequest

    done = image.change_dictionaries(action, DictionaryRequest(**options))
    if json:
        output.json(done)
    elif action != "remove":
        reports.trained(done.classes)
