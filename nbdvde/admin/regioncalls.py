"""Which management regions the disks of an image have, and their states."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import msgspec

from nbdvde.admin import streamcalls, wormcalls
from nbdvde.admin.calls import Call, OfImage
from nbdvde.admin.streamcalls import StreamInfo
from nbdvde.admin.wormcalls import WormInfo
from nbdvde.disk import BLOCK
from nbdvde.engine.image import Image
from nbdvde.engine.managed.anon import AnonTable
from nbdvde.engine.managed.area import Area
from nbdvde.engine.managed.metricslog import MetricsLog
from nbdvde.engine.managed.regions import Region
from nbdvde.engine.managed.stream import Stream
from nbdvde.engine.managed.vault import Vault
from nbdvde.engine.managed.worm import Worm
from nbdvde.engine.regions.directory import FORM as DIRECTORY
from nbdvde.engine.regions.directory import Slot
from nbdvde.errors import DamageError, RefusedError, UsageError
from nbdvde.moment import now_ns

_LOADED_MAX = 32 << 20
"""Bytes of header and records: of more the state is told only if somebody uses it, so that who asks loads little."""


class VaultState(msgspec.Struct, frozen=True):
    """Passports of a compliance vault, by state."""

    passports: int
    valid: int
    expired: int
    not_yet_valid: int
    revoked: int


class AnonState(msgspec.Struct, frozen=True):
    """An anonymisation table."""

    mappings: int
    subjects: int
    """Erased ones included."""
    erased: int
    """Subjects whose key was destroyed."""


class MetricsState(msgspec.Struct, frozen=True):
    """A metrics log. Bytes; nanoseconds since 1970-01-01 UTC."""

    used: int
    capacity: int
    samples: int
    first_ns: int | None
    """None as long as there is no sample."""
    last_ns: int | None


class RegionInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A region. Bytes. Of the states it has that of its type."""

    disk: str
    type: str
    """Four characters."""
    size: int
    """That it may use."""
    metadata: int
    """Of header and records."""
    stream: StreamInfo | None = None
    worm: WormInfo | None = None
    vault: VaultState | None = None
    anonymisation: AnonState | None = None
    metrics: MetricsState | None = None
    problem: str = ""
    """What is wrong with it."""


class RegionList(msgspec.Struct, frozen=True):
    """All regions."""

    regions: list[RegionInfo]


async def list_regions(image: Image, _: OfImage) -> RegionList:
    """The management regions of each disk, with their states."""
    found = []
    for disk in list(image.volumes.disks):
        try:
            area = await image.regions.area(disk)
        except DamageError as damage:
            name = DIRECTORY.name
            found.append(RegionInfo(disk=disk.name, type=name, size=BLOCK, metadata=BLOCK, problem=damage.message))
            continue
        for slot in area.directory:
            with suppress(UsageError, RefusedError):  # it was deleted meanwhile
                facts = await _facts(image, area, slot)
                size, metadata = slot.blocks * BLOCK, slot.used * BLOCK
                found.append(RegionInfo(disk=disk.name, type=slot.name, size=size, metadata=metadata, **facts))
    return RegionList(found)


async def _facts(image: Image, area: Area, slot: Slot) -> dict[str, Any]:
    """The state of a region, as far as it is told."""
    if slot.type not in _STATES:
        return {}
    kind, name, state = _STATES[slot.type]
    if slot.used * BLOCK > _LOADED_MAX and not image.regions.loaded(kind, area.disk.number):
        return {}
    try:
        return {name: await state(await image.regions.get(kind, area.disk))}
    except DamageError as damage:
        return {"problem": damage.message}


async def _stream(stream: Stream) -> StreamInfo:
    return streamcalls.described(stream)


async def _worm(worm: Worm) -> WormInfo:
    return wormcalls.described(worm)


async def _vault(vault: Vault) -> VaultState:
    states = await vault.states(now_ns())
    count = (states[name] for name in ("valid", "expired", "not yet valid", "revoked"))
    return VaultState(states.total(), *count)


async def _anonymisation(table: AnonTable) -> AnonState:
    return AnonState(*table.counted, len(table.proofs))


async def _metrics(log: MetricsLog) -> MetricsState:
    history, series = log.history, (await log.series()).values()
    first = min((extent.first_ns for extent in series), default=None)
    last = max((extent.last_ns for extent in series), default=None)
    return MetricsState(history.used_bytes, history.capacity, history.samples, first, last)


_STATES: dict[int, tuple[type[Region], str, Callable[[Any], Awaitable[object]]]] = {
    Stream.FORM.tag: (Stream, "stream", _stream),
    Worm.FORM.tag: (Worm, "worm", _worm),
    Vault.FORM.tag: (Vault, "vault", _vault),
    AnonTable.FORM.tag: (AnonTable, "anonymisation", _anonymisation),
    MetricsLog.FORM.tag: (MetricsLog, "metrics", _metrics),
}
"""By type: what it is, where its state goes, how that is told. Of what a newer version has made nothing is known."""

REGIONS = Call("regions", OfImage, RegionList, list_regions, changes=False, here=True)
