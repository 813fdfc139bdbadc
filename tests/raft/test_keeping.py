"""How much of a log is kept for followers when it is compacted."""

from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from nbdvde.raft.messages import AppendReply, Snapshot
from nbdvde.raft.upkeep import Upkeep
from tests.raft.party import Member, entry, members

THREE = members({1, 2, 3})
COMPACT_BYTES = 1000


def _leader() -> Member:
    """Member 3 takes over the state up to entry 5, member 2 has everything up to entry 9."""
    member = Member(THREE, [entry(1, index) for index in range(1, 5)], term=1)
    member.lead()
    member.hear(2, AppendReply(2, True, 5))
    member.store.compact_to(Snapshot(4, 1, THREE))
    member.core.compacted()
    member.hear(3, AppendReply(2, False, 4, 0, 0))
    for _ in range(6):
        member.core.propose([bytes(2 * COMPACT_BYTES)])
        member.say()
        member.hear(2, AppendReply(2, True, min(member.core.log.last_index, 9)))
    return member


async def _compacted(member: Member, room_bytes: int) -> int:
    """Up to where, with so much room for a log."""

    async def durable() -> Snapshot:
        await trio.lowlevel.checkpoint()
        return Snapshot(member.core.applied, 2, THREE)

    applier: Any = SimpleNamespace(durable=durable)
    helper: Any = SimpleNamespace(then=lambda call: None)
    upkeep = Upkeep(
        "default", member.core, member.store, applier, helper, lambda: None, COMPACT_BYTES,
        lambda size: size < room_bytes,
    )  # fmt: skip
    async with trio.open_nursery() as nursery:
        upkeep.begin(nursery)
        upkeep.grown()
        await wait_all_tasks_blocked()
    return member.store.snapshot.index


@pytest.mark.parametrize(("room_bytes", "kept"), [(1 << 20, 5), (2 * COMPACT_BYTES, 9)], ids=["room", "none"])
async def test_what_comes_behind_a_state_is_kept_for_who_takes_it_over_while_there_is_room(
    room_bytes: int, kept: int
) -> None:
    """However much longer the log is than others may make it."""
    member = _leader()
    assert member.store.size > 4 * COMPACT_BYTES
    assert member.core.applied == 9
    assert await _compacted(member, room_bytes) == kept


async def test_nothing_is_kept_any_more_for_who_has_taken_it_over() -> None:
    member = _leader()
    member.hear(3, AppendReply(2, True, 5))
    assert await _compacted(member, 1 << 20) == 9
