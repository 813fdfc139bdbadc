"""There can only be so many groups, those included that have no part of the disks any more."""

from typing import cast

import pytest
import trio

from nbdvde.errors import RefusedError, UsageError
from nbdvde.raft.placement import SLOTS
from nbdvde.replication.assembly import DEFAULT
from nbdvde.replication.operations import Arrange, Begin
from tests.replication.entries import MEMBERS, Author, machine_of
from tests.replication.leading import leading
from tests.replication.test_catchup import image

MANY = SLOTS - 24
"""Groups that there are besides `default`."""
PATIENCE_S = 60.0


def named(hold: int, count: int) -> list[str]:
    return [f"g{hold}.{at}" for at in range(count)]


async def test_more_are_refused_before_anything_is_agreed_on(autojump_clock: object) -> None:
    made = await image()
    with trio.fail_after(PATIENCE_S):
        async with leading(made) as (replica, _):
            replica.assembly.arrange(named(1, MANY), MEMBERS)
            replica.assembly.arrange([], MEMBERS)
            index = replica.machine.applied.index
            with pytest.raises(UsageError, match="more than the 1024"):
                await replica.arrange(SLOTS - MANY, [])
            assert replica.machine.applied.index == index
            assert len(replica.assembly.idle) == MANY
    await made.close()


@pytest.mark.parametrize("more", [SLOTS - MANY - 2, SLOTS - MANY])
async def test_more_are_refused_when_it_comes_to_them(more: int) -> None:
    """Two nodes may have asked at the same time."""
    made, author = await image(), Author()
    machine = await machine_of(made)
    assembly = machine._assembly
    assembly.arrange(named(1, MANY), MEMBERS)
    assembly.arrange([], MEMBERS)
    hold, result = await machine.apply(author.entries([Begin(), Arrange(1, (DEFAULT, *named(2, more)))]))
    assert hold == 1
    if 1 + MANY + more < SLOTS:
        assert result is None
        assert len(assembly.machines) == 1 + MANY + more
    else:
        assert "cannot have more than 1023 groups" in str(cast(RefusedError, result))
        assert len(assembly.machines) == 1 + MANY
        assert assembly.routing.groups == (DEFAULT,)
    assert (assembly.holding, assembly.settled) == (0, 1), "everything goes on"
    await made.close()
