"""A progress bar for what takes longer than a second."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress

PATIENCE_S = 1.0


class ProgressBar:
    """Call it with (done, total). It shows itself on standard error, if that is a terminal, after a second."""

    def __init__(self, title: str) -> None:
        self._title, self._start_s = title, time.monotonic()
        self._bar: Progress | None = None
        self._shown = sys.stderr.isatty()

    def __enter__(self) -> Self:
        return self

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            if not self._shown or time.monotonic() - self._start_s < PATIENCE_S:
                return
            self._bar = self._open()
        self._bar.update(self._bar.task_ids[0], completed=done, total=total)

    def _open(self) -> "Progress":
        from rich.console import Console
        from rich.progress import Progress

        bar = Progress(console=Console(stderr=True), transient=True)
        bar.add_task(self._title, total=None)
        bar.start()
        return bar

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
