"""How commands print: lines, JSON, tables, errors."""

import os
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from json import dumps
from typing import TextIO

import msgspec

from nbdvde.errors import NbdvdeError


def line(text: str) -> None:
    """One line on standard output. Raises OSError when it cannot be written; nothing more is written then."""
    _print(clean(text))


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError as error:
        silence(sys.stdout)
        error.filename = "standard output"
        raise


def raw(data: bytes) -> None:
    """Bytes on standard output. Raises OSError when they cannot be written."""
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as error:
        silence(sys.stdout)
        error.filename = "standard output"
        raise


def lines(texts: Iterable[str]) -> None:
    """As `line`, many at a time."""
    rest = iter(texts)
    while part := list(islice(rest, 1000)):
        _print("\n".join(map(clean, part)))


def prints(text: str) -> bool:
    """Whether standard output has the characters of a text."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def coloured(text: str) -> None:
    """As `line`, of text that is ours and may have escape sequences of colours."""
    _print(text)


def note(text: str) -> None:
    """One line on standard error, if there is anybody to read it."""
    try:
        print(f"nbdvde: {clean(text)}", file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


@contextmanager
def unless_interrupted(consequence: str) -> Iterator[None]:
    """Tell what follows from it when somebody ends the work inside."""
    try:
        yield
    except (KeyboardInterrupt, BaseExceptionGroup) as error:
        if isinstance(error, KeyboardInterrupt) or error.subgroup(KeyboardInterrupt):
            note(consequence)
        raise


def silence(stream: TextIO) -> None:
    """Throw away what a stream still holds and gets, so that flushing it at exit does not fail once more."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def clean(text: str) -> str:
    """The text with everything replaced that a terminal might obey."""
    return "".join(c if c.isprintable() else "?" for c in text)


def json(value: object) -> None:
    """As `line`, of JSON in ASCII: names of files need not be valid text."""
    _print(dumps(msgspec.to_builtins(value)))


def failure(error: NbdvdeError, *, as_json: bool) -> int:
    """Tell of an error; answers its exit code."""
    note(str(error))
    if as_json:
        with suppress(OSError):
            json({"error": {"code": int(error.exit_code), "message": error.message, "hint": error.hint}})
    return error.exit_code


def bug(error: BaseException) -> NbdvdeError:
    """What tells of an exception nobody expected, with its traceback in a file."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="nbdvde-", suffix=".log", delete=False, errors="backslashreplace"
        ) as file:
            traceback.print_exception(error, file=file)
    except OSError:
        return NbdvdeError("unexpected failure", text, "this is a bug; there was no place for a log")
    return NbdvdeError("unexpected failure", text, f"this is a bug; please report it with {file.name}")


def size(count: int) -> str:
    """Bytes for people, in units of 1024; exact ones look like the sizes that are typed."""
    value, unit = float(count), ""
    for larger in "KMGTP":
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.{0 if value == int(value) else 1}f}{unit}"


def counted(count: int, what: str) -> str:
    """So many of something."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def table(rows: Iterable[Sequence[str]]) -> None:
    """Rows of cells, in columns."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
