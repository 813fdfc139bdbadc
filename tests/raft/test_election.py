"""Elections (3.4, 3.6.1), the question before them (9.6), and leaders that nobody hears."""

from dataclasses import replace

import pytest

from nbdvde.raft.core import Core, Role
from nbdvde.raft.messages import Append, AppendReply, Beat, BeatReply, Message, Vote, VoteReply
from nbdvde.raft.settings import Settings
from tests.raft.party import SETTINGS, Member, Party, entry, members

THREE = members({1, 2, 3})


def test_who_waits_longest_in_vain_is_elected_by_a_majority() -> None:
    party = Party(members({1, 2, 3, 4, 5}))
    party.away = {4, 5}
    core = party.elect(3)
    assert (core.term, core.leader, core.elections) == (1, 3, 1)
    assert [party.cores[node].leader for node in (1, 2)] == [3, 3]
    assert party.log(1) == [(1, 1)], "it begins with an entry of its term (6.4)"


def test_no_more_than_half_are_no_majority() -> None:
    party = Party(members({1, 2, 3, 4}))
    party.away = {3, 4}
    party.silence()
    party.cores[1].campaign()
    party.settle()
    assert party.cores[1].role is Role.PRE_CANDIDATE
    assert party.cores[1].term == 0
    party.away = {4}
    party.tick(1, times=2 * SETTINGS.election)
    assert party.cores[1].is_leader


def test_a_silence_is_what_elections_begin_with() -> None:
    member = Member(THREE)
    for _ in range(2 * SETTINGS.election - 2):
        member.core.tick()
    assert not member.say()
    member.core.tick()
    assert member.say() == [Vote(1, 0, 0, pre=True)] * 2


def test_an_election_in_vain_is_followed_by_another_silence() -> None:
    member = Member(THREE)
    member.core.campaign()
    assert member.say()
    for _ in range(2 * SETTINGS.election - 2):
        member.core.tick()
    assert not member.say()
    member.core.tick()
    assert member.say() == [Vote(1, 0, 0, pre=True)] * 2


def test_how_long_is_waited_is_drawn_each_time() -> None:
    drawn: list[tuple[int, int]] = []

    def draw(low: int, high: int) -> int:
        drawn.append((low, high))
        return low

    member = Member(THREE)
    member.core = Core(1, member.store, member.store.hard, SETTINGS, draw)
    member.core.campaign()
    assert drawn == [(SETTINGS.election, 2 * SETTINGS.election - 1)] * 2


def test_who_asks_for_votes_knows_of_no_leader() -> None:
    member = Member(THREE)
    member.hear(2, Beat(1, 0, 1))
    assert member.core.leader == 2
    member.core.campaign()
    assert not member.core.leader


def test_a_vote_is_durable_before_it_is_given() -> None:
    member = Member(THREE)
    member.core.step(Message(2, 1, Vote(1, 0, 0)))
    ready = member.core.ready()
    assert ready
    assert ready.hard
    assert (ready.hard.term, ready.hard.vote) == (1, 2)
    assert not ready.now
    assert [message.body for message in ready.after] == [VoteReply(1, True)]


def test_a_candidate_asks_when_its_own_vote_is_durable() -> None:
    member = Member(THREE)
    member.core.campaign()
    member.say()
    member.core.step(Message(2, 1, VoteReply(1, True, pre=True)))
    ready = member.core.ready()
    assert ready
    assert ready.hard
    assert (ready.hard.term, ready.hard.vote) == (1, 1)
    assert not ready.now
    assert {type(message.body) for message in ready.after} == {Vote}


def test_who_is_alone_leads_when_its_own_vote_is_durable() -> None:
    member = Member(members({1}))
    member.core.campaign()
    assert not member.core.is_leader
    member.say()
    assert member.core.is_leader


def test_one_vote_in_a_term() -> None:
    member = Member(THREE)
    assert member.hear(2, Vote(1, 0, 0)) == [VoteReply(1, True)]
    assert member.hear(3, Vote(1, 0, 0)) == [VoteReply(1, False)]
    assert member.hear(2, Vote(1, 0, 0)) == [VoteReply(1, True)], "the answer may have been lost"


def test_a_vote_is_not_forgotten() -> None:
    member = Member(THREE)
    member.hear(2, Vote(5, 0, 0))
    again = Member(THREE, term=member.store.hard.term, vote=member.store.hard.vote)
    assert again.hear(3, Vote(5, 0, 0)) == [VoteReply(5, False)]


def test_a_second_vote_in_a_known_term_is_kept_as_well() -> None:
    member = Member(THREE, term=3)
    member.hear(2, Vote(3, 0, 0))
    assert member.store.hard.vote == 2


def test_a_term_is_not_forgotten() -> None:
    member = Member(THREE)
    member.hear(2, Beat(5, 0, 1))
    assert member.store.hard.term == 5


def test_a_vote_stays_given_when_one_asks_whether_one_would_win() -> None:
    member = Member(THREE, term=3, vote=2)
    member.core.campaign()
    assert member.hear(3, Vote(3, 0, 0)).of(VoteReply) == [VoteReply(3, False)]


def test_who_follows_a_leader_gives_nobody_else_a_vote_of_its_term() -> None:
    member = Member(THREE)
    member.hear(2, Beat(1, 0, 1))
    assert member.hear(3, Vote(1, 0, 0)).of(VoteReply) == [VoteReply(1, False)]
    assert member.core.leader == 2


def test_a_vote_of_an_older_term_that_becomes_durable_elects_nobody() -> None:
    member = Member(members({1}), term=1)
    member.core.step(Message(2, 1, Beat(2, 0, 1)))
    ready = member.begin()
    member.core.campaign()
    member.finish(ready)
    assert not member.core.is_leader
    member.say()
    assert member.core.is_leader


def test_who_has_voted_for_itself_votes_for_nobody_else() -> None:
    member = Member(THREE)
    member.core.campaign()
    member.hear(2, VoteReply(1, True, pre=True))
    assert member.role() is Role.CANDIDATE
    assert member.hear(3, Vote(1, 9, 1)) == [VoteReply(1, False)]


@pytest.mark.parametrize(
    ("last_index", "last_term", "granted"),
    [(3, 2, True), (4, 2, True), (1, 3, True), (2, 2, False), (9, 1, False)],
)
def test_nobody_is_elected_who_has_less(last_index: int, last_term: int, *, granted: bool) -> None:
    for pre in (False, True):
        member = Member(THREE, [entry(1, 1), entry(1, 2), entry(2, 3)], term=2)
        (answer,) = member.hear(2, Vote(3, last_index, last_term, pre))
        assert isinstance(answer, VoteReply)
        assert answer.granted == granted


def test_a_majority_against_it_ends_a_candidacy() -> None:
    member = Member(THREE)
    member.core.campaign()
    member.hear(2, VoteReply(0, False, pre=True))
    assert member.role() is Role.PRE_CANDIDATE
    member.hear(2, VoteReply(0, False, pre=True))
    assert member.role() is Role.PRE_CANDIDATE, "each counts once"
    member.hear(3, VoteReply(0, False, pre=True))
    assert member.role() is Role.FOLLOWER


def test_answers_to_other_questions_do_not_count() -> None:
    member = Member(THREE)
    member.core.campaign()
    member.hear(2, VoteReply(1, True))
    assert member.role() is Role.FOLLOWER, "a higher term"
    member.core.campaign()
    member.hear(2, VoteReply(1, True, pre=True))
    assert member.role() is Role.PRE_CANDIDATE
    member.hear(2, VoteReply(2, True, pre=True))
    assert member.role() is Role.CANDIDATE
    member.hear(2, VoteReply(2, True, pre=True))
    assert member.role() is Role.CANDIDATE


def test_the_term_never_goes_back() -> None:
    member = Member(THREE, term=5)
    assert member.hear(2, Beat(4, 0, 1)) == [BeatReply(5, 0)], "an old leader is told"
    assert member.hear(2, Vote(4, 9, 4)) == [VoteReply(5, False)]
    assert member.core.term == 5
    assert not member.core.leader


def test_a_leader_follows_who_leads_a_later_term() -> None:
    party = Party(THREE)
    party.elect(1)
    party.away = {1}
    party.elect(2)
    assert party.cores[1].is_leader, "it has not heard of it"
    party.away = set()
    party.tick(2)
    assert not party.cores[1].is_leader
    assert party.cores[1].leader == 2


def test_an_old_leader_hears_of_the_new_term() -> None:
    party = Party(THREE)
    party.elect(1)
    party.away = {1}
    party.elect(2)
    party.away = set()
    party.tick(1)
    assert not party.cores[1].is_leader


# The question before


def test_the_question_whether_an_election_would_be_won_changes_nothing() -> None:
    member = Member(THREE)
    assert member.hear(2, Vote(1, 0, 0, pre=True)) == [VoteReply(1, True, pre=True)]
    assert member.hear(3, Vote(1, 0, 0, pre=True)) == [VoteReply(1, True, pre=True)]
    assert (member.core.term, member.core.vote) == (0, 0)


def test_who_hears_a_leader_would_not_vote_and_does_not() -> None:
    member = Member(THREE, term=1)
    member.hear(2, Beat(1, 0, 1))
    assert not member.hear(3, Vote(2, 0, 0, pre=True))
    assert not member.hear(3, Vote(2, 0, 0))
    assert member.core.term == 1
    for _ in range(SETTINGS.election):
        member.core.tick()
    assert member.hear(3, Vote(2, 0, 0, pre=True)) == [VoteReply(2, True, pre=True)]


def test_who_was_cut_off_disturbs_nobody_when_it_is_back() -> None:
    party = Party(THREE)
    party.elect(1)
    party.away = {3}
    party.tick(times=5 * SETTINGS.election)
    party.away = set()
    party.tick(times=2 * SETTINGS.election)
    assert party.cores[1].is_leader
    assert {core.term for core in party.cores.values()} == {1}


def test_who_asks_learns_of_a_later_term() -> None:
    member = Member(THREE)
    member.core.campaign()
    member.hear(2, VoteReply(7, False, pre=True))
    assert (member.core.term, member.core.role) == (7, Role.FOLLOWER)


# Leaders that nobody hears


def test_a_leader_whose_connections_broke_is_followed_by_another_one_soon() -> None:
    party = Party(THREE)
    party.elect(1)
    party.away = {1}
    for node in (2, 3):
        party.cores[node].suspect(1)
    party.tick(2, 3, times=2)
    assert party.cores[2].role is Role.FOLLOWER, "it may be back at once"
    party.tick(2, 3)
    assert [core.leader for core in party.cores.values()] == [1, 2, 2]


def test_those_who_have_lost_a_leader_do_not_ask_for_votes_at_once() -> None:
    party = Party(THREE)
    party.elect(2)
    party.away = {1, 2}
    for node in (1, 3):
        party.cores[node].suspect(2)
    party.tick(3, times=4)
    assert party.cores[3].role is Role.FOLLOWER
    party.away = {2}
    party.tick(3)
    assert [core.leader for core in party.cores.values()] == [3, 2, 3]


def test_a_leader_that_one_has_lost_and_another_hears_stays() -> None:
    party = Party(THREE)
    party.elect(1)
    party.cores[2].suspect(1)
    party.tick(2, times=3)
    assert party.cores[2].role is Role.PRE_CANDIDATE
    assert party.cores[1].is_leader
    party.tick(1)
    assert {(core.term, core.leader) for core in party.cores.values()} == {(1, 1)}


@pytest.mark.parametrize(
    ("node", "settings"), [(3, SETTINGS), (2, replace(SETTINGS, lease=True))], ids=["another node", "with a lease"]
)
def test_a_broken_connection_changes_nothing(node: int, settings: Settings) -> None:
    member = Member(THREE, term=1, settings=settings)
    member.hear(2, Beat(1, 0, 1))
    member.core.suspect(node)
    for _ in range(SETTINGS.election - 1):
        member.core.tick()
    assert not member.say()
    assert not member.hear(3, Vote(2, 0, 0, pre=True))


def test_a_leader_that_hears_no_majority_leads_no_more() -> None:
    party = Party(THREE)
    party.elect(1)
    party.away = {2, 3}
    party.tick(1, times=2 * SETTINGS.election)
    assert not party.cores[1].is_leader
    assert not party.cores[1].leader


def test_a_leader_that_hears_a_majority_stays() -> None:
    party = Party(THREE)
    party.elect(1)
    party.away = {3}
    party.tick(1, times=10 * SETTINGS.election)
    assert party.cores[1].is_leader


def test_acknowledgements_are_signs_of_life_too() -> None:
    member = Member(THREE)
    member.lead()
    for _ in range(3 * SETTINGS.election):
        member.core.tick()
        member.hear(2, AppendReply(1, True, 1))
    assert member.core.is_leader


def test_learners_are_no_majority() -> None:
    party = Party(members({1, 2, 3}, {4, 5}))
    party.elect(1)
    party.away = {2, 3}
    party.tick(1, times=2 * SETTINGS.election)
    assert not party.cores[1].is_leader
    party.cores[4].campaign()
    assert not party.work(4), "and ask for no votes"


def test_who_has_holes_in_its_log_neither_votes_nor_leads_nor_acknowledges() -> None:
    member = Member(THREE)
    member.core.mute = True
    member.core.campaign()
    assert not member.say()
    assert member.hear(2, Vote(1, 0, 0, pre=True)) == [VoteReply(0, False, pre=True)]
    assert member.hear(2, Vote(1, 0, 0)) == [VoteReply(1, False)]
    assert member.hear(2, Append(1, 0, 0, (entry(1, 1),), 0)) == [AppendReply(1, True, 1, counts=False)]
    assert member.hear(2, Append(1, 5, 1, (), 0)) == [AppendReply(1, False, 5, 1, 1, counts=False)]
    assert member.hear(2, Beat(1, 9, 3)) == [BeatReply(1, 0)], "and does not say that there is no other leader"
    assert member.core.commit == 0, "what the leader remembers of it may be lost"
    assert member.store.last_index == 1, "but it takes what it gets"


def test_who_has_holes_in_its_log_gets_entries_and_counts_for_nothing() -> None:
    member = Member(THREE)
    member.lead()
    member.hear(2, AppendReply(1, True, 1))
    member.core.propose([b"data"])
    member.say()
    assert member.core.commit == 1
    member.hear(3, AppendReply(1, True, 2, counts=False))
    assert member.core.commit == 1
    member.core.propose([b"more"])
    assert [found.index for found in member.say().of(Append)[-1].entries] == [3], "it has the one before"
    assert member.hear(3, AppendReply(1, False, 2, 1, 1, counts=False)).of(Append)[0].previous == 1, "or not any more"
    assert member.hear(3, AppendReply(1, True, 3, counts=False)).of(Append) == []
    assert [append.entries for append in member.hear(3, BeatReply(1, 0)).of(Append)] == [()], "it is asked again"
    member.hear(3, AppendReply(1, True, 3))
    assert member.core.commit == 3, "what it had counts when it says so"


def test_who_has_forgotten_what_it_had_is_asked_without_anything_new() -> None:
    member = Member(THREE)
    member.lead()
    for node in (2, 3):
        member.hear(node, AppendReply(1, True, 1))
    assert not member.hear(2, BeatReply(1, 1)).of(Append), "it has everything"
    assert [append.previous for append in member.hear(3, BeatReply(1, 0)).of(Append)] == [1]
    again = member.hear(3, AppendReply(1, False, 1, 0, 0, counts=False)).of(Append)
    assert [found.index for found in again[0].entries] == [1]
