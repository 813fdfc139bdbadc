"""The command line: arguments to calls to exit codes. Only this package prints."""

import sys


def main() -> None:
    """Entry point of the `nbdvde` command."""
    from nbdvde.cli.run import run

    sys.exit(run(sys.argv[1:]))
