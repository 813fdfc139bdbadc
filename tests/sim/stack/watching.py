"""Counts what the groups of an image do to each other: each thing once, however many machines do it."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import trio

from nbdvde.admin import replicated
from nbdvde.engine.image import Image
from nbdvde.engine.regions.directory import FORM as DIRECTORY
from nbdvde.errors import RefusedError
from nbdvde.replication.assembly import Assembly
from nbdvde.replication.machine import ImageMachine
from nbdvde.replication.operations import Arrange, Call, GiveUp, Operation
from nbdvde.replication.questions import Rest
from nbdvde.replication.regioncopy import RegionGiver
from nbdvde.replication.replica import Replica
from nbdvde.replication.routing import Routing


class Watch:
    """Of a run."""

    def __init__(self, counts: Counter[str]) -> None:
        self._counts = counts
        self._seen: set[tuple[str, object]] = set()
        self.held = trio.Event()
        """Set when a hold begins."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count within."""
        with ExitStack() as stack:
            for owner, name, around in (
                (Assembly, "begin", self._begin),
                (Assembly, "arrange", self._arrange),
                (Assembly, "retire", self._retire),
                (Assembly, "_break_off", self._break_off),
                (ImageMachine, "do", self._do),
                (Replica, "_moved", self._moved),
                (Routing, "along", self._along),
                (RegionGiver, "rest", self._rest),
                (replicated, "_change_region", self._change_region),
            ):
                stack.enter_context(mock.patch.object(owner, name, _wrapped(getattr(owner, name), around)))
            yield

    def _once(self, what: str, key: object) -> None:
        if (what, key) not in self._seen:
            self._seen.add((what, key))
            self._counts[what] += 1

    def _begin(self, original: Callable[..., int], assembly: Assembly, hold: int) -> int:
        begun = original(assembly, hold)
        if begun:
            self._once("holds", hold)
            self.held.set()
            self.held = trio.Event()
        else:
            self._once("holds refused while there is one", hold)
        return begun

    def _arrange(self, original: Callable[..., None], assembly: Assembly, *args: Any) -> None:
        before = {*assembly.routing.groups}
        original(assembly, *args)
        after = {*assembly.routing.groups}
        for name in after - before:
            self._once("groups added", name)
        for name in before - after:
            self._once("groups removed", name)

    def _retire(self, original: Callable[..., None], assembly: Assembly, names: Sequence[str]) -> None:
        for name in {*names} & {*assembly.idle}:
            self._once("groups ended", name)
        original(assembly, names)

    async def _break_off(self, original: Callable[..., Any], assembly: Assembly) -> None:
        if len(assembly.machines) > 1:
            self._counts["states of several groups taken over"] += 1
        if assembly.holding:
            self._counts["states taken over by who knows of a hold"] += 1
        volumes = assembly.image.volumes
        if any(volumes.existing_region(DIRECTORY, disk.number) is not None for disk in volumes.disks):
            self._counts["states with regions taken over"] += 1
        await original(assembly)

    async def _do(
        self, original: Callable[..., Any], machine: ImageMachine, index: int, operation: Operation
    ) -> object:
        match operation:
            case Call(hold=hold) | Arrange(hold=hold) if hold:
                what = operation.path if isinstance(operation, Call) else "other groups"
                done = hold == machine._assembly.holding
                self._once(f"{what} under a hold" if done else "too late for their hold", hold)
            case GiveUp(hold=hold) if hold == machine._assembly.holding:
                self._once("holds given up", hold)
        return await original(machine, index, operation)

    async def _moved(self, original: Callable[..., Any], replica: Replica, version: int) -> None:
        self._counts["sent again by another table"] += 1
        await original(replica, version)

    def _along(self, original: Callable[..., Sequence[str]], routing: Routing, *where: Any) -> Sequence[str]:
        groups = original(routing, *where)
        self._counts["requests along several groups"] += len(groups) > 1
        return groups

    async def _rest(self, original: Callable[..., Any], giver: RegionGiver, number: int) -> Rest:
        rest: Rest = await original(giver, number)
        self._counts["regions changed while they were copied"] += bool(rest.chunks or rest.again)
        return rest

    async def _change_region(self, original: Callable[..., Any], image: Image, index: int, call: Call) -> object:
        try:
            return await original(image, index, call)
        except RefusedError as error:
            self._counts["changes of regions met again"] += "before a failure" in error.why
            raise


def _wrapped(original: Callable[..., Any], around: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: around(original, *args, **kwargs)
