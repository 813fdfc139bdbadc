"""How much is on its way, in bytes, and what does not wait for what."""

import pytest

from nbdvde.errors import RefusedError, UsageError
from nbdvde.raft.core import Core
from nbdvde.raft.messages import ENTRY_BYTES, Append, AppendReply, BeatReply, Entry, HardState, Snapshot
from nbdvde.raft.settings import Settings
from nbdvde.raft.store import MemoryStore
from tests.raft.party import Member, entry, members

DATA = bytes(100 - ENTRY_BYTES)
"""Of an entry that counts for 100 bytes."""
SMALL = Settings(message_bytes=200, window_bytes=500, apply_bytes=300, uncommitted_bytes=10_000)


def _leader(settings: Settings = SMALL) -> Member:
    """Of two members, the other one answers."""
    member = Member(members({1, 2}), settings=settings)
    member.lead()
    member.hear(2, AppendReply(1, True, 1))
    return member


def _sent(appends: list[Append]) -> list[int]:
    return [found.index for append in appends for found in append.entries]


def test_messages_and_what_is_on_its_way_are_bounded() -> None:
    member = _leader()
    member.core.propose([DATA] * 20)
    appends = member.say().of(Append)
    assert [len(append.entries) for append in appends] == [2, 2, 2], "beyond 500 bytes by no more than a message"
    assert not member.say().of(Append)
    assert _sent(member.hear(2, AppendReply(1, True, 3)).of(Append)) == [8, 9], "as much as has arrived"
    assert _sent(member.hear(2, AppendReply(1, True, 9)).of(Append)) == [10, 11, 12, 13, 14, 15]


def test_an_entry_that_is_larger_than_everything_goes_alone() -> None:
    member = _leader()
    member.core.propose([bytes(5000), b"a"])
    assert [_sent([append]) for append in member.say().of(Append)] == [[2]]
    assert [_sent([append]) for append in member.hear(2, AppendReply(1, True, 2)).of(Append)] == [[3]]


def test_who_does_not_answer_is_asked_one_question_at_a_time() -> None:
    member = Member(members({1, 2}), settings=SMALL)
    assert len(member.lead().of(Append)) == 1
    member.core.propose([DATA])
    member.core.propose([DATA])
    assert not member.say().of(Append)
    assert _sent(member.hear(2, BeatReply(1, 1)).of(Append)) == [1, 2], "it lives: what it was asked may be lost"
    assert not member.say().of(Append)


def test_signs_of_life_do_not_open_a_full_window() -> None:
    member = _leader()
    member.core.propose([DATA] * 20)
    member.say()
    assert _sent(member.hear(2, BeatReply(1, 1)).of(Append)) == []


def test_who_cannot_be_reached_is_not_asked_again_for_each_proposal() -> None:
    member = _leader()
    member.core.unreachable(2)
    member.core.propose([DATA])
    assert _sent(member.say().of(Append)) == [2]
    member.core.unreachable(2)
    member.core.propose([DATA])
    assert not member.say().of(Append)


def test_who_follows_takes_all_news_of_connections_and_logs_as_well() -> None:
    member = Member(members({1, 2}), term=1)
    member.core.unreachable(2)
    member.core.install_failed(2)
    member.core.loaded()
    assert not member.say()


def test_answers_of_who_does_not_belong_are_nothing() -> None:
    member = _leader()
    assert not member.hear(9, AppendReply(1, True, 1), BeatReply(1, 1), AppendReply(1, False, 1))


def test_after_a_loss_everything_from_there_on_is_sent_again() -> None:
    member = _leader()
    member.core.propose([DATA] * 4)
    assert _sent(member.say().of(Append)) == [2, 3, 4, 5]
    member.core.unreachable(2)
    assert not member.say().of(Append)
    assert _sent(member.hear(2, BeatReply(1, 1)).of(Append)) == [2, 3], "a question first"
    assert _sent(member.hear(2, AppendReply(1, True, 3)).of(Append)) == [4, 5]


def test_an_old_refusal_changes_nothing() -> None:
    member = _leader()
    member.core.propose([DATA] * 2)
    member.say()
    assert not member.hear(2, AppendReply(1, False, 1, 0, 0))
    member.hear(2, AppendReply(1, True, 3))
    assert not member.hear(2, AppendReply(1, False, 2, 0, 0))
    assert member.core.commit == 3


def test_too_much_that_is_not_committed_is_refused() -> None:
    member = _leader(Settings(message_bytes=100, window_bytes=100, uncommitted_bytes=1000))
    member.core.propose([bytes(2000)])
    assert member.core.log.last_index == 2, "one goes however large it is"
    with pytest.raises(RefusedError, match="too much that is not committed"):
        member.core.propose([b""])
    member.say()
    member.hear(2, AppendReply(1, True, 2))
    member.core.propose([bytes(300)])
    member.core.propose([bytes(400)])
    with pytest.raises(RefusedError, match="too much that is not committed"):
        member.core.propose([bytes(400)])
    member.say()
    member.hear(2, AppendReply(1, True, 3))
    with pytest.raises(RefusedError, match="too much that is not committed"):
        member.core.propose([bytes(700)])
    member.core.propose([bytes(400)])


def test_entries_are_handed_out_a_part_at_a_time() -> None:
    store = MemoryStore(Snapshot(0, 0, members({1, 2})))
    store.append([Entry(1, index, data=DATA) for index in range(1, 8)])
    core = Core(1, store, HardState(1, 0, 7), SMALL, lambda low, high: high)
    parts = []
    while ready := core.ready():
        parts.append([found.index for found in ready.committed])
        core.done(ready)
        assert core.ready() is None, "the next part comes when this one is applied"
        core.applied_to(ready.committed[-1].index)
    assert parts == [[1, 2, 3], [4, 5, 6], [7]]


class _Forgetful(MemoryStore):
    """Has old entries on its disk, not in memory."""

    def __init__(self, *, start: Snapshot) -> None:
        super().__init__(start)
        self.in_memory_from = 0

    def get_range(self, start: int, stop: int, max_bytes: int) -> list[Entry]:
        return [] if start < self.in_memory_from else list(super().get_range(start, stop, max_bytes))


def test_a_follower_waits_for_entries_that_are_not_in_memory_and_nobody_else_does() -> None:
    group = members({1, 2, 3})
    store = _Forgetful(start=Snapshot(0, 0, group))
    member = Member(group, [entry(1, index) for index in range(1, 10)], term=1)
    store.append(member.store.get_range(1, 10, 1 << 20))
    store.in_memory_from = 10
    member.store, member.core = store, Core(1, store, HardState(1, 0, 9), SMALL, lambda low, high: high)
    member.lead()
    assert not member.hear(2, AppendReply(2, False, 9, 4, 1)).of(Append)[0].entries, "only a question"
    assert _sent(member.hear(2, AppendReply(2, True, 4)).of(Append)) == []
    member.hear(3, AppendReply(2, True, 10))
    member.core.propose([b"a"])
    assert {_at(append) for append in member.say().of(Append)} == {(10, 11)}
    store.in_memory_from = 0
    member.core.loaded()
    assert _sent(member.say().of(Append))[:2] == [5, 6]


def _at(append: Append) -> tuple[int, int]:
    return append.previous, append.previous + len(append.entries)


@pytest.mark.parametrize(
    "settings",
    [
        Settings(heartbeat=0),
        Settings(heartbeat=10, election=10),
        Settings(quiet=5),
        Settings(message_bytes=0),
        Settings(message_bytes=1000, window_bytes=100),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: Settings) -> None:
    with pytest.raises(UsageError):
        Core(1, MemoryStore(Snapshot()), HardState(), settings, lambda low, high: high)
