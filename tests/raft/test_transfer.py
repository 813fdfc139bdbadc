"""Leadership that is handed over (3.10)."""

import pytest

from nbdvde.errors import RefusedError
from nbdvde.raft.core import NotLeaderError
from nbdvde.raft.messages import AppendReply, Elect, Message, Vote, VoteReply
from tests.raft.party import SETTINGS, Member, Party, members

THREE = members({1, 2, 3})


def test_who_has_everything_takes_over_at_once() -> None:
    party = Party(THREE)
    party.elect(1).transfer(2)
    party.settle()
    assert party.cores[2].is_leader
    assert party.cores[1].leader == party.cores[3].leader == 2
    assert party.cores[2].term == 2


def test_who_lacks_something_gets_it_first() -> None:
    party = Party(THREE)
    core = party.elect(1)
    party.away = {2}
    party.propose(1, b"a")
    party.away = set()
    core.transfer(2)
    party.work(1)
    assert Elect not in {type(message.body) for message in party.mail}
    party.tick(1)
    assert party.cores[2].is_leader
    party.propose(2, b"b")
    assert party.data(2) == [b"a", b"b"]


def test_who_has_everything_waits_until_it_is_committed() -> None:
    """Or those who proposed it would never learn what became of it."""
    five = Member(members({1, 2, 3, 4, 5}))
    five.core.campaign()
    five.say()
    for node in (2, 3):
        five.hear(node, VoteReply(1, granted=True, pre=True))
    for node in (2, 3):
        five.hear(node, VoteReply(1, granted=True))
    five.hear(2, AppendReply(1, True, 1))
    five.hear(3, AppendReply(1, True, 1))
    five.core.propose([b"a"])
    five.say()
    five.core.transfer(2)
    assert not five.hear(2, AppendReply(1, True, 2)).of(Elect)
    assert five.hear(3, AppendReply(1, True, 2)).of(Elect)


def test_the_own_disk_may_be_what_it_waits_for() -> None:
    party = Party(members({1, 2}))
    core = party.elect(1)
    core.propose([b"a"])
    ready = core.ready()
    assert ready
    party.begin(1, ready)
    party.settle(2)
    core.transfer(2)
    party.deliver(1)
    assert (core.is_leader, core.commit) == (True, 1)
    party.finish(1, ready)
    party.settle()
    assert party.cores[2].is_leader


def test_nothing_is_proposed_meanwhile() -> None:
    party = Party(THREE)
    core = party.elect(1)
    party.away = {2}
    party.propose(1, b"a")
    core.transfer(2)
    with pytest.raises(RefusedError, match="hands its leadership over"):
        core.propose([b"b"])
    party.tick(times=SETTINGS.election)
    core.propose([b"b"])
    assert core.is_leader, "it was given up"


def test_only_voters_take_over() -> None:
    party = Party(members({1, 2}, {3}))
    core = party.elect(1)
    with pytest.raises(RefusedError, match="no voter"):
        core.transfer(3)
    core.transfer(1)
    party.propose(1, b"a")
    assert core.is_leader, "to itself is nothing"
    with pytest.raises(NotLeaderError, match="ask node 1"):
        party.cores[2].transfer(1)


def test_an_invitation_of_an_older_term_is_void() -> None:
    member = Member(THREE, term=3)
    assert not member.hear(2, Elect(2))
    assert member.hear(2, Elect(3)).of(Vote)[0].forced


def test_a_voter_that_hears_the_leader_votes_all_the_same() -> None:
    party = Party(THREE)
    party.elect(1)
    party.tick()
    party.away = {1}
    party.cores[2].step(Message(1, 2, Elect(1)))
    party.settle()
    assert party.cores[2].is_leader
