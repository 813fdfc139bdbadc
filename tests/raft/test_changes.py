"""Members that come and go (4): one voter at once, more by way of both sets, learners at any time."""

from functools import partial

import pytest

from nbdvde.errors import RefusedError
from nbdvde.raft import membership
from nbdvde.raft.core import NotLeaderError
from nbdvde.raft.messages import Append, AppendReply, EntryKind, Members, Message, NodeId
from tests.raft.party import SETTINGS, Member, Party, members

THREE = members({1, 2, 3})


def _of(party: Party, node: NodeId) -> Members:
    return party.cores[node].members


def test_a_learner_gets_everything_and_counts_for_nothing() -> None:
    party = Party(THREE)
    core = party.elect(1)
    party.propose(1, b"a")
    party.add(4)
    core.change_members(members({1, 2, 3}, {4}))
    party.settle()
    party.away = {2, 3}
    party.propose(1, b"b")
    assert party.log(4) == party.log(1)
    assert party.data(1) == [b"a"], "one voter of three"
    party.away = set()
    party.tick()
    party.tick()
    assert party.data(4) == [b"a", b"b"]


def test_a_learner_becomes_a_voter() -> None:
    party = Party(members({1, 2}, {3}))
    core = party.elect(1)
    core.change_members(THREE)
    party.settle()
    party.away = {2}
    party.propose(1, b"a")
    assert party.data(1) == [b"a"]


def test_a_change_counts_from_when_it_is_in_the_log() -> None:
    """A second voter has to have it, so that nobody decides without it any more."""
    party = Party(members({1}))
    core = party.elect(1)
    core.change_members(members({1, 2}))
    party.settle()
    assert core.commit == 1
    party.add(2)
    party.tick()
    assert core.commit == 2


def test_a_voter_is_replaced_in_one_go() -> None:
    party = Party(THREE)
    core = party.elect(1)
    party.add(4)
    core.change_members(members({1, 2, 4}))
    assert _of(party, 1) == Members(frozenset({1, 2, 4}), outgoing=frozenset({1, 2, 3}), auto_leave=True)
    party.settle()
    party.tick()
    assert _of(party, 1) == _of(party, 2) == _of(party, 4) == members({1, 2, 4})
    party.away = {2}
    party.propose(1, b"a")
    assert party.data(1) == [b"a"]
    party.tick()
    assert party.data(4) == [b"a"]


@pytest.mark.parametrize("away", [{4, 5}, {2, 3}])
def test_meanwhile_both_sets_have_to_agree(away: set[NodeId]) -> None:
    party = Party(THREE)
    core = party.elect(1)
    for node in (4, 5):
        party.add(node)
    party.away = away
    core.change_members(members({1, 4, 5}))
    party.tick(times=3)
    assert core.commit == 1, "a majority of one set is not enough"
    party.away = {3, 5}
    party.tick(times=3)
    assert core.commit == 3
    assert core.members == members({1, 4, 5})


def test_meanwhile_both_sets_elect_and_are_heard() -> None:
    party = Party(THREE)
    core = party.elect(1)
    party.add(4)
    party.add(5)
    core.change(partial(membership.enter_joint, target=members({3, 4, 5}), auto_leave=False))
    party.settle()
    assert core.commit == 2
    party.tick()
    party.away = {1, 4, 5}
    party.silence()
    party.cores[2].campaign()
    party.settle()
    assert not party.cores[2].is_leader, "2 and 3 are a majority of the old ones only"
    party.away = {1, 5}
    party.cores[2].campaign()
    party.settle()
    assert party.cores[2].is_leader
    party.away = {1, 4, 5}
    party.tick(2, 3, times=2 * SETTINGS.election)
    assert not party.cores[2].is_leader, "who hears one set only is not a leader any more"


def test_meanwhile_both_sets_settle_reads() -> None:
    party = Party(THREE)
    core = party.elect(1)
    party.add(4)
    party.add(5)
    core.change(partial(membership.enter_joint, target=members({1, 4, 5}), auto_leave=False))
    party.settle()
    party.away = {4, 5}
    core.read(7)
    party.settle()
    assert not party.reads[1]
    party.away = {3, 5}
    party.tick()
    assert party.reads[1] == [(7, 2)]


def test_a_new_leader_ends_a_change_that_the_old_one_began() -> None:
    party = Party(THREE)
    core = party.elect(1)
    party.add(4)
    core.change_members(members({2, 3, 4}))
    party.work(1)
    party.deliver(2)
    party.deliver(3)
    party.away = {1}
    party.settle()
    assert _of(party, 2).outgoing
    party.elect(3)
    assert _of(party, 3) == members({2, 3, 4})
    assert core.is_leader, "which has not heard of it"


def test_a_change_may_be_ended_by_hand() -> None:
    party = Party(THREE)
    core = party.elect(1)
    core.change(partial(membership.enter_joint, target=members({1, 2}), auto_leave=False))
    party.settle()
    assert core.members.outgoing
    with pytest.raises(RefusedError, match="in the middle of a change"):
        core.change_members(members({1}))
    core.change(membership.leave_joint)
    party.settle()
    assert core.members == members({1, 2})


def test_one_change_at_a_time() -> None:
    party = Party(THREE)
    core = party.elect(1)
    core.change_members(members({1, 2}))
    with pytest.raises(RefusedError, match="in the middle of a change"):
        core.change_members(members({1}))
    party.settle()
    core.change_members(members({1}))


def test_no_change_before_something_of_the_term_is_committed() -> None:
    """Else two leaders could commit with majorities that have nobody in common (the correction of 2015 to 4.1)."""
    member = Member(THREE)
    member.lead()
    with pytest.raises(RefusedError):
        member.core.change_members(members({1, 2}))
    member.hear(2, AppendReply(1, True, 1))
    member.core.change_members(members({1, 2}))


def test_only_leaders_change_members() -> None:
    party = Party(THREE)
    party.elect(1)
    with pytest.raises(NotLeaderError):
        party.cores[2].change_members(members({1, 2}))


def test_members_of_an_entry_that_is_replaced_are_forgotten() -> None:
    party = Party(THREE)
    core = party.elect(1)
    party.away = {1}
    core.change_members(members({1, 2}))
    party.settle()
    assert core.members == members({1, 2})
    party.elect(2)
    party.away = set()
    party.tick(2)
    party.tick(2)
    assert core.members == THREE


def test_a_leader_that_is_removed_counts_for_nothing_and_hands_over_when_it_is() -> None:
    party = Party(THREE)
    core = party.elect(1)
    party.away = {3}
    core.change_members(members({2, 3}))
    party.settle()
    assert core.is_leader, "it goes on until that is committed"
    assert core.commit == 1, "node 2 and itself are no majority any more"
    party.away = set()
    party.tick()
    assert not core.is_leader
    assert core.leader != 1
    leaders = [node for node in (2, 3) if party.cores[node].is_leader]
    assert leaders
    (leader,) = leaders
    party.propose(leader, b"a")
    assert party.data(leader) == [b"a"]
    party.tick(1, times=5 * SETTINGS.election)
    assert party.cores[leader].is_leader, "nobody votes for who was removed"


def test_who_alone_has_the_entry_that_removes_it_can_still_be_elected() -> None:
    """4.2.2: nobody else can, for they lack it, and have to have its vote."""
    party = Party(members({1, 2}))
    core = party.elect(1)
    party.away = {2}
    core.change_members(members({2}))
    party.settle()
    party.restart(1)
    party.away = set()
    party.silence()
    party.cores[2].campaign()
    party.settle()
    assert not party.cores[2].is_leader
    party.tick(times=4 * SETTINGS.election)
    assert party.cores[2].is_leader
    assert party.cores[2].members == members({2})


def test_who_was_removed_asks_for_no_votes() -> None:
    party = Party(THREE)
    core = party.elect(3)
    core.change_members(members({1, 2}))
    party.settle()
    party.tick()
    for _ in range(2 * SETTINGS.election):
        core.tick()
    assert not party.work(3)


def test_a_new_member_is_sent_what_its_group_was_begun_with() -> None:
    party = Party(THREE, start=5)
    core = party.elect(1)
    party.propose(1, b"a")
    party.add(4)
    core.change_members(members({1, 2, 3, 4}))
    party.settle()
    party.tick()
    assert party.wanted[4], "the log does not begin at 1"
    assert party.cores[4].members == core.members
    assert party.stores[4].last_index == party.stores[1].last_index


def test_entries_of_members_are_told_as_such() -> None:
    member = Member(THREE)
    member.lead()
    member.core.step(Message(2, 1, AppendReply(1, True, 1)))
    member.core.change_members(members({1, 2}))
    (append, *_) = member.say().of(Append)
    (found,) = append.entries
    assert found.kind == EntryKind.MEMBERS
    assert Members.unpack(found.data) == members({1, 2})
