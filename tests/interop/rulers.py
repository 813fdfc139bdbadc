"""Somebody who has snapshots taken, disks rolled back and groups changed, while clients work and everything fails."""

import random
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from threading import Event

from nbdvde.admin.calls import Nothing
from nbdvde.admin.client import ControlClient
from nbdvde.admin.clustercalls import GROUPS, STATUS, GroupsRequest
from nbdvde.admin.messages import VolumeRequest
from nbdvde.errors import NbdvdeError
from tests.interop.cluster import WAIT_S
from tests.interop.faults import Machines
from tests.interop.history import Rollback, Snapshot

_GROUPS_MAX = 4
"""Besides `default`."""


class Ruler:
    """Asks one node or another, for one thing after the other, of which nobody may know the end."""

    def __init__(self, disks: Sequence[str], chance: random.Random, pause_s: float) -> None:
        """Takes a pause of up to `pause_s`."""
        self._disks, self._chance, self._pause_s = disks, chance, pause_s
        self.snapshots: list[Snapshot] = []
        self.rollbacks: list[Rollback] = []
        self.done: Counter[str] = Counter()
        """What was acknowledged."""
        self._ended = Event()
        self._pool = ThreadPoolExecutor(1)
        self._machines: Machines
        self._work: Future[None]

    def start(self, machines: Machines) -> None:
        """Begin to ask."""
        self._machines = machines
        self._work = self._pool.submit(self._run)

    def expect_running(self) -> None:
        """Raise what it met."""
        if self._work.done():
            self._work.result()

    def end(self) -> None:
        """Come to the end of what was asked for. Raises TimeoutError when there is none, though nothing fails."""
        self._ended.set()
        self._work.result(WAIT_S)

    def close(self) -> None:
        """End; whom it asks has ended."""
        self._ended.set()
        self._pool.shutdown()

    def _run(self) -> None:
        kinds = {
            "snapshot": (6, self._take), "deletion": (3, self._delete), "rollback": (1, self._roll_back),
            "groups": (2, self._arrange),
        }  # fmt: skip
        while not self._ended.wait(self._chance.uniform(0, self._pause_s)):
            (kind,) = self._chance.choices([*kinds], [share for share, _ in kinds.values()])
            with suppress(NbdvdeError):
                self.done[kind] += kinds[kind][1](self._chance.choice(self._machines.members).control)

    def _take(self, control: ControlClient) -> bool:
        label = f"{self._chance.choice(self._disks)}@s{len(self.snapshots)}"
        snapshot = Snapshot(label, time.monotonic_ns())
        self.snapshots.append(snapshot)
        control.change_volume("snapshots/create", VolumeRequest(label))
        snapshot.end_ns, snapshot.sure = time.monotonic_ns(), True
        return True

    def _delete(self, control: ControlClient) -> bool:
        there = [made for made in self.snapshots if made.sure and not (made.doomed or made.kept)]
        if not there:
            return False
        gone = self._chance.choice(there)
        gone.doomed = True
        control.change_volume("snapshots/delete", VolumeRequest(gone.label))
        return True

    def _roll_back(self, control: ControlClient) -> bool:
        there = [snapshot for snapshot in self.snapshots if snapshot.sure and not snapshot.doomed]
        if not there:
            return False
        rollback = Rollback(self._chance.choice(there), time.monotonic_ns())
        rollback.snapshot.kept = True
        self.rollbacks.append(rollback)
        control.change_volume("snapshots/rollback", VolumeRequest(rollback.snapshot.label, force=True))
        rollback.end_ns, rollback.sure = time.monotonic_ns(), True
        return True

    def _arrange(self, control: ControlClient) -> bool:
        groups = [group.group for group in control.call(STATUS, Nothing()).groups if group.group != "default"]
        fewer = self._chance.random() < len(groups) / _GROUPS_MAX
        request = GroupsRequest(remove=(self._chance.choice(groups),)) if fewer else GroupsRequest(add=1)
        control.call(GROUPS, request)
        return True
