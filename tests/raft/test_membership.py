"""Which changes of members are safe, and what they lead to."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdvde.errors import RefusedError
from nbdvde.raft import membership
from nbdvde.raft.messages import Members

_NODES = st.frozensets(st.integers(1, 6))


def _members(voters: set[int], learners: set[int] | None = None) -> Members:
    return Members(frozenset(voters), frozenset(learners or ()))


@given(_NODES.filter(bool), _NODES, _NODES.filter(bool), _NODES)
def test_every_target_is_reached_in_one_step_or_two(
    voters: frozenset[int], learners: frozenset[int], new_voters: frozenset[int], new_learners: frozenset[int]
) -> None:
    members = Members(voters, learners - voters)
    target = Members(new_voters, new_learners - new_voters)
    following = membership.towards(members, target)
    assert Members.unpack(following.pack()) == following
    if len(voters ^ new_voters) <= 1:
        assert following == target
        return
    assert following.quorums == (new_voters, voters)
    assert set(following) == voters | new_voters | new_learners, "nobody who counts or receives is left out"
    assert not following.learners & voters, "a voter of the old set is one until that is left"
    assert membership.leave_joint(following) == target


def test_a_voter_is_replaced_in_one_step() -> None:
    following = membership.towards(_members({1, 2, 3}), _members({1, 2, 4}))
    assert following.quorums == (frozenset({1, 2, 4}), frozenset({1, 2, 3}))
    assert following.auto_leave


def test_a_voter_that_becomes_a_learner_decides_until_the_change_is_over() -> None:
    following = membership.towards(_members({1, 2, 3}), _members({1, 4}, {2, 5}))
    assert following.votes(2)
    assert (following.learners, following.learners_next) == (frozenset({5}), frozenset({2}))
    assert membership.leave_joint(following) == _members({1, 4}, {2, 5})


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(_members(set(), {1}), id="no voter"),
        pytest.param(_members({1}, {1}), id="both"),
        pytest.param(_members({0, 1}), id="nobody's number"),
        pytest.param(Members(frozenset({1}), outgoing=frozenset({2})), id="in the middle of a change"),
        pytest.param(Members(frozenset({1}), learners_next=frozenset({2})), id="without the change it belongs to"),
    ],
)
def test_targets_that_are_refused(target: Members) -> None:
    with pytest.raises(RefusedError):
        membership.towards(_members({1, 2}), target)


def test_steps_that_are_not_safe_are_refused() -> None:
    with pytest.raises(RefusedError, match="more than one voter changes"):
        membership.simple(_members({1, 2}), _members({1, 3}))
    assert membership.simple(_members({1, 2}), _members({1, 2, 3})) == _members({1, 2, 3})
    with pytest.raises(RefusedError, match="no voters who could agree"):
        membership.enter_joint(_members(set()), _members({1, 2}), auto_leave=True)


def test_one_change_at_a_time() -> None:
    joint = membership.towards(_members({1}), _members({2, 3}))
    for change in (membership.simple, membership.towards):
        with pytest.raises(RefusedError, match="in the middle of a change"):
            change(joint, _members({2}))
    with pytest.raises(RefusedError, match="not in the middle of a change"):
        membership.leave_joint(_members({1}))
