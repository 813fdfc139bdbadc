"""An administrator who has other groups share the disks, again and again, by way of any node."""

from typing import TYPE_CHECKING

import trio

from nbdvde.errors import DetachedError, NbdvdeError
from nbdvde.replication.assembly import DEFAULT
from nbdvde.replication.replica import Replica

if TYPE_CHECKING:
    from tests.sim.stack.world import World

_PATIENCE_S = 8.0
_GROUPS_MAX = 4
"""At a time, about: what was asked for may come late."""


class Divider:
    """One."""

    def __init__(self, world: "World") -> None:
        self._world, self._random = world, world.random

    async def run(self) -> None:
        """Begin with a few groups, and have others until the world comes to rest."""
        await trio.sleep(self._random.random())
        while not self._world.resting:
            await self._change()
            await trio.sleep(5 * self._random.random() ** 2)

    async def _change(self) -> None:
        life = self._world.any_life()
        if life is None:
            return

        async def change(replica: Replica) -> tuple[int, list[str]]:
            groups = [name for name in replica.assembly.routing.groups if name != DEFAULT]
            gone = self._random.sample(groups, self._random.randint(0, len(groups)))
            add = self._random.randint(0 if gone else 1, max(1, _GROUPS_MAX - 1 - len(groups)))
            await replica.arrange(add, gone)
            return add, gone

        what = "nobody knows"
        try:
            with trio.move_on_after(_PATIENCE_S):
                add, gone = await life.ask(change)
                what = f"{add} more, without {gone}"
        except DetachedError:
            pass
        except NbdvdeError as error:
            what = f"refused: {error}"
            self._world.counts["other groups refused"] += 1
        self._world.note(f"groups: {what}")
