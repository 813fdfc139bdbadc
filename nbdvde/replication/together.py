"""Several things at the same time, of which one error is enough to know."""

from collections.abc import Awaitable, Callable, Sequence

import trio

from nbdvde.errors import NbdvdeError


async def together(calls: Sequence[Callable[[], Awaitable[object]]]) -> None:
    """Do all of them, to the end; raise the first error of those that fail. Raises NbdvdeError."""
    if len(calls) == 1:
        await calls[0]()
        return
    failures = list[NbdvdeError]()

    async def run(call: Callable[[], Awaitable[object]]) -> None:
        try:
            await call()
        except NbdvdeError as error:
            failures.append(error)

    async with trio.open_nursery() as nursery:
        for call in calls:
            nursery.start_soon(run, call)
    if failures:
        raise failures[0]
