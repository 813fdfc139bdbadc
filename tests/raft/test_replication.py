"""Entries from leaders to followers (3.5), and which of them are committed (3.6.2)."""

import pytest

from nbdvde.raft.core import Core
from nbdvde.raft.messages import Append, AppendReply, Beat, BeatReply, HardState, Message, Snapshot, Vote
from tests.raft.party import SETTINGS, Member, Party, entry, members

THREE = members({1, 2, 3})


def test_what_is_proposed_is_applied_by_all_in_order() -> None:
    party = Party(THREE)
    party.elect(1)
    party.propose(1, b"a", b"b")
    party.propose(1, b"c")
    party.tick()
    assert [party.data(node) for node in (1, 2, 3)] == [[b"a", b"b", b"c"]] * 3


def test_a_minority_commits_nothing() -> None:
    party = Party(members({1, 2, 3, 4}))
    party.elect(1)
    party.away = {3, 4}
    party.propose(1, b"a")
    party.tick(1, 2)
    assert not party.data(1)
    party.away = {4}
    party.tick(1, 2, 3)
    assert party.data(1) == [b"a"]


def test_a_leader_counts_what_it_has_stored_itself() -> None:
    member = Member(THREE)
    member.lead()
    member.hear(2, AppendReply(1, True, 1))
    assert member.core.commit == 1
    member.core.propose([b"a"])
    ready = member.begin()
    assert {message.body for message in ready.now} == {Append(1, 1, 1, (entry(1, 2, b"a"),), 1)}, "sent at once"
    member.core.step(Message(2, 1, AppendReply(1, True, 2)))
    assert member.core.commit == 1, "only node 2 has it durably"
    member.finish(ready)
    assert member.core.commit == 2


def test_others_are_enough_while_the_leader_stores() -> None:
    member = Member(THREE)
    member.lead()
    member.hear(2, AppendReply(1, True, 1))
    member.core.propose([b"a"])
    ready = member.begin()
    for sender in (2, 3):
        member.core.step(Message(sender, 1, AppendReply(1, True, 2)))
    assert member.core.commit == 2
    assert not ready.committed
    member.finish(ready)
    ready = member.begin()
    assert [found.index for found in ready.committed] == [2], "applied when it is stored here, too"


def test_entries_of_older_terms_are_committed_by_one_of_this_term() -> None:
    """Figure 3.7 of the thesis: a majority has an entry of an older term, and yet it can be replaced."""
    member = Member(THREE, [entry(1, 1), entry(2, 2)], term=2)
    member.lead()
    member.hear(2, AppendReply(3, True, 2))
    assert member.core.commit == 0
    member.hear(2, AppendReply(3, True, 3))
    assert member.core.commit == 3


def test_acknowledged_when_durable() -> None:
    member = Member(THREE, term=1)
    member.core.step(Message(2, 1, Append(1, 0, 0, (entry(1, 1),), 1)))
    ready = member.begin()
    assert not ready.now
    assert [message.body for message in ready.after] == [AppendReply(1, True, 1)]
    assert not ready.committed, "applied when it is stored"
    member.finish(ready)
    ready = member.begin()
    assert [found.index for found in ready.committed] == [1]


def test_what_would_leave_a_gap_is_refused() -> None:
    member = Member(THREE, [entry(1, 1)], term=1)
    assert member.hear(2, Append(1, 2, 1, (entry(1, 3),), 0)) == [AppendReply(1, False, 2, 1, 1)]
    assert member.store.last_index == 1


def test_what_follows_another_entry_is_refused() -> None:
    member = Member(THREE, [entry(1, 1), entry(1, 2)], term=2)
    assert member.hear(2, Append(3, 2, 3, (entry(3, 3),), 0)) == [AppendReply(3, False, 2, 2, 1)]
    assert member.store.last_index == 2


def test_what_contradicts_goes_with_all_behind_it() -> None:
    member = Member(THREE, [entry(1, 1), entry(1, 2), entry(1, 3)], term=2)
    member.hear(2, Append(2, 1, 1, (entry(2, 2),), 0))
    assert [found.term for found in member.store.get_range(1, 9, 1 << 20)] == [1, 2]


def test_what_is_there_stays_with_all_behind_it() -> None:
    """An old message, with less than came since."""
    member = Member(THREE, term=1)
    member.hear(2, Append(1, 0, 0, (entry(1, 1), entry(1, 2), entry(1, 3)), 0))
    assert member.hear(2, Append(1, 0, 0, (entry(1, 1),), 0)) == [AppendReply(1, True, 1)]
    assert member.store.last_index == 3


def test_no_more_is_committed_than_is_known_to_agree() -> None:
    member = Member(THREE, [entry(1, 1), entry(1, 2), entry(1, 3)], term=2)
    member.hear(2, Append(2, 1, 1, (), 3))
    assert member.core.commit == 1
    member.hear(2, Append(2, 1, 1, (entry(2, 2),), 3))
    assert member.core.commit == 2


def test_what_comes_late_may_begin_before_what_is_committed() -> None:
    member = Member(THREE, [entry(1, 1), entry(1, 2)], term=1)
    member.hear(2, Append(1, 2, 1, (), 2))
    member.store.compact_to(Snapshot(2, 1, THREE))
    member.core.compacted()
    late = Append(1, 0, 0, (entry(1, 1), entry(1, 2), entry(1, 3)), 2)
    assert member.hear(2, late) == [AppendReply(1, True, 3)]
    assert member.store.last_index == 3
    assert member.hear(2, Append(1, 0, 0, (entry(1, 1),), 2)) == [AppendReply(1, True, 2)]


def test_the_commit_index_that_is_kept_tells_of_what_is_durable() -> None:
    """A crash may leave it, and instead of the new entries those that they replace."""
    member = Member(THREE, [entry(1, 1), entry(1, 2)], term=2)
    member.core.step(Message(2, 1, Append(2, 1, 1, (entry(2, 2),), 2)))
    ready = member.begin()
    assert ready.hard
    assert ready.hard.commit == 1
    assert member.core.commit == 2


def test_hard_state_is_stored_again_when_there_is_news() -> None:
    member = Member(THREE, term=1)
    member.core.step(Message(2, 1, Append(1, 0, 0, (entry(1, 1),), 0)))
    ready = member.begin()
    assert ready.hard is None, "only the log is news"
    member.finish(ready)
    member.core.step(Message(2, 1, Beat(1, 1, 1)))
    ready = member.begin()
    assert [found.index for found in ready.committed] == [1]
    assert ready.hard is None, "what is committed goes along with the next entries"
    member.finish(ready)
    member.core.step(Message(2, 1, Append(1, 1, 1, (entry(1, 2),), 1)))
    assert member.begin().hard == HardState(1, 0, 1)


def test_an_entry_that_nobody_has_is_forgotten_while_nobody_leads() -> None:
    member = Member(THREE, [entry(1, index) for index in range(1, 5)], term=1)
    member.hear(2, Beat(1, 2, 1))
    assert not member.core.forget(4), "a leader decides that"
    for _ in range(2 * SETTINGS.election):
        member.core.tick()
    member.say()
    assert not member.core.forget(2), "it is committed"
    member.core.step(Message(3, 1, Vote(2, 4, 1)))
    ready = member.begin()
    assert not member.core.forget(3), "while something is being made durable"
    member.finish(ready)
    assert member.core.forget(3)
    assert (member.core.log.last_index, member.store.last_index) == (2, 2)


def test_a_replaced_entry_was_never_stored() -> None:
    """What a leader wrote while another one replaced it."""
    member = Member(THREE, [entry(1, 1)], term=1)
    member.core.step(Message(2, 1, Append(2, 1, 1, (entry(2, 2), entry(2, 3)), 0)))
    ready = member.begin()
    member.core.step(Message(3, 1, Append(3, 1, 1, (entry(3, 2), entry(3, 3)), 2)))
    member.finish(ready)
    assert member.core.log.persisted == 1
    ready = member.begin()
    assert [found.term for found in ready.entries] == [3, 3]
    assert [found.index for found in ready.committed] == [1]
    member.finish(ready)
    assert member.core.log.persisted == 3


def test_stored_entries_that_are_replaced_are_not_stored_any_more() -> None:
    member = Member(THREE, [entry(1, 1), entry(1, 2)], term=1)
    member.core.step(Message(3, 1, Append(2, 1, 1, (entry(2, 2),), 2)))
    assert member.core.log.persisted == 1
    ready = member.begin()
    assert [found.index for found in ready.committed] == [1], "the other one only when it is stored"


def test_a_follower_is_sent_what_follows_where_it_may_agree() -> None:
    member = Member(THREE, [entry(1, index) for index in range(1, 11)], term=1)
    member.lead()
    (append,) = member.hear(3, AppendReply(2, False, 10, 6, 1)).of(Append)
    assert append.previous == 6


@pytest.mark.parametrize(
    ("leader", "follower", "questions"),
    [
        pytest.param([1] * 20, [], 2, id="empty"),
        pytest.param([1, 1, 4, 4, 5, 5, 6, 6, 6], [1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3], 3, id="many terms of its own"),
        pytest.param([1, 1, 1, 2, 2, 2, 2, 2, 2, 2], [1] * 12, 2, id="longer"),
        pytest.param([1] * 12 + [5], [1] * 3 + [2] * 20, 2, id="a term that the leader knows nothing of"),
    ],
)
def test_few_questions_find_what_agrees(leader: list[int], follower: list[int], questions: int) -> None:
    """At the end of 3.5: one for each term, not one for each entry."""
    party = Party()
    for node, terms in ((1, leader), (2, follower), (3, leader)):
        party.add(node, Snapshot(0, 0, THREE), [entry(term, index) for index, term in enumerate(terms, 1)], term=10)
    party.away = {2}
    party.elect(1)
    party.away = set()
    asked = 0
    party.cores[1].tick()
    for _ in range(10):
        party.work(1)
        party.deliver(2)
        party.work(2)
        asked += sum(isinstance(message.body, AppendReply) and not message.body.ok for message in party.mail)
        party.deliver(1)
    assert party.log(2) == party.log(1)
    assert asked <= questions


def test_a_lost_message_is_sent_again() -> None:
    party = Party(THREE)
    party.elect(1)
    party.away = {2, 3}
    party.propose(1, b"a")
    party.away = set()
    party.tick()
    party.tick()
    assert party.data(2) == [b"a"]


def test_a_lost_answer_is_given_again() -> None:
    party = Party(THREE)
    party.elect(1)
    party.cores[1].propose([b"a"])
    party.work(1)
    party.deliver(2)
    party.work(2)
    party.mail.clear()
    party.tick(1)
    party.tick(1)
    assert party.data(1) == [b"a"]


def test_a_member_that_was_down_gets_what_it_lacks() -> None:
    party = Party(THREE)
    party.elect(1)
    party.away = {3}
    party.propose(1, *[b"%d" % at for at in range(100)])
    party.restart(3)
    party.away = set()
    party.tick()
    party.tick()
    assert party.data(3) == party.data(1)


def test_the_commit_index_comes_with_signs_of_life_as_far_as_a_follower_is_known_to_be() -> None:
    member = Member(THREE)
    member.lead()
    member.hear(2, AppendReply(1, True, 1))
    member.core.tick()
    beats = {message.receiver: message.body for message in member.begin().now if isinstance(message.body, Beat)}
    assert {node: beat.commit for node, beat in beats.items()} == {2: 1, 3: 0}


def test_followers_take_signs_of_life_from_the_leader_of_the_term() -> None:
    member = Member(THREE, [entry(1, 1)], term=1)
    assert member.hear(2, Beat(1, 1, 3)) == [BeatReply(1, 3)]
    assert (member.core.leader, member.core.commit) == (2, 1)
    for _ in range(SETTINGS.election):
        member.core.tick()
        member.hear(2, Beat(1, 1, 4))
    assert member.core.leader == 2


def test_what_a_member_has_applied_it_does_not_apply_again() -> None:
    party = Party(THREE)
    party.elect(1)
    party.propose(1, b"a", b"b", b"c")
    core = Core(2, party.stores[2], party.stores[2].hard, SETTINGS, lambda low, high: high, applied=3)
    assert (core.commit, core.applied) == (3, 3)
    party.cores[2] = core
    party.applied[2] = []
    party.tick()
    party.tick()
    assert party.data(2) == [b"c"]


def test_a_commit_index_is_kept_only_of_what_is_durable() -> None:
    member = Member(THREE, [entry(1, 1), entry(1, 2)], term=2)
    member.core.step(Message(2, 1, Append(2, 1, 1, (entry(2, 2, b"b"),), 2)))
    ready = member.core.ready()
    assert ready
    assert ready.entries == (entry(2, 2, b"b"),)
    assert ready.hard
    assert ready.hard.commit <= 1, "a crash may leave the older entry 2 beside it"


def test_what_follows_the_committed_entries_of_a_message_is_taken() -> None:
    member = Member(THREE, [entry(1, 1), entry(1, 2)], term=1)
    member.hear(2, Beat(1, 2, 1))
    said = member.hear(2, Append(1, 0, 0, (entry(1, 1), entry(1, 2), entry(1, 3)), 2))
    assert said.of(AppendReply) == [AppendReply(1, True, 3)]
