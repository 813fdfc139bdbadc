"""The command line: arguments to calls to exit codes. Only this package prints."""

import io
import os
import sys

INTERRUPTED = 130
"""Exit code after Ctrl-C, as a shell has it."""


def main() -> None:
    """Entry point of the `nbdvde` command."""
    try:
        _listen_to_signals()
        _collect_less()
        from nbdvde.cli.run import run

        _open_streams()
        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:  # before there is anything that could be undone
        os.write(2, b"nbdvde: interrupted\n")
        sys.exit(INTERRUPTED)


def _collect_less() -> None:
    """Look for garbage in cycles less often.

    A server's collector went through the views of buffered blocks again and again: 7 % of the event loop's time
    (1 MiB writes, perf). While modules are imported it finds nothing, and takes a sixth of that time.
    """
    import gc

    gc.set_threshold(50_000, 20, 50)


def _listen_to_signals() -> None:
    """Have what ends a command end it as Ctrl-C does, so that no half file is left behind."""
    import signal  # here, where Ctrl-C is met already

    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background: nothing may hang on it
        return
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores one
            signal.signal(number, lambda _number, _frame: signal.raise_signal(signal.SIGINT))


def _open_streams() -> None:
    """Python leaves out what is closed, and prints one to the other. Of results nothing may be lost unnoticed."""
    sys.stdout = sys.stdout or open(os.devnull)  # noqa: SIM115 - open to the end of the process, and not for writing
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names may not fit the terminal's encoding
