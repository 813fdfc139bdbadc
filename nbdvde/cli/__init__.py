"""The command line: arguments to calls to exit codes. Only this package prints."""

import io
import sys


def main() -> None:
    """Entry point of the `nbdvde` command."""
    from nbdvde.cli.run import run

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names may not fit the terminal's encoding

    sys.exit(run(sys.argv[1:]))
