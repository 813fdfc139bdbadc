"""Work that no request waits for, as system tasks of trio: an open image needs no nursery around it."""

from collections.abc import Awaitable, Callable

import trio


class Background:
    """Runs jobs on their own, and waits for them at the end. An exception of one is told to `failed`."""

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self._failed = failed
        self._running = 0
        self._idle = trio.Event()

    def __bool__(self) -> bool:
        """Whether any job runs."""
        return bool(self._running)

    def start(self, job: Callable[[], Awaitable[None]]) -> None:
        """Begin a job."""
        self._running += 1
        trio.lowlevel.spawn_system_task(self._run, job)

    async def _run(self, job: Callable[[], Awaitable[None]]) -> None:
        try:
            with trio.CancelScope(shield=True):
                await job()
        except Exception as error:  # noqa: BLE001 - in a system task it would end the process
            self._failed(error)
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def finish(self) -> None:
        """Wait until no job runs."""
        while self._running:
            self._idle = trio.Event()
            await self._idle.wait()
