"""The management regions of an open image: each is loaded once, by whoever asks first."""

from collections.abc import Awaitable, Callable, Container
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar, Protocol, Self, TypeVar, cast, runtime_checkable

import trio

from nbdvde.engine.managed.area import Area
from nbdvde.engine.managed.subjects import Subjects
from nbdvde.engine.regions.form import Form
from nbdvde.engine.volume import Volume
from nbdvde.engine.volumes import Volumes
from nbdvde.errors import NbdvdeError


class Region(Protocol):
    """A region of a disk, with everything that can be done with it."""

    FORM: ClassVar[Form]

    @classmethod
    async def load(cls, area: Area) -> Self:
        """That of the disk, which has one. Raises DamageError."""


R = TypeVar("R", bound=Region)


@runtime_checkable
class Tended(Protocol):
    """A region that has something to note every minute, and when the image is closed."""

    async def tend(self) -> None:
        """Do it. Raises NoSpaceError, PoisonedError."""


@runtime_checkable
class Awaited(Protocol):
    """A region that others wait for."""

    def end(self) -> None:
        """It was deleted, or its disk was: nobody waits any longer."""


class Regions:
    """The regions of all disks."""

    def __init__(self, volumes: Volumes, enable: Callable[[], Awaitable[None]], subjects: Subjects) -> None:
        """`enable` says in the image that there may be regions."""
        self._volumes, self._enable, self._subjects = volumes, enable, subjects
        self.alone = True
        """Whether they note things by themselves, not when all nodes of a cluster do."""
        self._loading = trio.Lock()
        self._any_tended = trio.Event()
        self._areas: dict[int, Area] = {}
        """By number of the disk."""
        self._loaded: dict[tuple[int, int], Any] = {}
        """By number of the disk and type."""

    async def area(self, disk: Volume) -> Area:
        """What the regions of a disk lie in. Raises DamageError."""
        async with self._loading:
            return await self._area(disk)

    async def get(self, kind: type[R], disk: Volume) -> R:
        """A region of a disk, always the same object. Raises UsageError when it has none, DamageError."""
        async with self._loading:
            area = await self._area(disk)
            area.get(kind.FORM)
            key = disk.number, kind.FORM.tag
            if key not in self._loaded:
                self._loaded[key] = region = await kind.load(area)
                if isinstance(region, Tended):
                    self._any_tended.set()
            return cast(R, self._loaded[key])

    async def tend(self) -> None:
        """Let all regions note what they have to. Raises the first NbdvdeError, when all others have."""
        failures = []
        for region in list(self._loaded.values()) if self.alone else ():
            if isinstance(region, Tended):
                try:
                    await region.tend()
                except NbdvdeError as error:
                    failures.append(error)
        if failures:
            raise failures[0]

    async def keep_tending(self, period_s: float) -> None:
        """Do that again and again, as soon as there is one that asks for it; what fails is tried again later."""
        await self._any_tended.wait()
        while True:
            await trio.sleep(period_s)
            with suppress(NbdvdeError):  # whoever writes is told
                await self.tend()

    def loaded(self, kind: type[R], disk: int) -> R | None:
        """A region of the disk with this number, if it was loaded already."""
        return cast(R | None, self._loaded.get((disk, kind.FORM.tag)))

    def forget(self, kind: type[Region], disk: Volume) -> None:
        """The region of a disk was given up."""
        self._forget(disk.number, kind.FORM)

    async def forget_deleted(self) -> None:
        """End the regions of disks that are no more, and destroy the keys of their subjects; durable.

        Raises PoisonedError, DamageError.
        """
        left = {disk.number for disk in self._volumes.disks}
        self._areas = {disk: area for disk, area in self._areas.items() if disk in left}
        for disk, tag in list(self._loaded):
            if disk not in left:
                region = self._loaded.pop((disk, tag))
                if isinstance(region, Awaited):
                    region.end()
        with trio.CancelScope(shield=True):
            await self._subjects.forget_disks()

    async def reload(self, disk: Volume, kept: Container[int]) -> None:
        """The regions of a disk, but for those of some types, were replaced by others. Raises DamageError."""
        async with self._loading:
            for number, tag in list(self._loaded):
                if number == disk.number and tag not in kept:
                    region = self._loaded.pop((number, tag))
                    if isinstance(region, Awaited):
                        region.end()
            if disk.number in self._areas:
                await self._areas[disk.number].load()

    def _forget(self, disk: int, form: Form) -> None:
        self._loaded.pop((disk, form.tag), None)

    async def _area(self, disk: Volume) -> Area:
        if disk.number not in self._areas:
            area = Area(self._volumes, disk, self._enable, self._subjects, partial(self._forget, disk.number))
            await area.load()
            self._areas[disk.number] = area
        return self._areas[disk.number]
