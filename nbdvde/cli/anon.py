"""The commands about the anonymisation table. Values come from standard input or a file, never as an argument."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer

from nbdvde.cli import output, regionreports
from nbdvde.cli.arguments import Control, ImageArgument, Json, KeyFile, image_at
from nbdvde.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from nbdvde.admin.anoncalls import ErasureInfo, MappingInfo

anon_app = typer.Typer(help="Map personal data to tokens, and erase subjects for good.", rich_markup_mode=None)

TableDisk = Annotated[
    str | None, typer.Option("--disk", metavar="NAME", help="The disk whose table it is. [default: the first disk]")
]
SUBJECT_HELP = "Whose data it is: a UUID, or a text that stands for one."
Subject = Annotated[str, typer.Option(metavar="ID", help=SUBJECT_HELP, show_default=False)]
MaybeSubject = Annotated[str | None, typer.Option(metavar="ID", help=SUBJECT_HELP)]
ValueFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", readable=False, help="File that holds the value. [default: standard input]"),
]
_VALUE_MAX = 4096


@anon_app.command("create")
def create(
    image: ImageArgument, disk: TableDisk = None,
    capacity: Annotated[str, typer.Option(metavar="SIZE", help="Most bytes that it may have, 4K to 4G.")] = "64M",
    key_file: KeyFile = None, control: Control = None, json: Json = False,
) -> None:  # fmt: skip
    """Give a disk an empty anonymisation table."""
    from nbdvde.admin.anoncalls import CREATE, CreateTable
    from nbdvde.config import parse_size

    made = image_at(image, key_file, control).call(CREATE, CreateTable(disk, parse_size(capacity)))
    if json:
        output.json(made)


@anon_app.command("map")
def map_(
    image: ImageArgument, subject: Subject,
    type_: Annotated[
        str,
        typer.Option(
            "--type", metavar="NAME", help="name, email, phone, ssn, address, birth-date, ip or custom.",
            show_default=False,
        ),
    ],
    value_file: ValueFile = None, disk: TableDisk = None,
    key_file: KeyFile = None, control: Control = None, json: Json = False,
) -> None:  # fmt: skip
    """Print the token of a value, a new one unless the subject has one for it."""
    from nbdvde.admin.anoncalls import MAP, MapValue, type_code

    type_code(type_)
    made = image_at(image, key_file, control).call(MAP, MapValue(subject, type_, _value(value_file), disk))
    output.json(made) if json else output.line(made.token)


@anon_app.command("lookup")
def lookup(
    image: ImageArgument,
    mapping: Annotated[str | None, typer.Option(metavar="ID", help="Look up a mapping by its id.")] = None,
    token: Annotated[str | None, typer.Option(metavar="TOKEN", help="Look up the mapping of a token.")] = None,
    subject: Annotated[
        str | None, typer.Option(metavar="ID", help="Look up a value of this subject, from standard input.")
    ] = None,
    value_file: ValueFile = None, disk: TableDisk = None,
    key_file: KeyFile = None, control: Control = None, json: Json = False,
) -> None:  # fmt: skip
    """Look up mappings by id, by token, or by subject and value. The value of a token cannot be had back."""
    from nbdvde.admin.anoncalls import LOOK_UP, LookUp

    if [mapping, token, subject].count(None) != 2:
        raise UsageError("lookup", "takes one of --mapping, --token and --subject", "give one of the three")
    value = None if subject is None else _value(value_file)
    request = LookUp(None if mapping is None else _uuid(mapping), token, subject, value, disk)
    found = image_at(image, key_file, control).call(LOOK_UP, request)
    output.json(found) if json else regionreports.mappings(found.mappings)


@anon_app.command("list")
def list_(
    image: ImageArgument, subject: MaybeSubject = None, disk: TableDisk = None,
    key_file: KeyFile = None, control: Control = None, json: Json = False,
) -> None:  # fmt: skip
    """List mappings, oldest first: all, or those of a subject."""
    from nbdvde.admin.anoncalls import LIST, ListMappings

    found: list[MappingInfo] = []
    image_at(image, key_file, control).feed(LIST, ListMappings(subject, disk), found.append)
    output.json({"mappings": found}) if json else regionreports.mappings(found)


@anon_app.command("erase")
def erase(
    image: ImageArgument, subject: Subject,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    disk: TableDisk = None, key_file: KeyFile = None, control: Control = None, json: Json = False,
) -> int:  # fmt: skip
    """Destroy the key of a subject, for good: no value can be found in its mappings again. Prints the proof."""
    from nbdvde.admin.anoncalls import ERASE, OfSubject

    if not yes:
        if sys.stdin is None or not sys.stdin.isatty():
            raise UsageError("erase", "there is no terminal to ask on", "add --yes")
        typer.confirm(f"Erase {subject} for good?", abort=True, err=True)
    return _told(image_at(image, key_file, control).call(ERASE, OfSubject(subject, disk)), json=json)


@anon_app.command("proof")
def proof(
    image: ImageArgument, subject: Subject, disk: TableDisk = None,
    key_file: KeyFile = None, control: Control = None, json: Json = False,
) -> int:  # fmt: skip
    """Show and verify the proof that a subject was erased; exit code 6 when it does not hold."""
    from nbdvde.admin.anoncalls import PROVE, OfSubject

    return _told(image_at(image, key_file, control).call(PROVE, OfSubject(subject, disk)), json=json)


def _told(found: "ErasureInfo", *, json: bool) -> int:
    output.json(found) if json else regionreports.erasure(found)
    return ExitCode.DONE if found.holds else ExitCode.DAMAGE


def _value(file: Path | None) -> bytes:
    """The bytes of a file or of standard input, without the end of the line."""
    from nbdvde.cli.files import opened

    data = b""
    with opened(file or Path("-")) as read:
        while part := read(_VALUE_MAX + 2 - len(data)):
            data += part
    return data.removesuffix(b"\n")


def _uuid(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise UsageError(f"mapping {text!r}", "is not a UUID", "nbdvde anon list shows them") from None
