"""What a machine keeps: the file of its image, and its log. A crash leaves a part of what was not synced."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace
from typing import cast

from tests.crash.recording import SECTOR, Change, RecordingStorage, Write
from tests.raft.simdisk import Files, SimDirectory, moments

ROOM = 64 << 20
"""Bytes that a disk has, for the image and for the log."""


class Device(RecordingStorage):
    """Holds an image. Fault model: `tests.crash.recording`; but a sync that failed is the last thing that is asked."""

    def __init__(self, base: bytes) -> None:
        super().__init__(base, ROOM)
        self._durable = bytearray(base)

    @property
    def pending(self) -> list[Change]:
        """What a crash may lose."""
        return cast(list[Change], self.events)

    def sync(self) -> None:
        self._enter("sync")
        for change in self.pending:
            change.apply(self._durable)
        self.events.clear()

    def statvfs(self) -> SimpleNamespace:
        """What `os.statvfs` says."""
        return SimpleNamespace(f_bavail=max(0, (self.limit or 0) - len(self.image)), f_frsize=1)

    def left(self, random: Random) -> bytes:
        """What a crash leaves."""
        image = bytearray(self._durable)
        for change in _survivors(self.pending, random):
            change.apply(image)
        return bytes(image)


def _survivors(changes: list[Change], random: Random) -> Iterator[Change]:
    """A first part, or any part; writes may be torn."""
    cut = random.randint(0, len(changes))
    some = random.random() < 0.5
    for at, change in enumerate(changes):
        if random.random() < 0.6 if some else at < cut:
            if isinstance(change, Write) and random.random() < 0.2:
                yield from (piece for piece in change.pieces(SECTOR) if random.random() < 0.5)
            else:
                yield change


@dataclass
class Disks:
    """Both, of a machine that is on."""

    device: Device
    folder: SimDirectory
    faults: dict[str, int] = field(default_factory=dict)
    """By operation: after how many more it fails, and all that follow do."""
    is_off: bool = False

    def __post_init__(self) -> None:
        self.device.fault = lambda operation: self._fault(operation) or None
        self.folder.fault = self._fault

    @classmethod
    def made(cls, image: bytes, files: Files | None = None) -> "Disks":
        """With what is there."""
        return cls(Device(image), SimDirectory(base=files or {}, limit=ROOM))

    @property
    def spare_log_bytes(self) -> int:
        """That the log may still take."""
        return self.folder.limit - sum(map(len, self.folder.files.values()))

    def _fault(self, operation: str) -> int:
        if self.is_off:
            return 5
        for kind in (operation, "any"):
            if kind in self.faults:
                self.faults[kind] -= 1
                if self.faults[kind] < 0:
                    return 5
        return 0

    def cut_off(self, jobs: list[Callable[[], object]], random: Random) -> "Disks":
        """The power goes, in the middle of some jobs; what is there afterwards."""
        for job in jobs:
            if random.random() < 0.5:
                self.faults = {"any": random.randint(0, 6)}
                try:
                    job()
                except Exception:  # the machine is off: nobody hears of it
                    continue
        self.is_off = True
        *_, moment = moments(self.folder.base, self.folder.events)
        share = random.choice((0.0, 0.5, 1.0))
        kept = [at for at in range(len(moment.pending)) if random.random() < share]
        return Disks.made(self.device.left(random), moment.left(kept))
