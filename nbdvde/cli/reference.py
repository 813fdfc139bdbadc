"""docs/reference.md, made from the code: `python -m nbdvde.cli.reference > docs/reference.md`."""

import inspect
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast, get_args, get_origin

import msgspec
from typer.main import get_command
from typer.testing import CliRunner

from nbdvde.admin.openapi import docstrings, document
from nbdvde.cli import INTERRUPTED
from nbdvde.cli.app import app
from nbdvde.cli.output import size
from nbdvde.cli.run import CLOSED
from nbdvde.config import Options
from nbdvde.engine.image import BUFFER_BYTES, CACHE_BYTES
from nbdvde.errors import ExitCode
from nbdvde.limits import Limits
from nbdvde.protocol.handshake import HandshakeLimits

INTRODUCTION = """# Reference

Made from the code by `python -m nbdvde.cli.reference`; do not edit.

**Sizes** are whole numbers with an optional K, M, G, T or P (powers of 1024). Sizes of disks are multiples of 512,
at most 8 EiB - 512.
**Key files** count as their exact bytes: 32 B to 8 KiB, mode 0600 or stricter, owned by the caller or root. Without one
a passphrase is asked for on the terminal.
**Errors** go to standard error as `nbdvde: WHAT: WHY (WHAT TO DO)`; with `--json` also to standard output as
`{"error": {"code", "message", "hint"}}`, where `code` is the exit code.
Commands that name an image work on it at rest, or through its control socket while it is served."""
CONFIGURATION = """## Configuration of the server

`serve --config FILE` reads TOML. Every key is also the environment variable `NBDVDE_TABLE_KEY` (lists separated by
commas). The command line wins over the environment, which wins over the file. Unknown keys are errors."""
CONTROL = """## Control socket

HTTP/1.1 and JSON on a Unix socket of mode 0600, `IMAGE.ctl` beside the image; what reads little and tells of no data
also at the address of `--admin` ([how](how-to/ask-from-programs.md)). [openapi.json](openapi.json) describes bodies and
answers, and is there at `/v1/openapi.json` as well.

One request a connection. The answer is one line of JSON, or of what takes long several: progress as
`{"progress": {"done", "total"}}`, and the result at the end. Closing the connection cancels. A failure is
`{"error": {"code", "message", "hint"}}`, where `code` is an exit code."""


def commands() -> Iterator[str]:
    """Every command as it is typed, all of the program."""
    for name, command in _within(get_command(app)).items():
        actions = _within(command)
        image = "IMAGE " if name == "ctl" else ""
        yield from (f"{name} {image}{action}" for action in actions) if actions else (name,)


def _within(group: Any) -> dict[str, Any]:
    return cast(dict[str, Any], getattr(group, "commands", {}))


def reference() -> str:
    """The whole document."""
    helps = (f"### `nbdvde {command}`\n\n```\n{_help(command)}\n```" for command in commands())
    tables = (_configuration(field) for field in msgspec.structs.fields(Options))
    parts = ["## Commands", *helps, "## Exit codes", _exit_codes(), CONFIGURATION, *tables, CONTROL, _control()]
    return "\n\n".join([INTRODUCTION, *parts]) + "\n"


def _help(command: str) -> str:
    arguments = [*command.split(), "--help"]
    shown = CliRunner().invoke(app, arguments, prog_name="nbdvde", env={"COLUMNS": "80"}, color=False)
    return shown.output.strip()


def _exit_codes() -> str:
    meanings = docstrings(ExitCode)
    rows = [(str(int(code)), meanings[code.name]) for code in ExitCode]
    rows += [(str(INTERRUPTED), "interrupted by Ctrl-C"), (str(CLOSED), "nobody reads the output any more")]
    return _table(("exit", "meaning"), rows)


def _configuration(table: msgspec.structs.FieldInfo) -> str:
    kind, title = table.type, f"[{table.name}]"
    if get_origin(kind) is tuple:
        kind, title = get_args(kind)[0], f"[[{table.name}]]"
    meanings = docstrings(kind)
    rows = [
        (f"`{field.name}`", meanings[field.name], _default(table.name, field)) for field in msgspec.structs.fields(kind)
    ]
    return f"### `{title}`\n\n{inspect.getdoc(kind)}\n\n{_table(('key', 'meaning', 'default'), rows)}"


def _default(table: str, field: msgspec.structs.FieldInfo) -> str:
    """The default as TOML has it; those of limits and engine are kept where they are used."""
    default = field.default
    if table == "limits":
        default = getattr(Limits(), field.name, None) or getattr(HandshakeLimits(), field.name)
    elif table == "engine":
        default = {"cache_size": CACHE_BYTES, "write_buffer_size": BUFFER_BYTES}.get(field.name)
    if field.name.endswith(("_size", "_bytes", "bytes_in_flight")):
        default = size(default)
    match default:
        case None | msgspec.NODEFAULT | math.inf:
            return ""
        case tuple():
            return f"`{list(default)}`".replace("'", '"')
        case str():
            return f'`"{default}"`'
    return f"`{default}`".lower()


def _control() -> str:
    rows = [
        (f"`{method.upper()} {path}`", operation["summary"])
        for path, methods in document()["paths"].items()
        for method, operation in methods.items()
    ]
    return _table(("request", "does"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in line) + " |" for line in lines
    )


if __name__ == "__main__":
    sys.stdout.write(reference())
