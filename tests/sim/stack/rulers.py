"""An administrator: snapshots, clones, disks that come, change their size and go, by way of any node."""

from typing import TYPE_CHECKING

import msgspec
import trio

from nbdvde.engine.catalogue import SEPARATOR
from nbdvde.errors import DetachedError, NbdvdeError
from nbdvde.replication.replica import Replica
from tests.sim.stack.history import BLOCK, Disk, Snapshot
from tests.sim.stack.images import SIZE
from tests.sim.stack.register import Op
from tests.sim.stack.users import USED, User

if TYPE_CHECKING:
    from tests.sim.stack.world import World

_PATIENCE_S = 8.0


class Ruler:
    """One, who does one thing after the other."""

    def __init__(self, world: "World") -> None:
        self._world, self._random, self._history = world, world.random, world.history
        self._made = 0
        self._unclear: set[str] = set()
        """Disks of which something may be changed at any time."""

    async def run(self) -> None:
        """Change the catalogue until the world comes to rest."""
        deeds = [self._snapshot, self._delete_snapshot, self._roll_back, self._resize, self._make, self._delete]
        while not self._world.resting:
            await trio.sleep(1.5 * self._random.random())
            disk = self._random.choice(list(self._history.disks.values()))
            await self._random.choices(deeds, (5, 2, 3, 2, 2, 1))[0](disk)

    async def _call(self, path: str, name: str, **more: object) -> bool | None:
        """Whether it was done; None when nobody knows."""
        life = self._world.any_life()
        if life is None:
            return False
        request = msgspec.json.encode({"name": name, **more})

        async def call(replica: Replica) -> bytes:
            return await replica.call(path, request)

        done: bool | None = None
        try:
            with trio.move_on_after(_PATIENCE_S):
                await life.ask(call)
                done = True
        except DetachedError:
            done = None
        except NbdvdeError as error:
            self._world.note(f"{path} {name} refused: {error}")
            done = False
        self._world.note(f"{path} {name}: {done}")
        if done:
            self._world.counts[path] += 1
        elif done is None:
            self._unclear.add(name.partition(SEPARATOR)[0])
        return done

    async def _snapshot(self, disk: Disk) -> None:
        self._made += 1
        snapshot = Snapshot(f"{disk.name}@s{self._made}", self._history.moment())
        disk.snapshots.append(snapshot)
        done = await self._call("snapshots/create", snapshot.label)
        if done:
            snapshot.ended, snapshot.sure = self._history.moment(), True
        elif done is False:
            disk.snapshots.remove(snapshot)

    async def _delete_snapshot(self, disk: Disk) -> None:
        free = [snapshot for snapshot in disk.snapshots if snapshot.sure and not (snapshot.used or snapshot.doomed)]
        if free:
            snapshot = self._random.choice(free)
            snapshot.doomed = True
            await self._call("snapshots/delete", snapshot.label)

    async def _roll_back(self, disk: Disk) -> None:
        kept = [snapshot for snapshot in disk.snapshots if snapshot.sure and not snapshot.doomed]
        if not kept:
            return
        snapshot, begun = self._random.choice(kept), self._history.moment()
        snapshot.used = True
        op = Op(0, begun)
        disk.rollbacks.append((snapshot, op))
        done = await self._call("snapshots/rollback", snapshot.label, force=True)
        if done:
            self._history.fence(disk, begun, 0)
            op.ended, op.sure = self._history.moment(), True
        elif done is False:
            disk.rollbacks.remove((snapshot, op))

    async def _resize(self, disk: Disk) -> None:
        before, blocks = disk.blocks, self._random.choice((SIZE, SIZE + 200, 302, 400))
        disk.blocks = min(before, blocks)
        begun = self._history.moment()
        ops = self._history.begin(disk, None, {block: 0 for block in USED if block >= blocks})
        done = await self._call("disks/resize", disk.name, size=blocks * BLOCK, discard=True, force=True)
        if done:
            self._history.fence(disk, begun, 0)
            self._history.done(disk, ops)
            disk.blocks = blocks
        elif done is False:
            self._history.refused(disk, ops)
            disk.blocks = before

    async def _make(self, disk: Disk) -> None:
        """A disk, empty or as a snapshot."""
        if len(self._history.disks) > 2:
            return
        self._made += 1
        kept = [snapshot for snapshot in disk.snapshots if snapshot.sure and not snapshot.doomed]
        origin = self._random.choice(kept) if kept and self._random.random() < 0.6 else None
        old = [gone.name for gone in self._history.gone if gone.name not in self._unclear]
        name = self._random.choice(old) if old and self._random.random() < 0.7 else f"d{self._made}"
        new = Disk(name, disk.blocks if origin else SIZE, origin)
        if origin:
            origin.used = True
            done = await self._call("disks/clone", new.name, source=origin.label)
        else:
            done = await self._call("disks/create", new.name, size=SIZE * BLOCK)
        if done:
            self._history.gone = [gone for gone in self._history.gone if gone.name != name]
            self._history.disks[new.name] = new
            self._world.welcome(User(self._world, f"user-{new.name}", new))

    async def _delete(self, disk: Disk) -> None:
        if disk.name == "disk" or any(s.used for s in disk.snapshots) or self._random.random() < 0.5:
            return
        disk.doomed = True
        for snapshot in disk.snapshots:
            snapshot.doomed = True
            await self._call("snapshots/delete", snapshot.label)
        if await self._call("disks/delete", disk.name, force=True):
            del self._history.disks[disk.name]
            self._history.gone.append(disk)
