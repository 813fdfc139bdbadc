"""Members that lack what the log of the leader has forgotten (5)."""

from nbdvde.raft.core import Core
from nbdvde.raft.messages import Append, AppendReply, BeatReply, HardState, Install, Message, Snapshot, Vote
from nbdvde.raft.settings import Settings
from tests.raft.party import SETTINGS, Member, Party, entry, members

THREE = members({1, 2, 3})
STATE = Snapshot(4, 1, THREE)


def _behind() -> Party:
    """Member 3 lacks what the others have forgotten."""
    party = Party(THREE)
    core = party.elect(1)
    party.away = {3}
    party.propose(1, b"a", b"b", b"c")
    party.tick(1, 2)
    party.stores[1].compact_to(STATE)
    core.compacted()
    party.restart(3)
    party.away = set()
    return party


def _leader() -> Member:
    """Of term 2, with four forgotten entries; member 2 has everything."""
    member = Member(THREE, [entry(1, index) for index in range(1, 5)], term=1)
    member.lead()
    member.hear(2, AppendReply(2, True, 5))
    member.store.compact_to(STATE)
    member.core.compacted()
    return member


def test_it_takes_over_the_state_and_then_the_rest() -> None:
    party = _behind()
    party.tick(times=2)
    assert party.wanted[3] == [STATE], "as far as the leader has applied"
    party.propose(1, b"d")
    party.tick()
    assert party.data(3) == [b"d"]
    assert party.cores[3].applied == 5


def test_nothing_else_is_sent_meanwhile() -> None:
    member = _leader()
    (install,) = member.hear(3, AppendReply(2, False, 4, 0, 0))
    assert install == Install(2, Snapshot(5, 2, THREE))
    member.core.propose([b"a"])
    member.say()
    assert not member.hear(3, BeatReply(2, 1))
    assert [append.previous for append in member.hear(3, AppendReply(2, True, 5)).of(Append)] == [5]


def test_it_is_told_again_as_long_as_it_answers() -> None:
    member = _leader()
    member.hear(3, AppendReply(2, False, 4, 0, 0))
    for _ in range(2):
        member.hear(3, BeatReply(2, 1))
        member.hear(2, BeatReply(2, 1))
        said = [body for _ in range(SETTINGS.election) for body in _ticked(member)]
        assert said.count(Install(2, Snapshot(5, 2, THREE))) == 1
    member.hear(2, BeatReply(2, 1))
    assert Install not in {type(body) for _ in range(SETTINGS.election) for body in _ticked(member)}


def _ticked(member: Member) -> list[object]:
    member.core.tick()
    return list(member.say())


def test_who_streamed_is_told_as_well() -> None:
    """It was slow, and the log has forgotten what it was to get next."""
    member = Member(THREE, settings=Settings(message_bytes=100, window_bytes=100))
    member.lead()
    for sender in (2, 3):
        member.hear(sender, AppendReply(1, True, 1))
    member.core.propose([bytes(200)] * 3)
    member.hear(2, AppendReply(1, True, 4))
    member.store.compact_to(Snapshot(4, 1, THREE))
    member.core.compacted()
    assert member.hear(3, AppendReply(1, True, 2)) == [Install(1, STATE)]
    member.core.propose([b"a"])
    assert [append.previous for append in member.say().of(Append)] == [4], "to node 2"


def test_a_new_leader_sends_what_it_had_applied_before() -> None:
    member = Member(THREE, [entry(1, index) for index in range(1, 5)], term=1)
    member.store.compact_to(Snapshot(2, 1, THREE))
    member.core = Core(1, member.store, HardState(1, 0, 3), SETTINGS, lambda low, high: high, applied=3)
    member.lead()
    assert member.hear(3, AppendReply(2, False, 4, 0, 0)) == [Install(2, Snapshot(3, 1, THREE))]


def test_nobody_is_told_who_does_not_answer() -> None:
    member = _leader()
    for _ in range(SETTINGS.election):
        member.hear(2, BeatReply(2, 1))
        member.core.tick()
    member.say()
    member.core.propose([b"a"])
    assert not member.say().of(Install)


def test_who_could_not_take_it_over_is_asked_what_it_has() -> None:
    member = _leader()
    member.hear(3, AppendReply(2, False, 4, 0, 0))
    member.core.install_failed(3)
    assert member.hear(3, BeatReply(2, 1)).of(Install), "still nothing"


def test_a_state_that_is_older_than_the_log_is_not_wanted() -> None:
    member = Member(THREE, [entry(1, index) for index in range(1, 7)], term=1)
    assert member.hear(2, Install(1, STATE)) == [AppendReply(1, True, 4)]
    assert member.core.commit == 4, "it is known to be committed"
    member.hear(2, Append(1, 6, 1, (), 6))
    assert member.hear(2, Install(1, STATE)) == [AppendReply(1, True, 6)]
    assert member.store.last_index == 6


def test_a_state_replaces_a_log_that_contradicts_it() -> None:
    member = Member(THREE, [entry(1, index) for index in range(1, 7)], term=2)
    member.core.step(Message(2, 1, Install(3, Snapshot(4, 2, THREE))))
    ready = member.begin()
    assert ready.install == (2, Snapshot(4, 2, THREE))
    member.finish(ready)
    member.store.reset(Snapshot(4, 2, THREE))
    member.core.installed(Snapshot(4, 2, THREE))
    assert member.say() == [AppendReply(3, True, 4)]
    assert (member.core.commit, member.core.applied, member.core.log.last_index) == (4, 4, 4)
    assert member.hear(2, Append(3, 4, 2, (entry(3, 5),), 5)) == [AppendReply(3, True, 5)]


def test_a_state_that_comes_late_does_not_take_anything_away() -> None:
    """The log came as far while the state was on its way, and what is behind it was acknowledged."""
    member = Member(THREE, term=1)
    member.core.step(Message(2, 1, Install(1, STATE)))
    member.finish(member.begin())
    member.hear(2, Append(1, 0, 0, tuple(entry(1, index) for index in range(1, 7)), 2))
    assert not member.core.wants(STATE)
    member.core.overtaken(STATE)
    assert (member.core.commit, member.core.applied, member.core.log.last_index) == (4, 4, 6)
    member.core.step(Message(2, 1, Append(1, 6, 1, (), 6)))
    assert [found.index for found in member.begin().committed] == [5, 6]


def test_members_of_a_state_count() -> None:
    member = Member(members({1, 2}), term=1)
    state = Snapshot(9, 1, members({1, 2, 3}, {4}))
    member.core.step(Message(2, 1, Install(1, state)))
    member.finish(member.begin())
    member.store.reset(state)
    member.core.installed(state)
    assert member.core.members == state.members


def test_who_has_taken_over_a_state_tells_its_leader_if_it_knows_one() -> None:
    member = Member(THREE, term=1)
    member.core.step(Message(2, 1, Install(1, STATE)))
    member.finish(member.begin())
    member.core.step(Message(3, 1, Vote(2, 9, 2, forced=True)))
    member.say()
    member.store.reset(STATE)
    member.core.installed(STATE)
    assert not member.say()
