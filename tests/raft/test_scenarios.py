"""The interaction scenarios that etcd's Raft is tested with: members here come to the same, but for what is listed.

Compared are term, vote, role, known leader, log, what is committed and applied, and the members, of every member of
which a scenario has told it, whenever it has let members work; and what a status or a refusal says. Messages are not
compared: how many there are, and when followers are asked again, is each implementation's own business.
"""

import re

import pytest

from nbdvde.raft.messages import NodeId
from tests.raft.datadriven import Directive, directives, files
from tests.raft.scenario import Told, World, differences, read_output

_ALL = {
    "campaign.txt",
    "campaign_learner_must_vote.txt",
    "confchange_v1_add_single.txt",
    "confchange_v1_remove_leader.txt",
    "confchange_v2_add_double_auto.txt",
    "confchange_v2_add_double_implicit.txt",
    "confchange_v2_add_single_auto.txt",
    "confchange_v2_add_single_explicit.txt",
    "snapshot_succeed_via_app_resp.txt",
}

_WAITS = {"commit", "applied", "members", "last", "entry 5", "entry 7", "entry 8"}
_ELECTS = {"term", "vote", "commit", "applied", "last"}
_DIFFERENCES: dict[str, dict[NodeId, tuple[int, set[str]]]] = {
    # Members count here from when they are in the log (4.1), there from when they are applied: so a change is committed
    # when enough of the new ones have it too. By place: the commit index of members that are behind until then.
    "confchange_v1_remove_leader.txt:73": {1: (3, _WAITS)},
    "confchange_v1_remove_leader.txt:99": {1: (3, _WAITS), 2: (3, _WAITS)},
    "confchange_v1_remove_leader.txt:120": {1: (3, _WAITS), 2: (3, _WAITS)},
    "confchange_v2_add_double_auto.txt:39": {1: (3, _WAITS)},
    "confchange_v2_add_double_auto.txt:54": {1: (3, _WAITS)},
    "confchange_v2_add_single_auto.txt:114": {1: (4, _WAITS), 2: (4, _WAITS)},
    "confchange_v2_add_single_auto.txt:180": {1: (4, _WAITS), 2: (4, _WAITS)},
    # A leader that is removed hands over (there it stays, nothing can be proposed any more; a note wishes for this).
    "confchange_v1_remove_leader.txt:128": {1: (4, _WAITS), 2: (7, _ELECTS), 3: (7, _ELECTS)},
    "confchange_v1_remove_leader.txt:203": {1: (4, _WAITS), 2: (7, _ELECTS), 3: (7, _ELECTS)},
}
_ANSWERS = {
    # There the end of a change may be asked for again while it is on its way.
    "confchange_v2_add_single_auto.txt:175": "ignored",
}


def test_all_are_played() -> None:
    assert {path.name for path in files("testdata") if path.parent.parent.name == "raft"} == _ALL


@pytest.mark.parametrize("name", sorted(_ALL))
def test_scenario(name: str) -> None:
    world = _play(name)
    if name == "confchange_v2_add_single_auto.txt":
        _finish(world)


def _play(name: str) -> World:
    (path,) = (path for path in files("testdata") if path.name == name)
    world, told = World(), dict[NodeId, Told]()
    for directive in directives(path):
        answer = world.run(directive)
        read_output(told, directive)
        assert answer == _ANSWERS.get(directive.where, _answer(directive)), directive.where
        if directive.command in ("stabilize", "process-ready"):
            _compare(world, told, directive)
    return world


def _answer(directive: Directive) -> object:
    """What the scenario says that a directive answers."""
    first = directive.output[0]
    match directive.command:
        case "propose":
            return first
        case "propose-conf-change":
            return "ignored" if "ignoring conf change" in first else first
        case "status":
            rows = [re.match(r"(\d+): (\w+) match=(\d+) ", row) for row in directive.output]
            return {int(row[1]): (row[2], int(row[3])) for row in rows if row}
    return None


def _compare(world: World, told: dict[NodeId, Told], directive: Directive) -> None:
    listed = _DIFFERENCES.get(directive.where, {})
    found: dict[NodeId, set[str]] = {}
    for node, name, is_, was in differences(world, told):
        assert name in listed.get(node, (0, ()))[1], f"{directive.where}: {name} of {node} is {is_}, not {was}"
        found.setdefault(node, set()).add(name)
    assert found.keys() == listed.keys(), f"{directive.where}: something listed differs no more"
    for node, (commit, _) in listed.items():
        assert world.facts(node).commit == world.facts(node).applied == commit, directive.where


def _finish(world: World) -> None:
    """Members that a change waits for appear, and it ends by itself."""
    world.run(Directive("the end", "add-nodes", {"3": []}, [], []))
    world.run(Directive("the end", "stabilize", {}, [], []))
    for node in range(1, 6):
        facts = world.facts(node)
        assert facts.members
        assert facts.members.quorums == (frozenset(range(1, 6)), frozenset())
        assert facts.commit == facts.applied == facts.last == world.facts(1).last
