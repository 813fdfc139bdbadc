"""The commands about the keys of an image."""

from typing import TYPE_CHECKING, Annotated

import typer

from nbdvde.cli import output, reports
from nbdvde.cli.arguments import Control, ImageArgument, Json, KeyFile, NewKeyFile, Slot, image_at

if TYPE_CHECKING:
    from nbdvde.admin.messages import KeyList

key_app = typer.Typer(help="List, add, remove and change the keys of an image.", rich_markup_mode=None)


@key_app.command("list")
def key_list(image: ImageArgument, control: Control = None, json: Json = False) -> None:
    """List the keys of an image. None is needed for that."""
    _show(image_at(image, None, control).keys(), json=json)


@key_app.command("add")
def key_add(
    image: ImageArgument,
    key_file: KeyFile = None,
    new_key_file: NewKeyFile = None,
    slot: Annotated[
        int | None, typer.Option(metavar="N", help="Number of the key slot. [default: the first free one]")
    ] = None,
    label: Annotated[str, typer.Option(metavar="TEXT", help="What the list shows of it, at most 64 bytes.")] = "",
    control: Control = None,
    json: Json = False,
) -> None:
    """Let a further key or passphrase open an image."""
    target = image_at(image, key_file, control)
    _show(target.change_keys("add", new_key_file=new_key_file, slot=slot, label=label), json=json)


@key_app.command("remove")
def key_remove(
    image: ImageArgument, key_file: KeyFile = None, slot: Slot = None, control: Control = None, json: Json = False
) -> None:
    """Make a key useless: that of a slot, or the given one."""
    _show(image_at(image, key_file, control).change_keys("remove", slot=slot), json=json)


@key_app.command("change")
def key_change(
    image: ImageArgument,
    key_file: KeyFile = None,
    new_key_file: NewKeyFile = None,
    slot: Slot = None,
    control: Control = None,
    json: Json = False,
) -> None:
    """Replace a key: that of a slot, or the given one."""
    _show(image_at(image, key_file, control).change_keys("change", new_key_file=new_key_file, slot=slot), json=json)


def _show(keys: "KeyList", *, json: bool) -> None:
    output.json(keys) if json else reports.slots(keys.slots)
