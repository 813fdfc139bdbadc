"""Groups in which nothing happens, and their first sign of life."""

import contextlib
from collections.abc import Callable

import pytest

from nbdvde.raft.core import Core, NotLeaderError
from nbdvde.raft.messages import Beat, Message, Vote
from nbdvde.raft.settings import Settings
from tests.raft.party import Member, Party, members

THREE = members({1, 2, 3})
QUIET = Settings(heartbeat=3, election=10, quiet=12)


def _asleep() -> Party:
    party = Party(THREE, QUIET)
    party.elect(1)
    party.propose(1, b"a")
    party.tick(times=2 * QUIET.quiet)
    return party


def test_a_group_in_which_nothing_happens_falls_silent_and_keeps_its_leader() -> None:
    party = _asleep()
    assert all(core.quiet for core in party.cores.values())
    assert [party.data(node) for node in (1, 2, 3)] == [[b"a"]] * 3
    for core in party.cores.values():
        for _ in range(100):
            core.tick()
    assert not any(party.work(node) for node in party.cores)


def test_a_proposal_wakes_it() -> None:
    party = _asleep()
    party.propose(1, b"b")
    assert not any(core.quiet for core in party.cores.values())
    party.tick(times=QUIET.heartbeat)
    assert party.data(3) == [b"a", b"b"]


def test_a_read_wakes_it() -> None:
    party = _asleep()
    party.cores[2].read(7)
    party.settle()
    assert party.reads[2] == [(7, 2)]
    assert not party.cores[1].quiet


def test_who_is_woken_gives_signs_of_life_for_a_while() -> None:
    party = _asleep()
    party.cores[1].wake()
    party.tick(times=QUIET.quiet - 2)
    assert not any(core.quiet for core in party.cores.values())
    party.tick(times=5)
    assert all(core.quiet for core in party.cores.values())


def test_a_leader_that_went_silently_is_replaced_when_somebody_asks() -> None:
    party = _asleep()
    party.away = {1}
    for node in (2, 3):
        party.cores[node].wake()
    party.elect(2)


@pytest.mark.parametrize("ask", [lambda core: core.read(7), lambda core: core.propose([b"b"])])
def test_who_is_asked_for_something_expects_the_leader_to_be_there(ask: Callable[[Core], object]) -> None:
    follower = _asleep().cores[2]
    with contextlib.suppress(NotLeaderError):
        ask(follower)
    assert not follower.quiet, "it asks for votes if nobody is there"


def test_no_silence_while_somebody_lacks_something() -> None:
    party = Party(THREE, QUIET)
    party.elect(1)
    party.away = {3}
    party.propose(1, b"a")
    party.tick(times=5 * QUIET.quiet)
    assert not party.cores[1].quiet
    party.away = set()
    party.tick(times=3 * QUIET.quiet)
    assert all(core.quiet for core in party.cores.values())


def test_who_does_not_belong_to_it_wakes_nobody() -> None:
    party = _asleep()
    for core in party.cores.values():
        core.step(Message(9, core.node, Vote(2, 0, 0, pre=True)))
    assert all(core.quiet for core in party.cores.values())
    for core in party.cores.values():
        core.step(Message(3, core.node, Vote(2, 0, 0, pre=True)))
    assert not any(core.quiet for core in party.cores.values())


def test_an_old_sign_of_life_silences_nobody() -> None:
    member = Member(THREE, settings=QUIET)
    member.hear(2, Beat(1, 0, 5))
    member.hear(2, Beat(1, 0, 4, quiet=True))
    assert not member.core.quiet
    member.hear(2, Beat(1, 0, 5, quiet=True))
    assert member.core.quiet


def test_a_leader_that_cannot_reach_somebody_wakes() -> None:
    party = _asleep()
    party.cores[1].unreachable(3)
    assert not party.cores[1].quiet


def test_who_is_alone_sleeps_when_all_is_stored() -> None:
    member = Member(members({1}), settings=QUIET)
    member.core.campaign()
    member.say()
    member.core.propose([b"a"])
    ready = member.begin()
    for _ in range(3 * QUIET.quiet):
        member.core.tick()
    assert not member.core.quiet
    member.finish(ready)
    for _ in range(QUIET.heartbeat):
        member.core.tick()
    assert member.core.quiet


def test_signs_of_life_come_as_often_as_is_chosen() -> None:
    member = Member(THREE, settings=QUIET)
    member.lead()
    beats = []
    for _ in range(9):
        member.core.tick()
        beats.append(len(member.say().of(Beat)))
    assert beats == [0, 0, 2] * 3


def test_without_that_choice_nobody_falls_silent() -> None:
    party = Party(THREE)
    party.elect(1)
    party.tick(times=100)
    assert not party.cores[1].quiet


def test_who_missed_that_it_falls_silent_gets_signs_of_life_again() -> None:
    party = _asleep()
    party.cores[3].wake()
    party.tick(times=3 * QUIET.election)
    assert party.cores[1].is_leader
    assert party.cores[1].term == 1
    party.tick(times=2 * QUIET.quiet)
    assert party.cores[3].quiet
