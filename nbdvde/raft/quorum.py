"""What enough voters have or say. While members change, each of two sets of voters has to have enough (4.3)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from enum import Enum
from typing import TypeAlias

from nbdvde.raft.messages import NodeId

Voters: TypeAlias = AbstractSet[NodeId]
"""One set of them: a majority decides. A set without anybody never objects."""
EVERYTHING = (1 << 64) - 1
"""What a set without anybody reaches."""


class Outcome(Enum):
    """Of an election."""

    PENDING = "pending"
    WON = "won"
    LOST = "lost"


def majority(voters: Voters) -> int:
    """How many make one."""
    return len(voters) // 2 + 1


def reached(sets: Iterable[Voters], of: Callable[[NodeId], int]) -> int:
    """The highest number that a majority of each set reach."""
    return min(_reached(voters, of) for voters in sets)


def _reached(voters: Voters, of: Callable[[NodeId], int]) -> int:
    return sorted(map(of, voters), reverse=True)[majority(voters) - 1] if voters else EVERYTHING


def agree(sets: Iterable[Voters], nodes: Voters) -> bool:
    """Whether nodes are a majority of each set."""
    return all(not voters or len(voters & nodes) >= majority(voters) for voters in sets)


def outcome(sets: Sequence[Voters], ballots: Mapping[NodeId, bool]) -> Outcome:
    """What answers, so far, mean for who asked for votes."""
    granted = {node for node, yes in ballots.items() if yes}
    if agree(sets, granted):
        return Outcome.WON
    refused = ballots.keys() - granted
    lost = any(len(voters - refused) < majority(voters) for voters in sets if voters)
    return Outcome.LOST if lost else Outcome.PENDING
