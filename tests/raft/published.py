"""How etcd's Raft writes members and their changes down."""

import re
from collections.abc import Sequence

from nbdvde.raft.messages import Members


def operations(members: Members, words: Sequence[str]) -> Members:
    """What members are to be: v1 makes 1 a voter, l1 a learner, r1 removes it; u1, and any of node 0, are nothing.

    Here a target says all at once what these say in steps.
    """
    voters, learners = set(members.voters), set(members.learners)
    for word in words:
        kind, node = word[0], int(word[1:])
        if kind == "u" or not node:
            continue
        voters.discard(node)
        learners.discard(node)
        if kind != "r":
            (voters if kind == "v" else learners).add(node)
    return Members(frozenset(voters), frozenset(learners))


def parse_members(text: str) -> Members:
    """From `voters=(2 3)&&(1) learners=(4) learners_next=(1) autoleave`."""
    sets = {name: frozenset(map(int, nodes.split())) for name, nodes in re.findall(r"(\w+=|&&)\(([\d ]*)\)", text)}
    voters, learners, old, following = (
        sets.get(name, frozenset()) for name in ("voters=", "learners=", "&&", "learners_next=")
    )
    return Members(voters, learners, old, following, text.endswith(" autoleave"))
