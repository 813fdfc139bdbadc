"""Reads that see everything that was written before them (6.4), and which of them need to ask nobody."""

import pytest

from nbdvde.raft.core import NotLeaderError
from nbdvde.raft.messages import AppendReply, AskRead, Beat, BeatReply, Elect, Message, ReadReply, Vote, VoteReply
from nbdvde.raft.settings import Settings
from tests.raft.party import SETTINGS, Member, Party, entry, members

THREE = members({1, 2, 3})
LEASE = Settings(heartbeat=1, election=10, lease=True)
QUIET_LEASE = Settings(heartbeat=1, election=10, lease=True, quiet=12)


def _leader(settings: Settings = SETTINGS) -> Member:
    """Of term 1, with its first entry committed."""
    member = Member(THREE, settings=settings)
    member.lead()
    member.hear(2, AppendReply(1, True, 1))
    return member


def test_a_read_waits_until_a_majority_has_answered() -> None:
    party = Party(members({1, 2, 3, 4, 5}))
    party.elect(1).read(7)
    party.settle(1, 2)
    assert not party.reads[1], "two of five"
    party.settle(1, 2, 3)
    assert party.reads[1] == [(7, 1)]


def test_reads_share_a_round_that_began_after_them() -> None:
    member = _leader()
    for key in (1, 2):
        member.core.read(key)
    assert [beat.round for beat in member.say().of(Beat)] == [1, 1]
    member.core.read(3)
    assert [beat.round for beat in member.say().of(Beat)] == [2, 2]
    member.core.step(Message(2, 1, BeatReply(1, 1)))
    assert member.begin().reads == [(1, 1), (2, 1)]


def test_answers_of_one_follower_count_once() -> None:
    party = Party(members({1, 2, 3, 4, 5}))
    core = party.elect(1)
    core.read(7)
    party.work(1)
    for _ in range(3):
        core.step(Message(2, 1, BeatReply(1, 99)))
    party.work(1)
    assert not party.reads[1]


def test_a_read_comes_after_what_was_committed_when_it_came() -> None:
    party = Party(THREE)
    core = party.elect(1)
    party.propose(1, b"a", b"b")
    core.read(7)
    party.settle()
    assert party.reads[1] == [(7, 3)]


def test_a_new_leader_first_learns_what_is_committed() -> None:
    """What its predecessor has acknowledged is committed, though it may not know yet."""
    member = Member(THREE, [entry(1, 1), entry(1, 2)], term=1)
    member.lead()
    member.core.read(7)
    assert not member.say(), "nobody is asked before"
    (beat, _) = member.hear(2, AppendReply(2, True, 3)).of(Beat)
    member.core.step(Message(2, 1, BeatReply(2, beat.round)))
    assert member.begin().reads == [(7, 3)]


def test_a_leader_that_is_replaced_answers_no_read() -> None:
    party = Party(THREE)
    party.elect(1)
    party.away = {1}
    party.elect(2)
    party.propose(2, b"news")
    party.cores[1].read(7)
    party.settle()
    assert not party.reads[1]
    party.away = set()
    party.tick()
    assert party.reads[1] == [(7, -1)], "to be asked again"


def test_reads_that_wait_for_a_first_entry_are_given_back_too() -> None:
    member = Member(THREE)
    member.lead()
    member.core.read(7)
    assert not member.core.ready()
    member.core.step(Message(3, 1, Beat(2, 0, 1)))
    assert member.begin().reads == [(7, -1)]


def test_reads_of_others_are_not_given_back_by_who_led() -> None:
    member = _leader()
    member.hear(3, AskRead(1, 7))
    member.core.step(Message(3, 1, Beat(2, 0, 1)))
    assert not member.begin().reads


def test_without_a_lease_every_read_asks() -> None:
    member = _leader()
    member.core.tick()
    (beat, _) = member.say().of(Beat)
    member.hear(2, BeatReply(1, beat.round))
    member.core.read(7)
    assert not member.begin().reads


def test_a_follower_asks_its_leader() -> None:
    party = Party(THREE)
    party.elect(1)
    party.propose(1, b"a")
    party.cores[2].read(7)
    party.settle()
    assert party.reads[2] == [(7, 2)]


def test_without_a_leader_nobody_can_be_asked() -> None:
    member = Member(THREE)
    with pytest.raises(NotLeaderError, match="wait for an election"):
        member.core.read(7)
    member.hear(2, Beat(1, 0, 1))
    with pytest.raises(NotLeaderError, match="ask node 2"):
        member.core.propose([b"a"])
    member.core.read(7)
    assert member.say() == [AskRead(1, 7)]
    member.core.step(Message(2, 1, ReadReply(1, 7, 4)))
    assert member.begin().reads == [(7, 4)]


def test_who_decides_alone_asks_nobody() -> None:
    party = Party(members({1}, {2}))
    party.elect(1).read(7)
    party.work(1)
    assert party.reads[1] == [(7, 1)]


# With a lease


def _leased() -> Member:
    member = _leader(LEASE)
    member.core.tick()
    (beat, _) = member.say().of(Beat)
    member.hear(2, BeatReply(1, beat.round))
    return member


def test_a_leased_leader_answers_at_once_for_less_than_half_of_an_election_timeout() -> None:
    member = _leased()
    for _ in range((LEASE.election - 1) // 2 - 1):
        member.core.tick()
    member.say()
    member.core.read(7)
    assert member.begin().reads == [(7, 1)]


def test_a_lease_ends() -> None:
    member = _leased()
    for _ in range((LEASE.election - 1) // 2):
        member.core.tick()
    member.say()
    member.core.read(7)
    assert not member.begin().reads


def test_a_lease_begins_when_the_question_was_asked_not_when_it_was_answered() -> None:
    member = _leader(LEASE)
    member.core.tick()
    (beat, _) = member.say().of(Beat)
    for _ in range((LEASE.election - 1) // 2):
        member.core.tick()
    member.hear(2, BeatReply(1, beat.round))
    member.core.read(7)
    assert not member.begin().reads


def test_no_lease_after_somebody_was_told_to_take_over() -> None:
    """The invitation may arrive late, and is followed though this leader is heard."""
    member = _leased()
    member.core.transfer(2)
    assert member.say().of(Elect)
    member.core.read(7)
    assert not member.begin().reads


def test_a_lease_outlives_a_follower_that_is_started_again() -> None:
    member = Member(THREE, term=1, settings=LEASE)
    assert not member.hear(3, Vote(2, 0, 0, pre=True))
    for _ in range(LEASE.election - 1):
        member.core.tick()
    assert not member.hear(3, Vote(2, 0, 0))
    member.core.tick()
    assert member.hear(3, Vote(2, 0, 0)) == [VoteReply(2, True)]


def test_only_the_start_keeps_from_voting() -> None:
    member = Member(THREE, term=1, settings=LEASE)
    for _ in range(LEASE.election):
        member.core.tick()
    member.core.campaign()
    assert member.hear(3, Vote(2, 0, 0)).of(VoteReply) == [VoteReply(2, True)]


def test_a_lease_does_not_outlast_silence() -> None:
    """The clock of a quiet leader stands still, and others may have elected another one meanwhile."""
    party = Party(THREE, QUIET_LEASE)
    party.elect(1)
    party.tick(times=30)
    assert party.cores[1].quiet
    party.away = {1}
    for node in (2, 3):
        party.cores[node].wake()
    party.elect(2)
    party.propose(2, b"news")
    party.cores[1].step(Message(9, 1, AskRead(1, 8)))
    party.cores[1].read(7)
    party.cores[1].step(Message(2, 1, BeatReply(1, 30)))
    party.cores[1].read(9)
    ready = party.cores[1].ready()
    assert ready
    assert not ready.reads
    assert {message.receiver for message in ready.now} == {2, 3}, "who does not belong gets no answer either"


def test_an_answer_from_before_silence_gives_no_lease() -> None:
    member = Member(THREE, settings=QUIET_LEASE)
    member.lead()
    member.hear(3, AppendReply(1, True, 1))
    member.hear(2, AppendReply(1, True, 1))
    for round_ in range(1, 2 * QUIET_LEASE.quiet):
        member.core.tick()
        if member.core.quiet:
            break
        for sender in (2, 3):
            member.hear(sender, BeatReply(1, round_))
    assert member.core.quiet
    member.say()
    member.core.wake()
    member.hear(2, BeatReply(1, round_))
    member.core.read(7)
    assert not member.begin().reads


def test_rounds_that_are_answered_or_need_no_answer_are_not_remembered() -> None:
    member = _leader(LEASE)
    alone = Member(members({1}, {2}), settings=LEASE)
    alone.core.campaign()
    alone.say()
    for round_ in range(1, 50):
        member.core.tick()
        alone.core.tick()
        member.hear(2, BeatReply(1, round_))
    assert member.core.office
    assert alone.core.office
    assert not member.core.office._begun
    assert not alone.core.office._begun
