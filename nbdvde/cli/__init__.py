"""The command line: arguments to calls to exit codes. Only this package prints."""

import io
import os
import sys


def main() -> None:
    """Entry point of the `nbdvde` command."""
    from nbdvde.cli.run import run

    # Python leaves them out when they are closed, and then prints one to the other.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - open to the end of the process
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names may not fit the terminal's encoding

    sys.exit(run(sys.argv[1:]))
