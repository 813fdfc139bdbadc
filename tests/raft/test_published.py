"""Quorums and changes of members against the data files that etcd's Raft is tested with: 185 directives."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nbdvde.errors import RefusedError
from nbdvde.raft import quorum
from nbdvde.raft.membership import enter_joint, leave_joint, simple
from nbdvde.raft.messages import Members, NodeId
from nbdvde.raft.progress import Progress, of_members
from nbdvde.raft.quorum import EVERYTHING, Outcome
from tests.raft.datadriven import Directive, check, directives, files
from tests.raft.published import operations, parse_members

_OUTCOMES = {"VoteWon": Outcome.WON, "VoteLost": Outcome.LOST, "VotePending": Outcome.PENDING}
_BALLOTS = {"y": True, "n": False}
_ERRORS = {
    "can't leave a non-joint config": "members: are not in the middle of a change",
    "can't make a zero-voter config joint": "members: there are no voters who could agree to a change",
    "config is already joint": "members: are in the middle of a change",
    "can't apply simple config change in joint config": "members: are in the middle of a change",
    "removed all voters": "members: no voter would be left",
    "more than one voter changed without entering joint config": "members: more than one voter changes",
}


def test_all_of_them_are_there() -> None:
    folders = ("quorum/testdata", "confchange/testdata")
    assert sum(len(directives(path)) for folder in folders for path in files(folder)) == 185


# Quorums: `committed` and `vote`, with voters `cfg`, and `cfgj` when there are two sets; `idx` or `votes` of each voter


def test_quorums() -> None:
    for path in files("quorum/testdata"):
        assert check(path, _decide, _decided)


def _sets(directive: Directive) -> tuple[frozenset[NodeId], frozenset[NodeId]]:
    return frozenset(directive.numbers("cfg")), frozenset(directive.numbers("cfgj"))


def _by_voter(directive: Directive, key: str) -> dict[NodeId, str]:
    """What each voter has or says: in the order in which they are named first."""
    named = dict.fromkeys(directive.numbers("cfg") + directive.numbers("cfgj"))
    values = directive.arguments.get(key, [])
    return {node: value for node, value in zip(named, values, strict=True) if value != "_"}


def _decide(directive: Directive) -> object:
    sets = _sets(directive)
    if directive.command == "vote":
        ballots = {node: _BALLOTS[value] for node, value in _by_voter(directive, "votes").items()}
        answer = quorum.outcome(sets, ballots)
        assert quorum.outcome(sets[::-1], ballots) is answer
        return answer
    assert directive.command == "committed"
    indexes = {node: int(value) for node, value in _by_voter(directive, "idx").items()}
    committed = _committed(sets, indexes)
    _alike(sets, indexes, committed)
    return committed, [(node, indexes.get(node)) for node in sorted(sets[0] | sets[1])]


def _committed(sets: Sequence[frozenset[NodeId]], indexes: Mapping[NodeId, int]) -> int:
    return quorum.reached(sets, lambda node: indexes.get(node, 0))


def _alike(sets: tuple[frozenset[NodeId], frozenset[NodeId]], indexes: dict[NodeId, int], answer: int) -> None:
    """What must not change the answer: which set is first, the same one twice, who is behind being further behind."""
    assert _committed(sets[::-1], indexes) == answer
    if sets[1]:
        return
    assert _committed((sets[0],), indexes) == _committed((sets[0], sets[0]), indexes) == answer
    for node, index in indexes.items():
        if index < answer:
            assert _committed(sets, {**indexes, node: index - 1}) == _committed(sets, {**indexes, node: 0}) == answer


def _decided(directive: Directive) -> object:
    if directive.command == "vote":
        return _OUTCOMES[directive.output[0]]
    last = directive.output[-1]
    committed = EVERYTHING if last.endswith("∞") else int(last)
    rows = [re.fullmatch(r"(\?|x*>) +(\d+) +\(id=(\d+)\)", line) for line in directive.output[1:-1]]
    assert all(rows), "the marks before the indexes are a drawing, and not looked at"
    return committed, [(int(row[3]), None if row[1] == "?" else int(row[2])) for row in rows if row]


# Changes: `simple`, `enter-joint`, `leave-joint`, with operations on single nodes as input


@dataclass
class _Group:
    """Members, and what a leader knows of them."""

    members: Members = field(default_factory=lambda: Members(frozenset()))
    followers: dict[NodeId, Progress] = field(default_factory=dict)
    index: int = 0
    """Of the next change: one more with each directive."""

    def run(self, directive: Directive) -> object:
        """Change the members; answers what they are, or why they are not changed."""
        try:
            self.members = self._changed(directive)
            self.followers = of_members(self.members, self.followers, self.index)
        except RefusedError as error:
            return error.message
        finally:
            self.index += 1
        learns = self.members.learners
        known = {node: (progress.match, progress.next, node in learns) for node, progress in self.followers.items()}
        return self.members, known

    def _changed(self, directive: Directive) -> Members:
        target = operations(self.members, " ".join(directive.input).split())
        match directive.command:
            case "simple":
                return simple(self.members, target)
            case "enter-joint":
                return enter_joint(self.members, target, auto_leave=directive.arguments.get("autoleave") == ["true"])
            case "leave-joint":
                return leave_joint(self.members)
        raise AssertionError(directive.command)


def _expected(directive: Directive) -> object:
    if directive.output[0] in _ERRORS:
        return _ERRORS[directive.output[0]]
    known = {}
    for line in directive.output[1:]:
        row = re.fullmatch(r"(\d+): StateProbe match=(\d+) next=(\d+)( learner)?", line)
        assert row, line
        known[int(row[1])] = int(row[2]), int(row[3]), bool(row[4])
    return parse_members(directive.output[0]), known


def test_changes() -> None:
    for path in files("confchange/testdata"):
        assert check(path, _Group().run, _expected)
