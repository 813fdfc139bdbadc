"""Run one command, and turn whatever ends it into one line and an exit code."""

import errno
import io
import re
import sys
from collections.abc import Iterator, Sequence

import typer

from nbdvde.cli import INTERRUPTED, output
from nbdvde.cli.app import app
from nbdvde.errors import ExitCode, ImageError, NbdvdeError, NoSpaceError, UsageError, reason

CLOSED = 141
"""Exit code when nobody reads the output any more, as a shell has it after SIGPIPE."""


def run(arguments: Sequence[str]) -> int:
    """Run the command in `arguments` (without the program's name); answers the exit code."""
    try:
        return _call(arguments)
    except BrokenPipeError:
        output.silence(sys.stdout)
        return CLOSED
    except NbdvdeError as error:
        return output.failure(error, as_json="--json" in arguments)


def _call(arguments: Sequence[str]) -> int:
    """Raises NbdvdeError for everything a person can do something about."""
    try:
        code = typer.main.get_command(app).main(list(arguments), prog_name="nbdvde", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        return code if isinstance(code, int) else ExitCode.DONE
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # typer made the one of the other
            raise ended.__context__ from None
        raise
    except typer.TyperException as error:
        raise _usage(error) from None
    except (KeyboardInterrupt, typer.Abort):
        output.note("interrupted")
        return INTERRUPTED
    except BaseExceptionGroup as group:
        return _meet(next(_leaves(group)), group)
    except Exception as error:  # noqa: BLE001 - the last place that can tell the user
        return _meet(error, error)


def _meet(error: BaseException, whole: BaseException) -> int:
    """Raise what a person understands; what is left is a bug, and told as one."""
    match error:
        case NbdvdeError() | BrokenPipeError():
            raise error
        case _ if _is_interrupt(error):
            output.note("interrupted")
            return INTERRUPTED
        case io.UnsupportedOperation():
            raise ImageError("standard output", "is closed", "send it to /dev/null if nobody wants it") from None
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            raise NoSpaceError(str(error.filename or "host"), "no space left", "free some") from None
        case OSError(filename=str() as path):
            raise ImageError(path, reason(error), "check the path") from None
    raise output.bug(whole) from None


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether it began with Ctrl-C: Python makes another exception of one that comes while a class is made."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    """The exceptions inside, those first that say more than the others: bugs, then our own."""
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    yield from sorted(leaves, key=lambda error: isinstance(error, NbdvdeError))


def _usage(error: typer.TyperException) -> UsageError:
    text = " ".join(error.format_message().replace("Value error, ", "").split()).rstrip(".")
    text = re.sub(r" \(Possible options: (.*)\)$", r", did you mean \1?", text)
    context = getattr(error, "ctx", None)
    hint = f"see {context.command_path} --help" if context else "see nbdvde --help"
    return UsageError(text[:1].lower() + text[1:], hint=hint)
