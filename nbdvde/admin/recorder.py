"""A served image records its own operation: in the metrics log of each of its disks that has one.

A disk that nobody uses is left alone: after the first sample in which nothing was asked for come no more, so that an
idle server neither wakes the host's disks nor fills the log with what is known.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import trio

from nbdvde.engine.gauges import ImageGauges
from nbdvde.engine.image import Image
from nbdvde.engine.managed.metricslog import MetricsLog
from nbdvde.engine.regions.metriclist import number_of
from nbdvde.engine.regions.samples import FORM, Sample
from nbdvde.engine.volume import Volume
from nbdvde.errors import NbdvdeError
from nbdvde.exports import Export
from nbdvde.metrics import COMMANDS, Histogram, Traffic, total
from nbdvde.replication.registry import replica_of
from nbdvde.server import Server

_log = logging.getLogger(__name__)
_COMMAND = {name: number for number, name in enumerate(COMMANDS)}


@dataclass(frozen=True, slots=True)
class _State:
    """What was counted when a disk was looked at."""

    time_s: float
    """Monotonic."""
    traffic: Traffic
    gauges: ImageGauges
    syncs: Histogram
    clients: int


class Recorder:
    """Records what the exports of an image did since it was asked last."""

    def __init__(
        self, image: Image, server: Server, exports: Callable[[], Iterable[Export]], now_ns: Callable[[], int]
    ) -> None:
        """`exports` answers those there are, of any image; `now_ns` the wall clock."""
        self._image, self._server, self._exports, self._now_ns = image, server, exports, now_ns
        self._before: dict[int, _State] = {}
        """By number of the disk."""
        self._quiet: set[int] = set()
        """Numbers of the disks whose last sample says that nothing happens."""
        self._told: str | None = None

    async def run(self, interval_s: float) -> None:
        """Record until it is cancelled. What goes wrong is logged, each failure once."""
        while True:
            try:
                await self.record()
            except (NbdvdeError, OSError) as error:
                if str(error) != self._told and not self._image.closed:
                    self._told = str(error)
                    _log.warning("%s: its metrics are not recorded: %s", self._image.path, error)
            except Exception:  # noqa: BLE001 - a bug met here must not end the server
                _log.exception("%s: its metrics are recorded no more: unexpected failure", self._image.path)
                return
            await trio.sleep(interval_s)

    async def record(self) -> None:
        """Record all disks that have a log; what one did is known from the second time on. Raises NbdvdeError."""
        replica = replica_of(self._image)
        if replica and replica.incomplete:  # logs may be taken over just now
            return
        disks = [disk for disk in list(self._image.volumes.disks) if await self._has_log(disk)]
        before, self._before = self._before, {}
        if not disks:
            return
        gauges = self._image.gauges()
        self._before = {disk.number: self._state(disk, gauges) for disk in disks}
        for disk in disks:
            if disk.number in before:
                await self._record(disk, before[disk.number], self._before[disk.number])

    async def _has_log(self, disk: Volume) -> bool:
        return (await self._image.regions.area(disk)).find(FORM) is not None

    async def _record(self, disk: Volume, before: _State, state: _State) -> None:
        quiet = state.clients == before.clients and not any(state.traffic.since(before.traffic).requests)
        if quiet and disk.number in self._quiet:
            return
        log = await self._image.regions.get(MetricsLog, disk)
        now_ns = self._now_ns()
        await log.append(Sample(number_of(name), now_ns, value) for name, value in values(before, state).items())
        self._quiet = self._quiet | {disk.number} if quiet else self._quiet - {disk.number}

    def _state(self, disk: Volume, gauges: ImageGauges) -> _State:
        replica = replica_of(self._image)
        shown = replica.disk(disk.name) if replica else disk
        exports = [export for export in self._exports() if export.disk is shown]
        syncs = Histogram()
        syncs.merge(self._image.syncs)
        clients = sum(export.clients for export in exports)
        traffic = total(self._server.traffic(exports))
        return _State(trio.current_time(), traffic, gauges, syncs, clients)


def values(before: _State, after: _State) -> dict[str, float]:
    """The values of metrics (regions/metriclist.py), without those that nothing was found out about."""
    seconds = max(after.time_s - before.time_s, 1e-9)
    traffic, old, new = after.traffic.since(before.traffic), before.gauges, after.gauges
    requests = {name: traffic.requests[number] for name, number in _COMMAND.items()}
    lengths = {name: traffic.request_bytes[number] for name, number in _COMMAND.items()}
    rates = {
        "read_requests": requests["read"], "read_bytes": lengths["read"], "write_requests": requests["write"],
        "write_bytes": lengths["write"], "flush_requests": requests["flush"],
        "trim_requests": requests["trim"] + requests["write_zeroes"],
        "trim_bytes": lengths["trim"] + lengths["write_zeroes"], "errors": traffic.errors,
        "cleaned_bytes": new.cleaned_bytes - old.cleaned_bytes,
    }  # fmt: skip
    found = {name: count / seconds for name, count in rates.items()}
    for name in ("read", "write", "flush"):
        latency = traffic.latencies[_COMMAND[name]]
        if latency is not None and latency.count:
            found[f"{name}_latency_p50"] = latency.quantile_ns(0.5) / 1e9
            found[f"{name}_latency_p99"] = latency.quantile_ns(0.99) / 1e9
    syncs = after.syncs.since(before.syncs)
    if syncs.count:
        found["sync_time_p99"] = syncs.quantile_ns(0.99) / 1e9
    hits, misses = new.cache_hits - old.cache_hits, new.cache_misses - old.cache_misses
    if hits + misses:
        found["cache_hits"] = hits / (hits + misses)
    if stored := new.statistics["bytes_stored"]:
        found["compression_ratio"] = new.statistics["bytes_in"] / stored
    gauges = {
        "clients": after.clients, "file_bytes": new.file_bytes, "live_bytes": new.space.live_bytes,
        "garbage_bytes": new.space.garbage_bytes,
    }  # fmt: skip
    return found | gauges
